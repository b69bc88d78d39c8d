"""Constructors of rules: operations of one structure share one rule.

* ``selection``: every entry of J is 0 or 1 (views, gathers, sums, max pooling): J∘J = J.
* ``scaling``: every input entry feeds at most one output entry, linearly (means, dropout): (J∘J)ᵀ h = Jᵀ1 ∘ Jᵀh.
* ``pointwise``: every input entry feeds one output entry: both terms of (2) from two products, no formula.
* ``stretching``: y = c ∘ x with c piecewise constant: two products. ``constant``: no derivative at all.
* ``elementwise``: y = φ(x), with φ' and φ'' given as formulas; ``relative``: with φ''/φ'.
* ``decomposed``: a fused kernel, carried out again in steps; each step has its own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..graph import Operation
from ..registry import Layout, rule
from .default import others_fixed

Derivative = Callable[..., Tensor]


def selection(*names: str, outputs: str = "first", coincident: bool = True, layout: Layout = "") -> None:
    """Every entry of J is 0 or 1, so J∘J = J and h_x = Jᵀ h; nothing bends. Complex tensors are no different.

    Where several inputs are added up, ``coincident`` must be false: x + x has slope 2.
    """
    for wave in ("diagonal", "complex"):
        rule(*names, wave=wave, outputs=outputs, coincident=coincident, linear=True, additive=True, layout=layout)(
            select_all if outputs == "all" else select
        )


def select(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """J has entries 0 and 1, so J∘J = J: h_x = Jᵀ h."""
    return None if h is None else op.vjp(h, *[None] * (len(op.outputs) - 1))


def select_all(op: Operation, g: Any, h: Sequence[Tensor | None] | None) -> Any:
    """J has entries 0 and 1, so J∘J = J: h_x = Jᵀ h."""
    return None if h is None else op.vjp(*h)


def scaling(*names: str) -> None:
    """y is linear and each entry of each input feeds at most one output entry, with any slope."""
    rule(*names, coincident=True, linear=True, additive=True)(scale)


def scale(op: Operation, g: Tensor | None, h: Tensor | None) -> list[Tensor | None] | None:
    """Linear, each input entry feeds one output entry: h_x = (Jᵀ1) ∘ (Jᵀh)."""
    return None if h is None else pointwise_rule(op, None, h)


def pointwise(*names: str) -> None:
    """Each entry of each input feeds exactly one output entry; see :func:`pointwise_rule`."""
    rule(*names, how="structure", coincident=True, separable=True)(pointwise_rule)


def pointwise_rule(op: Operation, g: Tensor | None, h: Tensor | None) -> list[Tensor | None]:
    """Each input entry feeds one output entry: h_x = (Jᵀ1) ∘ (Jᵀh) + ∂(Jᵀg)/∂x · 1, from the node itself."""
    waves: list[Tensor | None] = [None] * len(op.edges)
    rest = [None] * (len(op.outputs) - 1)
    if h is not None:
        ones, pulled = op.vjp(torch.ones_like(h), *rest), op.vjp(h, *rest)
        for group in op.groups:
            if ones[group[0]] is None:
                continue
            if len(group) == 1:  # unsummed over broadcast dimensions, hence exact there too
                waves[group[0]] = ones[group[0]] * pulled[group[0]]  # type: ignore[operator]
            else:
                waves[group[0]] = sum(ones[i] for i in group) * sum(pulled[i] for i in group)  # type: ignore[misc, call-overload]
    if g is not None:
        for i, bend in bending(op, g).items():
            wave = waves[i]
            waves[i] = bend if wave is None else op.reduced(wave, i) + bend
    return waves


def bending(
    op: Operation, g: Tensor | Sequence[Tensor | None], weights: Callable[[Tensor], Tensor] = torch.ones_like
) -> dict[int, Tensor]:
    """∂(Jᵀg)/∂x · v, by input: with v = 1 the second term of (2) if ∂(Jᵀg)/∂x is diagonal. Linear inputs are left out.

    Args:
        g: the gradient at the first output, or at each.
        weights: makes v from a tensor of its shape.
    """
    bends: dict[int, Tensor] = {}
    with torch.enable_grad():
        gs = [g, *[None] * (len(op.outputs) - 1)] if isinstance(g, Tensor) else g
        outs = op.vjp(*(None if v is None else v.detach() for v in gs))
        for group in op.groups:
            # reduced before the derivative: a broadcast entry is one variable of many outputs, diagonal all the same
            parts = [op.reduced(out, i) for i in group if (out := outs[i]) is not None and out.requires_grad]
            if not parts:
                continue
            i, out = group[0], sum(parts[1:], start=parts[0])
            with others_fixed(op, i):
                edge = GradientEdge(*op.edges[i])
                bend = torch.autograd.grad(out, edge, weights(out), retain_graph=True, allow_unused=True)[0]
            if bend is not None:
                bends[i] = bend.detach()
    return bends


def stretching(*names: str) -> None:
    """y = c ∘ x with c piecewise constant: J is symmetric, so h_x = J(J h)."""
    rule(*names, coincident=True, linear=True, additive=True)(stretch)


def stretch(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = c ∘ x, c piecewise constant: h_x = c² h."""
    if h is None:
        return None
    rest = [None] * (len(op.outputs) - 1)
    return op.vjp(op.vjp(h, *rest)[0], *rest)


def factor_fixed(i: int, j: int) -> Callable[[Operation], bool]:
    """Whether one of two inputs that are multiplied is fixed, so that y is linear in the others together."""
    return lambda op: not (op.needs[i] and op.needs[j])


def constant(*names: str) -> None:
    """y does not change with x, or only by jumps: no wave."""
    for wave in ("diagonal", "complex"):
        rule(*names, wave=wave, coincident=True, linear=True, additive=True)(zero)


def zero(op: Operation, g: Tensor | None, h: Tensor | None) -> None:
    """y is piecewise constant: h_x = 0."""


def elementwise(*names: str, d1: Derivative, d2: Derivative | None = None) -> None:
    """y = φ(x): h_x = φ'² h + φ'' g. ``d1(op)`` is φ'; ``d2(op, φ')`` is φ'', absent if φ is piecewise linear."""

    def elementwise_rule(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
        """y = φ(x): h_x = φ'² h + φ'' g."""
        if h is None and (d2 is None or g is None):
            return None
        slope = d1(op)
        pulled = None if h is None else slope * slope * h
        return pulled if d2 is None or g is None else bent(pulled, d2(op, slope), g)

    rule(*names, linear=d2 is None, separable=True)(elementwise_rule)


def relative(*names: str, ratio: Callable[[Operation], tuple[Tensor, float]]) -> None:
    """y = φ(x) with φ'' = c ρ φ', where ``ratio(op) = (ρ, c)``; φ' comes from the node, in one step."""

    def relative_rule(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
        """y = φ(x), ρ = φ''/φ': h_x = φ' (φ' h + ρ g)."""
        if g is None:
            return stretch(op, None, h)
        rest = [None] * (len(op.outputs) - 1)
        pulled = None if h is None else op.vjp(h, *rest)[0]
        rho, c = ratio(op)
        return op.vjp(bent(pulled, rho, g, c), *rest)

    rule(*names, separable=True)(relative_rule)


def bent(pulled: Tensor | None, bend: Tensor, g: Tensor, factor: float = 1) -> Tensor:
    """The sum of both terms of (2), ``pulled + factor · bend ∘ g``, where the first may be zero."""
    if pulled is not None:
        return torch.addcmul(pulled, bend, g, value=factor)
    return bend * g if factor == 1 else bend * g * factor


def decomposed(*names: Any, outputs: str = "all") -> Callable[[Callable[..., Any]], Any]:
    """Register a fused kernel by the steps it consists of.

    The decorated function gets the operation and returns ``(inputs, outputs)``: one leaf per input of the operation
    (``None`` where it has none), and the outputs computed from them again. Equation (2) is applied to each step, so
    the result does not depend on which kernel was chosen.
    """

    def register(steps: Callable[..., Any]) -> Callable[..., Any]:
        def decomposed_rule(op: Operation, g: Any, h: Any) -> Any:
            from ..diagonal import through  # which applies rules: imported only when one is applied

            with torch.enable_grad():
                inputs, results = steps(op)
            return through(results, inputs, g, h, op.settings)

        decomposed_rule.__doc__ = steps.__doc__
        return rule(*names, how="decomposed", outputs=outputs)(decomposed_rule)

    return register
