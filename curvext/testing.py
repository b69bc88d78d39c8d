"""Checkers for rules and quantities: what curvext's own tests call, and what tests of third-party rules should call.

All of them compare with the default's exact enumeration, which knows no operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import registry
from .columns import reads_columns
from .diagonal import bends, pass_diagonal
from .errors import CurvatureError
from .extend import extend
from .graph import Graph, Operation, edge_of
from .quantities import Quantity
from .rules.default import default
from .rules.structure import bending
from .selection import Model
from .sweep import Settings
from .testing_factor import check_columns, check_readings
from .testing_operators import check_operator

EXACT = 1 << 40


@contextmanager
def without_rules() -> Iterator[None]:
    """Within, no operation has a rule: everything goes through the default."""
    kept = dict(registry.RULES)
    registry.RULES.clear()
    try:
        yield
    finally:
        registry.RULES.update(kept)


def check_rule(
    function: Callable[..., Any], *inputs: Tensor, rtol: float = 1e-9, atol: float = 1e-10, seed: int = 0
) -> set[Any]:
    """Compare every rule in the graph of ``function(*inputs)`` with the default's exact enumeration.

    Each operation of the recorded graph is given random ``g`` and signed random ``h``, both together and one at a time.

    Args:
        function: returns a tensor or a sequence of tensors.
        inputs: leaves; those that require a gradient are followed. Use float64 and few entries.

    Returns:
        The operations (node names or ``autograd.Function`` classes) whose rule was checked; on complex tensors,
        ``(name, "complex")``; where PyTorch cannot differentiate the node twice, so that only the first term of
        equation (2) was compared, ``(name, "first term")``.

    Raises:
        AssertionError: naming the operation, the input and the terms that differ.
    """
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    roots = [edge_of(y)[0] for y in outputs if isinstance(y, Tensor) and y.requires_grad]
    targets = {edge_of(x): i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    generator = torch.Generator().manual_seed(seed)
    checked = set()
    for op in Graph(roots).operations(targets, Settings(enumerate_up_to=EXACT)):
        rule = registry.find_diagonal(op)
        if rule is None or rule.how == "refused":
            continue
        both = check_operation(op, generator, rtol, atol)
        kind = op.kind if (op.kind, "diagonal") in registry.RULES else op.name
        kind = (kind, "complex") if op.is_complex else kind
        checked.add(kind if both else (kind, "first term"))
    return checked


def check_operation(op: Operation, generator: torch.Generator, rtol: float = 1e-9, atol: float = 1e-10) -> bool:
    """Compare the rule of one recorded operation with the default (its steps with theirs, if it is decomposed).

    Returns:
        Whether both terms of equation (2) were compared: PyTorch cannot differentiate every node twice.
    """
    rule = registry.find_diagonal(op)
    assert rule is not None, f"{op.kind} has no rule"
    every = len(op.outputs) if rule.outputs == "all" else 1
    g, h = _draw(op, every, generator), _draw(op, every, generator)
    _check_promises(op, rule, g, generator, atol)
    none: list[Tensor | None] = [None] * len(op.outputs)
    both = True
    for label, g_, h_ in (("g and h", g, h), ("h alone", None, h), ("g alone", g, none)):
        with torch.no_grad():
            got = list(pass_diagonal(op, g_, h_))
            if rule.how == "decomposed":
                with without_rules_but(op):
                    want = list(pass_diagonal(op, g_, h_))
            else:
                try:
                    want = default(op, g_, None if label == "g alone" else h_)
                except CurvatureError:
                    if g_ is None:
                        raise
                    both = False
                    continue
        _compare(op, got, want, label, rtol, atol)
    return both


def _check_promises(
    op: Operation, rule: registry.Rule, g: list[Tensor | None], generator: torch.Generator, atol: float
) -> None:
    """∂(Jᵀg)/∂x is zero if the rule is linear, D with Dv = (D1) ∘ v if separable; Jᵀg is fixed if it is additive."""
    drawn: dict[torch.Size, Tensor] = {}

    def v(like: Tensor) -> Tensor:
        if like.shape not in drawn:
            drawn[like.shape] = torch.randn(like.shape, generator=generator, dtype=like.dtype)
        return drawn[like.shape]

    try:
        once, along = (bending(op, g, weights) for weights in (torch.ones_like, v))
        mixed = _changes(op, g, v) if rule.is_additive(op) else []
    except RuntimeError:  # PyTorch cannot differentiate every node twice
        return

    def near(got: Tensor, want: Tensor, msg: str) -> None:
        least = max(atol, rounding(got.dtype))
        torch.testing.assert_close(got, want, rtol=least, atol=least, msg=msg)

    for i, bend in along.items():
        if not bends(op):
            near(bend, torch.zeros_like(bend), msg=f"{op.kind} is said to be linear, but bends in input {i}")
        elif rule.separable:
            near(bend, once[i] * v(bend), msg=f"{op.kind} is said to be separable, but input {i} is put together")
    for bend in mixed:
        near(bend, torch.zeros_like(bend), msg=f"{op.kind} is said to be additive, but bends")


def _changes(op: Operation, g: list[Tensor | None], v: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The derivatives of ⟨v, Jᵀg⟩ in the inputs."""
    with torch.enable_grad():
        parts = [part for part in op.vjp(*g) if part is not None and part.requires_grad]
    edges = [GradientEdge(*edge) for _, edge in op.below]
    options = {"retain_graph": True, "allow_unused": True}
    found = torch.autograd.grad(parts, edges, [v(part) for part in parts], **options) if parts else ()
    return [bend for bend in found if bend is not None]


@contextmanager
def without_rules_but(op: Operation) -> Iterator[None]:
    """Within, only this operation keeps its rule."""
    kept = registry.find(op, "diagonal")
    assert kept is not None
    with without_rules():
        registry.RULES[op.kind, "diagonal"] = kept
        try:
            yield
        finally:
            registry.unregister(op.kind)


def _draw(op: Operation, every: int, generator: torch.Generator) -> list[Tensor | None]:
    draws: list[Tensor | None] = []
    for k, meta in enumerate(op.outputs):
        floating = meta.dtype.is_floating_point or meta.dtype.is_complex
        draws.append(torch.randn(meta.shape, dtype=meta.dtype, generator=generator) if k < every and floating else None)
    return draws


def _compare(
    op: Operation, got: Sequence[Tensor | None], want: Sequence[Tensor | None], label: str, rtol: float, atol: float
) -> None:
    for group in op.groups:
        shape, dtype = op.inputs[group[0]].shape, op.inputs[group[0]].dtype
        least = rounding(dtype)
        sums = []
        for waves in (got, want):
            present = [op.reduced(waves[i], i) for i in group if i < len(waves) and waves[i] is not None]  # type: ignore[arg-type]
            sums.append(sum(present[1:], start=present[0]) if present else torch.zeros(shape))
        torch.testing.assert_close(
            sums[0],
            sums[1],
            rtol=max(rtol, least),
            atol=max(atol, least),
            check_dtype=False,
            equal_nan=True,
            msg=_after(f"{op.kind}, input {group[0]}, {label}: rule != default."),
        )


def rounding(dtype: torch.dtype) -> float:
    """The least tolerance that makes sense: some kernels have low precision only."""
    return min(1000 * torch.finfo(dtype).eps, 1e-2)


def _after(context: str) -> Callable[[str], str]:
    return lambda text: f"{context} {text}"


def check_quantity(
    quantity: Quantity,
    model: Model,
    loss: Callable[[], Tensor],
    rtol: float = 1e-8,
    atol: float = 1e-10,
    **options: Any,
) -> dict[str, Any]:
    """Compare a quantity computed with the registered rules with the same quantity by the default alone.

    If it reads the factor wave and has ``join``, also with columns that are carried one by one. A result must not
    depend on which columns with Σᵥ Sᵥ Sᵥᵀ = B they are (so :class:`~curvext.SqrtGGNExact` fails), nor be random.

    Args:
        quantity: the quantity.
        model: what ``extend`` takes; small, in float64.
        loss: closure that returns the loss; called several times, so it must be deterministic.
        options: of ``extend``, such as ``samples``.

    Returns:
        The results, by parameter name.

    Raises:
        AssertionError: naming the parameter whose results differ.
    """

    def results(**more: Any) -> dict[str, Any]:
        with extend(model, quantity, enumerate_up_to=EXACT, **options, **more) as curvature:
            loss().backward()
        return dict(curvature[quantity.savefield])

    got = results()
    with without_rules():
        others = {"without rules": results()}
    if reads_columns(quantity) and not quantity.undivided():
        others["columns one by one"] = results(max_memory=1)
    for how, want in others.items():
        assert got.keys() == want.keys(), f"results for {sorted(got)}, and for {sorted(want)} {how}"
        for name in want:
            context = _after(f"{quantity} of {name}, against {how}:")
            torch.testing.assert_close(got[name], want[name], rtol=rtol, atol=atol, msg=context)
    return got


__all__ = [
    "check_columns",
    "check_operation",
    "check_operator",
    "check_quantity",
    "check_readings",
    "check_rule",
    "without_rules",
]
