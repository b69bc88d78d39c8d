"""Recurrent layers: fused kernels, carried out again step by step.

LSTM, with a = W_x x_t + b_x + W_h h_(t-1) + b_h in four parts (Hochreiter & Schmidhuber 1997):

    i, f, o = σ(a_i), σ(a_f), σ(a_o),   u = tanh a_u,   c_t = f c_(t-1) + i u,   h_t = o tanh c_t

GRU (Cho et al. 2014, in the form that cuDNN uses):

    r, z = σ(a_r + b_r), σ(a_z + b_z),   u = tanh(a_u + r b_u),   h_t = u + z (h_(t-1) - u)

Layers that PyTorch itself carries out in steps (RNN, GRU, LSTM in float64, with projections, or packed) need no rule.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import CurvatureError
from ..graph import Operation
from ..registry import rule
from .structure import decomposed

Steps = tuple[list[Tensor | None], list[Tensor | None]]


def leaves(op: Operation, *names: str) -> list[Tensor | None]:
    """The operation's inputs as leaves, ``None`` where it has none."""
    saved = [getattr(op.node, "_saved_" + name) for name in names]
    return [None if x is None else x.detach().requires_grad_(need) for x, need in zip(saved, op.needs, strict=True)]


@decomposed("MkldnnRnnLayerBackward0")
def lstm_layer(op: Operation) -> Steps:
    """One direction of one layer of an LSTM (CPU, float32), time step by time step."""
    inputs = leaves(op, "input", "weight0", "weight1", "weight2", "weight3", "hx_", "cx_")
    x, w_x, w_h, b_x, b_h, h, c = inputs
    if not op.has_biases:
        b_x = b_h = None
    times = F.linear(x, w_x, b_x).unbind()  # type: ignore[arg-type]
    outputs = []
    for gates in reversed(times) if op.reverse else times:
        h, c = lstm_step(gates + F.linear(h, w_h, b_h), c)  # type: ignore[arg-type]
        outputs.append(h)
    return inputs, [torch.stack(outputs[::-1] if op.reverse else outputs), h, c]


@decomposed("ThnnFusedLstmCellBackward0")
def lstm_cell(op: Operation) -> Steps:
    """One time step of an LSTM (CUDA), from W_x x and W_h h on."""
    inputs = leaves(op, "input_gates", "hidden_gates", "cx", "input_bias", "hidden_bias")
    a_x, a_h, c, b_x, b_h = inputs
    gates = _biased(a_x, b_x) + _biased(a_h, b_h)
    return inputs, list(lstm_step(gates, c))  # type: ignore[arg-type]


@decomposed("ThnnFusedGruCellBackward0")
def gru_cell(op: Operation) -> Steps:
    """One time step of a GRU (CUDA), from W_x x and W_h h on."""
    inputs = leaves(op, "input_gates", "hidden_gates", "hx", "input_bias", "hidden_bias")
    a_x, a_h, h, b_x, b_h = inputs
    x_r, x_z, x_u = _biased(a_x, b_x).chunk(3, 1)
    h_r, h_z, h_u = _biased(a_h, b_h).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    u = (x_u + r * h_u).tanh()
    return inputs, [u + z * (h - u)]  # type: ignore[operator]


def lstm_step(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The new h and c of an LSTM, as PyTorch computes them."""
    a_i, a_f, a_u, a_o = gates.chunk(4, 1)
    c = a_f.sigmoid() * c + a_i.sigmoid() * a_u.tanh()
    return a_o.sigmoid() * c.tanh(), c


def _biased(gates: Any, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


@rule("CudnnRnnBackward0", "MiopenRnnBackward0", how="refused", outputs="all", coincident=True)
def whole_layers(op: Operation, g: Any, h: Any) -> NoReturn:
    """All layers and time steps in one kernel, with weights in a layout of its own."""
    raise CurvatureError(
        f"{op.name}: curvature cannot be computed through the fused RNN, GRU and LSTM of cuDNN and MIOpen. Run the "
        "forward pass without them: with torch.backends.cudnn.flags(enabled=False)."
    )
