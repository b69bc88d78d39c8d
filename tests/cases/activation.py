"""Activations and dropout."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Built, Draw, add_case, case, of_module

# CELU rounds 1/alpha to float32 in its gradient, hence an alpha that float32 holds.
MODULES = {
    "relu": lambda d: nn.ReLU(inplace=d.boolean()),
    "relu6": lambda d: nn.ReLU6(inplace=d.boolean()),
    "leaky_relu": lambda d: nn.LeakyReLU(d.choice(0.01, 0.5, 2.0)),
    "leaky_relu_": lambda d: nn.LeakyReLU(d.choice(0.01, 0.5), inplace=True),
    "rrelu_train": lambda d: nn.RReLU(0.1, d.choice(0.1, 0.4)),
    "rrelu_train_": lambda d: nn.RReLU(0.1, 0.4, inplace=True),
    "rrelu_eval": lambda d: nn.RReLU(0.1, 0.4, inplace=d.boolean()).eval(),
    "elu": lambda d: nn.ELU(d.choice(1.0, 0.3)),
    "elu_": lambda d: nn.ELU(d.choice(1.0, 0.3), inplace=True),
    "selu": lambda d: nn.SELU(inplace=d.boolean()),
    "celu": lambda d: nn.CELU(d.choice(1.0, 0.5)),
    "celu_": lambda d: nn.CELU(d.choice(1.0, 0.5), inplace=True),
    "gelu": lambda d: nn.GELU(approximate=d.choice("none", "tanh")),
    "gelu_tanh": lambda d: nn.GELU(approximate="tanh"),
    "silu": lambda d: nn.SiLU(inplace=d.boolean()),
    "mish": lambda d: nn.Mish(inplace=d.boolean()),
    "softplus": lambda d: nn.Softplus(d.choice(1, 2.5), d.choice(20, 0.7)),
    "softsign": lambda d: nn.Softsign(),
    "tanhshrink": lambda d: nn.Tanhshrink(),
    "softshrink": lambda d: nn.Softshrink(d.choice(0.5, 0.1)),
    "hardshrink": lambda d: nn.Hardshrink(d.choice(0.5, 0.1)),
    "hardsigmoid": lambda d: nn.Hardsigmoid(inplace=d.boolean()),
    "hardswish": lambda d: nn.Hardswish(inplace=d.boolean()),
    "hardtanh": lambda d: nn.Hardtanh(-0.5, 0.7, inplace=d.boolean()),
    "logsigmoid": lambda d: nn.LogSigmoid(),
    "threshold": lambda d: nn.Threshold(0.1, 20),
    "threshold_": lambda d: nn.Threshold(0.1, 20, inplace=True),
    "dropout": lambda d: nn.Dropout(d.choice(0.0, 0.4, 1.0), inplace=d.boolean()),
    "dropout_eval": lambda d: nn.Dropout(0.4).eval(),
    "alpha_dropout": lambda d: nn.AlphaDropout(d.choice(0.1, 0.4)),
}
SPATIAL = {
    "dropout1d": (nn.Dropout1d, 3),
    "dropout2d": (nn.Dropout2d, 4),
    "dropout3d": (nn.Dropout3d, 5),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout, 4),
}


def _add_module(name, make):
    def build(d: Draw) -> Built:
        module = make(d)
        return lambda x: module(2 * x), [(3 * d.tensor(*d.shape())).detach().requires_grad_()]

    add_case(f"module_{name}", build)


for _name, _make in MODULES.items():
    _add_module(_name, _make)


def _add_spatial(name, module, dims):
    def build(d: Draw) -> Built:
        dropout = module(d.choice(0.2, 0.5))

        def function(x):
            torch.manual_seed(0)
            return dropout(x)

        return function, [d.tensor(*d.sizes(dims, high=3))]

    add_case(name, build)


for _name, (_module, _dims) in SPATIAL.items():
    _add_spatial(_name, _module, _dims)


@case
def native_dropout(d: Draw) -> Built:
    p, train = d.choice(0.0, 0.4, 1.0), d.choice(True, False, None)

    def function(x):
        torch.manual_seed(0)
        return torch.native_dropout(x, p, train)[0]

    return function, [d.tensor(*d.shape())]


@case
def native_dropout_backward(d: Draw) -> Built:
    mask = d.mask(2, 3)
    return lambda x: torch.ops.aten.native_dropout_backward(x, mask, 1.5), [d.tensor(2, 3)]


# PyTorch cannot differentiate the node of F.hardsigmoid twice.
@case(twin=lambda x: F.relu6(x + 3) / 6)
def hardsigmoid(d: Draw) -> Built:
    return F.hardsigmoid, [(3 * d.tensor(*d.shape())).detach().requires_grad_()]


@case
def rrelu_with_noise(d: Draw) -> Built:
    noise = torch.rand(3, 4, dtype=d.dtype, generator=d.generator)
    functional = torch.ops.aten.rrelu_with_noise_functional
    return lambda x: functional(x, noise, 0.1, 0.4, True)[0], [d.tensor(3, 4)]


@case
def glu(d: Draw) -> Built:
    a, b, dim = d.integer(1, 3), d.integer(1, 3), d.choice(0, 1, -1)
    shape = [2 * a, b] if dim == 0 else [a, 2 * b]
    return lambda x: F.glu(x, dim), [d.tensor(*shape)]


@case
def prelu(d: Draw) -> Built:
    n, c = d.sizes(2)
    return of_module(d, nn.PReLU(d.choice(1, c)), d.tensor(n, c, *d.shape(0, 2)))


@case
def prelu_of_one_tensor(d: Draw) -> Built:
    return lambda x: torch._prelu_kernel(x, x), [d.tensor(*d.shape())]


FIRST_DERIVATIVES = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "elu": F.elu,
    "elu_": lambda x: F.elu_(2 * x),
    "gelu": F.gelu,
    "hardshrink": F.hardshrink,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "prelu": lambda x: torch._prelu_kernel(x, torch.full_like(x, 0.3)),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softshrink": F.softshrink,
}


def _add_first_derivative(name, activation):
    def build(d: Draw) -> Built:
        def function(x, v):
            y = activation(x)
            return torch.autograd.grad(y, x, (v * v.sum())[..., : y.shape[-1]], create_graph=True)[0]

        shape = [*d.shape(0, 2), 2 * d.integer(1, 2)]
        return function, [d.tensor(*shape).detach().requires_grad_(), d.tensor(*shape)]

    add_case(f"{name}_first_derivative", build)


for _name, _activation in FIRST_DERIVATIVES.items():
    _add_first_derivative(_name, _activation)

ELSEWHERE_ACTIVATION = {"FusedDropoutBackward0": "only torch._fused_dropout on CUDA records it"}
