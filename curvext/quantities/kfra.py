"""KFRA: the Gauss-Newton recursion with one matrix for all samples, averaged after every operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import registry
from ..axes import Axis, back, front
from ..errors import CurvatureError
from ..factor import across, part, pass_columns, reduced_columns
from ..graph import Operation
from ..hessians import LossHessian
from ..persample import Dense, Outer, PerSample, gram
from ..wave import Wave
from .base import Target
from .kronecker import Kept, sums, wide
from .waves import Factor

ALIKE = {  # y is the same linear function of every sample's x, whatever x is
    *("MmBackward0", "AddmmBackward0", "LinearBackward0", "ConvolutionBackward0", "AddBackward0"),
    *("AvgPool2DBackward0", "AvgPool3DBackward0", "AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0"),
    *("ConstantPadNdBackward0", "MeanBackward1", "SumBackward1"),
}


@dataclass(frozen=True)
class Mean:
    """Σ_n of the samples' matrices, ``[D, D]`` for the D entries that each sample has of a tensor."""

    m: Tensor


@dataclass(frozen=True)
class Placed:
    """At the weight of a linear map: M, and where each of its rows has gone: labels are numbers from 1 times scales."""

    m: Tensor
    labels: PerSample
    scales: PerSample

    def gram(self, labels: Outer, scales: Outer) -> Tensor:
        """Σ_t of the diagonal blocks of M, ``[G, O, O]``."""
        s, scale = labels.s[0, 0], scales.s[0, 0]
        if s.shape[2] == len(self.m):  # one group at one position: all entries in order
            by = scale.flatten().to(self.m.dtype)
            return (by.outer(by) * self.m).unsqueeze(0)
        index = torch.where(scale == 0, 0, s / scale).round().long()  # 0: nothing, where a map was padded
        scale = scale.to(self.m.dtype)
        blocks = pad(self.m, (1, 0, 1, 0))[index.unsqueeze(-1), index.unsqueeze(-2)]
        return (blocks * scale.unsqueeze(-1) * scale.unsqueeze(-2)).sum(1)


@dataclass(frozen=True)
class Square:
    """At any other tensor that the samples share: its block ``[P, P]``."""

    m: Tensor


@dataclass(frozen=True)
class Averaged(Factor):
    """M = Σ_n B_n at the source, M_x = 1/N Σ_n J_nᵀ M J_n at every operation below."""

    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Sequence[Any]) -> Sequence[Any]:
        given = [(source, value) for values in wave if values for source, value in values.items()]
        found: list[Any] = list(super().step(op, g, [values and {} for values in wave]))
        if len(given) > 1 or (given and any(found)):
            raise _branches()
        for source, value in given:
            for i, below in self._below(op, value).items():
                found[i] = {source: below}
        return found

    def _of(self, hessian: LossHessian, op: Operation, axis: Axis, n: int) -> Any:
        s = wide(front(hessian.fewest(axis, n), axis, n, 1).flatten(2).flatten(0, 1))
        return Mean(gram(s.unsqueeze(0))[0])

    def _below(self, op: Operation, value: Any) -> dict[int, Any]:
        if isinstance(value, Placed):
            labels, scales = across(op, [value.labels]), across(op, [value.scales])
            return {i: Placed(value.m, labels[i], scales[i]) for i in labels}
        if isinstance(value, Square):
            rows = value.m.view(len(value.m), 1, *op.outputs[0].shape)
            return {i: Square(_twice(lambda c: across(op, [Dense(c)]), i, rows)) for i in across(op, [Dense(rows)])}
        if not isinstance(value, Mean) or (len(op.outputs) > 1 and op.name not in SEVERAL):
            raise CurvatureError("KFRA: supports losses of the samples alone, and operations with one output; use KFLR")
        data = [i for i, need in enumerate(op.needs) if need and op.axes_seen[i] is not None]
        shared = [need and axis is None for need, axis in zip(op.needs, op.axes_seen, strict=True)]
        if len(data) > 1 or any(op.axes_in[i] is None for i in data):
            raise _branches()
        found: dict[int, Any] = {i: Mean(_averaged(op, i, value.m)) for i in data}
        if any(shared):
            found.update(_at_weights(op, value.m, shared))
        return found

    def add(self, a: Any, b: Any) -> Any:
        if a and b:
            raise _branches()
        return a or b


SEVERAL = {"MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0", "NativeDropoutBackward0"}


def _branches() -> CurvatureError:
    return CurvatureError("KFRA is defined for chains, and here branches meet (a residual, a re-used layer); use KFLR")


def _alike(op: Operation) -> bool:
    return op.name in ALIKE or registry.laid_out(op, "reshaped", "moved")


def _columns(op: Operation, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``rows [R, N, D]``, one vector for each sample, as columns at the operation's output."""
    shape, axis, n = op.outputs[0].shape, op.axes_out[0], op.n_samples
    split = front(torch.empty(shape, device="meta"), axis, n).shape[1:]
    return back(rows.reshape(len(rows), n, *split), axis, shape, n, 1).to(dtype or op.outputs[0].dtype)


def _dealt(op: Operation, rows: Tensor) -> Tensor:
    """``rows [R, D]`` dealt to the samples, as columns: one column takes N of them."""
    n, (r, d) = op.n_samples, rows.shape
    padded = torch.cat([rows, rows.new_zeros(-r % n, d)]) if r % n else rows
    return _columns(op, padded.reshape(-1, n, d))


def _passed(op: Operation, i: int, columns: Tensor) -> Tensor:
    """J_nᵀ of every sample's part: ``[R, N, D_x]``."""
    others = [None] * (len(op.outputs) - 1)
    found = pass_columns(op, [columns, *others], [j == i for j in range(len(op.edges))])[i]
    assert found is not None
    return wide(front(reduced_columns(op, found, i), op.axes_in[i], op.n_samples, 1).flatten(2))


def _averaged(op: Operation, i: int, m: Tensor) -> Tensor:
    """1/N Σ_n J_nᵀ M J_n."""
    n = op.n_samples
    if _alike(op):
        once = _passed(op, i, _dealt(op, m)).flatten(0, 1)[: len(m)].mT
        return _passed(op, i, _dealt(op, once)).flatten(0, 1)[: len(once)]
    if registry.laid_out(op, "aligned") and op.inputs[i].shape == op.outputs[0].shape:
        slopes = _passed(op, i, m.new_ones(1, *op.outputs[0].shape, dtype=op.outputs[0].dtype))[0]
        return gram(slopes.unsqueeze(0), 1 / n)[0].mul_(m)
    once = _passed(op, i, _columns(op, m.unsqueeze(1).expand(-1, n, -1)))
    return _passed(op, i, _columns(op, once.transpose(0, 2))).mean(1)


def _at_weights(op: Operation, m: Tensor, wanted: Sequence[bool]) -> dict[int, Placed | Square]:
    if not _alike(op):
        raise CurvatureError("KFRA: is not defined for the parameters of this operation; use KFLR, or leave them out")
    ones = torch.ones(1, op.n_samples, len(m), dtype=torch.float64, device=m.device)
    numbers = ones.cumsum(2)
    labels, scales = (part(op, [_columns(op, rows, rows.dtype)], wanted) for rows in (numbers, ones))
    found: dict[int, Placed | Square] = {}
    for i, placed in labels.items():
        if isinstance(placed, Outer):
            found[i] = Placed(m, placed, scales[i])
        else:
            found[i] = Square(_twice(lambda c: part(op, [_dealt(op, c)], wanted), i, m))
    return found


def _twice(pull: Callable[[Tensor], dict[int, PerSample]], i: int, m: Tensor) -> Tensor:
    """Jᵀ M J, pulling the rows of M and then those of what came of it back to input ``i``."""
    size, shape = len(m), m.shape[1:]
    once = pull(m)[i].dense().flatten(0, 1)[:size].reshape(size, -1).mT
    return wide(pull(once.reshape(-1, *shape))[i].dense().flatten(0, 1)[: len(once)].reshape(len(once), -1))


@dataclass(frozen=True)
class KFRA(Kept):
    """Kronecker factors by a recursion that averages over the samples, for chains of operations: ``p.kfra``.

        M = Σ_n B_n at the model's output,   M_x = 1/N Σ_n J_nᵀ M J_n from operation to operation

    and the factors of a weight are Σ_t of M's diagonal blocks, and 1/(N·T) Σ x xᵀ. The form is that of
    :class:`KFAC`. M has as many rows as a sample has entries, so that this is for small layers.

    Raises:
        CurvatureError: where branches meet, or a parameter is in an operation that is no linear map.

    Source: Botev, Ritter & Barber, Practical Gauss-Newton optimisation for deep learning, 2017.
    """

    dense_up_to: int = 1024
    savefield = "kfra"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (Averaged(),)

    def undivided(self) -> str:
        return "it carries one matrix, which is as large for a few of them as for all"

    def read(self, target: Target, *waves: Any) -> Any:
        for value in (waves[0] or {}).values():
            if isinstance(value, Square):
                return value.m if len(value.m) <= self.dense_up_to else value.m.diagonal()
            if isinstance(value, Placed) and isinstance(value.labels, Outer) and isinstance(value.scales, Outer):
                return sums(value.labels, "expand", value.gram(value.labels, value.scales))
            raise CurvatureError("KFRA: is defined for parameters that are, as they are, weights or biases; use KFLR")
        return None
