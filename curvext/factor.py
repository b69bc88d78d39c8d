"""The factor wave: columns S with Σᵥ Sᵥ Sᵥᵀ the loss's Hessian at the model's output, carried down by S_x = Jᵀ S_y.

Three things happen to columns on their way. In a tensor that holds the samples they are ``[V, *shape]``, every entry
belonging to its own sample. Where such a tensor was computed with one that the samples share (a weight), the columns
of every sample part: they become a :class:`~curvext.persample.PerSample`, ``[V, N, *shape]``, and stay so down to the
parameter. Columns that no sample owns (of a penalty on the weights) are :class:`Whole`, ``[K, *shape]``, throughout.

The rules: ``"factor"`` gives Jᵀ S, by default ``torch.vmap`` of the node; ``"shared"`` parts the columns, by default by
masking all samples but one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import registry
from .axes import BATCH, Axis, apart, masked
from .errors import CurvatureError
from .graph import Operation
from .persample import Dense, PerSample
from .rules.default import UNBATCHED, quiet_vmap
from .tangents import Above

Columns = Sequence[Tensor | None]


@dataclass(frozen=True)
class Whole:
    """Columns ``[K, *shape]`` that belong to no sample."""

    columns: Tensor

    def __add__(self, other: Whole) -> Whole:
        return Whole(self.columns + other.columns)


@dataclass(frozen=True)
class Diagonal:
    """All columns of a diagonal matrix diag(h), which belong to no sample."""

    h: Tensor

    def __add__(self, other: Diagonal) -> Diagonal:
        return Diagonal(self.h + other.h)


WRITTEN = 1024


def pass_columns(op: Operation, s: Columns, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Jᵀ S for every wanted input: ``[V, *shape]``, broadcast dimensions not summed yet.

    Args:
        s: columns at every output, ``None`` where zero.
        wanted: by input.
    """
    if not any(wanted):
        return [None] * len(op.edges)
    rule = registry.find(op, "factor")
    if rule is not None and (rule.outputs == "all" or not any(c is not None for c in s[1:])):
        found = rule.function(op, s if rule.outputs == "all" else s[0], wanted)
        if found is not None:
            return [row if want else None for row, want in zip(found, wanted, strict=True)]
    given = [k for k, c in enumerate(s) if c is not None]
    present: list[bool] = []

    def products(*columns: Tensor) -> list[Tensor]:
        full: list[Tensor | None] = [None] * len(s)
        for k, c in zip(given, columns, strict=True):
            full[k] = c
        rows = op.vjp(*full)
        present[:] = [want and row is not None for row, want in zip(rows, wanted, strict=True)]
        return [row for row, want in zip(rows, wanted, strict=True) if want and row is not None]

    rows = iter(_mapped(op, products, [c for c in s if c is not None]))
    return [next(rows) if here else None for here in present]


def _mapped(op: Operation, products: Any, columns: list[Tensor]) -> list[Tensor]:
    """One product for every column, together; one by one where PyTorch cannot, or it is one."""
    if len(columns[0]) > 1 and op.kind not in UNBATCHED and not op.is_python:
        try:
            with quiet_vmap():
                return list(torch.vmap(products)(*columns))
        except (RuntimeError, NotImplementedError, ValueError):
            pass
    rows = [products(*column) for column in zip(*columns, strict=True)]
    return [torch.stack(row) for row in zip(*rows, strict=True)]


def reduced_columns(op: Operation, columns: Tensor, i: int) -> Tensor:
    """Columns as they belong to input ``i``: broadcast dimensions summed, its dtype."""
    meta = op.inputs[i]
    if columns.layout is not torch.strided:
        columns = columns.to_dense()
    if list(columns.shape[1:]) != list(meta.shape):
        padded = [1] * (columns.dim() - 1 - len(meta.shape)) + list(meta.shape)
        columns = columns.sum_to_size([len(columns), *padded]).reshape(len(columns), *meta.shape)
    if columns.dtype == meta.dtype:
        return columns
    return (columns if meta.dtype.is_complex or not columns.is_complex() else columns.real).to(meta.dtype)


def _diagonal(op: Operation, values: Sequence[Diagonal | None]) -> dict[int, Any]:
    """Copies leave it diagonal; else its columns are written out, if they are few."""
    rule = registry.find(op, "diagonal")
    if rule is not None and rule.layout == "copies":
        rows = op.vjp(*[None if v is None else v.h for v in values])
        return {i: Diagonal(op.reduced(h, i)) for i, h in enumerate(rows) if h is not None and op.needs[i]}
    roots = torch.cat([v.h.flatten() for v in values if v is not None]).sqrt()
    if len(roots) > WRITTEN:
        raise CurvatureError(
            f"a term of the loss that no sample owns has a Hessian with {len(roots)} columns here; leave it to "
            "the optimizer (weight_decay), or write it directly in the parameters"
        )
    columns = iter(torch.diag(roots).split([v.h.numel() for v in values if v is not None], 1))
    return across(op, [None if v is None else Whole(next(columns).reshape(-1, *v.h.shape)) for v in values])


def across(op: Operation, values: Sequence[Any]) -> dict[int, Any]:
    """What an operation's inputs get, by input, from columns of one source at its outputs."""
    if any(isinstance(value, PerSample) for value in values):
        places = zip(values, op.axes_out, strict=True)
        return _shared(op, [at_target(value, axis, op.n_samples) for value, axis in places])
    present = next(value for value in values if value is not None)
    if isinstance(present, Above):
        return {i: present for i, need in enumerate(op.needs) if need}
    if isinstance(present, Diagonal):
        return _diagonal(op, values)
    wanted = [need and axis is not None for need, axis in zip(op.needs, op.axes_seen, strict=True)]
    if isinstance(present, Whole):
        passed = pass_columns(op, [None if v is None else v.columns for v in values], op.needs)
        return {i: Whole(reduced_columns(op, c, i)) for i, c in enumerate(passed) if c is not None}
    found: dict[int, Any] = {}
    for i, columns in enumerate(pass_columns(op, values, wanted)):
        if columns is not None:
            columns = reduced_columns(op, columns, i)
            # others may see the samples elsewhere in this tensor, so that it counts as shared
            found[i] = columns if op.axes_in[i] is not None else Dense(masked(columns, op.axes_seen[i], op.n_samples))
    parting = [need and not want for need, want in zip(op.needs, wanted, strict=True)]
    if any(parting):
        found.update(part(op, values, parting))
    return found


def part(op: Operation, s: Columns, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """What inputs that the samples share get from columns ``[V, *shape]`` of every sample's entries."""
    rule = registry.find(op, "shared")
    found: dict[int, PerSample] = {}
    if rule is not None and rule.outputs == "all":
        found = dict(rule.function(op, s, wanted))
    elif rule is not None and not any(c is not None for c in s[1:]) and s[0] is not None:
        found = dict(rule.function(op, s[0], wanted) or {})
    rest = [want and i not in found for i, want in enumerate(wanted)]
    return {**_parted(op, s, rest), **found} if any(rest) else found


def _parted(op: Operation, s: Columns, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """The default: where an input was broadcast, its unsummed product tells the samples apart; else by masking."""
    k = next(k for k, c in enumerate(s) if c is not None)
    axis, n = op.axes_out[k], op.n_samples
    found: dict[int, PerSample] = {}
    rest = list(wanted)
    if len(s) == 1 and registry.laid_out(op, "aligned"):  # a product of the output's shape was not summed yet
        for i, raw in enumerate(pass_columns(op, s, wanted)):
            if raw is not None and raw.shape[1:] == s[k].shape[1:]:  # type: ignore[union-attr]
                found[i], rest[i] = _summed(op, raw, axis, i, n), False
    if any(rest):
        few = [_masked(op, s, rest, samples) for samples in _fewer(op, s)]
        found.update({i: Dense(torch.cat([p[i] for p in few], 1)) for i in few[0]})
    return found


def _fewer(op: Operation, s: Columns) -> Iterator[slice]:
    """Samples that are masked together: as many as the memory budget allows."""
    size = sum(c.numel() * c.element_size() for c in s if c is not None)
    budget = op.settings.max_memory
    step = op.n_samples if budget is None else max(1, budget // max(1, 2 * size))
    return (slice(start, start + step) for start in range(0, op.n_samples, step))


def _masked(op: Operation, s: Columns, wanted: Sequence[bool], samples: slice) -> dict[int, Tensor]:
    every = [None if c is None else masked(c, op.axes_out[j], op.n_samples, samples) for j, c in enumerate(s)]
    size = next(c.shape[:2] for c in every if c is not None)
    passed = pass_columns(op, [None if c is None else _flat(c) for c in every], wanted)
    return {i: reduced_columns(op, c, i).unflatten(0, size) for i, c in enumerate(passed) if c is not None}


def _flat(columns: Tensor) -> Tensor:
    return columns.flatten(0, 1)


def mixes(op: Operation) -> bool:
    """Whether entries of a tensor that holds the samples are put together with weights that the samples share."""
    meets = any([need and axis is None for need, axis in zip(op.needs, op.axes_seen, strict=True)])
    return meets and not registry.laid_out(op, "aligned")


def _summed(op: Operation, raw: Tensor, axis: Axis, i: int, n: int) -> Dense:
    """Products of the output's shape, summed over what was broadcast, but not over samples."""
    meta = op.inputs[i]
    return Dense(apart(raw if raw.dtype == meta.dtype else raw.to(meta.dtype), axis, n, meta.shape))


def _shared(op: Operation, values: Sequence[PerSample | None]) -> dict[int, PerSample]:
    """Between shared tensors: the same operation for every column of every sample."""
    if len(values) == 1 and len(op.edges) == 1:
        (value,) = values
        assert value is not None

        def apply(columns: Tensor) -> Tensor:
            (found,) = pass_columns(op, [columns], (True,))
            assert found is not None
            return reduced_columns(op, found, 0)

        return {0: value.through(op, apply)}
    size = next(value.size for value in values if value is not None)
    flat = [None if value is None else _flat(value.dense()) for value in values]
    passed = pass_columns(op, flat, op.needs)
    return {i: Dense(reduced_columns(op, c, i).unflatten(0, size)) for i, c in enumerate(passed) if c is not None}


def at_target(value: Any, axis: Any, n: int | None) -> Any:
    """What arrived at a target as it is read: columns of a tensor that holds the samples are masked."""
    if isinstance(value, Tensor):
        return Dense(masked(value, BATCH if axis is None else axis, n or 1))
    return value
