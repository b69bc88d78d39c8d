"""Functions of lists of tensors (``torch._foreach_*``): one node, with the list as its outputs.

These nodes save nothing that Python can read, so both terms of (2) come from their own derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import bending

UNARY = (
    "Abs Acos Asin Atan Ceil Clone Cos Cosh Erf Erfc Exp Expm1 Floor Frac Lgamma Log Log10 Log1P Log2 Neg Reciprocal "
    "Round Rsqrt Sigmoid Sign Sin Sinh Sqrt Tan Tanh Trunc"
)
OTHERS = (
    "AddBackward0List AddBackward1Scalar AddBackward1ScalarList SubBackward0List SubBackward1Scalar "
    "SubBackward1ScalarList MulBackward0List MulBackward0Tensor MulBackward1Scalar MulBackward1ScalarList DivBackward0 "
    "DivBackward0Tensor DivBackward1Scalar DivBackward1ScalarList PowBackward0 PowBackward0Scalar PowBackward1 "
    "PowBackward2 AddcdivBackward0Scalar AddcdivBackward0ScalarList AddcmulBackward0Scalar AddcmulBackward0ScalarList "
    "ClampMaxBackward0Scalar ClampMaxBackward0ScalarList ClampMaxBackward1List ClampMinBackward0Scalar "
    "ClampMinBackward0ScalarList ClampMinBackward1List LerpBackward0Scalar LerpBackward1List MaximumBackward0 "
    "MaximumBackward0List MaximumBackward1 MinimumBackward0 MinimumBackward0List MinimumBackward1"
)
NAMES = [f"Foreach{name}Backward0" for name in UNARY.split()] + [f"Foreach{name}" for name in OTHERS.split()]


@rule(*NAMES, how="structure", outputs="all")
def foreach(op: Operation, g: Sequence[Tensor | None] | None, h: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    """Each input entry feeds one entry of one output: h_x = (Jᵀ1) ∘ (Jᵀh) + ∂(Jᵀg)/∂x · 1."""
    waves: list[Tensor | None] = [None] * len(op.edges)
    if h is not None:
        slopes = op.vjp(*(None if wave is None else torch.ones_like(wave) for wave in h))
        waves = [None if b is None or v is None else b * v for b, v in zip(slopes, op.vjp(*h), strict=True)]
    if g is not None:
        for i, bend in bending(op, g).items():
            wave = waves[i]
            waves[i] = bend if wave is None else op.reduced(wave, i) + bend
    return waves
