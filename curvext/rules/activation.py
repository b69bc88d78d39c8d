"""Activations: h_x = φ'² h + φ'' g, from PyTorch's fused backward kernels where they save steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import bent, pointwise_rule, relative, selection, stretch, stretching

aten = torch.ops.aten

selection(
    "ReluBackward0",
    "ThresholdBackward0",
    "ThresholdBackward1",
    "HardtanhBackward0",
    "HardshrinkBackward0",
    "SoftshrinkBackward0",
)
stretching(
    "HardsigmoidBackward0",
    "RreluWithNoiseBackward0",
    "RreluWithNoiseBackward1",
    "RreluWithNoiseFunctionalBackward0",
    "NativeDropoutBackward0",
    "FusedDropoutBackward0",
)


relative("SoftplusBackward0", ratio=lambda op: (1 - _softplus_slope(op), op.beta))
relative("LogSigmoidBackward0", ratio=lambda op: (torch.sigmoid(op.self), -1))


def _softplus_slope(op: Operation) -> Tensor:
    """sigmoid βx, 1 above the threshold."""
    return aten.softplus_backward(torch.ones_like(op.self), op.self, op.beta, op.threshold)


@rule("LeakyReluBackward0", linear=True)
def leaky_relu(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """φ' = 1 or a: h_x = h or a² h."""
    return None if h is None else aten.leaky_relu_backward(h, op.self, op.negative_slope**2, False)


@rule("LeakyReluBackward1", linear=True)
def leaky_relu_(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """φ' = 1 or a, in place (y has the sign of x): h_x = h or a² h."""
    return None if h is None else aten.leaky_relu_backward(h, op.result, op.negative_slope**2, False)


@rule("PreluKernelBackward0", coincident=True, linear=True)
def prelu(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = x or w x: h_x = h or w² h, h_w = 0 or x² h; linear in each."""
    if op.coincident:
        return pointwise_rule(op, g, h)
    if h is None:
        return None
    x, w = op.self, op.weight
    h_x, xh = aten._prelu_kernel_backward(h, x, w.square())  # the second is 0 or x h
    return h_x, (x * xh if op.needs[1] else None)


@rule("EluBackward0", separable=True)
def elu(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """φ'' = κ φ' where x < 0, κ the input scale: h_x = φ' (φ' h + κ g [x < 0])."""
    return _elu(op, g, h, op.self, op.input_scale)


@rule("EluBackward1", separable=True)
def elu_(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """φ'' = κ φ' where x < 0, in place (y has the sign of x): h_x = φ' (φ' h + κ g [x < 0])."""
    return _elu(op, g, h, op.result, op.input_scale)


@rule("CeluBackward0", separable=True)
def celu(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """φ'' = φ'/α where x < 0: h_x = φ' (φ' h + g/α [x < 0])."""
    return _elu(op, g, h, op.self, 1 / op.alpha)


@rule("CeluBackward1", separable=True)
def celu_(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """φ'' = φ'/α where x < 0, in place (y has the sign of x): h_x = φ' (φ' h + g/α [x < 0])."""
    return _elu(op, g, h, op.result, 1 / op.alpha)


def _elu(op: Operation, g: Tensor | None, h: Tensor | None, x: Tensor, ratio: float) -> Any:
    if g is None:
        return stretch(op, None, h)
    below = aten.hardtanh_backward(g, x, -math.inf, 0)  # g where x < 0
    pulled: Any = 0 if h is None else op.vjp(h)[0]
    return op.vjp(torch.add(pulled, below, alpha=ratio))


@rule("GeluBackward0", separable=True)
def gelu(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = x Φ(x): φ'' = (2 - x²) exp(-x²/2) / √2π; by the chain rule for the tanh form."""
    x, form, pulled = op.self, op.approximate, None
    if h is not None:
        slope = aten.gelu_backward(torch.ones_like(x), x, approximate=form)
        pulled = slope.square_() * h
    if g is None:
        return pulled
    if form == "tanh":
        return bent(pulled, _tanh_gelu_bend(x), g)
    square = x.clamp(-40, 40).square()  # beyond, φ'' is zero in any dtype, but its factors overflow in float16
    return bent(pulled, (square * -0.5).exp_().mul_(2 - square), g, 1 / math.sqrt(2 * math.pi))


def _tanh_gelu_bend(x: Tensor) -> Tensor:
    """φ'' of y = x (1 + t)/2, t = tanh u, u = c (x + a x³): (1 - t²) (u' + x (u''/2 - t u'²))."""
    c, a = math.sqrt(2 / math.pi), 0.044715
    x = x.clamp(-10, 10)  # as above
    square = x.square()
    d1 = c + (3 * a * c) * square
    t = torch.tanh(c * x * (1 + a * square))
    return (1 - t.square()) * (d1 + x * ((3 * a * c) * x - t * d1.square()))


@rule("SiluBackward0", separable=True)
def silu(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = x s, s = sigmoid x: φ'' = s (1-s) (2 + x - 2 x s)."""
    x, pulled = op.self, None
    if h is not None:
        slope = aten.silu_backward(torch.ones_like(x), x)
        pulled = slope.square_() * h
    if g is None:
        return pulled
    s = torch.sigmoid(x)
    return bent(pulled, aten.sigmoid_backward(torch.addcmul(x + 2, x, s, value=-2), s), g)


@rule("MishBackward0", separable=True)
def mish(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = x t, t = tanh softplus x, s = sigmoid x, d = s (1-t²): φ' = t + x d, φ'' = d (2 + x (1 - s - 2 t s))."""
    if g is None and h is None:
        return None
    x = op.self
    s, t = torch.sigmoid(x), torch.tanh(torch.nn.functional.softplus(x))
    d = s * (1 - t.square())
    pulled = None if h is None else torch.addcmul(t, x, d).square_() * h
    return pulled if g is None else bent(pulled, d * (2 + x * (1 - s * (1 + 2 * t))), g)


@rule("HardswishBackward0", separable=True)
def hardswish(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """φ'' = 1/3 where |x| < 3: h_x = φ'² h + g/3 [|x| < 3]."""
    x = op.self
    pulled = None if h is None else aten.hardswish_backward(aten.hardswish_backward(h, x), x)
    if g is None:
        return pulled
    inside = aten.hardtanh_backward(g, x, -3, 3)
    return inside / 3 if pulled is None else torch.add(pulled, inside, alpha=1 / 3)


@rule("GluBackward0")
def glu(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = a s(b): h_a = s² h, h_b = a s' (a s' h + (1-2s) g)."""
    a, b = op.self.chunk(2, op.dim)
    s = torch.sigmoid(b)
    slope = a * (s - s.square())
    zero = torch.zeros_like(s)
    h_b = None if h is None else slope * h
    if g is not None:
        h_b = bent(h_b, 0.5 - s, g, 2)
    return None if h_b is None else torch.cat([zero if h is None else s.square() * h, slope * h_b], op.dim)
