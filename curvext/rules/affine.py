"""Products of two tensors: y is linear in each, so h_A = (J_A∘J_A)ᵀ h and nothing bends.

For y = A B:  h_A = h (B∘B)ᵀ,  h_B = (A∘A)ᵀ h.  With a weight this is HesScale's h_W = hᵀ(x∘x), h_x = h (W∘W).
"""

from __future__ import annotations

from torch import Tensor

from ..graph import Operation
from ..registry import rule
from .structure import pointwise_rule

Waves = tuple[Tensor | None, ...] | None


@rule("MmBackward0")
def mm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = A B."""
    if h is None:
        return None
    a = h @ op.mat2.square().mT if op.needs[0] else None
    return a, (op.self.square().mT @ h if op.needs[1] else None)


@rule("AddmmBackward0")
def addmm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = β C + α A B."""
    if h is None:
        return None
    c = _scaled(h, op.beta) if op.needs[0] else None
    a = _scaled(h @ op.mat2.square().mT, op.alpha) if op.needs[1] else None
    return c, a, (_scaled(op.mat1.square().mT @ h, op.alpha) if op.needs[2] else None)


@rule("BmmBackward0")
def bmm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = A B, batched."""
    if h is None:
        return None
    a = h @ op.mat2.square().mT if op.needs[0] else None
    return a, (op.self.square().mT @ h if op.needs[1] else None)


@rule("MulBackward0", coincident=True)
def mul(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves | list[Tensor | None]:
    """y = a ∘ b."""
    if op.coincident:  # x * x is a square, not a product of two variables
        return pointwise_rule(op, g, h)
    if h is None:
        return None
    return (  # a saved Python number is a tensor whose own square would be computed in the default dtype
        h * op.other * op.other if op.needs[0] else None,
        h * op.self * op.self if len(op.needs) > 1 and op.needs[1] else None,
    )


def _scaled(wave: Tensor, factor: float) -> Tensor:
    return wave if factor == 1 else wave * factor**2
