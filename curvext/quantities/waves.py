"""The waves that quantities read besides the diagonal one: every sample's gradient, and the factor wave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from ..axes import BATCH, Axis, masked
from ..errors import CurvatureError
from ..factor import Diagonal, Whole, across, part, pass_columns, reduced_columns
from ..graph import Edge, Operation
from ..hessians import ALL, DiagonalHessian, LossHessian, convex
from ..output import Output, convex_in_output
from ..persample import Dense, PerSample
from ..sources import filled, is_layer, loss_hessian, may_start, starts
from ..tangents import Above
from ..wave import Wave

Waves = Sequence[Any]


@dataclass(eq=False)
class Part:
    """Columns ``start`` to ``stop`` of every factor; ``most``: how many the widest has, of those met so far."""

    start: int = 0
    stop: int | None = None
    most: int = 0

    @property
    def place(self) -> slice:
        return slice(self.start, self.stop)

    def count(self, columns: int) -> None:
        self.most = max(self.most, columns)


@dataclass(frozen=True, eq=False)
class Source:
    """Where columns come from: those of one source belong together in all tensors that they reach.

    ``at`` is the same for all parts of a factor: the node; ``None``: the marks. ``token`` stands for it in results,
    which are not to hold the graph. They count ``sign`` times.
    """

    at: Any
    sign: int = 1
    token: object = field(default_factory=object)


class _Unowned:
    """The gradient of a term of the loss that no sample owns, such as a penalty on weights."""


@dataclass(frozen=True)
class SampleGradients(Wave):
    """Every sample's gradient of a tensor that the samples share: a :class:`PerSample` of one column."""

    by_sample = True

    def needs_gradient(self, op: Operation) -> bool:
        return any(parting or masking for parting, masking in self._places(op))

    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Waves) -> Waves:
        found: list[Any] = [None] * len(op.edges)
        if any(isinstance(w, _Unowned) for w in wave) or (op.summed and any(v is not None and v.numel() for v in g)):
            return [_Unowned() if parting else None for parting, _ in self._places(op)]
        columns = [
            None if v is None or axis is None else v.detach().unsqueeze(0)
            for v, axis in zip(g, op.axes_out, strict=True)
        ]
        if any(isinstance(w, PerSample) for w in wave):
            for i, value in across(op, [c if w is None else w for c, w in zip(columns, wave, strict=True)]).items():
                found[i] = value
            return found
        if not any(c is not None for c in columns):
            return found
        parting, masking = zip(*self._places(op), strict=True)
        if any(parting):
            for i, value in part(op, columns, parting).items():
                found[i] = value
        for i, c in enumerate(pass_columns(op, columns, masking)):
            if c is not None:
                found[i] = Dense(masked(reduced_columns(op, c, i), op.axes_seen[i], op.n_samples))
        return found

    @staticmethod
    def _places(op: Operation) -> list[tuple[bool, bool]]:
        """By input: whether samples part here, and whether it holds them but is read, or counts as shared, below."""
        places = zip(filled(op), op.axes_seen, op.axes_in, op.ends, strict=True)
        return [(need and s is None, need and s is not None and (end or a is None)) for need, s, a, end in places]

    def add(self, a: Any, b: Any) -> Any:
        if isinstance(a, _Unowned) or isinstance(b, _Unowned):
            return _Unowned()
        return a.plus(b)

    def reduced(self, op: Operation, wave: Any, i: int) -> Any:
        return wave


def owned(value: Any, what: str) -> PerSample | None:
    """Every sample's gradient, if there is no other part of it.

    Raises:
        CurvatureError: if a term of the loss reached the parameter past the samples.
    """
    if isinstance(value, _Unowned):
        raise CurvatureError(
            f"{what}: a term of the loss reaches this parameter without passing a sample (a penalty on the weights? a "
            "loss over rows whose number is not a multiple of that of the samples?), so the gradient is not a sum over "
            "samples. Leave the term to the optimizer (weight_decay), or call backward() on it outside the block"
        )
    return value  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Factor(Wave):
    """The factor wave; see :mod:`curvext.factor`. Values are dicts by source, as columns of two sources are not added;
    an empty one is zero, below the loss.

    Args:
        kind: ``"fewest"`` columns or ``"columns"``, one for every output, both exact; ``"draws"``: random ones;
            ``"none"``, but B itself.
        draws: how many, if random.
        within: these columns only; what no sample owns is not divided, and comes with the first of them.
    """

    kind: str = "fewest"
    draws: int = 1
    within: Part | None = None
    by_sample = True

    def needs_gradient(self, op: Operation) -> bool:
        return may_start(op)

    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Waves) -> Waves:
        reached = any(values is not None for values in wave)
        found: list[Any] = [{} if need and (reached or is_layer(op)) else None for need in op.needs]
        for source, columns in self._sources(op, g, reached).items():
            for i, value in columns.items():
                found[i] = {**(found[i] or {}), **({} if value is None else {source: value})}
        for source in {source: None for values in wave if values for source in values}:
            values = [None if values is None else values.get(source) for values in wave]
            written = Source(op.node, source.sign) if any(isinstance(value, Diagonal) for value in values) else source
            for i, value in across(op, values).items():
                found[i] = {**(found[i] or {}), source if isinstance(value, Diagonal) else written: value}
        return found

    def _sources(self, op: Operation, g: Sequence[Tensor | None], reached: bool) -> dict[Source, dict[int, Any]]:
        """What starts here, by input."""
        return {Source(op.node): self._start(op, g)} if starts(op, reached) else {}

    def _start(self, op: Operation, g: Sequence[Tensor | None]) -> dict[int, Any]:
        return {i: self._columns(hessian.part(convex), op, i) for i, hessian in loss_hessian(op, g).items()}

    def seeds(self, output: Output) -> dict[Edge, Any]:
        source, found = Source(None), {(op.node, 0): {} for op in output.marks}  # type: Source, dict[Edge, Any]
        for op in output.marks:
            if op.node in output.hessians:
                hessian = output.hessians[op.node].part(convex_in_output)
                value = self._columns(hessian, op, None)
                found[op.node, 0] = {} if value is None else {source: value}
        return found

    def _columns(self, hessian: LossHessian, op: Operation, i: int | None) -> Any:
        """Of B at input ``i``, or at the output of a mark."""
        edge, axis = ((op.node, 0), op.axes_out[0]) if i is None else (op.edges[i], op.axes_in[i])
        if self.kind == "none":
            return Above({edge: (hessian, op, axis)})
        if axis is not None and not hessian.whole:
            columns = self._of(hessian, op, axis, op.n_samples)
            if self.within is None:
                return columns
            self.within.count(self.draws if self.kind == "draws" else prod(columns.shape[1:]) // op.n_samples)
            return columns if len(columns) else None
        if self.within is not None and self.within.start > 0:
            return None
        if isinstance(hessian, DiagonalHessian):
            return Diagonal(hessian.b)
        return Whole(replace(self, within=None)._of(hessian, op, BATCH, 1))

    def _of(self, hessian: LossHessian, op: Operation, axis: Axis, n: int) -> Tensor:
        part = ALL if self.within is None else self.within.place
        if self.kind == "draws":
            few = len(range(self.draws)[part])
            columns = hessian.draws(few, axis, n, op.settings)
            return columns if few == self.draws else columns * (few / self.draws) ** 0.5
        return hessian.fewest(axis, n, part) if self.kind == "fewest" else hessian.columns(axis, n, part)

    def add(self, a: Any, b: Any) -> Any:
        joined = dict(a)
        for source, value in b.items():
            joined[source] = value if source not in joined else _plus(joined[source], value)
        return joined

    def reduced(self, op: Operation, wave: Any, i: int) -> Any:
        return wave


def _plus(a: Any, b: Any) -> Any:
    return a.plus(b) if isinstance(a, PerSample) else a + b
