"""Convolutions: y is linear in input and weight, so the wave goes back as the gradient does, past squared factors.

h_x = (W∘W)ᵀ ⋆ h and h_W = (x∘x) ⋆ h: convolution's own backward, given the squares of its input and weight. A term of y
is one weight entry times one input entry, and no two terms of one output entry share either (x with itself shifted
meets different weights), so every entry of J is one entry of the other factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import rule

Waves = Sequence[Tensor | None] | None


@rule("ConvolutionBackward0", "ConvolutionOverrideableBackward0", linear=True)
def convolution(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = W ⋆ x + b, also transposed: h_x = (W∘W)ᵀ ⋆ h, h_W = (x∘x) ⋆ h, h_b = Σ h."""
    if h is None:
        return None
    node: Any = op.node  # op.input and op.groups are no saved values
    geometry = (op.stride, op.padding, op.dilation, op.transposed, op.output_padding, node._saved_groups)
    return _backward(op, h, node._saved_input, op.weight, geometry)


@rule(
    *("MkldnnConvolutionBackward0", "ConvDepthwise2DBackward0"),
    *("ConvDepthwise3DBackward0", "SlowConv2DBackward0", "SlowConv3DBackward0"),
    *("SlowConvDilated2DBackward0", "SlowConvDilated3DBackward0"),
    *("SlowConvTranspose2DBackward0", "SlowConvTranspose3DBackward0"),
    *("CudnnConvolutionBackward0", "CudnnConvolutionTransposeBackward0", "MpsConvolutionBackward0"),
    *("MiopenConvolutionBackward0", "MiopenConvolutionTransposeBackward0", "MiopenDepthwiseConvolutionBackward0"),
    linear=True,
)
def kernel(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = W ⋆ x + b by one library's kernel, called directly: as convolution; what it has no setting for is plain."""
    if h is None:
        return None
    weight, transposed, plain = op.weight, "Transpose" in op.name, [0] * len(op.stride)
    geometry = (
        op.stride,
        op.padding,
        getattr(op, "dilation", [1] * len(plain)),
        transposed,
        getattr(op, "output_padding", plain),
        getattr(op.node, "_saved_groups", 1 if transposed else op.self.shape[1 - weight.dim()] // weight.shape[1]),
    )
    return _backward(op, h, op.self, weight, geometry)


def _backward(op: Operation, h: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Waves:
    """Convolution's backward at squared factors; of one that no needed wave depends on it sees the shape only."""
    needs_x, needs_weight, needs_bias = needs = [*op.needs, False][:3]
    x, weight = x * x if needs_weight else x, weight * weight if needs_x else weight
    bias = [h.shape[1]] if needs_bias else None
    return torch.ops.aten.convolution_backward(h, x, weight, bias, *geometry, needs)


@rule("ConvTbcBackward0", linear=True)
def conv_tbc(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = W ⋆ x + b over time, batch and channels: as convolution."""
    if h is None:
        return None
    return torch.ops.aten.conv_tbc_backward(h, op.self.square(), op.weight.square(), op.bias, op.pad)
