"""One backward sweep: hooks on the nodes, waves carried along with the gradient and freed as they are consumed.

This is the only place with hooks and state. Rules hold maths only; quantities know no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .graph import Edge, Operation, operations
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

    Use as a context around the backward pass. ``deliver(target, quantity, wave)`` is called with every wave that
    reaches a target; several waves to one target are to be added. An error in a rule stops the sweep, not the backward
    pass: gradients come out as without a sweep, and :attr:`error` holds what went wrong.
    """

    def __init__(
        self,
        roots: Iterable[Node],
        targets: Mapping[Edge, Any],
        quantities: Sequence[Quantity],
        deliver: Callable[[Any, Quantity, Any], None],
        settings: Settings,
    ):
        self.operations = operations(roots, targets, settings)
        self.targets, self.quantities, self.deliver = targets, quantities, deliver
        self.waves: dict[Edge, list[Any]] = {}
        self.handles: list[Any] = []
        self.task: int | None = None
        self.error: Exception | None = None

    def __enter__(self) -> Sweep:
        for op in self.operations:
            self.handles.append(op.node.register_prehook(partial(self._prehook, op)))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.operations.clear()
        self.waves.clear()

    def _prehook(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Runs with the complete gradient of the node's outputs; nodes run in topological order."""
        task = torch._C._current_graph_task_id()
        if self.task is None:
            self.task = task
        if task != self.task or self.error is not None:  # another backward pass on the same nodes, or ours has failed
            return
        try:
            if torch.is_grad_enabled():  # backward(create_graph=True)
                with torch.no_grad():
                    self.visit(op, grads)
            else:
                self.visit(op, grads)
        except Exception as error:
            self.error = error
            self.waves.clear()

    def visit(self, op: Operation, grads: Sequence[Tensor | None]) -> None:
        """Consume the waves at the operation's outputs and pass them to its inputs."""
        incoming = [self.waves.pop((op.node, k), None) for k in range(len(grads))]
        for q, quantity in enumerate(self.quantities):
            arrived = [None if waves is None else waves[q] for waves in incoming]
            if op.is_target:
                for k, wave in enumerate(arrived):
                    if wave is not None and (op.node, k) in self.targets:
                        self.deliver(self.targets[op.node, k], quantity, wave)
            self._send(op, q, quantity.step(op, grads, arrived))

    def _send(self, op: Operation, q: int, outgoing: Sequence[Any]) -> None:
        for i, wave in enumerate(outgoing):
            if wave is None or not op.needs[i]:
                continue
            edge, wave = op.edges[i], op.reduced(wave, i)
            if not edge[0].next_functions:  # a leaf: nothing passes below it
                if edge in self.targets:
                    self.deliver(self.targets[edge], self.quantities[q], wave)
                continue
            waiting = self.waves.get(edge)
            if waiting is None:
                waiting = self.waves[edge] = [None] * len(self.quantities)
            waiting[q] = wave if waiting[q] is None else self.quantities[q].add(waiting[q], wave)
