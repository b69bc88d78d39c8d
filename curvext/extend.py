"""The block: sees ``backward``, runs the sweep, hands the results to the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from .errors import CurvatureError
from .graph import Edge, Graph
from .quantities import HesScale, Quantity, WholeGraph
from .sweep import Settings, Sweep

Target = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Tensor


class Curvature(Mapping[str, dict[str, Tensor]]):
    """Results of a block: ``curvature["hesscale"]["fc1.weight"]``, or ``curvature.hesscale["fc1.weight"]``."""

    def __init__(self, fields: Sequence[str]):
        self._results: dict[str, dict[str, Tensor]] = {field: {} for field in fields}

    def __getitem__(self, field: str) -> dict[str, Tensor]:
        return self._results[field]

    def __getattr__(self, field: str) -> dict[str, Tensor]:
        results = self.__dict__.get("_results", {})
        if field not in results:
            raise AttributeError(f"this block computes {list(results)}, not {field!r}")
        return results[field]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return "Curvature(" + ", ".join(f"{k}: {len(v)} tensors" for k, v in self._results.items()) + ")"


class extend(TorchFunctionMode):
    """A block in which ``loss.backward()`` also leaves curvature on the parameters.

        with extend(model) as curvature:
            loss_fn(model(x), y).backward()

        p.grad, p.hesscale, curvature.hesscale["fc1.weight"]

    The forward pass may run before the block or inside it (before is a little faster: inside, every operation passes
    through Python). One block is one loss: several ``backward()`` calls give what their sum would give; a new block
    starts afresh. ``p.grad`` is bitwise what it is without the block.

    Args:
        model: names and selects parameters: an ``nn.Module`` (its parameters that require a gradient), a mapping of
            names to tensors, or an iterable of tensors (named "0", "1", ...). The graph is found from the loss.
        quantities: what to compute, instances; ``HesScale()`` if none is given.
        generator: source of random probes, for operations that must be sampled.
        probes: random probes for each operation that must be sampled.
        enumerate_up_to: operations without a rule are enumerated exactly up to this many entries, and sampled beyond.

    Raises:
        TypeError: if ``model`` or a quantity is of the wrong kind.
        CurvatureError: on leaving the block, if no ``backward()`` ran in it; after ``backward()``, if the loss does not
            depend on the model, or if an operation has no correct curvature (gradients are then as without the block).
    """

    def __init__(
        self,
        model: Target,
        *quantities: Quantity | WholeGraph,
        generator: torch.Generator | None = None,
        probes: int = 1,
        enumerate_up_to: int = 256,
    ):
        super().__init__()
        self.model = _kept(model)
        _trained(_named(self.model))
        self.quantities = _checked(quantities or (HesScale(),))
        if probes < 1 or enumerate_up_to < 0:
            raise ValueError(f"extend: probes must be >= 1 and enumerate_up_to >= 0, got {probes}, {enumerate_up_to}")
        self.options = {"generator": generator, "probes": probes, "enumerate_up_to": enumerate_up_to}

    def __enter__(self) -> Curvature:  # type: ignore[override]
        if hasattr(self, "results"):
            raise CurvatureError("extend: this block is running already; a block inside it needs its own extend(...)")
        named = _named(self.model)  # afresh: parameters may have been frozen or replaced since the last block
        self.tensors = _trained(named)
        fields = [quantity.savefield for quantity in self.quantities]
        self.earlier = {id(t): [t.__dict__.pop(field, None) for field in fields] for t in named.values()}
        self.settings = Settings(**self.options)  # type: ignore[arg-type]
        self.results = Curvature(fields)
        self.backwards = 0
        super().__enter__()
        return self.results

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        results, backwards = self.results, self.backwards
        del self.tensors, self.settings, self.results, self.backwards, self.earlier
        if kind is None and not backwards:
            raise CurvatureError(
                f"extend: no backward() ran inside the block, so there is no {', '.join(results)}. Call "
                "loss.backward() within it (torch.autograd.backward and torch.autograd.grad are not seen)."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.backward:
            return self._backward(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)  # every operation of a forward pass comes by here

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """``loss.backward(...)`` with a sweep around it; whatever fails in the sweep is raised after it."""
        self.backwards += 1
        arguments = {"gradient": gradient, "retain_graph": retain_graph, "create_graph": create_graph, "inputs": inputs}
        if loss.grad_fn is None:
            return loss.backward(**arguments)  # torch's own error, or a leaf, which has no curvature
        graph = Graph([loss.grad_fn])
        names = self._targets(graph, inputs)
        carried = [quantity for quantity in self.quantities if isinstance(quantity, Quantity)]
        earlier = {edge: self.earlier.pop(id(self.tensors[first]), None) for edge, (first, *_) in names.items()}
        sweep = Sweep(graph, names, carried, self.settings, earlier=earlier)
        products, failure = self._products(loss, gradient, names)
        try:
            with sweep:
                loss.backward(**arguments)
        except CheckpointError as error:
            raise CurvatureError(_CHECKPOINTED) from error
        if failure is not None:
            raise failure
        if isinstance(sweep.error, Warning):  # warnings are errors
            raise sweep.error
        if sweep.error is not None:
            raise _located(sweep.error, sweep.where) from sweep.error
        if not sweep.results:
            raise CurvatureError(_unreached(self.tensors, inputs))
        for edge in names:
            if edge in sweep.results:
                for quantity, wave in (*zip(carried, sweep.results[edge], strict=True), *products.get(edge, ())):
                    self._keep(names[edge], quantity, wave)

    def _targets(self, graph: Graph, inputs: Any) -> dict[Edge, list[str]]:
        """The names of every tensor to follow: all of the graph, or those that ``backward(inputs=...)`` asks for."""
        asked = None if inputs is None else _ids(inputs)
        targets: dict[Edge, list[str]] = {}
        for name, tensor in self.tensors.items():
            edge = graph.edge_of(tensor)
            if edge is not None and (asked is None or id(tensor) in asked):
                targets.setdefault(edge, []).append(name)
        return targets

    def _products(
        self, loss: Tensor, gradient: Tensor | None, names: Mapping[Edge, list[str]]
    ) -> tuple[dict[Edge, list[tuple[WholeGraph, Any]]], CurvatureError | None]:
        """What needs the whole graph, before the backward pass frees it; a failure must not cost the gradients."""
        found: dict[Edge, list[tuple[WholeGraph, Any]]] = {}
        tensors = [self.tensors[first] for first, *_ in names.values()]
        try:
            for quantity in self.quantities:
                if isinstance(quantity, WholeGraph):
                    for edge, value in zip(names, quantity.compute(loss, gradient, tensors), strict=True):
                        found.setdefault(edge, []).append((quantity, value))
        except CurvatureError as error:
            return {}, error
        return found, None

    def _keep(self, names: Sequence[str], quantity: Quantity | WholeGraph, value: Any) -> None:
        """Add what has arrived at one tensor to its result; a tensor may have several names."""
        results, tensor = self.results[quantity.savefield], self.tensors[names[0]]
        if value is None:
            value = quantity.zero(tensor)
        if names[0] in results:
            value = quantity.add(results[names[0]], value)
        for name in names:
            results[name] = value
        setattr(tensor, quantity.savefield, value)


_CHECKPOINTED = (
    "extend: this graph uses activation checkpointing, which lets a saved tensor be read only once, so curvature "
    "cannot be computed along with the gradient, and the gradients of this step are incomplete. Run this step without "
    "torch.utils.checkpoint."
)


def _located(error: Exception, where: tuple[Any, Any] | None) -> CurvatureError:
    """The error of a rule or of the default, with the place in the model and a remedy."""
    operation, names = where or ("unknown", None)
    kind = operation if isinstance(operation, str) else operation.__name__
    place = f"operation {kind}, nearest parameter {names[0] if names else 'unknown'}: "
    if isinstance(error, CurvatureError):
        return CurvatureError(f"{place}{error}")
    return CurvatureError(
        f"{place}its curvature rule failed with {type(error).__name__}: {error}. Gradients are as without the "
        "block. Compare the rule with the default by curvext.testing.check_rule, or remove it with curvext.unregister, "
        "and the default takes its place."
    )


def _ids(tensors: Any) -> set[int]:
    return {id(tensor) for tensor in ([tensors] if isinstance(tensors, Tensor) else tensors)}


def _unreached(tensors: Mapping[str, Tensor], inputs: Any) -> str:
    few = ", ".join(list(tensors)[:3]) + (", ..." if len(tensors) > 3 else "")
    if not tensors:
        return "extend: none of the tensors given requires a gradient, so there is nothing to compute curvature for."
    if inputs is not None and _ids(inputs).isdisjoint(_ids(tensors.values())):
        return f"extend: backward(inputs=...) names none of the {len(tensors)} tensors given to extend ({few})."
    return (
        f"extend: the loss does not depend on any of the {len(tensors)} tensors given to extend ({few}). Pass the "
        "model that the loss was computed with."
    )


def _kept(model: Target) -> Any:
    """What ``extend`` was given, in a form that can be read again for every block."""
    if isinstance(model, (nn.Module, Mapping, Tensor)):
        return model
    if isinstance(model, Iterable):
        return list(model)
    raise TypeError(f"extend: expected a module, a mapping or an iterable of tensors, got {type(model).__name__}")


def _named(model: Any) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        return dict(model.named_parameters())
    if isinstance(model, Tensor):
        return {"0": model}
    return dict(model) if isinstance(model, Mapping) else {str(i): tensor for i, tensor in enumerate(model)}


def _trained(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the named tensors that require a gradient."""
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"extend: expected a tensor for {name!r}, got {type(tensor).__name__}")
        if tensor.is_complex() and tensor.requires_grad:
            raise CurvatureError(
                f"extend: parameter {name!r} is complex ({tensor.dtype}); its curvature is not one number an entry. "
                "Use a real parameter and torch.view_as_complex."
            )
    return {name: tensor for name, tensor in named.items() if tensor.requires_grad}


def _checked(quantities: Sequence[Any]) -> tuple[Quantity | WholeGraph, ...]:
    fields: set[str] = set()
    for quantity in quantities:
        if not isinstance(quantity, (Quantity, WholeGraph)):
            what = quantity.__name__ if isinstance(quantity, type) else repr(quantity)
            hint = f"; write {what}()" if isinstance(quantity, type) else ""
            raise TypeError(f"extend: expected quantities such as HesScale(), got {what}{hint}")
        if quantity.savefield in fields:
            raise ValueError(f"extend: two quantities would be saved as {quantity.savefield!r}")
        fields.add(quantity.savefield)
    return tuple(quantities)
