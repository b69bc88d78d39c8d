"""Reading an autograd graph: operations, their inputs, and which of them lead to the targets.

An *operation* is one autograd node. Its outputs are numbered; its differentiable inputs are the node's
``next_functions``: *edges* ``(node, output number)`` of the operations that produced them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

Edge = tuple[Node, int]
HIDING: set[str] = set()  # names of Python functions that reach parameters beside the graph
WRAPPED = 1 << 63  # C++ saves a dimension of -1 in an unsigned integer


def edge_of(tensor: Tensor) -> Edge:
    """Where in the graph ``tensor`` is produced (for a leaf: where its gradient is accumulated)."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _signed(value: Any) -> Any:
    if isinstance(value, int):
        return value - 2 * WRAPPED if value >= WRAPPED else value
    if isinstance(value, tuple):
        return tuple(_signed(v) for v in value)
    return value


class Operation:
    """One node of the graph, as rules see it.

    ``op.name`` is the node's name. Anything the node saved reads as an attribute: ``op.result`` is
    ``node._saved_result``. ``op.needs[i]`` says whether input ``i`` leads to a target; only those waves are used.
    """

    #: Whether each input is a target.
    ends: tuple[bool, ...] = ()
    #: Where the samples are, if a quantity asks: see :class:`curvext.samples.Samples`.
    n_samples = 1
    axes_out: tuple[Any, ...] = ()  # of every output, and of every input: an Axis, or None if it is shared
    axes_in: tuple[Any, ...] = ()
    axes_seen: tuple[Any, ...] = ()  # of every input as this operation sees it: others may disagree
    summed = True  # whether the samples are summed already
    #: Whether it is part of the loss, by :func:`curvext.output`: a tensor so marked is below.
    above = False

    def __init__(self, node: Node, needs: tuple[bool, ...], graph: Graph, settings: Any, is_target: bool):
        self.node, self.needs, self.graph = node, needs, graph
        self.settings, self.is_target = settings, is_target
        self.name: str = node.name()
        #: Whether this is a Python ``autograd.Function``; then what its ``ctx`` held reads as an attribute.
        self.is_python = isinstance(node, BackwardCFunction)
        #: What rules are registered for: the node's name, or the class of a Python ``autograd.Function``.
        self.kind = getattr(type(node), "_forward_cls", self.name) if self.is_python else self.name
        self.edges = edges = graph.edges[node]
        #: Shape, dtype and device of every output.
        self.outputs = graph.outputs[node]
        #: The inputs that lead to targets, by number, and where they come from.
        self.below = [(i, edge) for i, edge in enumerate(edges) if needs[i]]
        #: Whether an input or an output is complex: such a tensor counts as a pair of real ones.
        self.is_complex = bool(graph.complex) and (node in graph.complex or any(n in graph.complex for n, _ in edges))
        #: Whether one tensor enters this operation more than once.
        self.coincident = len(edges) > 1 and len(set(edges)) < len(edges) and any(len(g) > 1 for g in self.groups)

    @cached_property
    def inputs(self) -> tuple[Any, ...]:
        """Shape, dtype and device of every differentiable input; ``None`` where there is no edge."""
        return tuple([None if child is None else self.graph.outputs[child][k] for child, k in self.edges])

    def __getattr__(self, saved: str) -> Any:
        if self.__dict__["is_python"]:
            return getattr(self.node, saved)
        return _signed(getattr(self.node, "_saved_" + saved))

    def __repr__(self) -> str:
        return f"Operation({self.name})"

    @property
    def groups(self) -> list[list[int]]:
        """The needed inputs, those that are one and the same tensor (``x * x``) together."""
        by_edge: dict[Edge, list[int]] = {}
        for i, edge in enumerate(self.edges):
            if self.needs[i]:
                by_edge.setdefault(edge, []).append(i)
        return list(by_edge.values())

    def vjp(self, *v: Tensor | None) -> tuple[Tensor | None, ...]:
        """``Jᵀ v`` for every input; broadcast inputs are not summed to their shape yet."""
        if self.is_python:
            return self._python_vjp(v)
        result = cast(Any, self.node)(*v)
        return result if isinstance(result, tuple) else (result,)

    def _python_vjp(self, v: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """The backward of a Python function; it may write into what it is given, and may not expect ``None``."""
        given = [
            torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device) if t is None else t.clone()
            for t, meta in zip(v, self.outputs, strict=True)
        ]
        result = cast(Any, self.node).apply(*given)
        result = result if isinstance(result, tuple) else (result,)
        needed = cast(Any, self.node).needs_input_grad  # one for every argument, edges only for tensors
        wanted = iter([t for t, need in zip(result, needed, strict=False) if need])
        return tuple(None if node is None else next(wanted) for node, _ in self.edges)

    def reduced(self, wave: Tensor, i: int) -> Tensor:
        """A wave as it belongs to input ``i``: broadcast dimensions summed, its dtype, dense."""
        if wave.layout is not torch.strided:
            wave = wave.to_dense()
        node, k = self.edges[i]
        meta = self.graph.outputs[node][k]
        if list(wave.shape) != meta.shape:
            wave = wave.sum_to_size(meta.shape)
        if wave.dtype != meta.dtype:
            wave = wave.to(meta.dtype) if meta.dtype.is_complex or not wave.is_complex() else wave.real.to(meta.dtype)
        return wave


class Graph:
    """The nodes under ``roots``, children before parents, and what can be said of them at a glance."""

    def __init__(self, roots: Iterable[Node]):
        self.roots = frozenset(roots)
        self.edges: dict[Node, tuple[Edge, ...]] = {}
        self.order: list[Any] = []
        self.ends: list[Any] = []
        self._walk()
        self.outputs: dict[Node, tuple[Any, ...]] = {node: node._input_metadata for node in self.order}
        self.complex = {node for node, metas in self.outputs.items() for meta in metas if meta.dtype.is_complex}
        self.leaves: dict[int, Edge] = {id(node.variable): (node, 0) for node in self.ends if hasattr(node, "variable")}

    def _walk(self) -> None:
        """Depth first."""
        stack: list[Any] = list(self.roots)
        while stack:
            node = stack.pop()
            if node is None:  # all below the next one are listed
                self.order.append(stack.pop())
            elif node not in self.edges:
                self.edges[node] = edges = node.next_functions
                if edges:
                    stack += (node, None)
                    for child, _ in edges:
                        if child is not None:
                            stack.append(child)
                else:
                    self.order.append(node)
                    self.ends.append(node)

    def edge_of(self, tensor: Tensor) -> Edge | None:
        """Where ``tensor`` is produced; ``None`` for a leaf that the roots do not depend on."""
        leaf = self.leaves.get(id(tensor))
        return leaf if leaf is not None or tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)

    def operations(self, targets: Collection[Edge], settings: Any = None) -> list[Operation]:
        """The operations that lead to ``targets``, roots first.

        Nodes from which no target can be reached are left out: frozen layers below the first trained one cost nothing.
        """
        produced = {node for node, _ in targets}
        leading, found = set(produced), []
        for node in self.order:
            needs = tuple([child in leading for child, _ in self.edges[node]])
            if True in needs or node in produced or _hides(node):
                leading.add(node)
                if needs:
                    found.append(Operation(node, needs, self, settings, node in produced))
        found.reverse()
        return found


def _hides(node: Node) -> bool:
    """Whether what is below this node may not be in the graph: such a node is always listed."""
    return hasattr(type(node), "_forward_cls") and node.name() in HIDING


def nearest(node: Node, targets: Mapping[Edge, Any]) -> Any:
    """What ``targets`` holds for the target with the fewest operations between ``node`` and it; for messages."""
    level, seen = [node], {node}
    while level:
        below: list[Node] = []
        for parent in level:
            for edge in cast(tuple[Edge, ...], parent.next_functions):
                if edge in targets:
                    return targets[edge]
                if edge[0] is not None and edge[0] not in seen:
                    seen.add(edge[0])
                    below.append(edge[0])
        level = below
    return None
