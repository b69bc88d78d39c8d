"""Functions of one entry, y = φ(x): h_x = φ'² h + φ'' g."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import elementwise

LN2, LN10, PI = math.log(2), math.log(10), math.pi


@rule("ExpBackward0")
def exp(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """φ' = φ'' = y: h_x = y (y h + g)."""
    y = op.result
    if h is None:
        return None if g is None else y * g
    return y * (y * h if g is None else torch.addcmul(g, y, h))


elementwise(
    "Exp2Backward0",
    d1=lambda op: op.result * LN2,
    d2=lambda op, slope: slope * LN2,
)
elementwise("Expm1Backward0", d1=lambda op: op.result + 1, d2=lambda op, slope: slope)
elementwise("LogBackward0", d1=lambda op: op.self.reciprocal(), ratio=lambda op, slope: (slope, -1))
elementwise("Log1PBackward0", d1=lambda op: (op.self + 1).reciprocal(), ratio=lambda op, slope: (slope, -1))
elementwise("Log2Backward0", d1=lambda op: (op.self * LN2).reciprocal(), ratio=lambda op, slope: (slope, -LN2))
elementwise("Log10Backward0", d1=lambda op: (op.self * LN10).reciprocal(), ratio=lambda op, slope: (slope, -LN10))

elementwise("SqrtBackward0", d1=lambda op: 0.5 / op.result, ratio=lambda op, slope: (slope.square(), -2))
elementwise("RsqrtBackward0", d1=lambda op: op.result.pow(3) * -0.5, ratio=lambda op, slope: (op.result.square(), -1.5))
elementwise("ReciprocalBackward0", d1=lambda op: -op.result.square(), ratio=lambda op, slope: (op.result, -2))

elementwise("SinBackward0", d1=lambda op: op.self.cos(), d2=lambda op, slope: -op.self.sin())
elementwise("CosBackward0", d1=lambda op: -op.self.sin(), d2=lambda op, slope: -op.self.cos())
elementwise("TanBackward0", d1=lambda op: op.result.square() + 1, ratio=lambda op, slope: (op.result, 2))
elementwise("SinhBackward0", d1=lambda op: op.self.cosh(), d2=lambda op, slope: op.self.sinh())
elementwise("CoshBackward0", d1=lambda op: op.self.sinh(), d2=lambda op, slope: op.self.cosh())
elementwise("TanhBackward0", d1=lambda op: 1 - op.result.square(), ratio=lambda op, slope: (op.result, -2))
elementwise("SigmoidBackward0", d1=lambda op: _logistic(op.result), ratio=lambda op, slope: (0.5 - op.result, 2))

elementwise(
    "AsinBackward0",
    d1=lambda op: (1 - op.self.square()).rsqrt(),
    ratio=lambda op, slope: (op.self * slope.square(), 1),
)
elementwise(
    "AcosBackward0",
    d1=lambda op: -(1 - op.self.square()).rsqrt(),
    ratio=lambda op, slope: (op.self * slope.square(), 1),
)
elementwise(
    "AtanBackward0",
    d1=lambda op: (op.self.square() + 1).reciprocal(),
    ratio=lambda op, slope: (op.self * slope, -2),
)
elementwise(
    "AsinhBackward0",
    d1=lambda op: (op.self.square() + 1).rsqrt(),
    ratio=lambda op, slope: (op.self * slope.square(), -1),
)
elementwise(
    "AcoshBackward0",
    d1=lambda op: (op.self.square() - 1).rsqrt(),
    ratio=lambda op, slope: (op.self * slope.square(), -1),
)
elementwise(
    "AtanhBackward0",
    d1=lambda op: (1 - op.self.square()).reciprocal(),
    ratio=lambda op, slope: (op.self * slope, 2),
)

elementwise("ErfBackward0", d1=lambda op: _normal(op.self, 2 / math.sqrt(PI)), ratio=lambda op, slope: (op.self, -2))
elementwise("ErfcBackward0", d1=lambda op: _normal(op.self, -2 / math.sqrt(PI)), ratio=lambda op, slope: (op.self, -2))
elementwise("LgammaBackward0", d1=lambda op: op.self.digamma(), d2=lambda op, slope: op.self.polygamma(1))
elementwise("DigammaBackward0", d1=lambda op: op.self.polygamma(1), d2=lambda op, slope: op.self.polygamma(2))
elementwise(
    "PolygammaBackward0",
    "PolygammaBackward1",
    d1=lambda op: op.self.polygamma(op.n + 1),
    d2=lambda op, slope: op.self.polygamma(op.n + 2),
)
elementwise("AbsBackward0", d1=lambda op: op.self.sgn())


def _logistic(y: Tensor) -> Tensor:
    """y (1 - y)."""
    return torch.addcmul(y, y, y, value=-1)


def _normal(x: Tensor, scale: float) -> Tensor:
    """scale · exp(-x²)."""
    return scale * torch.exp(-x.square())
