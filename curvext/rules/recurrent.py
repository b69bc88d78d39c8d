"""Recurrent layers: fused kernels, back through the steps they consist of.

LSTM, with a = W_x x_t + b_x + W_h h_(t-1) + b_h in four parts (Hochreiter & Schmidhuber 1997):

    i, f, u, o = σ(a_i), σ(a_f), tanh(a_u), σ(a_o),   c_t = f c_(t-1) + i u,   h_t = o tanh c_t

GRU (Cho et al. 2014, in the form that cuDNN uses):

    r, z = σ(a_r + b_r), σ(a_z + b_z),   u = tanh(a_u + r b_u),   h_t = u + z (h_(t-1) - u)

Layers that PyTorch itself carries out in steps (RNN, GRU, LSTM in float64, with projections, or packed) need no rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from ..axes import BATCH, Axis, front
from ..errors import CurvatureError
from ..graph import Operation
from ..persample import Dense, Outer, PerSample
from ..registry import rule
from .structure import decomposed

Waves = Sequence[Tensor | None]
Pair = Sequence[Tensor]  # what arrives at h_t and at c_t


@rule("MkldnnRnnLayerBackward0", how="decomposed", outputs="all", coincident=True)
def lstm_layer(op: Operation, g: Waves | None, h: Waves | None) -> Waves:
    """One direction of one layer of an LSTM (CPU, float32), time step by time step."""
    return lstm_waves(_tensors(op), (op.hx_, op.cx_), op.result0, op.reverse, g, h)


def _tensors(op: Operation) -> list[Tensor]:
    return [op.input, op.weight0, op.weight1, *([op.weight2, op.weight3] if op.has_biases else [])]


def lstm_waves(
    tensors: Sequence[Tensor], state: Pair, y: Tensor, reverse: bool, g: Waves | None, h: Waves | None
) -> Waves:
    """From the waves of all outputs y [T,N,O], last h and last c to those of x [T,N,I], weights, biases and state."""
    _, w_x, w_h, *biases = tensors
    (g_y, *at_g), (h_y, *at_h) = (_dense(waves, (y, *state)) for waves in (g, h))
    if reverse:
        g_y, h_y = g_y.flip(0), h_y.flip(0)
    x, before, steps = _steps(tensors, state, y, reverse)
    square, gates = w_h.square(), []
    for t in reversed(range(len(x))):
        a_g, a_h, c_g, c_h = steps.back(t, (at_g[0] + g_y[t], at_g[1]) if g else None, (at_h[0] + h_y[t], at_h[1]))
        gates.append(a_h)
        at_g, at_h = [a_g @ w_h, c_g] if g else at_g, [a_h @ square, c_h]
    h_a = torch.stack(gates[::-1])
    h_x, flat = h_a @ w_x.square(), h_a.flatten(0, 1).mT
    h_b = flat.sum(1) if biases else None
    weights = (flat @ v.flatten(0, 1).square() for v in (x, before))
    return [h_x.flip(0) if reverse else h_x, *weights, h_b, h_b, *at_h]


def _steps(tensors: Sequence[Tensor], state: Pair, y: Tensor, reverse: bool) -> tuple[Tensor, Tensor, LstmSteps]:
    """x, h before every step, and the steps, in the order in which they were carried out."""
    x, w_x, w_h, *biases = tensors
    x, y = (x.flip(0), y.flip(0)) if reverse else (x, y)
    before = torch.cat((state[0].unsqueeze(0), y[:-1]))
    return x, before, LstmSteps(sum(biases, start=F.linear(x, w_x) + F.linear(before, w_h)), state[1])


@rule("MkldnnRnnLayerBackward0", wave="factor", outputs="all")
def lstm_layer_factor(op: Operation, s: Waves, wanted: Sequence[bool]) -> Waves | None:
    """Columns of all gates, step by step, then of x and of the first state; of weights it is left to the node."""
    if any(wanted[1:5]):
        return None
    gates, at, *_ = _gates(op, s)
    s_x = gates @ op.weight0
    return [s_x.flip(1) if op.reverse else s_x, *[None] * 4, *at]


@rule("MkldnnRnnLayerBackward0", wave="shared", outputs="all")
def lstm_layer_shared(op: Operation, s: Waves, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """Weights are those of linear maps at every step: of x, and of the state before."""
    axis, n = next(a for a in op.axes_out if a is not None), op.n_samples
    if axis is not BATCH:
        if any(a is not None and a != Axis(1 if k == 0 else 0, axis.inner) for k, a in enumerate(op.axes_out)):
            return {}
        axis = Axis(1, axis.inner)
    gates, _, x, before = _gates(op, s)
    waves = front(gates, axis, n, 1).flatten(2, 3).unsqueeze(2)  # V N 1 T 4·O
    found: dict[int, PerSample] = {}
    for i, seen_by in ((1, x), (2, before)):
        if wanted[i]:
            found[i] = Outer(waves, front(seen_by, axis, n).flatten(1, 2).unsqueeze(1), tuple(op.inputs[i].shape))
    return {**found, **{i: Dense(waves.sum((2, 3))) for i in (3, 4) if wanted[i]}}


@rule("MkldnnRnnLayerBackward0", wave="tangent", outputs="all")
def lstm_layer_tangent(op: Operation, t: Waves) -> Waves:
    """t_a = W_x t_x + t_Wx x + t_Wh h + t_b of all gates; then, step by step, W_h t_h is added, and c and h follow."""
    x, before, steps = _steps(_tensors(op), (op.hx_, op.cx_), op.result0, op.reverse)
    gates = x.new_zeros(len(next(s for s in t if s is not None)), *x.shape[:2], 1)
    if t[0] is not None:
        gates = gates + (t[0].flip(1) if op.reverse else t[0]) @ op.weight0.mT
    for t_w, seen_by in ((t[1], x), (t[2], before)):
        gates = gates if t_w is None else gates + seen_by @ t_w.mT.unsqueeze(1)
    for t_b in t[3:5]:
        gates = gates if t_b is None else gates + t_b[:, None, None]
    at_h, at_c = (before.new_zeros(before.shape[-1]) if s is None else s for s in t[5:])
    y = []
    for k in range(len(x)):
        at_h, at_c = steps.push(k, gates[:, k] + at_h @ op.weight1.mT, at_c)
        y.append(at_h)
    return [torch.stack(y[::-1] if op.reverse else y, 1), at_h, at_c]


def _gates(op: Operation, s: Waves) -> tuple[Tensor, Pair, Tensor, Tensor]:
    """Columns of the gates ``[V, T, N, 4·O]`` and of the first state; x and h before, all in the order of the steps."""
    x, before, steps = _steps(_tensors(op), (op.hx_, op.cx_), op.result0, op.reverse)
    v = len(next(c for c in s if c is not None))
    s_y, at_h, at_c = (
        before.new_zeros(v, *meta.shape) if c is None else c for c, meta in zip(s, op.outputs, strict=False)
    )
    s_y, gates = s_y.flip(1) if op.reverse else s_y, []
    for t in reversed(range(len(x))):
        of_gates, at_c = steps.pull(t, (at_h + s_y[:, t], at_c))
        gates.append(of_gates)
        at_h = of_gates @ op.weight1
    return torch.stack(gates[::-1], 1), (at_h, at_c), x, before


class LstmSteps:
    """The slopes of every step of an LSTM, from its gates a [T,N,4·O] and its first c."""

    def __init__(self, gates: Tensor, c: Tensor):
        i, f, u, o = gates.chunk(4, -1)
        i, f, u, o = i.sigmoid(), f.sigmoid(), u.tanh(), o.sigmoid()
        cells = [c]
        for forget, new in zip(f, i * u, strict=True):
            cells.append(torch.addcmul(new, forget, cells[-1]))
        tanh = torch.stack(cells[1:]).tanh()
        slopes = torch.stack((i * (1 - i), f * (1 - f), 1 - u * u, o * (1 - o)), -2)
        bends = slopes * torch.stack((1 - 2 * i, 1 - 2 * f, -2 * u, 1 - 2 * o), -2)
        factors = torch.stack((u, torch.stack(cells[:-1]), i, tanh), -2)  # of i, f, u and o
        self.gate, self.bend = slopes * factors, bends * factors
        self.forget, self.out = f, o * (1 - tanh * tanh)
        self.out_bend = -2 * tanh * self.out
        self.gate_square, self.forget_square, self.out_square = (s.square() for s in (self.gate, self.forget, self.out))

    def back(self, t: int, g: Pair | None, h: Pair) -> tuple[Any, Tensor, Any, Tensor]:
        """Gradient (if given) and wave of the gates of step t [N,4·O], then of c_(t-1), from those of h_t and c_t."""
        h_c = torch.addcmul(h[1], self.out_square[t], h[0])
        if g is None:
            wave = self.gate_square[t] * _four(h_c, h[0])
            return None, wave.flatten(-2), None, self.forget_square[t] * h_c
        h_c = torch.addcmul(h_c, self.out_bend[t], g[0])
        g_gates, g_c = self._arriving(t, g)
        wave = torch.addcmul(self.bend[t] * g_gates, self.gate_square[t], _four(h_c, h[0]))
        slope = self.gate[t] * g_gates
        return slope.flatten(-2), wave.flatten(-2), self.forget[t] * g_c, self.forget_square[t] * h_c

    def pull(self, t: int, g: Pair) -> tuple[Tensor, Tensor]:
        """The gradient, or columns ``[V, N, O]``, of the gates of step t and of c_(t-1), from those of h_t and c_t."""
        g_gates, g_c = self._arriving(t, g)
        return (self.gate[t] * g_gates).flatten(-2), self.forget[t] * g_c

    def push(self, t: int, gates: Tensor, c: Tensor) -> Pair:
        """The tangents ``[V, N, O]`` of h_t and c_t, from those of the gates of step t and of c_(t-1)."""
        through = self.gate[t] * gates.unflatten(-1, (4, -1))
        c = torch.addcmul(through[..., :3, :].sum(-2), self.forget[t], c)
        return torch.addcmul(through[..., 3, :], self.out[t], c), c

    def _arriving(self, t: int, g: Pair) -> tuple[Tensor, Tensor]:
        g_c = torch.addcmul(g[1], self.out[t], g[0])
        return _four(g_c, g[0]), g_c


def _four(c: Tensor, h: Tensor) -> Tensor:
    """What arrives at the products with i, f, u (by c) and o (by h)."""
    return torch.stack((c, c, c, h), -2)


@rule("ThnnFusedLstmCellBackward0", how="decomposed", outputs="all", coincident=True)
def lstm_cell(op: Operation, g: Waves | None, h: Waves | None) -> Waves:
    """One time step of an LSTM (CUDA), from W_x x and W_h h on."""
    gates = _biased(op.input_gates, op.input_bias) + _biased(op.hidden_gates, op.hidden_bias)
    at_g, at_h = (_dense(waves, (op.cx, op.cx)) for waves in (g, h))
    _, h_a, _, h_c = LstmSteps(gates.unsqueeze(0), op.cx).back(0, at_g if g else None, at_h)
    return h_a, h_a, h_c, h_a, h_a


@decomposed("ThnnFusedGruCellBackward0")
def gru_cell(op: Operation) -> tuple[Waves, Waves]:
    """One time step of a GRU (CUDA), from W_x x and W_h h on."""
    saved = (op.input_gates, op.hidden_gates, op.hx, op.input_bias, op.hidden_bias)
    inputs: list[Any] = [x if x is None else x.detach().requires_grad_(k) for x, k in zip(saved, op.needs, strict=True)]
    a_x, a_h, h, b_x, b_h = inputs
    x_r, x_z, x_u = _biased(a_x, b_x).chunk(3, 1)
    h_r, h_z, h_u = _biased(a_h, b_h).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    u = (x_u + r * h_u).tanh()
    return inputs, [u + z * (h - u)]


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


def _dense(waves: Waves | None, like: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where nothing arrives."""
    if waves is None:
        waves = [None] * len(like)
    return [torch.zeros_like(x) if wave is None else wave for wave, x in zip(waves, like, strict=False)]


@rule("CudnnRnnBackward0", "MiopenRnnBackward0", how="refused", outputs="all", coincident=True)
def whole_layers(op: Operation, g: Any, h: Any) -> NoReturn:
    """All layers and time steps in one kernel, with weights in a layout of its own."""
    raise CurvatureError(
        f"{op.name}: curvature cannot be computed through the fused RNN, GRU and LSTM of cuDNN and MIOpen. Run the "
        "forward pass without them: with torch.backends.cudnn.flags(enabled=False)."
    )
