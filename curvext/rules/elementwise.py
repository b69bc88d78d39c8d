"""Functions of one entry, y = φ(x): h_x = φ'² h + φ'' g."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import elementwise, relative

LN2 = math.log(2)


@rule("ExpBackward0", separable=True)
def exp(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """φ' = φ'' = y: h_x = y (y h + g)."""
    y = op.result
    if h is None:
        return None if g is None else y * g
    return y * (y * h if g is None else torch.addcmul(g, y, h))


elementwise("Exp2Backward0", d1=lambda op: op.result * LN2, d2=lambda op, slope: slope * LN2)
elementwise("Expm1Backward0", d1=lambda op: op.result + 1, d2=lambda op, slope: slope)
relative("LogBackward0", "Log2Backward0", "Log10Backward0", ratio=lambda op: (op.self.reciprocal(), -1))
relative("Log1PBackward0", ratio=lambda op: ((op.self + 1).reciprocal(), -1))

relative("SqrtBackward0", ratio=lambda op: (op.result.square().reciprocal(), -0.5))
relative("RsqrtBackward0", ratio=lambda op: (op.result.square(), -1.5))
relative("ReciprocalBackward0", ratio=lambda op: (op.result, -2))

elementwise("SinBackward0", d1=lambda op: op.self.cos(), d2=lambda op, slope: -op.self.sin())
elementwise("CosBackward0", d1=lambda op: -op.self.sin(), d2=lambda op, slope: -op.self.cos())
relative("TanBackward0", ratio=lambda op: (op.result, 2))
relative("SinhBackward0", ratio=lambda op: (op.self.tanh(), 1))
elementwise("CoshBackward0", d1=lambda op: op.self.sinh(), d2=lambda op, slope: op.self.cosh())
relative("TanhBackward0", ratio=lambda op: (op.result, -2))
relative("SigmoidBackward0", ratio=lambda op: (0.5 - op.result, 2))

relative("AsinBackward0", "AcosBackward0", ratio=lambda op: (op.self / (1 - op.self.square()), 1))
relative("AtanBackward0", ratio=lambda op: (op.self / (1 + op.self.square()), -2))
relative("AsinhBackward0", ratio=lambda op: (op.self / (1 + op.self.square()), -1))
relative("AcoshBackward0", ratio=lambda op: (op.self / (op.self.square() - 1), -1))
relative("AtanhBackward0", ratio=lambda op: (op.self / (1 - op.self.square()), 2))

relative("ErfBackward0", "ErfcBackward0", ratio=lambda op: (op.self, -2))
elementwise("LgammaBackward0", d1=lambda op: op.self.digamma(), d2=lambda op, slope: op.self.polygamma(1))
elementwise("DigammaBackward0", d1=lambda op: op.self.polygamma(1), d2=lambda op, slope: op.self.polygamma(2))
elementwise(
    "PolygammaBackward0",
    "PolygammaBackward1",
    d1=lambda op: op.self.polygamma(op.n + 1),
    d2=lambda op, slope: op.self.polygamma(op.n + 2),
)
elementwise("AbsBackward0", d1=lambda op: op.self.sgn())
