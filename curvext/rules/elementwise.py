"""Functions of one entry, y = φ(x): h_x = φ'² h + φ'' g."""

from __future__ import annotations

from .structure import elementwise, pointwise

elementwise(
    "TanhBackward0",
    d1=lambda op: 1 - op.result.square(),
    d2=lambda op, slope: -2 * op.result * slope,
)
elementwise(
    "SigmoidBackward0",
    d1=lambda op: op.result * (1 - op.result),
    d2=lambda op, slope: slope * (1 - 2 * op.result),
)
elementwise("ReluBackward0", d1=lambda op: (op.result > 0).to(op.result.dtype))
elementwise("ExpBackward0", d1=lambda op: op.result, d2=lambda op, slope: slope)
elementwise("LogBackward0", d1=lambda op: op.self.reciprocal(), d2=lambda op, slope: -slope.square())
pointwise("GeluBackward0", "SiluBackward0")
