"""Convolutions whose second derivative is three convolutions, of the kind that their first is.

PyTorch's double backward of a convolution always computes all of its results, and two of them as convolutions with
batch and channels exchanged, for which there are no fast kernels. Here every result is a convolution or one of its two
gradients, as y = x ∗ w is bilinear, and only what is asked for is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
Options = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class Convolutions(TorchFunctionMode):
    """A block in which convolutions are made here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(_convolution, func) if func in CONVOLUTIONS else func
        return call(*args, **(kwargs or {}))


def _convolution(
    func: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    n = CONVOLUTIONS[func]
    unusual = input.dim() != n + 2 or weight.is_complex() or torch.is_autocast_enabled(weight.device.type)
    stride, dilation = _each(stride, n), _each(dilation, n)
    padded = _padding(padding, weight.shape[2:], dilation)
    if unusual or padded is None:
        return func(input, weight, bias, stride, padding, dilation, groups)
    return _Convolution.apply(input, weight, bias, (stride, padded, dilation, groups))  # type: ignore[no-any-return]


def _each(value: int | Sequence[int], n: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * n if len(values) == 1 else values


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[int] | None:
    """In numbers; ``None`` where the two sides differ."""
    if not isinstance(padding, str):
        return _each(padding, len(kernel))
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
    return None if any(t % 2 for t in total) else [t // 2 for t in total]


def _forward(x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> Tensor:
    stride, padding, dilation, groups = options
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)


def _backward(g: Tensor, x: Tensor, w: Tensor, options: Options, mask: Sequence[bool]) -> list[Tensor | None]:
    """Gradients in x, w and the bias."""
    stride, padding, dilation, groups = options
    zero, sizes = [0] * len(stride), [w.shape[0]]
    mask = list(mask)
    return list(
        torch.ops.aten.convolution_backward(g, x, w, sizes, stride, padding, dilation, False, zero, groups, mask)
    )


def _asked(ctx: Any) -> list[bool]:
    """Which inputs' gradients this backward pass goes on with."""
    needs = list(ctx.needs_input_grad[:3])
    for i, (node, _) in enumerate(ctx.next_functions):
        needs[i] = needs[i] and _executed(node)
    return needs


def _executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is asked for
        return True


class _Convolution(Function):
    """y = x ∗ w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, options: Options) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options = options
        return _forward(x, w, b, options)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        mask = _asked(ctx)
        if torch.is_grad_enabled():
            return *_Gradients.apply(g, x, w, ctx.options, mask), None
        return *_backward(g, x, w, ctx.options, mask), None


class _Gradients(Function):
    """∂y/∂xᵀ g, ∂y/∂wᵀ g, ∂y/∂bᵀ g; trilinear in g, x and w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, options: Options, mask: Sequence[bool]) -> Any:
        ctx.save_for_backward(g, x, w)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return tuple(_backward(g, x, w, options, mask))

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, b: Tensor | None, c: Tensor | None) -> Any:
        """⟨a, ∂y/∂xᵀ g⟩ + ⟨b, ∂y/∂wᵀ g⟩ + ⟨c, Σg⟩ = ⟨g, a ∗ w + x ∗ b + c⟩, differentiated."""
        g, x, w = ctx.saved_tensors
        needs, options = _asked(ctx), ctx.options
        parts: list[Tensor | None] = [None, None, None]
        if needs[0]:
            terms = [_forward(a, w, None, options)] if a is not None else []
            terms += [_forward(x, b, None, options)] if b is not None else []
            terms += [c.view(-1, *[1] * (g.dim() - 2)).expand_as(g)] if c is not None else []
            parts[0] = sum(terms[1:], start=terms[0]) if terms else None
        if needs[1] and b is not None:
            parts[1] = _backward(g, x, b, options, (True, False, False))[0]
        if needs[2] and a is not None:
            parts[2] = _backward(g, a, w, options, (False, True, False))[1]
        return *parts, None, None
