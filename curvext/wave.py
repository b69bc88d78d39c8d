"""What passes from the loss to the leaves, operation by operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .graph import Edge, Operation


@dataclass(frozen=True)
class Wave(ABC):
    """Something that passes from the loss to the leaves, operation by operation; it starts as ``None``: zero.

    Equal waves are carried once. A concrete wave knows no operation by name.
    """

    by_sample: ClassVar[bool] = False  # whether operations must know where their samples are

    @abstractmethod
    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Sequence[Any]) -> Sequence[Any]:
        """The waves at the operation's inputs, given gradients and waves at its outputs."""

    def seeds(self, output: Any) -> Mapping[Edge, Any]:
        """Where it starts at tensors marked by :func:`curvext.output`; ``output`` has the loss's Hessian in them."""
        return {}

    def check(self, operations: Sequence[Operation]) -> None:  # noqa: B027
        """Before the backward pass: raise a CurvatureError if what arrives would not be right; roots come first."""

    def needs_gradient(self, op: Operation) -> bool:
        """Whether :meth:`step` uses the gradient here; operations where it does not need no hook."""
        return True

    def add(self, a: Any, b: Any) -> Any:
        """The wave of a tensor that is used twice."""
        return a + b

    def reduced(self, op: Operation, wave: Any, i: int) -> Any:
        """What :meth:`step` gave as it belongs to input ``i``: in its shape and dtype."""
        return op.reduced(wave, i)
