"""Recurrent layers and cells: carried out in steps, in the CPU's fused kernel (float32), and in CUDA's by stand-ins."""

import torch
from torch import nn

from ..stand_ins import aten
from . import Built, Draw, add_case, case, of_module

ELSEWHERE_RECURRENT = {
    "MkldnnRnnLayerBackward0": "float32 only: tests/test_recurrent.py",
}


class Outputs(nn.Module):
    """A recurrent layer of which all outputs count."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x, *state):
        y, last = self.layer(x, *([state] if len(state) > 1 else state))
        return [y, *([last] if isinstance(last, torch.Tensor) else last)]


@case(examples=2)
def lstm_layer(d: Draw) -> Built:
    i, o, t, n = d.sizes(4, high=2)
    layer = nn.LSTM(i, o, bias=d.boolean(), bidirectional=d.boolean())
    k = 2 if layer.bidirectional else 1
    return of_module(d, Outputs(layer), d.tensor(t, n, i), d.tensor(k, n, o), d.tensor(k, n, o))


@case(examples=2)
def gru_layer(d: Draw) -> Built:
    i, o, t, n = d.sizes(4, high=2)
    return of_module(d, Outputs(nn.GRU(i, o, batch_first=True)), d.tensor(n, t, i), d.tensor(1, n, o))


@case(examples=2)
def rnn_layer(d: Draw) -> Built:
    i, o, t, n = d.sizes(4, high=2)
    return of_module(d, Outputs(nn.RNN(i, o, nonlinearity=d.choice("tanh", "relu"))), d.tensor(t, n, i))


def _add_cell(name, cell_of):
    def build(d: Draw) -> Built:
        i, o, n = d.sizes(3, high=3)
        return of_module(d, cell_of(i, o, bias=d.boolean()), d.tensor(n, i))

    add_case(name, build, examples=3)


_add_cell("lstm_cell", nn.LSTMCell)
_add_cell("gru_cell", nn.GRUCell)
_add_cell("rnn_cell", nn.RNNCell)


def _add_fused_cell(name, gates, outputs):
    def build(d: Draw) -> Built:
        n, o = d.sizes(2)
        biases = [d.tensor(gates * o), d.tensor(gates * o)] if d.boolean() else [None, None]
        inputs = [d.tensor(n, gates * o), d.tensor(n, gates * o), d.tensor(n, o), *biases]
        return lambda *args: getattr(aten, "_thnn_fused_" + name)(*args)[:outputs], inputs

    add_case("fused_" + name, build)


_add_fused_cell("lstm_cell", 4, 2)
_add_fused_cell("gru_cell", 3, 1)
