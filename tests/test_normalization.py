"""Normalisations: nodes of other devices by their formulas, exactness at a diagonal loss, and low precision."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.functional import jvp

from curvext import HesScale, extend
from curvext.registry import RULES
from curvext.rules import normalization

from .reference import equation_2, hessian, split


@pytest.mark.parametrize("normalized", [(3,), (2, 3)])
def test_fused_rms_norm(float64, normalized):
    x, weight = torch.randn(4, 2, 3), torch.randn(normalized)
    dims = tuple(range(-len(normalized), 0))
    saved = {"input": x, "weight": weight, "result1": (x.square().mean(dims, keepdim=True) + 0.1).rsqrt()}
    named = {"name": "FusedRmsNormBackward0", "needs": (True, True), "outputs": (x,)}
    op = SimpleNamespace(**saved, **named, normalized_shape=normalized)
    g, h = torch.randn(2, *x.shape)
    waves = RULES["FusedRmsNormBackward0", "diagonal"](op, g, h)
    for i, wave in enumerate(waves[:2]):
        want = equation_2(lambda x, w: F.rms_norm(x, normalized, w, 0.1), [x, weight], i, g, h)
        torch.testing.assert_close(wave.sum_to_size(want.shape), want)
    t = torch.randn(2, *x.shape), torch.randn(2, *normalized)
    got = RULES["FusedRmsNormBackward0", "tangent"].function(op, t)
    for v in range(2):
        _, want = jvp(lambda x, w: F.rms_norm(x, normalized, w, 0.1), (x, weight), (t[0][v], t[1][v]))
        torch.testing.assert_close(got[v], want)


NORMS = {
    "layer": nn.LayerNorm(6),
    "group": nn.GroupNorm(2, 6),
    "batch": nn.BatchNorm1d(6),
    "batch, running": nn.BatchNorm1d(6).eval(),
    "batch, no statistics": nn.BatchNorm1d(6, affine=False, track_running_stats=False),
    "softmax": nn.Softmax(-1),
    "log softmax": nn.LogSoftmax(-1),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
def test_exact_below_a_separable_loss(float64, norm):
    """Linear, normalisation, squared error: one diagonal at the output, so every parameter is exact.

    Train-mode batch norm mixes samples, so a weight used by all of them is not: there its input is tested instead.
    """
    mixes = isinstance(norm, nn.BatchNorm1d) and norm.training
    model = nn.Sequential(nn.Identity() if mixes else nn.Linear(3, 6), norm).double()
    x, y = torch.randn(5, 6 if mixes else 3, requires_grad=True), torch.randn(5, 6)
    model(x)  # moves running statistics away from their defaults
    leaves = [x, *model.parameters()]

    def loss():
        return ((model(x) - y) ** 2).sum()

    with extend(leaves, HesScale()) as curvature:
        loss().backward()
    exact = split(hessian(loss, leaves).diagonal(), leaves)
    for i, want in enumerate(exact):
        if i > 0 or mixes:  # the input of the linear layer has a full Hessian
            torch.testing.assert_close(curvature.hesscale[str(i)], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)], ids=str)
def test_blocks_make_no_difference(float64, monkeypatch, norm):
    model, x, y = norm.double(), torch.randn(7, 6, 5)[..., 0].requires_grad_(), torch.randn(7, 6)
    results = []
    for block in (1, 20, 1 << 17):
        monkeypatch.setattr(normalization, "BLOCK", block)
        with extend({"x": x, **dict(model.named_parameters())}) as curvature:
            ((model(x) - y) ** 4).sum().backward()
        results.append(curvature.hesscale)
    for other in results[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name])


def test_no_samples():
    norm = nn.LayerNorm(3)
    with extend(norm) as curvature:
        norm(torch.randn(0, 3)).square().sum().backward()
    assert not curvature.hesscale["weight"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)], ids=str)
def test_low_precision(norm, dtype):
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    results = []
    for kind in (dtype, torch.float64):
        model, given = norm.to(kind), x.to(kind).requires_grad_()
        with extend({"x": given, **dict(model.named_parameters())}) as curvature:
            ((model(given) - y.to(kind)) ** 2).sum().backward()
        assert all(value.dtype is kind for value in curvature.hesscale.values())
        results.append({name: value.double() for name, value in curvature.hesscale.items()})
    for name, want in results[1].items():
        error = (results[0][name] - want).abs().max() / want.abs().max()
        assert error < (1e-5 if dtype is torch.float32 else 0.05), f"{name}: {error}"
