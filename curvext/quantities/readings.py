"""What is read of the waves that arrived at a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..factor import Diagonal, Whole, at_target
from ..persample import Dense, Outer, PerSample
from .base import Quantity, Target
from .waves import Source


@dataclass(frozen=True)
class Arrived:
    """What a target got from the factor wave, by kind."""

    samples: list[PerSample]
    whole: list[Whole]
    diagonal: list[Diagonal]

    def owned(self, what: str) -> PerSample | None:
        """The columns of the samples, if there are no others: those of several sources one after the other."""
        return joined(self.parts(what))

    def parts(self, what: str) -> list[PerSample]:
        """The same source by source.

        Raises:
            CurvatureError: if a term of the loss that no sample owns has curvature here.
        """
        if self.whole or self.diagonal:
            raise CurvatureError(
                f"{what}: a term of the loss that no sample owns (a penalty on the weights, or mixed samples) "
                "has curvature here. DiagGGNExact, DiagGGNMC and GGNBlock include such terms; otherwise leave "
                "penalties to the optimizer (weight_decay), or pass samples=1"
            )
        return self.samples


def arrived(value: Any, target: Target) -> Arrived:
    """Sorts what arrived at a target."""
    values = [at_target(v, target.axis, target.n) for v in (value or {}).values()]
    return Arrived(*([v for v in values if isinstance(v, kind)] for kind in (PerSample, Whole, Diagonal)))  # type: ignore[arg-type]


def squared(value: Any) -> Tensor:
    """The diagonal of Σᵥ Sᵥ Sᵥᵀ, in the tensor's shape."""
    if isinstance(value, PerSample):
        return value.squares()
    if isinstance(value, Diagonal):
        return value.h
    return (value.columns if isinstance(value, Whole) else value).square().sum(0)  # type: ignore[no-any-return]


def joined(parts: Sequence[PerSample]) -> PerSample | None:
    """The columns of several sources, one after the other."""
    if len(parts) > 1:
        return Dense(torch.cat([p.dense() for p in parts]))
    return parts[0] if parts else None


def formed(columns: PerSample, target: Target, leading: Sequence[int]) -> Tensor:
    """All of ``columns`` as ``[*leading, *P]``, in the memory of an earlier result if that can be."""
    if isinstance(columns, Dense):
        return columns.values.view(*leading, *target.tensor.shape)
    shape = (*leading, *target.tensor.shape)
    out = target.memory(*shape)
    if out is None:
        out = columns.empty(shape)
    columns.dense(out.view(*columns.size, *target.tensor.shape))
    return out


def squared_by_sample(columns: PerSample, target: Target) -> Tensor:
    """The diagonal of every sample's Σᵥ Sᵥ Sᵥᵀ, ``[N, *P]``."""
    if isinstance(columns, Outer) and columns.positions == 1:
        return formed(columns.squared(), target, columns.size[1:])
    return columns.sample_squares()


class BySample(Quantity):
    """A quantity of every sample, ``[*leading, N, *P]``; several backward passes are joined along N.

    Attributes:
        leading: the sizes before N where nothing arrives.
        subsampling: the samples to keep, by index; ``None``: all.
    """

    per_sample = True
    recycles = True
    leading: ClassVar[tuple[int, ...]] = ()
    subsampling: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.subsampling is not None:
            object.__setattr__(self, "subsampling", tuple([int(n) for n in self.subsampling]))

    def kept(self, columns: PerSample) -> PerSample:
        """Those of the samples to keep."""
        if self.subsampling is None:
            return columns
        n = columns.size[1]
        if not all([-n <= k < n for k in self.subsampling]):
            raise CurvatureError(f"{type(self).__name__}: subsampling={self.subsampling}, but there are {n} samples")
        return columns.select(self.subsampling)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], len(self.leading))

    def zero(self, target: Target) -> Tensor:
        n = target.n or 0 if self.subsampling is None else len(self.subsampling)
        return target.tensor.new_zeros(*self.leading, n, *target.tensor.shape)


class ColumnsBySample(BySample):
    """The columns themselves, ``[C, N, *P]``, those of one source after those of another.

    Of several backward passes, one with fewer columns (of shorter sequences) has zeros for the others.
    """

    leading = (0,)

    def read(self, target: Target, *waves: Any) -> Any:
        found: dict[Any, list[Tensor]] = {}
        for source, value in (waves[0] or {}).items():
            columns = arrived({source: value}, target).owned(type(self).__name__)
            assert columns is not None
            kept = self.kept(columns)
            place = source.at if isinstance(source, Source) else source
            found.setdefault(place, []).append(formed(kept, target, kept.size))
        return found or None

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        more = len(a) - len(b)
        return super().add(_padded(a, -more), _padded(b, more))

    def join(self, a: Any, b: Any) -> Any:
        return {place: [*a.get(place, ()), *b.get(place, ())] for place in {**a, **b}}

    def complete(self, value: Any) -> Tensor:
        parts = [part for of_source in value.values() for part in of_source]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(columns: Tensor, by: int) -> Tensor:
    return torch.cat([columns, columns.new_zeros(by, *columns.shape[1:])]) if by > 0 else columns
