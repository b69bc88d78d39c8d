"""Recurrent layers: fused kernels equal the steps they consist of, whatever the layer's options."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from curvext import GGNMP, KFLR, BatchGrad, CurvatureError, DiagGGNExact, HesScale, extend, factor, registry
from curvext.diagonal import pass_diagonal, through
from curvext.graph import Graph, Operation, edge_of
from curvext.rules.recurrent import lstm_waves
from curvext.sweep import Settings
from curvext.testing import check_columns, check_quantity

from .reference import hessian
from .stand_ins import aten

LSTMS = {
    "plain": {},
    "no bias": dict(bias=False),
    "reversed as well": dict(bidirectional=True),
    "two layers": dict(num_layers=2),
    "both": dict(num_layers=2, bidirectional=True, batch_first=True),
}


def loss_of(layer, x, *state):
    y, last = layer(x, *state)
    return y.square().sum() + sum(s.tanh().sum() for s in ([last] if isinstance(last, torch.Tensor) else last))


def node_names(loss):
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(child for child, _ in node.next_functions)
    return {node.name() for node in seen}


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("options", LSTMS.values(), ids=LSTMS)
def test_fused_lstm_equals_its_steps(options):
    layer = nn.LSTM(3, 4, **options)
    x = torch.randn(5, 2, 3).requires_grad_()
    k = layer.num_layers * (1 + layer.bidirectional)
    n = 5 if layer.batch_first else 2
    tensors = {**dict(layer.named_parameters()), "x": x}
    tensors |= {name: torch.randn(k, n, 4).requires_grad_() for name in "hc"}
    results = []
    for fused in (True, False):
        with torch.backends.mkldnn.flags(enabled=fused):
            loss = loss_of(layer, x, (tensors["h"], tensors["c"]))
        assert ("MkldnnRnnLayerBackward0" in node_names(loss)) is fused
        with extend(tensors) as curvature:
            loss.backward()
        results.append(curvature.hesscale)
    assert results[0].keys() == tensors.keys()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("options", LSTMS.values(), ids=LSTMS)
@pytest.mark.parametrize("of", ["outputs", "states", "both"])
def test_columns_of_a_fused_lstm(options, of, monkeypatch):
    """Samples part in it, and directions pass, as in its steps in double precision; no column is taken alone."""
    layer, x = nn.LSTM(3, 4, **options), torch.randn(5, 2, 3)
    batch = 0 if layer.batch_first else 1
    k, n = layer.num_layers * (1 + layer.bidirectional), x.shape[batch]
    start = {name: torch.randn(k, n, 4) for name in "hc"}
    quantities = BatchGrad(), DiagGGNExact(), KFLR(), GGNMP()

    def results(dtype):
        tensors = {**dict(layer.to(dtype).named_parameters())}
        tensors |= {name: value.to(dtype).requires_grad_() for name, value in start.items()}
        y, last = layer(x.to(dtype), (tensors["h"], tensors["c"]))
        terms = [] if of == "states" else [y.movedim(batch, 0)]
        terms += [] if of == "outputs" else [s.movedim(1, 0) for s in last]
        loss = torch.cat([term.flatten(1) for term in terms], 1).square().sum(1).sum()
        assert ("MkldnnRnnLayerBackward0" in node_names(loss)) is (dtype == torch.float32)
        with extend(tensors, *quantities) as curvature:
            loss.backward()
        assert "MkldnnRnnLayerBackward0" not in seen
        along = {name: t.detach().arctan().unsqueeze(0) for name, t in tensors.items()}
        products = {name: product(along[name]) for name, product in curvature["ggnmp"].items()}
        found = {**curvature, "ggnmp": products}
        return {field: {name: _double(value) for name, value in values.items()} for field, values in found.items()}

    mapped, seen = factor._mapped, []
    monkeypatch.setattr(factor, "_mapped", lambda op, *args: (seen.append(op.name), mapped(op, *args))[1])
    want, got = map(results, (torch.float64, torch.float32))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def _double(value):
    return [v.double() for v in value] if isinstance(value, list) else value.double()


@pytest.mark.parametrize("reverse", [False, True])
def test_rules_of_a_fused_lstm(reverse):
    """Each against the node, wherever its outputs may hold samples."""
    layer, tensors = nn.LSTM(3, 2), [torch.randn(4, 2, 3), *torch.randn(2, 1, 2, 2)]
    tensors = [t.requires_grad_() for t in (*tensors, *layer.parameters())]

    def outputs(x, h, c, *weights):
        y, last_h, last_c, _ = torch.ops.aten.mkldnn_rnn_layer(
            x, *weights, h[0], c[0], reverse, [], 2, 2, 1, True, False, False, True
        )
        return y, last_h, last_c

    checked = check_columns(outputs, *tensors, rtol=1e-3, atol=1e-4)
    assert {("MkldnnRnnLayerBackward0", wave) for wave in ("samples", "factor", "shared", "tangent")} <= checked


@pytest.mark.parametrize("frozen", ["x", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "weight_ih_l0 bias_hh_l0"])
def test_frozen_parts_of_a_fused_lstm(frozen):
    layer, x = nn.LSTM(3, 4), torch.randn(5, 2, 3).requires_grad_()
    tensors = {**dict(layer.named_parameters()), "x": x}
    with extend(tensors) as curvature:
        loss_of(layer, x).backward()
    for name in frozen.split():
        tensors[name].requires_grad_(False)
    with extend(tensors) as again:
        loss_of(layer, x).backward()
    want = {name: wave for name, wave in curvature.hesscale.items() if name not in frozen.split()}
    torch.testing.assert_close(again.hesscale, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gauss_newton", [False, True])
@pytest.mark.parametrize("arriving", ["y h c", "y", "h", "c"])
def test_an_lstm_in_closed_form_equals_its_steps(reverse, bias, gauss_newton, arriving, float64):
    """To rounding; the kernel itself has no float64."""
    layer = nn.LSTM(3, 2, bias=bias)
    x, h, c = (torch.randn(*shape).requires_grad_() for shape in [(4, 2, 3), (1, 2, 2), (1, 2, 2)])
    given = x.flip(0) if reverse else x
    y, (last_h, last_c) = layer(given, (h, c))
    y = y.flip(0) if reverse else y
    g, w = (
        [torch.randn_like(v) if k in arriving else None for k, v in zip("yhc", (y, h, c), strict=True)] for _ in "gw"
    )
    g = None if gauss_newton else g
    tensors = [x, *layer.parameters()]
    want = through([y, last_h, last_c], [*tensors, h, c], g, w, Settings())
    g, w = (v and [t if t is None or t is v[0] else t[0] for t in v] for v in (g, w))
    got = lstm_waves([t.detach() for t in tensors], (h[0].detach(), c[0].detach()), y.detach(), reverse, g, w)
    got = got if bias else [*got[:3], *got[5:]]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.view_as(b), b, rtol=1e-11, atol=1e-13)


LAYERS = {
    "lstm": lambda: nn.LSTM(2, 3, 2, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(2, 3, proj_size=2),
    "gru": lambda: nn.GRU(2, 3, 2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(2, 3, nonlinearity="relu"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_carried_out_in_steps(name, float64):
    layer = LAYERS[name]()
    x = torch.randn(2, 2, 2)
    results = check_quantity(HesScale(), layer, lambda: loss_of(layer, x))
    assert results.keys() == dict(layer.named_parameters()).keys()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_float32(name):
    layer = LAYERS[name]()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        loss = loss_of(layer, torch.randn(4, 3, 2))
    with extend(layer):
        loss.backward()
    for p in layer.parameters():
        assert p.hesscale.shape == p.shape
        assert p.hesscale.isfinite().all()


def test_a_packed_sequence_counts_as_its_samples(float64):
    layer, lengths = nn.LSTM(2, 3), [4, 2]
    x = torch.randn(4, 2, 2)

    def packed():
        y, _ = layer(pack_padded_sequence(x, torch.tensor(lengths)))
        return pad_packed_sequence(y)[0].square().sum()

    def one_by_one():
        return sum(layer(x[:t, i])[0].square().sum() for i, t in enumerate(lengths))

    results = []
    for loss in (packed, one_by_one):
        with extend(layer) as curvature:
            loss().backward()
        results.append(curvature.hesscale)
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_one_step_of_an_lstm_is_exact_at_its_outputs_gate(float64):
    """Where no branches meet, the recursion is the Hessian's diagonal: the output gate of the last step."""
    cell, x = nn.LSTMCell(2, 1), torch.randn(1, 2)

    def loss():
        return cell(x)[0].exp().sum()

    with extend(cell):
        loss().backward()
    exact = hessian(loss, [cell.weight_ih]).diagonal().view_as(cell.weight_ih)
    torch.testing.assert_close(cell.weight_ih.hesscale[3], exact[3], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cell, gates", [("lstm", 4), ("gru", 3)])
def test_fused_cells_equal_those_of_the_cpu(cell, gates, float64):
    """With W_x = 1 and W_h = 0 the input and the bias of an ordinary cell are the gates of a fused one."""
    names = ["input_gates", "hidden_gates", "state"]
    tensors = [torch.randn(1, size).requires_grad_() for size in (2 * gates, 2 * gates, 2)]
    a_x, a_h, state = tensors
    weights = torch.eye(2 * gates), torch.zeros(2 * gates, 2), torch.zeros(2 * gates), a_h[0]
    before = (torch.zeros(1, 2), state) if cell == "lstm" else state
    ordinary = getattr(torch, cell + "_cell")(a_x, before, *weights)
    fused = getattr(aten, f"_thnn_fused_{cell}_cell")(*tensors)[: 2 if cell == "lstm" else 1]
    ordinary = [ordinary] if cell == "gru" else ordinary
    torch.testing.assert_close(list(fused), list(ordinary))
    g, h = ([torch.randn(1, 2) for _ in fused] for _ in "gh")
    want = through(ordinary, tensors, g, h, Settings())
    (op,) = Graph([fused[0].grad_fn]).operations({edge_of(x): x for x in tensors}, Settings())
    unread = [None] * (len(op.outputs) - len(g))
    got = pass_diagonal(op, g + unread, h + unread)
    for name, a, b in zip(names, got, want, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["CudnnRnnBackward0", "MiopenRnnBackward0"])
def test_whole_layers_in_one_kernel_are_refused(kind):
    rule = registry.RULES[kind, "diagonal"]
    assert rule.how == "refused"
    op = Operation.__new__(Operation)
    op.name = kind
    with pytest.raises(CurvatureError, match=kind + r".*torch\.backends\.cudnn\.flags\(enabled=False\)"):
        rule(op, None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_cuda_layers(kind):
    layer = kind(2, 3, 2, bidirectional=True)
    x, results = torch.randn(4, 3, 2, dtype=torch.float64), []
    for device in ("cpu", "cuda"):
        layer = layer.to(device, torch.float64)
        with torch.backends.cudnn.flags(enabled=False), extend(layer) as curvature:
            loss_of(layer, x.to(device)).backward()
        results.append({name: wave.cpu() for name, wave in curvature.hesscale.items()})
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
    with pytest.raises(CurvatureError, match="CudnnRnnBackward0"), extend(layer):
        loss_of(layer, x.cuda()).backward()
