"""One backward sweep: hooks on the nodes, waves carried along with the gradient and freed as they are consumed.

This is the only place with hooks and state. Rules hold maths only; quantities know no operation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Edge, Graph, Operation, nearest
from .wave import Wave


@dataclass
class Settings:
    """How the default treats operations without a rule; shared by all sweeps of one block."""

    enumerate_up_to: int = 256
    probes: int = 1
    generator: torch.Generator | None = None
    max_memory: int | None = None
    sampled: set[Any] = field(default_factory=set)

    def signs(self, like: Tensor) -> Tensor:
        """Random signs of the shape, dtype and device of ``like``."""
        device = like.device if self.generator is None else self.generator.device
        draw = torch.randint(0, 2, like.shape, generator=self.generator, device=device)
        return (2 * draw - 1).to(like.device, like.dtype)


class Sweep:
    """Hooks on a graph that carry waves down to the targets.

    Use as a context around the backward pass. As soon as a target has got all it will get, ``arrive`` is called with
    its edge and one wave for each of ``waves`` (``None``: zero). Operations that bend nothing need no gradient: they
    get no hook, and are passed as soon as all their users have sent their waves. An error in a rule stops the sweep,
    not the backward pass: gradients come out as without a sweep, :attr:`error` holds what went wrong, and
    :attr:`where` the operation and the target nearest below.
    """

    def __init__(
        self,
        graph: Graph,
        targets: Mapping[Edge, Any],
        waves: Sequence[Wave],
        settings: Settings,
        arrive: Callable[[Edge, list[Any]], None],
        seeds: Mapping[Edge, list[Any]] | None = None,
    ):
        self.roots, self.operations = graph.roots, graph.operations(targets, settings)
        self.targets, self.kinds, self.arrive, self.seeds = targets, waves, arrive, dict(seeds or {})
        self.waves: dict[Edge, list[Any]] = {}
        self.arrived: set[Edge] = set()
        self.handles: list[Any] = []
        self.unhooked: dict[Node, Operation] = {}  # they need no gradient
        self.awaited: dict[Node, int] = {}  # uses, of these and of leaves, that have not sent their waves yet
        self.ready: list[Operation] = []  # unhooked operations whose waves are complete
        self.task: int | None = None
        self.visiting = False
        self.thread = threading.get_ident()
        self.error: Exception | None = None
        self.where: tuple[Any, Any] | None = None

    def __enter__(self) -> Sweep:
        for op in self.operations:
            if op.node in self.roots or any([wave.needs_gradient(op) for wave in self.kinds]):
                self.handles.append(op.node.register_prehook(partial(self._prehook, op)))
            else:
                self.unhooked[op.node] = op
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()
        for edge in [edge for edge in self.waves if edge in self.targets]:
            if self.error is None:  # its own node did not run: not a leaf, and named by backward(inputs=...)
                self._finish(edge)
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
        self.arrived.clear()
        self.awaited = dict.fromkeys(self.unhooked, 0)
        self.awaited.update([(node, 0) for node, _ in self.targets if not node.next_functions])
        for op in self.operations:
            for _, (node, _) in op.below:
                if node in self.awaited:
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
        if op.is_target:
            for k in range(len(grads)):
                if (op.node, k) in self.targets:
                    self._finish((op.node, k), keep=True)
        incoming = [self.waves.pop((op.node, k), None) for k in range(len(grads))]
        for q, kind in enumerate(self.kinds):
            arrived = [None if waves is None else waves[q] for waves in incoming]
            self._send(op, q, kind.step(op, grads, arrived))
        self._release(op)

    def _send(self, op: Operation, q: int, outgoing: Sequence[Any]) -> None:
        kind = self.kinds[q]
        for i, edge in op.below:
            if i >= len(outgoing) or outgoing[i] is None:
                continue
            wave = kind.reduced(op, outgoing[i], i)
            waiting = self.waves.get(edge)
            if waiting is None:
                self.waves[edge] = waiting = [None] * len(self.kinds)
            waiting[q] = wave if waiting[q] is None else kind.add(waiting[q], wave)

    def _release(self, op: Operation) -> None:
        """What was sent may have been the last that a leaf, or an operation without a hook, was waiting for."""
        for _, edge in op.below:
            node = edge[0]
            if node in self.awaited:
                self.awaited[node] -= 1
                if self.awaited[node]:
                    continue
                if node in self.unhooked:
                    self.ready.append(self.unhooked[node])
                elif edge in self.targets:
                    self._finish(edge)

    def _finish(self, edge: Edge, keep: bool = False) -> None:
        """Nothing more will reach this target."""
        waves = self.waves.get(edge) if keep else self.waves.pop(edge, None)
        self.arrived.add(edge)
        self.arrive(edge, [None] * len(self.kinds) if waves is None else waves)
