"""Where the samples are: which dimension of every tensor of a graph counts them.

A loss is a sum over N samples. Below it, a tensor either holds all samples along one of its dimensions (an
:class:`~curvext.axes.Axis`), or is shared by them (``None``): a parameter, and whatever is computed from parameters
alone. The axis is followed from the loss to the leaves by the rules of the wave ``"samples"``; an operation without one
is asked itself (:func:`probe`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from . import registry
from .axes import BATCH, Axis, State, labels
from .errors import CurvatureError
from .graph import Edge, Operation


class Samples:
    """The axis of every tensor that matters, for one loss.

    If the loss sums up N·T rows, T consecutive ones belong to a sample, unless the rows are next seen as ``[T, N]``.

    Args:
        operations: of the graph, roots first.
        n: the number of samples; ``None``: the size of the leading dimension of the tensor that the loss sums up.

    Attributes:
        n: the number of samples; ``None`` if the loss sums up nothing.
        axes: for every edge below the place where samples are summed: its axis, or ``None`` if it is shared.
        doubt: the leading dimensions, if ``n`` was not given and the loss sums up tensors that differ in them.
    """

    def __init__(self, operations: Sequence[Operation], targets: Collection[Edge], n: int | None = None):
        self.operations, self.targets, self.given, self.n = operations, targets, n, n
        self.terms: set[Edge] = set()  # what the loss sums up but no sample enters, such as a penalty on weights
        self.axes: dict[Edge, State] = {}
        self.at: Operation | None = None  # where the samples are being followed
        self.interleaved = False  # whether rows n, n + N, ... of the loss belong to sample n
        self.single = False  # whether there is one sample: sizes of 1 need not come from a sum
        self.doubt: set[int] = set()

    def follow(self) -> None:
        """Find the axes, and tell every operation.

        Raises:
            CurvatureError: if an operation refuses, as samples meet in it; :attr:`at` is the operation.
        """
        while not self._follow():
            pass
        self.at = None
        for op in self.operations:
            op.n_samples, op.ends = self.n or 1, tuple([edge in self.targets for edge in op.edges])
            op.axes_out = tuple([self.axes.get((op.node, k)) for k in range(len(op.outputs))])
            op.axes_in = tuple([self.axes.get(edge) for edge in op.edges])
            op.axes_seen = tuple(self.seen.get(op.node, op.axes_in))
            op.summed = not any([(op.node, k) in self.axes for k in range(len(op.outputs))])

    def _follow(self) -> bool:
        """One pass from the loss to the leaves; False if it must be repeated with what it found out."""
        self.axes = {}
        self.seen: dict[Node, Sequence[State]] = {}
        self.origin: dict[Edge, Edge] = {}
        self.claims: dict[Edge, set[tuple[Edge, bool]]] = {}  # by leaf: who uses it, and whether as rows of samples
        self.flat: set[Edge] = set()  # where a sample's rows are still rows of the loss
        for op in self.operations:
            above = [edge for k in range(len(op.outputs)) if (edge := (op.node, k)) in self.axes]
            if self.given != 1 and not above:
                if self._begin(op):
                    return False
                continue
            states = self._across(op, above)
            if states is None:
                return False
            self.seen[op.node] = states
            for edge, state, needed in zip(op.edges, states, op.needs, strict=True):
                if needed:
                    self._meet(edge, state, self.origin.get(above[0]) if above else None)
        return not self._penalties() and not self._single()

    def _across(self, op: Operation, above: Sequence[Edge]) -> Sequence[State] | None:
        """The axes of an operation's inputs; ``None``: the rows of the loss must be understood the other way round."""
        self.at = op
        if any(self.axes[edge] is None for edge in above):
            return [None] * len(op.edges)
        if self.given == 1:
            weights = [_is_weight(edge) for edge in op.edges]
            alone = all(weight for weight, need in zip(weights, op.needs, strict=True) if need)
            shared = not alone or registry.find(op, "shared") is not None  # a linear map meets samples, if frozen ones
            return [None if weight and shared else BATCH for weight in weights]
        assert self.n is not None
        out = [self.axes.get((op.node, k)) for k in range(len(op.outputs))]
        rule = registry.find(op, "samples")
        states = probe(op, out, self.n) if rule is None else rule.function(op, out, self.n)
        return states if self.flat.isdisjoint(above) else self._unflatten(op, states)

    def _unflatten(self, op: Operation, states: Sequence[State]) -> Sequence[State] | None:
        """As :meth:`_across`, where a sample's rows are rows of the loss."""
        if not self._shown(op, states):
            if self.interleaved:
                raise CurvatureError(
                    "the loss sums up rows of which several belong to a sample, and here it cannot be told which of "
                    f"the {self.n} samples a row belongs to. Without samples= every row counts as a sample"
                )
            self.interleaved = True
            return None
        for edge, state, meta in zip(op.edges, states, op.inputs, strict=True):
            if state is not None and meta is not None and meta.shape[state.dim] != self.n:
                self.flat.add(edge)
        return states

    def _shown(self, op: Operation, states: Sequence[State]) -> bool:
        """Whether an operation that moves the entries of one input leaves the samples in a dimension of that input,

        or in one of their number, if interleaved rows would be in one.
        """
        rule = registry.find(op, "samples")
        view = rule is not None and rule.layout == "reshaped"
        if len(op.edges) != 1 or op.inputs[0] is None or (rule is not None and not view):
            return True
        (state,), shape = states, op.inputs[0].shape
        if state is None or self.interleaved or not view or shape[state.dim] == self.n:
            return state is not None or prod(shape) < max(prod(meta.shape) for meta in op.outputs)
        assert rule is not None
        (other,) = rule.function(op, [Axis(self.axes[op.node, 0].dim)], self.n)  # type: ignore[union-attr]
        return other is None or shape[other.dim] != self.n

    def _begin(self, op: Operation) -> bool:
        """The samples are summed by this operation or below it; True if their number is not what was thought."""
        for i, edge in enumerate(op.edges):
            if not op.needs[i]:
                continue
            shape = op.inputs[i].shape
            if edge in self.terms:
                self._meet(edge, None, edge)
            elif self._has_rows(edge, shape):
                before = self.n
                if self._fits(shape[0]):
                    self._meet(edge, self._rows(edge, shape[0]), edge)
                elif self.n != before:
                    return True
                else:
                    self._meet(edge, None, edge)
        return False

    def _has_rows(self, edge: Edge, shape: Sequence[int]) -> bool:
        """Whether a tensor may have rows of samples; a single number is a sum of them, unless there is one sample."""
        if prod(shape) != 1:
            return prod(shape) > 1
        return len(shape) > 1 or (len(shape) == 1 and (self.single or not edge[0].next_functions))

    def _fits(self, rows: int) -> bool:
        """Whether there are so many rows of samples; if N was not given, it is a number that divides all of them."""
        if self.n is None:
            self.n = rows
        if self.given is None and rows != self.n and rows > 1:
            if self.n > 1 and 0 in (rows % self.n, self.n % rows):
                self.doubt |= {rows, self.n}
            if self.n == 1 or self.n % rows == 0:
                self.n = rows
                return False
        return rows % self.n == 0

    def _rows(self, edge: Edge, rows: int) -> Axis:
        assert self.n is not None
        if rows != self.n:
            self.flat.add(edge)
        return Axis(0, 1 if self.interleaved else rows // self.n)

    def _meet(self, edge: Edge, state: State, origin: Edge | None) -> None:
        """Two users of a tensor who see its samples in different places: it counts as shared, which is always right."""
        if origin is not None:
            self.origin.setdefault(edge, origin)
            if not edge[0].next_functions:
                self.claims.setdefault(edge, set()).add((origin, state is not None))
        if edge in self.axes and self.axes[edge] != state:
            state = None
        self.axes[edge] = state

    def _penalties(self) -> bool:
        """Whether what was taken for samples are entries of a parameter: that term is a function of it alone."""
        if self.n == 1:  # every broadcast parameter has a row for the one sample
            return False
        found: set[Edge] = set()
        for (leaf, _), claims in self.claims.items():
            rows, shared = ({origin for origin, held in claims if held is kind} for kind in (True, False))
            if isinstance(getattr(leaf, "variable", None), nn.Parameter) or shared - rows:
                found |= rows
        found -= self.terms
        self.terms |= found
        self.n = self.given if found else self.n
        self.doubt = set() if found else self.doubt
        return bool(found)

    def _single(self) -> bool:
        """Whether it turned out that there is one sample."""
        found, self.single = self.n == 1 and not self.single, self.n == 1
        return found


def _is_weight(edge: Edge) -> bool:
    """Whether a tensor is a leaf, or a view of one."""
    node: Node | None = edge[0]
    while node is not None and node.next_functions:
        rule = registry.RULES.get((node.name(), "diagonal"))
        node = node.next_functions[0][0] if rule is not None and rule.layout == "copies" else None
    return node is not None


PROBED = 1e-2  # how far from itself a label may come out at most, relatively


def probe(op: Operation, out: Sequence[State], n: int) -> list[State]:
    """The axes of the inputs by asking the node: Jᵀ(r ∘ label) / Jᵀr is the label where one sample alone arrives."""
    generator = torch.Generator().manual_seed(0)
    plain: list[Tensor | None] = []
    labelled: list[Tensor | None] = []
    for axis, meta in zip(out, op.outputs, strict=True):
        if axis is None:
            plain.append(None)
            labelled.append(None)
            continue
        r = torch.rand(meta.shape, generator=generator).add_(0.5).to(meta.device, meta.dtype)
        plain.append(r)
        labelled.append(r * (1 + labels(meta.shape, axis, n, meta.device)).to(meta.dtype))
    try:
        below, above = op.vjp(*plain), op.vjp(*labelled)
    except RuntimeError:  # some backwards accept no random gradient, such as that of complex eigenvectors
        return [None] * len(op.edges)
    return [_read(op, i, below[i], above[i], n) if need else None for i, need in enumerate(op.needs)]


def _read(op: Operation, i: int, plain: Tensor | None, labelled: Tensor | None, n: int) -> State:
    if plain is None or labelled is None:
        return None
    plain, labelled = op.reduced(plain, i), op.reduced(labelled, i)
    if plain.is_complex():
        plain, labelled = plain.abs(), labelled.abs()
    seen = plain != 0  # however small: gradients may be large there
    ratio = torch.where(seen, labelled / torch.where(seen, plain, 1), 0)
    near = min(torch.finfo(ratio.dtype).eps ** 0.5, PROBED)
    for axis in _candidates(plain.shape, n):
        expected = 1 + labels(plain.shape, axis, n, plain.device)
        if bool(((ratio - expected).abs() <= near * expected)[seen.expand_as(ratio)].all()):
            return axis
    return None


def _candidates(shape: Sequence[int], n: int) -> Iterator[Axis]:
    """Of an empty tensor, its empty dimension; of one that holds one sample, all entries of a dimension."""
    if 0 in shape:
        yield Axis(list(shape).index(0))
        return
    for dim, size in enumerate(shape):
        for inner in range(size // n, 0, -1):
            if size % (n * inner) == 0:
                yield Axis(dim, inner)
