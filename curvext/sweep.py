"""One backward sweep: hooks on the nodes, waves carried along with the gradient and freed as they are consumed.

This is the only place with hooks and state. Rules hold maths only; quantities know no operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Edge, Operation, nearest, operations
from .quantities.base import Quantity


@dataclass
class Settings:
    """How the default treats operations without a rule; shared by all sweeps of one block."""

    enumerate_up_to: int = 256
    probes: int = 1
    generator: torch.Generator | None = None
    sampled: set[Any] = field(default_factory=set)

    def signs(self, like: Tensor) -> Tensor:
        """Random signs of the shape, dtype and device of ``like``."""
        device = like.device if self.generator is None else self.generator.device
        draw = torch.randint(0, 2, like.shape, generator=self.generator, device=device)
        return (2 * draw - 1).to(like.device, like.dtype)


class Sweep:
    """Hooks on the graph under ``roots`` that carry one wave per quantity down to the targets.

    Use as a context around the backward pass; then :attr:`results` holds, for every target below the roots, one wave
    per quantity (``None``: zero). An error in a rule stops the sweep, not the backward pass: gradients come out as
    without a sweep, :attr:`error` holds what went wrong, and :attr:`where` the operation and the target nearest below.
    """

    def __init__(
        self,
        roots: Iterable[Node],
        targets: Mapping[Edge, Any],
        quantities: Sequence[Quantity],
        settings: Settings,
        seeds: Mapping[Edge, list[Any]] | None = None,
        earlier: dict[Edge, Any] | None = None,
    ):
        self.roots = frozenset(roots)
        self.operations = operations(self.roots, targets, settings)
        self.targets, self.quantities, self.seeds = targets, quantities, dict(seeds or {})
        # results of an earlier block: let go of one by one, so that the allocator reuses their memory while it is warm
        self.earlier = earlier if earlier is not None else {}
        self.waves: dict[Edge, list[Any]] = {}
        self.results: dict[Edge, list[Any]] = {}
        self.handles: list[Any] = []
        self.views: dict[Node, Operation] = {}  # complete as soon as their one user has sent its wave
        self.task: int | None = None
        self.visiting = False
        self.error: Exception | None = None
        self.where: tuple[Any, Any] | None = None

    def __enter__(self) -> Sweep:
        for op in self.operations:
            if op.is_leaf_view and not any([quantity.needs_gradient(op) for quantity in self.quantities]):
                self.views[op.node] = op
            else:
                self.handles.append(op.node.register_prehook(partial(self._prehook, op)))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()
        # a target whose own node did not run: not a leaf, and named by backward(inputs=...)
        self.results.update({edge: waves for edge, waves in self.waves.items() if edge in self.targets})
        if len(self.results) < len(self.targets):  # reached by linear operations alone
            for edge in {edge for op in self.operations for edge in op.edges if edge in self.targets}:
                self.results.setdefault(edge, [None] * len(self.quantities))
        for held in (self.handles, self.operations, self.views, self.waves, self.seeds):
            held.clear()

    def _prehook(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Runs with the complete gradient of the node's outputs; nodes run in topological order."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            if self.visiting or op.node not in self.roots:  # another backward pass on some of the same nodes
                return
            self._start(task)
        if self.error is not None:
            return
        self.visiting = True  # a rule may differentiate the node, which passes through it again
        try:
            if torch.is_grad_enabled():  # backward(create_graph=True)
                with torch.no_grad():
                    self.visit(op, grads)
            else:
                self.visit(op, grads)
        except Exception as error:
            self.error, self.where = error, (op.kind, nearest(op.node, self.targets))
            self.waves.clear()
        finally:
            self.visiting = False

    def _start(self, task: int) -> None:
        """Begin at a root; if a backward pass ran before ours (products of a quantity of another block), forget it."""
        self.task, self.error = task, None
        self.waves = {edge: list(waves) for edge, waves in self.seeds.items()}
        self.results = {}

    def visit(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Consume the waves at the operation's outputs and pass them to its inputs."""
        incoming = [self.waves.pop((op.node, k), None) for k in range(len(grads))]
        for q, quantity in enumerate(self.quantities):
            arrived = [None if waves is None else waves[q] for waves in incoming]
            if op.is_target:
                for k, wave in enumerate(arrived):
                    if wave is not None and (op.node, k) in self.targets:
                        self._add(self.results, (op.node, k), q, wave)
            self._send(op, q, quantity.step(op, grads, arrived))

    def _send(self, op: Operation, q: int, outgoing: Sequence[Any]) -> None:
        for i, wave in enumerate(outgoing):
            if wave is None or not op.needs[i]:
                continue
            edge, wave = op.edges[i], op.reduced(wave, i)
            if edge[0] in self.views:
                view = self.views[edge[0]]
                self._send(view, q, self.quantities[q].step(view, [None], [wave]))
            elif edge[0].next_functions:
                self._add(self.waves, edge, q, wave)
            elif edge in self.targets:  # a leaf: nothing passes below it
                self._add(self.results, edge, q, wave)
                self.earlier.pop(edge, None)

    def _add(self, waves: dict[Edge, list[Any]], edge: Edge, q: int, wave: Any) -> None:
        waiting = waves.get(edge)
        if waiting is None:
            waiting = waves[edge] = [None] * len(self.quantities)
        waiting[q] = wave if waiting[q] is None else self.quantities[q].add(waiting[q], wave)
