"""One backward sweep: hooks on the nodes, waves carried along with the gradient and freed as they are consumed.

This is the only place with hooks and state. Rules hold maths only; quantities know no operation.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Edge, Graph, Operation, nearest
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
    """Hooks on a graph that carry one wave per quantity down to the targets.

    Use as a context around the backward pass; then :attr:`results` holds, for every target below the roots, one wave
    per quantity (``None``: zero). Operations that bend nothing need no gradient: they get no hook, and are passed as
    soon as all their users have sent their waves. An error in a rule stops the sweep, not the backward pass: gradients
    come out as without a sweep, :attr:`error` holds what went wrong, and :attr:`where` the operation and the target
    nearest below.
    """

    def __init__(
        self,
        graph: Graph,
        targets: Mapping[Edge, Any],
        quantities: Sequence[Quantity],
        settings: Settings,
        seeds: Mapping[Edge, list[Any]] | None = None,
        earlier: dict[Edge, Any] | None = None,
    ):
        self.roots, self.operations = graph.roots, graph.operations(targets, settings)
        self.targets, self.quantities, self.seeds = targets, quantities, dict(seeds or {})
        # results of an earlier block: let go of one by one, so that the allocator reuses their memory while it is warm
        self.earlier = earlier if earlier is not None else {}
        self.waves: dict[Edge, list[Any]] = {}
        self.results: dict[Edge, list[Any]] = {}
        self.handles: list[Any] = []
        self.unhooked: dict[Node, Operation] = {}  # they need no gradient
        self.awaited: dict[Node, int] = {}  # uses of these that have not sent their waves yet
        self.ready: list[Operation] = []  # those of them whose waves are complete
        self.task: int | None = None
        self.visiting = False
        self.thread = threading.get_ident()
        self.error: Exception | None = None
        self.where: tuple[Any, Any] | None = None

    def __enter__(self) -> Sweep:
        for op in self.operations:
            if op.node in self.roots or any([quantity.needs_gradient(op) for quantity in self.quantities]):
                self.handles.append(op.node.register_prehook(partial(self._prehook, op)))
            else:
                self.unhooked[op.node] = op
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()
        # a target whose own node did not run: not a leaf, and named by backward(inputs=...)
        self.results.update({edge: waves for edge, waves in self.waves.items() if edge in self.targets})
        if len(self.results) < len(self.targets):  # reached by linear operations alone
            for edge in {edge for op in self.operations for edge in op.edges if edge in self.targets}:
                self.results.setdefault(edge, [None] * len(self.quantities))
        for held in (self.handles, self.operations, self.unhooked, self.ready, self.waves, self.seeds):
            held.clear()

    def _prehook(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Runs with the complete gradient of the node's outputs; nodes run in topological order."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            if self.visiting or op.node not in self.roots or self._is_foreign(op):
                return  # another backward pass on some of the same nodes
            self._start(task)
        if self.error is not None:
            return
        self.visiting = True  # a rule may differentiate the node, which passes through it again
        try:
            if torch.is_grad_enabled():  # backward(create_graph=True)
                with torch.no_grad():
                    self._advance(op, grads)
            else:
                self._advance(op, grads)
        except Exception as error:
            self.error, self.where = error, (self.at.kind, nearest(self.at.node, self.targets))
            self.waves.clear()
        finally:
            self.visiting = False

    def _is_foreign(self, op: Operation) -> bool:
        """Whether another thread's backward pass is at one of our roots; on the CPU, passes stay in their thread."""
        return op.outputs[0].device.type == "cpu" and threading.get_ident() != self.thread

    def _start(self, task: int) -> None:
        """Begin at a root; if a backward pass ran before ours (products of a quantity of another block), forget it."""
        self.task, self.error, self.ready = task, None, []
        self.waves = {edge: list(waves) for edge, waves in self.seeds.items()}
        self.results = {}
        self.awaited = dict.fromkeys(self.unhooked, 0)
        for op in self.operations:
            for (node, _), needed in zip(op.edges, op.needs, strict=True):
                if needed and node in self.awaited:
                    self.awaited[node] += 1

    def _advance(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Visit an operation, then all below it that need no gradient and wait for no other."""
        self.visit(op, grads)
        while self.ready:
            op = self.ready.pop()
            self.visit(op, [None] * len(op.outputs))

    def visit(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Consume the waves at the operation's outputs and pass them to its inputs."""
        self.at = op
        incoming = [self.waves.pop((op.node, k), None) for k in range(len(grads))]
        for q, quantity in enumerate(self.quantities):
            arrived = [None if waves is None else waves[q] for waves in incoming]
            if op.is_target:
                for k, wave in enumerate(arrived):
                    if wave is not None and (op.node, k) in self.targets:
                        self._add(self.results, (op.node, k), q, wave)
            self._send(op, q, quantity.step(op, grads, arrived))
        self._release(op)

    def _send(self, op: Operation, q: int, outgoing: Sequence[Any]) -> None:
        for i, wave in enumerate(outgoing):
            if wave is None or not op.needs[i]:
                continue
            edge, wave = op.edges[i], op.reduced(wave, i)
            if edge[0].next_functions:
                self._add(self.waves, edge, q, wave)
            elif edge in self.targets:  # a leaf: nothing passes below it
                self._add(self.results, edge, q, wave)
                self.earlier.pop(edge, None)

    def _release(self, op: Operation) -> None:
        """What was sent may have been the last that an operation without a hook was waiting for."""
        for node, _ in op.edges:
            if node in self.awaited:
                self.awaited[node] -= 1
                if not self.awaited[node]:
                    self.ready.append(self.unhooked[node])

    def _add(self, waves: dict[Edge, list[Any]], edge: Edge, q: int, wave: Any) -> None:
        waiting = waves.get(edge)
        if waiting is None:
            waiting = waves[edge] = [None] * len(self.quantities)
        waiting[q] = wave if waiting[q] is None else self.quantities[q].add(waiting[q], wave)
