"""The checker for rules of columns and tangents: what ``curvext.testing.check_columns`` is.

The reference is the node alone, called for one column of one sample after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import registry
from .axes import BATCH, Axis, State, labels, masked
from .errors import CurvatureError
from .factor import part, pass_columns, reduced_columns
from .graph import Graph, Operation, edge_of
from .persample import Dense, PerSample
from .samples import _candidates, probe
from .sweep import Settings
from .tangents import pass_tangents

COLUMNS = 2
Waves = ("samples", "factor", "shared", "tangent")


def check_columns(
    function: Callable[..., Any], *inputs: Tensor, rtol: float = 1e-9, atol: float = 1e-10, seed: int = 0
) -> set[tuple[Any, str]]:
    """Compare the rules that the factor wave uses in the graph of ``function(*inputs)`` with the nodes themselves.

    For every operation, wherever its output may hold samples: an input is where its ``"samples"`` rule says (and is not
    called shared needlessly), columns pass as by one product each (``"factor"``), and part as by masking all samples
    but one (``"shared"``); what they part into reads the same in every form. Tangents (``"tangent"``) are passed by the
    transpose of what passes columns.

    Args:
        function: returns a tensor or a sequence of tensors.
        inputs: leaves; those that require a gradient are followed. Use float64 and few entries.

    Returns:
        The rules that were checked, as (operation, wave).

    Raises:
        AssertionError: naming the operation, the wave and the input.
    """
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    roots = [edge_of(y)[0] for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    targets = {edge_of(x) for x in inputs if isinstance(x, Tensor) and x.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    checked: set[tuple[Any, str]] = set()
    for op in Graph(roots).operations(targets, Settings()):
        with torch.no_grad():
            checked |= _Check(op, generator, rtol, atol).every()
    return checked


class _Check:
    """All checks of one recorded operation."""

    def __init__(self, op: Operation, generator: torch.Generator, rtol: float, atol: float):
        self.op, self.generator, self.rtol, self.atol = op, generator, rtol, atol
        self.rules = {wave: registry.find(op, wave) for wave in Waves}
        self.checked: set[tuple[Any, str]] = set()

    def every(self) -> set[tuple[Any, str]]:
        first = self.op.outputs[0]
        if not (first.dtype.is_floating_point or first.dtype.is_complex) or 0 in first.shape:
            return set()
        if any(meta is not None and 0 in meta.shape for meta in self.op.inputs):
            return set()
        try:
            products(self.op, self._drawn()[:1])
        except NotImplementedError:  # a kernel of another device
            return set()
        self.columns()
        self.tangents()
        for n, axis in places(first.shape):
            self.at(n, axis)
        self.batch()
        return self.checked

    def at(self, n: int, axis: Axis) -> None:
        """With the samples at one place of the outputs."""
        op = self.op
        like = [len(m.shape) == len(op.outputs[0].shape) for m in op.outputs]
        fits = [same and m.shape[axis.dim] % (n * axis.inner) == 0 for same, m in zip(like, op.outputs, strict=True)]
        op.n_samples, op.axes_out = n, tuple([axis if fit else None for fit in fits])
        rule = self.rules["samples"]
        try:
            states = probe(op, op.axes_out, n) if rule is None else rule.function(op, op.axes_out, n)
        except CurvatureError:
            return self._passed("samples")
        op.axes_seen = op.axes_in = tuple([*states, *[None] * (len(op.edges) - len(states))])
        self.parts()

    def batch(self) -> None:
        """With the whole batch as one sample, and one input after the other a weight."""
        op = self.op
        op.n_samples, op.axes_out = 1, (BATCH,) * len(op.outputs)
        for i, need in enumerate(op.needs):
            if need:
                op.axes_seen = op.axes_in = tuple([None if j == i else BATCH for j in range(len(op.edges))])
                self.parts()

    def columns(self) -> None:
        """The factor rule passes columns as the node does, whichever inputs are wanted."""
        op, s = self.op, self._drawn()
        want = products(op, s)
        for wanted in {
            op.needs,
            *[tuple(need and i == j for j, need in enumerate(op.needs)) for i in range(len(op.needs))],
        }:
            got = pass_columns(op, [s, *[None] * (len(op.outputs) - 1)], wanted)
            for i, here in enumerate(wanted):
                if here:
                    self._near(None if (c := got[i]) is None else reduced_columns(op, c, i), want[i], "factor", i)
        self._passed("factor")

    def tangents(self) -> None:
        """⟨s, J t⟩ = ⟨Jᵀ s, t⟩ for a direction t of every input."""
        op, s = self.op, self._drawn()
        pulled = products(op, s) if self.rules["tangent"] else []
        for group in op.groups if pulled else ():
            rows = [row for i in group if (row := pulled[i]) is not None]
            if rows:
                t = torch.randn(*rows[0].shape, dtype=rows[0].dtype, generator=self.generator)
                pushed = pass_tangents(op, [t if i in group else None for i in range(len(op.edges))])[0]
                got = None if pushed is None else _inner(s, pushed)
                want = torch.stack([_inner(row, t) for row in rows]).sum(0)
                low = min(s, t, key=lambda x: x.dtype.itemsize).real.dtype
                self._near(None if got is None else got.to(low), want.to(low), "tangent", group[0])
        self._passed("tangent")

    def parts(self) -> None:
        """Inputs hold the samples where the rule says; columns part as by masking."""
        op, n, s = self.op, self.op.n_samples, self._drawn()
        axis = op.axes_out[0]
        if axis is None:
            return
        alone = products(op, masked(s, axis, n).flatten(0, 1))
        want = [None if w is None else w.unflatten(0, (COLUMNS, n)) for w in alone]
        for i, state in enumerate(op.axes_seen):
            if op.needs[i]:
                self._placed(i, state, want[i])
        self._passed("samples")
        wanted = [need and state is None for need, state in zip(op.needs, op.axes_seen, strict=True)]
        if any(wanted):
            found = part(op, [s, *[None] * (len(op.outputs) - 1)], wanted)
            for i, here in enumerate(wanted):
                if here:
                    self._near(found[i].dense() if i in found else None, want[i], "shared", i)
                    if i in found and not (isinstance(p := found[i], Dense) and p.wave is None):
                        check_readings(found[i], f"{op.kind}, input {i}: ")
            self._passed("shared")

    def _placed(self, i: int, state: State, want: Tensor | None) -> None:
        n, where = self.op.n_samples, f"{self.op.kind}, input {i}, samples at {self.op.axes_out}"
        if want is None or self.rules["samples"] is None:
            return
        if state is not None:
            assert owned(want, state, n), f"{where}: entries of one sample are not where the rule says, {state}"
        elif n > 1 and bool((want != 0).flatten(0, 1).any(0).all()):  # not where entries go unused
            better = [axis for axis in _candidates(want.shape[2:], n) if owned(want, axis, n)]
            assert not better, f"{where}: the rule calls the input shared, though it holds the samples at {better}"

    def _drawn(self) -> Tensor:
        meta = self.op.outputs[0]
        return torch.randn(COLUMNS, *meta.shape, dtype=meta.dtype, generator=self.generator)

    def _near(self, got: Tensor | None, want: Tensor | None, wave: str, i: int) -> None:
        where = f"{self.op.kind}, {wave} rule, input {i}, samples at {self.op.axes_out}: rule != node."
        if got is None or want is None:
            assert all(t is None or not t.any() for t in (got, want)), where
            return
        least = min(1000 * torch.finfo(want.dtype).eps, 1e-2)
        torch.testing.assert_close(
            *(got, want), rtol=max(self.rtol, least), atol=max(self.atol, least), equal_nan=True,
            msg=lambda text: f"{where} {text}",
        )  # fmt: skip

    def _passed(self, wave: str) -> None:
        if self.rules[wave] is not None:
            kind = self.op.kind if (self.op.kind, wave) in registry.RULES else self.op.name
            self.checked.add((kind, wave))


def places(shape: Sequence[int]) -> Iterator[tuple[int, Axis]]:
    """Numbers of samples that a tensor may hold, and where."""
    for dim, size in enumerate(shape):
        for n in range(1 if dim == 0 else 2, size + 1):
            if size % n == 0:
                yield from ((n, Axis(dim, inner)) for inner in {1, size // n})


def products(op: Operation, s: Tensor) -> list[Tensor | None]:
    """Jᵀ s for every input, one row after the other, in its shape.

    Each row is a copy: the backward of as_strided_scatter reads a view's gradient from the wrong place (PyTorch 2.13).
    """
    rest = [None] * (len(op.outputs) - 1)
    rows = [op.vjp(row.clone(), *rest) for row in s]
    found: list[Tensor | None] = []
    for i, need in enumerate(op.needs):
        present = [op.reduced(row[i], i) for row in rows if row[i] is not None] if need else []  # type: ignore[arg-type]
        found.append(torch.stack(present) if present else None)
    return found


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner products of the rows."""
    return (a.conj() * b).real.reshape(len(a), -1).sum(1)


def owned(parted: Tensor, axis: Axis, n: int) -> bool:
    """Whether of ``[V, N, *shape]`` every entry is zero but for one sample: that which ``axis`` gives it."""
    shape = parted.shape[2:]
    every = torch.arange(n).view(-1, *[1] * len(shape))
    others = torch.where(labels(shape, axis, n) == every, parted.new_zeros(()), parted)
    return bool(others.abs().max() <= 1e-9 * parted.abs().max())


def check_readings(value: PerSample, context: str = "") -> None:
    """Compare everything that can be read of a :class:`~curvext.persample.PerSample` with the tensor itself."""
    full = value.dense()
    assert value.size == full.shape[:2], f"{context}size"
    plain, last = Dense(full), full.shape[1] - 1
    written = value.dense(value.empty(full.shape))
    vectors = torch.randn(2, *full.shape[2:], dtype=full.dtype)
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        name: (getattr(value, name)(), getattr(plain, name)())
        for name in ("squares", "sample_squares", "sums", "norms", "gram", "block")
    }
    pairs["dense(out)"] = written, full
    pairs["select"] = value.select([last, 0]).dense(), full[:, [last, 0]]
    pairs["plus"] = value.plus(value).dense(), full + full
    pairs["inner"] = value.inner(vectors), torch.einsum("u...,vn...->uvn", vectors, full)
    pairs["combined"] = value.combined(pairs["inner"][1]), torch.einsum("uvn,vn...->u...", pairs["inner"][1], full)
    places = torch.randint(full[0, 0].numel(), (3,))
    pairs["entries"] = value.entries(places), full.unsqueeze(2).flatten(2)[..., places].permute(2, 0, 1)
    for name, (got, want) in pairs.items():
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"{context}{name} differs. {text}")  # type: ignore[misc]


__all__ = ["check_columns", "check_readings"]
