"""Constructors of rules: operations of one structure share one rule.

* ``selection``: every entry of J is 0 or 1 (views, gathers, sums, max pooling): J∘J = J.
* ``scaling``: every input entry feeds at most one output entry, linearly (means, dropout): (J∘J)ᵀ h = Jᵀ1 ∘ Jᵀh.
* ``pointwise``: every input entry feeds one output entry: both terms of (2) from two products, no formula.
* ``elementwise``: y = φ(x), with φ' and φ'' given as formulas.
* ``decomposed``: a fused kernel, carried out again in steps; each step has its own rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..graph import Operation
from ..registry import rule
from .default import others_fixed

Derivative = Callable[..., Tensor]


def selection(*names: str, outputs: str = "first") -> None:
    """Every entry of J is 0 or 1, so J∘J = J and h_x = Jᵀ h; nothing bends."""
    rule(*names, how="closed form", outputs=outputs, coincident=True)(select_all if outputs == "all" else select)


def select(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """J has entries 0 and 1, so J∘J = J: h_x = Jᵀ h."""
    return None if h is None else op.vjp(h, *[None] * (len(op.outputs) - 1))


def select_all(op: Operation, g: Any, h: Sequence[Tensor | None] | None) -> Any:
    """J has entries 0 and 1, so J∘J = J: h_x = Jᵀ h."""
    return None if h is None else op.vjp(*h)


def scaling(*names: str) -> None:
    """y is linear and each entry of each input feeds at most one output entry, with any slope."""
    rule(*names, how="closed form", coincident=True)(scale)


def scale(op: Operation, g: Tensor | None, h: Tensor | None) -> list[Tensor | None] | None:
    """Linear, each input entry feeds one output entry: h_x = (Jᵀ1) ∘ (Jᵀh)."""
    return None if h is None else pointwise_rule(op, None, h)


def pointwise(*names: str) -> None:
    """Each entry of each input feeds exactly one output entry; see :func:`pointwise_rule`."""
    rule(*names, how="structure", coincident=True)(pointwise_rule)


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
        _add_bending(op, g, waves)
    return waves


def _add_bending(op: Operation, g: Tensor, waves: list[Tensor | None]) -> None:
    with torch.enable_grad():
        outs = op.vjp(g.detach(), *[None] * (len(op.outputs) - 1))
        for group in op.groups:
            # reduced before the derivative: a broadcast entry is one variable of many outputs, diagonal all the same
            parts = [out for i in group if (out := outs[i]) is not None and out.requires_grad]
            if not parts:
                continue
            i, out = group[0], sum(parts[1:], start=parts[0])
            with others_fixed(op, i):
                bend = torch.autograd.grad(
                    out, GradientEdge(*op.edges[i]), torch.ones_like(out), retain_graph=True, allow_unused=True
                )[0]
            if bend is not None:
                wave = waves[i]
                waves[i] = bend.detach() if wave is None else op.reduced(wave, i) + bend.detach()


def elementwise(*names: str, d1: Derivative, d2: Derivative | None = None) -> None:
    """y = φ(x): h_x = φ'² h + φ'' g. ``d1(op)`` is φ'; ``d2(op, φ')`` is φ'', absent if φ is piecewise linear."""

    def elementwise_rule(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
        """y = φ(x): h_x = φ'² h + φ'' g."""
        if h is None and (d2 is None or g is None):
            return None
        slope = d1(op)
        pulled = None if h is None else slope * slope * h
        if d2 is None or g is None:
            return pulled
        bend = d2(op, slope)
        return bend * g if pulled is None else torch.addcmul(pulled, bend, g)

    rule(*names)(elementwise_rule)


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
