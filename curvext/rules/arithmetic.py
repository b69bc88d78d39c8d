"""Sums, products, quotients, powers, and choices between two tensors.

A function that is linear in each of its inputs bends in none of them: mixed derivatives are not in the diagonal. Where
one tensor fills several inputs (``x * x``), it does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import bent, pointwise_rule, scaling, selection

Waves = tuple[Tensor | None, ...]

# Choices of one input for each entry.
selection(
    "ClampBackward0",
    "ClampBackward1",
    "ClampMaxBackward0",
    "ClampMaxBackward1",
    "ClampMinBackward0",
    "ClampMinBackward1",
    "FmaxBackward0",
    "FminBackward0",
    "MaskedFillBackward0",
    "MaskedFillBackward1",
    "WhereBackward0",
)
scaling("MaximumBackward0", "MinimumBackward0")  # a tie passes half of the gradient to each


def _sum(op: Operation, h: Tensor | None, a: float, b: float) -> Tensor | Waves | None:
    """y = α a + β b: h_a = α² h, h_b = β² h."""
    if h is None:
        return None
    if op.coincident:
        return _times(h, (a + b) ** 2)
    return _times(h, a * a), _times(h, b * b)


def _times(h: Tensor, factor: float) -> Tensor:
    return h if factor == 1 else h * factor


@rule("AddBackward0", coincident=True, linear=True, additive=True)
def add(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | Waves | None:
    """y = a + α b: h_a = h, h_b = α² h."""
    return _sum(op, h, 1, op.alpha)


@rule("SubBackward0", coincident=True, linear=True, additive=True)
def sub(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | Waves | None:
    """y = a - α b: h_a = h, h_b = α² h."""
    return _sum(op, h, 1, -op.alpha)


@rule("RsubBackward0", coincident=True, linear=True, additive=True)
def rsub(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | Waves | None:
    """y = b - α a: h_a = α² h, h_b = h."""
    return _sum(op, h, -op.alpha, 1)


@rule("AddBackward1", "SubBackward1", "NegBackward0", "NegViewBackward0", linear=True)
def shift(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = ± x + c: h_x = h."""
    return h


@rule("RsubBackward1", linear=True)
def rsub_number(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = c - α x: h_x = α² h."""
    return None if h is None else _times(h, op.alpha**2)


@rule("MulBackward0", coincident=True, separable=True, linear=True)
def mul(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | Waves | None:
    """y = a b: h_a = b² h, h_b = a² h; of x x: 4 x² h + 2 g."""
    if op.coincident:
        return _square(op.self, g, h)
    if h is None:
        return None
    return (  # a saved Python number is a tensor whose own square would be computed in the default dtype
        h * op.other * op.other if op.needs[0] else None,
        h * op.self * op.self if op.needs[1] else None,
    )


@rule("MulBackward1", linear=True)
def mul_number(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = c x: h_x = c² h."""
    return None if h is None else h * op.other**2


@rule("DivBackward0", coincident=True, linear=lambda op: not op.needs[1], separable=True)
def div(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves | None:
    """y = a / b: h_a = h / b², h_b = y (y h + 2 g) / b²; nothing for x / x."""
    if op.coincident:
        return None
    b = op.other  # not squared: a saved Python number would be in the default dtype
    h_a = h / b / b if op.needs[0] and h is not None else None
    return h_a, (_divisor(op.self / b, b, g, h) if op.needs[1] else None)


def _divisor(q: Tensor, c: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """The wave of c where q = b / c."""
    if h is None:
        return None if g is None else 2 * q * g / c.square()
    return q * (q * h if g is None else torch.add(q * h, g, alpha=2)) / c.square()


@rule("DivBackward2", coincident=True, linear=lambda op: not op.needs[1], separable=True)
def div_rounded(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves | None:
    """y = a / b, or rounded, hence without derivative."""
    return div(op, g, h) if op.rounding_mode is None else None


@rule("DivBackward1", linear=True)
def div_number(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = x / c: h_x = h / c²."""
    return None if h is None else h / op.other**2


@rule("DivBackward3", linear=True)
def div_number_rounded(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = x / c, or rounded, hence without derivative."""
    return div_number(op, g, h) if op.rounding_mode is None else None


def _square(x: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = x²: h_x = 4 x² h + 2 g."""
    if h is None:
        return None if g is None else 2 * g
    return 4 * x.square() * h if g is None else torch.addcmul(2 * g, x.square(), h, value=4)


@rule("PowBackward0", separable=True)
def pow_number(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = xⁿ: φ' = n xⁿ⁻¹, φ'' = n (n-1) xⁿ⁻²."""
    x, n = op.self, op.exponent
    if n == 0:
        return None
    if n == 1:
        return h
    if n == 2:
        return _square(x, g, h)
    bend = None if g is None and n < 2 else x.pow(n - 2)
    pulled = None
    if h is not None:
        slope = x.pow(n - 1) if bend is None or n < 2 else bend * x  # below 2, 0 times infinity at x = 0
        pulled = slope.square() * h * n**2
    return pulled if g is None or bend is None else bent(pulled, bend, g, n * (n - 1))


@rule("PowBackward1", coincident=True, separable=True)
def pow_tensor(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = xⁿ: h_x as for a number n (0 where n = 0), h_n = λ y (λ y h + λ g), λ = log x."""
    if op.coincident:
        return pointwise_rule(op, g, h)
    if g is None and h is None:
        return None
    x, n = op.self, op.exponent
    h_x = h_n = None
    if op.needs[0]:
        slope = (n * x.pow(n - 1)).masked_fill(n == 0, 0)
        h_x = None if h is None else slope.square() * h
        if g is not None:
            h_x = bent(h_x, (n * (n - 1) * x.pow(n - 2)).masked_fill((n == 0) | (n == 1), 0), g)
    if op.needs[1]:
        y = op.result
        log = x.to(y.dtype).log().masked_fill((x == 0) & (n >= 0), 0)
        pulled = None if h is None else log * y * h
        h_n = log * y * (pulled if g is None else bent(pulled, log, g))
    return h_x, h_n


@rule("PowBackward2", separable=True)
def number_pow(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = cˣ, λ = log c: h_x = λ² y (y h + g); nothing for 0ˣ."""
    if op.self == 0:
        return None
    y, factor = op.result, (math.log(op.self) if op.self > 0 else math.nan) ** 2
    if h is None:
        return None if g is None else factor * y * g
    return factor * y * (y * h if g is None else torch.addcmul(g, y, h))


@rule("AddcmulBackward0", coincident=True, separable=True, linear=True)
def addcmul(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = a + v b c: h_a = h, h_b = v² c² h, h_c = v² b² h."""
    if op.coincident:
        return pointwise_rule(op, g, h)
    if h is None:
        return None
    scaled = _times(h, op.value**2) if any(op.needs[1:]) else h
    return (
        h,
        scaled * op.tensor2.square() if op.needs[1] else None,
        scaled * op.tensor1.square() if op.needs[2] else None,
    )


@rule("AddcdivBackward0", coincident=True, separable=True)
def addcdiv(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = a + q, q = v b / c: h_a = h, h_b = v² h / c², h_c = q (q h + 2 g) / c²."""
    if op.coincident:
        return pointwise_rule(op, g, h)
    c: Any = op.tensor2 if any(op.needs[1:]) else None  # not saved otherwise
    h_b = h * op.value**2 / c.square() if op.needs[1] and h is not None else None
    return h, h_b, (_divisor(op.value * op.tensor1 / c, c, g, h) if op.needs[2] else None)


@rule("LerpBackward0", coincident=True, linear=True, additive=True)
def lerp_number(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = (1-w) a + w b: h_a = (1-w)² h, h_b = w² h."""
    return _sum(op, h, 1 - op.weight, op.weight)


@rule("LerpBackward1", coincident=True, linear=True)
def lerp(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = (1-w) a + w b: h_a = (1-w)² h, h_b = w² h, h_w = (b-a)² h."""
    if op.coincident:
        return pointwise_rule(op, g, h)
    if h is None:
        return None
    return (
        (1 - op.weight).square() * h if op.needs[0] else None,
        op.weight.square() * h if op.needs[1] else None,
        (op.end - op.self).square() * h if op.needs[2] else None,
    )
