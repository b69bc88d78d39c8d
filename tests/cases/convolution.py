"""Convolutions."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Built, Draw, add_case, case, of_module

# Nodes of kernels that only another device or build has; models record ConvolutionBackward0 there too.
ELSEWHERE_CONVOLUTION = {
    "ConvolutionOverrideableBackward0": "recorded by backends outside of torch",
    "ConvDepthwise2DBackward0": "CUDA kernel, called directly",
    "ConvDepthwise3DBackward0": "CUDA kernel, called directly",
    "CudnnConvolutionBackward0": "CUDA kernel, called directly",
    "CudnnConvolutionTransposeBackward0": "CUDA kernel, called directly",
    "MiopenConvolutionBackward0": "ROCm kernel, called directly",
    "MiopenConvolutionTransposeBackward0": "ROCm kernel, called directly",
    "MiopenDepthwiseConvolutionBackward0": "ROCm kernel, called directly",
    "MpsConvolutionBackward0": "MPS kernel",
}

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def _channels(d: Draw) -> tuple[int, int, int]:
    """Input channels, output channels, groups: several of them, depthwise, or one."""
    return d.choice((1, 2, 1), (3, 2, 1), (2, 2, 2), (2, 4, 2), (4, 2, 2))


def _input(d: Draw, channels: int, dimensions: int) -> torch.Tensor:
    batch = d.choice([2], [1], [])
    return d.tensor(*batch, channels, *d.sizes(dimensions, low=3, high=5 if dimensions < 3 else 3))


def _convolution(dimensions: int):
    def build(d: Draw) -> Built:
        i, o, groups = _channels(d)
        stride, dilation, padding = d.choice(
            (1, 1, 0), (2, 1, 1), (1, 2, 1), (2, 1, 0), (1, 1, "same"), (1, 2, "same"), (1, 1, "valid")
        )
        mode = d.choice("zeros", "zeros", "circular", "reflect", "replicate") if padding != "valid" else "zeros"
        layer = CONVOLUTIONS[dimensions](
            *(i, o, [3 if padding == "same" else size for size in d.sizes(dimensions, high=2)]),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=d.boolean(),
            padding_mode=mode,
        )
        return of_module(d, layer, _input(d, i, dimensions))

    return build


def _transposed(dimensions: int):
    def build(d: Draw) -> Built:
        i, o, groups = _channels(d)
        stride, output_padding, dilation = d.choice((1, 0, 1), (2, 1, 1), (3, 2, 1), (2, 0, 2), (1, 1, 2))
        layer = TRANSPOSED[dimensions](
            *(i, o, d.sizes(dimensions, high=2)),
            stride=stride,
            padding=d.integer(0, 1),
            output_padding=output_padding,
            dilation=dilation,
            groups=groups,
            bias=d.boolean(),
        )
        return of_module(d, layer, _input(d, i, dimensions))

    return build


for _n in (1, 2, 3):
    add_case(f"conv{_n}d", _convolution(_n), examples=12 if _n < 3 else 6)
    add_case(f"conv_transpose{_n}d", _transposed(_n), examples=12 if _n < 3 else 6)


@case
def conv2d_asymmetric(d: Draw) -> Built:
    """Settings that differ by dimension."""
    i, o, groups = _channels(d)
    layer = nn.Conv2d(i, o, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), groups=groups)
    return of_module(d, layer, _input(d, i, 2))


@case
def conv2d_channels_last(d: Draw) -> Built:
    def function(x, w, b):
        return F.conv2d(x.contiguous(memory_format=torch.channels_last), w, b, padding=1)

    return function, [d.tensor(2, 3, 4, 4), d.tensor(2, 3, 3, 3), d.tensor(2)]


@case
def conv2d_of_expanded(d: Draw) -> Built:
    """Inputs that overlap themselves in memory."""
    return lambda x, w: F.conv2d(x.expand(2, 3, 4, 4), w), [d.tensor(1, 3, 1, 4), d.tensor(2, 3, 2, 2)]


@case
def conv2d_lazy(d: Draw) -> Built:
    """Weights that are functions of parameters."""
    return lambda x, w: F.conv2d(x, w.tanh()), [d.tensor(1, 2, 3, 3), d.tensor(2, 2, 2, 2)]


@case
def conv_tbc(d: Draw) -> Built:
    t, b, i, o = d.integer(3, 5), *d.sizes(3, high=3)
    pad = d.integer(0, 1)
    return lambda *args: torch.conv_tbc(*args, pad), [d.tensor(t, b, i), d.tensor(d.integer(1, 3), i, o), d.tensor(o)]


def _kernel(name: str, dimensions: int, **settings):
    """A kernel of torch._C._nn, called directly."""

    def build(d: Draw) -> Built:
        i, o = d.sizes(2, high=2)
        size = [2] * dimensions
        function = getattr(torch._C._nn, name)

        def run(x, weight, *bias):
            return function(x, weight, size, *(bias or [None]), **settings)

        shape = (i, o) if "transpose" in name else (o, i)
        bias = [d.tensor(o)] if d.boolean() else []
        return run, [d.tensor(2, i, *[4] * dimensions), d.tensor(*shape, *size), *bias]

    return build


for _n in (2, 3):
    add_case(f"slow_conv_dilated{_n}d", _kernel(f"slow_conv_dilated{_n}d", _n, dilation=2, padding=1))
    add_case(f"slow_conv_transpose{_n}d", _kernel(f"slow_conv_transpose{_n}d", _n, stride=2, output_padding=1))
add_case("slow_conv2d", _kernel("thnn_conv2d", 2, stride=2, padding=1))
add_case("slow_conv3d", _kernel("slow_conv3d", 3, stride=2, padding=1))


@case
def mkldnn_convolution(d: Draw) -> Built:
    d.dtype = torch.float32  # the only one it has
    i, o, groups = _channels(d)

    def function(x, weight, bias):
        return torch.mkldnn_convolution(x, weight, bias, [1, 0], [1, 2], [1, 1], groups)

    return function, [d.tensor(2, i, 4, 4), d.tensor(o, i // groups, 2, 2), d.tensor(o)]
