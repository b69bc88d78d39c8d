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
from .graph import Edge, edge_of
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

    The forward pass may run before or inside the block. One block is one loss: several ``backward()`` calls give what
    their sum would give; a new block starts afresh. ``p.grad`` is bitwise what it is without the block.

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
        self.names = _named_tensors(model)
        self.quantities = _checked(quantities or (HesScale(),))
        if probes < 1 or enumerate_up_to < 0:
            raise ValueError(f"extend: probes must be >= 1 and enumerate_up_to >= 0, got {probes}, {enumerate_up_to}")
        self.options = {"generator": generator, "probes": probes, "enumerate_up_to": enumerate_up_to}

    def __enter__(self) -> Curvature:  # type: ignore[override]
        self.settings = Settings(**self.options)  # type: ignore[arg-type]
        self.results = Curvature([quantity.savefield for quantity in self.quantities])
        self.backwards = 0
        for tensor in self.names.values():
            for quantity in self.quantities:
                tensor.__dict__.pop(quantity.savefield, None)
        super().__enter__()
        return self.results

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        results, backwards = self.results, self.backwards
        del self.settings, self.results, self.backwards
        if kind is None and not backwards:
            raise CurvatureError(
                f"extend: no backward() ran inside the block, so there is no {', '.join(results)}. Call "
                "loss.backward() within it (torch.autograd.backward and torch.autograd.grad are not seen)."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward:
            return self._backward(*args, **kwargs)
        return func(*args, **kwargs)

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
        selected = _selected(self.names, inputs)
        targets: dict[Edge, list[str]] = {}
        for name, tensor in selected.items():
            targets.setdefault(edge_of(tensor), []).append(name)
        exact = self._whole_graph(loss, gradient, selected)
        carried = [quantity for quantity in self.quantities if isinstance(quantity, Quantity)]
        sweep = Sweep([loss.grad_fn], targets, carried, self._keep, self.settings)
        reached = bool(sweep.operations)
        try:
            with sweep:
                loss.backward(**arguments)
        except CheckpointError as error:
            raise CurvatureError(_CHECKPOINTED) from error
        for failure in (exact, sweep.error):
            if failure is not None:
                raise failure
        if not reached:
            raise CurvatureError(
                f"extend: the loss does not depend on any of the {len(self.names)} tensors given "
                f"({', '.join(list(self.names)[:3])}, ...). Pass the model that the loss was computed with."
            )

    def _whole_graph(self, loss: Tensor, gradient: Tensor | None, selected: dict[str, Tensor]) -> Exception | None:
        try:
            for quantity in self.quantities:
                if isinstance(quantity, WholeGraph):
                    values = quantity.compute(loss, gradient, list(selected.values()))
                    for name, value in zip(selected, values, strict=True):
                        if value is not None:
                            self._keep([name], quantity, value)
        except CurvatureError as error:
            return error
        return None

    def _keep(self, names: Sequence[str], quantity: Quantity | WholeGraph, value: Any) -> None:
        """Add what has arrived at one tensor to its result; a tensor may have several names."""
        results = self.results[quantity.savefield]
        if names[0] in results:
            value = quantity.add(results[names[0]], value)
        for name in names:
            results[name] = value
        setattr(self.names[names[0]], quantity.savefield, value)


_CHECKPOINTED = (
    "extend: this graph uses activation checkpointing, which lets a saved tensor be read only once, so curvature "
    "cannot be computed along with the gradient. Run this step without torch.utils.checkpoint."
)


def _selected(names: dict[str, Tensor], inputs: Any) -> dict[str, Tensor]:
    """The named tensors, or those of them that ``backward(inputs=...)`` asks for."""
    if inputs is None:
        return names
    asked = {id(t) for t in ([inputs] if isinstance(inputs, Tensor) else inputs)}
    return {name: tensor for name, tensor in names.items() if id(tensor) in asked}


def _named_tensors(model: Target) -> dict[str, Tensor]:
    if isinstance(model, nn.Module):
        named: dict[Any, Any] = dict(model.named_parameters())
    elif isinstance(model, Mapping):
        named = dict(model)
    elif isinstance(model, Tensor):
        named = {"0": model}
    elif isinstance(model, Iterable):
        named = {str(i): tensor for i, tensor in enumerate(model)}
    else:
        raise TypeError(f"extend: expected a module, a mapping or an iterable of tensors, got {type(model).__name__}")
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"extend: expected a tensor for {name!r}, got {type(tensor).__name__}")
        if tensor.is_complex():
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
