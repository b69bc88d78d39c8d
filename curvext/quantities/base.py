"""What a quantity is: where its wave starts, how it passes an operation, what is kept at a target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..graph import Operation


class _Saved(ABC):
    """What both kinds of quantity share: a name, and how two contributions to one tensor are joined."""

    savefield: ClassVar[str]

    def add(self, a: Any, b: Any) -> Any:
        """The wave of a tensor that is used twice, and of one block's several backward passes."""
        return a + b

    def zero(self, target: Tensor) -> Any:
        """The result for a tensor in which the loss is linear, so that no wave reaches it."""
        return torch.zeros_like(target, requires_grad=False)


@dataclass(frozen=True)
class Quantity(_Saved):
    """Something ``extend`` computes and leaves on parameters as the attribute ``savefield``.

    Every quantity starts at the loss with a zero wave (``None``). A concrete quantity says how the wave passes an
    operation (:meth:`step`) and how two waves that meet are joined (:meth:`add`); it knows no operation by name.
    """

    @abstractmethod
    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Sequence[Any]) -> Sequence[Any]:
        """The waves at the operation's inputs, given gradients and waves at its outputs."""

    def needs_gradient(self, op: Operation) -> bool:
        """Whether :meth:`step` uses the gradient here; operations where it does not need no hook."""
        return True


@dataclass(frozen=True)
class WholeGraph(_Saved):
    """A quantity computed from the whole graph by products, before the backward pass frees it."""

    @abstractmethod
    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One result for each target (``None``: zero); ``scale`` is the ``gradient`` argument of ``backward``."""
