"""What a quantity is: the waves it asks for, and what it makes of them at a target.

A *wave* says how something passes an operation on the way from the loss to the leaves; a *quantity* reads what arrives.
Quantities that ask for equal waves share one. A quantity whose wave is its result is both: a :class:`Carried`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..graph import Operation
from ..memory import taken
from ..wave import Wave


def positive(quantity: Any, **counts: int | None) -> None:
    """Refuse arguments that are no numbers of things."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"{type(quantity).__name__}: {name} must be an integer >= 1, got {count!r}")


class Saved(ABC):
    """Something that is left on a tensor as the attribute ``savefield``."""

    savefield: ClassVar[str]
    total: ClassVar[bool] = False  # whether it reads ``target.gradient``
    recycles: ClassVar[bool] = False  # whether it writes into ``target.memory``
    retains: ClassVar[bool] = False  # whether the graph is needed after the backward pass too
    per_sample: ClassVar[bool] = False  # whether it depends on how the loss is divided into samples

    def settled(self, held: Any) -> Any:
        """What was read, for as long as the block lasts; if ``total``, before another pass writes to the gradients."""
        return held

    def add(self, a: Any, b: Any) -> Any:
        """What several backward passes of one block give together: that of the sum of their losses."""
        return a + b

    def undivided(self) -> str:
        """Why all columns of the factor wave must be read at once; empty if what parts of them give can be joined."""
        return "it has no join(a, b)" if type(self).join is Saved.join else ""

    def join(self, a: Any, b: Any) -> Any:
        """What two sets of columns of the factor wave give together; for quantities that can be had in parts."""
        raise NotImplementedError(f"{type(self).__name__} reads all columns at once")

    def complete(self, value: Any) -> Any:
        """What was read, once all columns are there."""
        return value

    def zero(self, target: Target) -> Any:
        """For a tensor in which the loss is linear, so that no wave reaches it."""
        return torch.zeros_like(target.tensor, requires_grad=False)

    def result(self, held: Any, target: Target) -> Any:
        """The attribute, from what was read and added up."""
        return held

    def attach(self, model: Any, held: Mapping[str, Any]) -> None:  # noqa: B027
        """Leave on modules what belongs to several of their parameters; ``held`` is by parameter name."""

    def only(self, *where: Any) -> Selected:
        """This quantity for some tensors only: globs over names (``"fc*"``), modules, their classes, predicates."""
        return Selected(self, where)


@dataclass(frozen=True)
class Selected:
    """A quantity with the places it is for."""

    quantity: Any
    where: tuple[Any, ...]


class Quantity(Saved):
    """Something ``extend`` computes and leaves on parameters as the attribute ``savefield``; a frozen dataclass.

    :attr:`waves` are asked for; :meth:`read` makes of what arrives at a target something that can be added up over
    backward passes (:meth:`add`), and :meth:`result` makes the attribute of that.
    """

    @property
    def waves(self) -> tuple[Wave, ...]:
        """The waves to carry."""
        raise NotImplementedError(f"{type(self).__name__} must say which waves it reads")

    @abstractmethod
    def read(self, target: Target, *arrived: Any) -> Any:
        """From the complete waves at a target (``None``: zero), one for each of :attr:`waves`."""


@dataclass
class Target:
    """A tensor that results are left on: itself, its names, and, if a wave asked, where its samples are.

    ``gradient`` is that of this backward pass while a quantity with ``total`` reads, if the tensor is a leaf.
    """

    tensor: Tensor
    names: list[str]
    n: int | None = None
    axis: Any = None
    gradient: Tensor | None = None
    earlier: list[Any] | None = None

    def memory(self, *shape: int) -> Tensor | None:
        """What an earlier block left here for the quantity that reads, to be written again, if nobody else holds it."""
        return taken(self.earlier or [], shape, self.tensor)


@dataclass(frozen=True)
class Carried(Wave, Quantity):
    """A quantity that is the wave itself, in the parameter's shape."""

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (self,)

    def add(self, a: Any, b: Any) -> Any:
        return a + b

    def read(self, target: Target, *arrived: Any) -> Any:
        return arrived[0]


@dataclass(frozen=True)
class WholeGraph(Saved):
    """A quantity computed from the whole graph by products, before the backward pass frees it."""

    @abstractmethod
    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """One result for each target (``None``: zero); ``scale`` is the ``gradient`` argument of ``backward``."""

    def rides(self, operations: Sequence[Operation] | None, targets: Sequence[Tensor]) -> bool:
        """Whether it is read from waves after all, in a graph of these operations (``None``: samples meet in it)."""
        return False
