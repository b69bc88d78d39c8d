"""Python functions of other libraries, as they are written there."""

import torch

from . import Built, Draw, case


class GeLUFunction(torch.autograd.Function):
    """tanh's approximation of GELU, x σ(2u) with u = √(2/π) (x + 0.044715 x³)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.nn.functional.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        a, b = (2 / torch.pi) ** 0.5, 0.044715
        t = torch.tanh(a * (x + b * x**3))
        return g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 3 * b * x**2))


@case
def gelu_function(d: Draw) -> Built:
    return GeLUFunction.apply, [d.tensor(*d.shape())]
