"""The block: sees ``backward``, runs the sweep, hands the results to the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from .columns import in_parts, reads_columns
from .errors import CurvatureError
from .graph import Edge, Graph, nearest
from .memory import keep
from .output import seeds
from .quantities import HesScale
from .quantities.base import Quantity, Selected, Target, WholeGraph, positive
from .reader import Reader
from .registry import find
from .samples import Samples
from .selection import Model, assigned, checked, kept, named, trained
from .sweep import Settings, Sweep


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
        quantities: what to compute, instances; ``HesScale()`` if none is given. ``KFAC().only("fc*", nn.Linear)`` is
            for some parameters only.
        only: restricts all quantities: globs over parameter names (a module's name stands for all below it), modules
            or their classes, or predicates ``(name, parameter) -> bool``; one or a list.
        samples: the number N of samples, for quantities that tell samples apart; by default the size of the leading
            dimension of the tensor that the loss sums up. ``samples=1`` treats the batch as one sample. If that
            dimension is N·T (token losses), T consecutive rows belong to a sample; every N-th one, if that is the
            only way in which the model's own reshapes fit.
        extension_hook: called with each parameter as soon as its quantities are on it, before ``p.grad`` is complete:
            to reduce them early. What it deletes from parameters is freed and not in the block's results; what it
            replaces is freed, and the results hold the replacement. Neither is added up over backward passes. Its
            errors are raised after the backward pass, and nothing stays on the parameters.
        generator: source of random probes and Monte-Carlo draws.
        probes: random probes for each operation that must be sampled.
        enumerate_up_to: operations without a rule are enumerated exactly up to this many entries, and sampled beyond.
        max_memory: a budget in bytes for the columns that Gauss-Newton quantities carry at a time (at least one is).
            Where all of them would take more, they are carried a few at a time, each few by another backward pass
            over the graph; results are the same, but that random columns are other ones. Hooks of your own on
            tensors run in every pass.

    Raises:
        TypeError: if ``model`` or a quantity is of the wrong kind.
        ValueError: if a selection matches nothing, or two quantities would be saved under one name.
        CurvatureError: on leaving the block, if no ``backward()`` ran in it; after ``backward()``, if the loss does not
            depend on the model, or if an operation has no correct curvature (gradients are then as without the block).
    """

    def __init__(
        self,
        model: Model,
        *quantities: Quantity | WholeGraph | Selected,
        only: Any = None,
        samples: int | None = None,
        extension_hook: Callable[[Tensor], None] | None = None,
        generator: torch.Generator | None = None,
        probes: int = 1,
        enumerate_up_to: int = 256,
        max_memory: int | None = None,
    ):
        super().__init__()
        keep()
        self.model, self.only, self.samples, self.hook = kept(model), only, samples, extension_hook
        self.entries = checked(quantities or (HesScale(),))
        if not isinstance(model, nn.Module) or only is not None or any(entry.where for entry in self.entries):
            assigned(self.model, self.entries, trained(named(self.model)), only)  # once more on entering the block
        positive(self, probes=probes, samples=samples, max_memory=max_memory)
        if enumerate_up_to < 0:
            raise ValueError(f"extend: enumerate_up_to must be >= 0, got {enumerate_up_to}")
        if max_memory is not None:
            for quantity in (entry.quantity for entry in self.entries if reads_columns(entry.quantity)):
                if why := quantity.undivided():
                    what = type(quantity).__name__
                    raise ValueError(f"extend: {what} needs all columns at once ({why}); leave out max_memory")
        self.options = enumerate_up_to, probes, generator, max_memory
        self.waves = list({wave: None for entry in self.entries for wave in getattr(entry.quantity, "waves", ())})

    def __enter__(self) -> Curvature:  # type: ignore[override]
        if hasattr(self, "results"):
            raise CurvatureError("extend: this block is running already; a block inside it needs its own extend(...)")
        every = named(self.model)  # afresh: parameters may have been frozen or replaced since the last block
        tensors = trained(every)
        self.asked = assigned(self.model, self.entries, tensors, self.only)
        self.tensors = {name: tensors[name] for name in self.asked}
        fields = list({entry.quantity.savefield: None for entry in self.entries})
        self.earlier = {(id(t), field): t.__dict__.pop(field, None) for t in every.values() for field in fields}
        self.settings = Settings(*self.options)
        self.results = Curvature(fields)
        self.held: dict[tuple[str, str], Any] = {}
        self.backwards = 0
        super().__enter__()
        return self.results

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        results, backwards = self.results, self.backwards
        del self.tensors, self.asked, self.settings, self.results, self.held, self.backwards, self.earlier
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
        targets = self._targets(graph, inputs)
        reader = Reader(self, targets)
        sweep = Sweep(graph, targets, self.waves, self.settings, reader.arrive)
        self._settle()
        failure = self._prepare(sweep, reader, loss, gradient)
        if failure is None:
            failure = _failure(in_parts(sweep, graph, self.settings, loss, gradient, reader.gather))
        if failure is None and any([entry.quantity.retains for entry in self.entries]):
            arguments["retain_graph"] = True
        try:
            with sweep if failure is None else nullcontext():
                loss.backward(**arguments)
        except CheckpointError as error:
            raise CurvatureError(_CHECKPOINTED) from error
        finally:
            reader.unhook()
        failure = failure or reader.failure or _failure(sweep)
        if failure is None and not targets:
            failure = CurvatureError(_unreached(self.tensors, inputs))
        if failure is not None:
            reader.withdraw()
            raise failure
        reader.commit()

    def _settle(self) -> None:
        """Make what earlier passes left independent of gradients."""
        for (field, name), value in self.held.items():
            for quantity in self.asked[name]:
                if quantity.total and quantity.savefield == field:
                    self.held[field, name] = quantity.settled(value)

    def _targets(self, graph: Graph, inputs: Any) -> dict[Edge, Target]:
        """Every tensor to follow: all of the graph, or those that ``backward(inputs=...)`` asks for."""
        asked = None if inputs is None else _ids(inputs)
        targets: dict[Edge, Target] = {}
        for name, tensor in self.tensors.items():
            edge = graph.edge_of(tensor)
            if edge is not None and (asked is None or id(tensor) in asked):
                if edge in targets:
                    targets[edge].names.append(name)
                else:
                    targets[edge] = Target(tensor, [name])
        return targets

    def _prepare(self, sweep: Sweep, reader: Reader, loss: Tensor, gradient: Tensor | None) -> Exception | None:
        """What must be known before the backward pass; a failure must not cost the gradients."""
        samples = Samples(sweep.operations, sweep.targets, self.samples)
        refusal = None
        try:
            self._look(samples)
            if any([wave.by_sample for wave in self.waves]):
                try:
                    self._follow(samples, sweep)
                except CurvatureError as error:
                    refusal = error.with_traceback(None)  # its frames would keep the graph
            sweep.kinds = reader.products(loss, gradient, sweep.operations if refusal is None else None)
            if refusal is not None and any([wave.by_sample for wave in sweep.kinds]):
                raise refusal
            for wave in sweep.kinds:
                wave.check(sweep.operations)
            if any([wave.by_sample for wave in sweep.kinds]):
                sweep.seeds = seeds(sweep.operations, sweep.kinds, loss, gradient)
        except CurvatureError as error:
            at = samples.at
            return error if at is None else _located(error, (at.kind, nearest(at.node, sweep.targets)))
        return None

    def _look(self, samples: Samples) -> None:
        """Refuse operations that no wave can pass."""
        for op in samples.operations:
            refused = find(op, "any")
            if refused is not None:
                samples.at = op
                refused.function(op)

    def _follow(self, samples: Samples, sweep: Sweep) -> None:
        samples.follow()
        if samples.doubt and any(entry.quantity.per_sample for entry in self.entries):
            raise CurvatureError(_doubtful(samples.doubt))
        for edge, target in sweep.targets.items():
            target.n, target.axis = samples.n, samples.axes.get(edge)


def _failure(sweep: Sweep) -> Exception | None:
    if sweep.error is None or isinstance(sweep.error, Warning):  # warnings are errors
        return sweep.error
    located = _located(sweep.error, sweep.where)
    located.__cause__ = sweep.error
    return located


_CHECKPOINTED = (
    "extend: this graph uses activation checkpointing, which lets a saved tensor be read only once, so curvature "
    "cannot be computed along with the gradient, and the gradients of this step are incomplete. Run this step without "
    "torch.utils.checkpoint."
)


def _located(error: Exception, where: tuple[Any, Any] | None) -> CurvatureError:
    """The error of a rule or of the default, with the place in the model and a remedy."""
    operation, target = where or ("unknown", None)
    kind = operation if isinstance(operation, str) else operation.__name__
    place = f"operation {kind}, nearest parameter {target.names[0] if target else 'unknown'}: "
    if isinstance(error, CurvatureError):
        return CurvatureError(f"{place}{error}")
    return CurvatureError(
        f"{place}its curvature rule failed with {type(error).__name__}: {error}. Gradients are as without the "
        "block. Compare the rule with the default by curvext.testing.check_rule, or remove it with curvext.unregister, "
        "and the default takes its place."
    )


def _doubtful(sizes: Collection[int]) -> str:
    return (
        f"extend: the loss adds up tensors whose leading dimensions are {' and '.join(map(str, sorted(sizes)))}, so "
        "that it cannot be told how many samples there are; pass samples="
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
