"""Reads what arrives at the targets of a backward pass, and hands it to the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .columns import of_columns, reads_columns
from .graph import Edge, Operation
from .quantities.base import Quantity, Target, WholeGraph
from .wave import Wave

if TYPE_CHECKING:
    from .extend import extend


class Reader:
    """Reads what arrives at the targets of one backward pass, and hands it to the parameters."""

    def __init__(self, block: extend, targets: Mapping[Edge, Target]):
        self.block, self.targets = block, targets
        self.place: dict[Wave, int] = {}
        self.by_products: set[Any] = set()
        self.whole: dict[Edge, dict[str, Any]] = {}
        self.parts: dict[tuple[Edge, str], Any] = {}  # of the columns that were carried before
        self.read: dict[Edge, list[tuple[Any, Any]]] = {}
        self.failure: Exception | None = None
        self.handles: list[Any] = []

    def products(self, loss: Tensor, gradient: Tensor | None, operations: Sequence[Operation] | None) -> list[Wave]:
        """What needs the whole graph, before the backward pass frees it.

        Args:
            operations: of the graph; ``None`` if they cannot tell samples apart.

        Returns:
            The waves that the others need.
        """
        for entry in self.block.entries:
            quantity = entry.quantity
            edges = [edge for edge, target in self.targets.items() if quantity in self.block.asked[target.names[0]]]
            tensors = [self.targets[edge].tensor for edge in edges]
            if isinstance(quantity, WholeGraph) and not quantity.rides(operations, tensors):
                self.by_products.add(quantity)
                values = quantity.compute(loss, gradient, tensors) if tensors else []
                for edge, value in zip(edges, values, strict=True):
                    self.whole.setdefault(edge, {})[quantity.savefield] = value
            else:
                self.place.update(dict.fromkeys(quantity.waves))
        self.place = {wave: j for j, wave in enumerate(self.place)}
        return list(self.place)

    def gather(self, edge: Edge, columns: Sequence[Any]) -> None:
        """Some columns of the factor waves alone."""
        target = self.targets[edge]
        arrived: dict[Wave, Any] = dict(zip(of_columns(self.place), columns, strict=True))
        for quantity in self.block.asked[target.names[0]]:
            if isinstance(quantity, Quantity) and quantity not in self.by_products and reads_columns(quantity):
                value = quantity.read(target, *[arrived.get(wave) for wave in quantity.waves])
                self.parts[edge, quantity.savefield] = self._joined(edge, quantity, value)

    def _joined(self, edge: Edge, quantity: Any, value: Any) -> Any:
        before = self.parts.pop((edge, quantity.savefield), None)
        return value if before is None else before if value is None else quantity.join(before, value)

    def arrive(self, edge: Edge, waves: Sequence[Any]) -> None:
        """All that this target will get, but for its gradient, which comes next."""
        target = self.targets[edge]
        own = target.tensor._backward_hooks  # these may change the gradient
        if target.tensor.is_leaf and not own and any([q.total for q in self.block.asked[target.names[0]]]):
            self.handles.append(target.tensor.register_hook(partial(self._with_gradient, edge, waves)))
        else:
            self._read(edge, waves)

    def _with_gradient(self, edge: Edge, waves: Sequence[Any], gradient: Tensor) -> None:
        if self.failure is None:
            try:
                with torch.no_grad():
                    self.targets[edge].gradient = gradient.detach()
                    self._read(edge, waves)
            except Exception as error:
                self.failure = error
        self.targets[edge].gradient = None

    def _read(self, edge: Edge, waves: Sequence[Any]) -> None:
        block, target = self.block, self.targets[edge]
        asked = block.asked[target.names[0]]
        readings = []
        for quantity in asked:
            # an earlier block's result: let go of or written again one by one, so that its memory is reused while warm
            earlier = block.earlier.pop((id(target.tensor), quantity.savefield), None)
            target.earlier = [earlier] if quantity.recycles else None
            del earlier
            if isinstance(quantity, Quantity) and quantity not in self.by_products:
                value = quantity.read(target, *[waves[self.place[wave]] for wave in quantity.waves])
                value = self._joined(edge, quantity, value)
            else:
                value = self.whole[edge][quantity.savefield]
            readings.append((quantity, quantity.zero(target) if value is None else quantity.complete(value)))
        target.earlier = None
        self.read[edge] = readings
        if block.hook is not None:
            self._keep(edge)
            try:
                block.hook(target.tensor)
            except Exception as error:
                self.failure = error
                raise
            self._release()

    def _release(self) -> None:
        """What a hook deleted or replaced is let go of here too."""
        for field, values in self.block.results.items():
            for name, value in list(values.items()):
                now: Any = self.block.tensors[name].__dict__.get(field)
                if now is not value:
                    self.block.held.pop((field, name), None)
                    values[name] = now
                    if now is None:
                        del values[name]

    def _keep(self, edge: Edge) -> None:
        """Add what has arrived to the results; a tensor may have several names."""
        target = self.targets[edge]
        for quantity, value in self.read.pop(edge):
            key = quantity.savefield, target.names[0]
            if key in self.block.held:
                value = quantity.add(self.block.held[key], value)
            self.block.held[key] = value
            value = quantity.result(value, target)
            for name in target.names:
                self.block.results[quantity.savefield][name] = value
            setattr(target.tensor, quantity.savefield, value)

    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()

    def commit(self) -> None:
        for edge in self.targets:  # in the order of the parameters, not of arrival
            if edge in self.read:
                self._keep(edge)
        for entry in self.block.entries:
            held = self.block.held.items()
            entry.quantity.attach(self.block.model, {n: v for (f, n), v in held if f == entry.quantity.savefield})

    def withdraw(self) -> None:
        """Nothing of a pass that failed stays, not even what a hook has seen already."""
        if self.block.hook is None:
            return
        for target in self.targets.values():
            for field, values in self.block.results.items():
                target.tensor.__dict__.pop(field, None)
                for name in target.names:
                    values.pop(name, None)
                    self.block.held.pop((field, name), None)
