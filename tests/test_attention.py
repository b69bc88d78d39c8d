"""Attention: the result does not depend on which kernel ran."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvext import HMP, PCHMP, BatchDiagHessian, CurvatureError, DiagHessian, extend
from curvext.diagonal import pass_diagonal, through
from curvext.graph import Graph, edge_of
from curvext.sweep import Settings
from curvext.testing import EXACT

from .stand_ins import aten
from .stand_ins import unfused_attention as unfused


def leaves(b=2, heads=4, shared=2, t=5, s=6, e=8, f=8, **options):
    return {
        "q": torch.randn(b, heads, t, e, **options).requires_grad_(),
        "k": torch.randn(b, shared, s, e, **options).requires_grad_(),
        "v": torch.randn(b, shared, s, f, **options).requires_grad_(),
    }


def drawn(y):
    """A gradient and a wave at y, in every precision the same numbers."""
    torch.manual_seed(1)
    return torch.randn(2, *y.shape, dtype=torch.float32).to(y)


def waves(tensors, attend, gauss_newton=False):
    """The diagonal waves that random ones at the output lead to, by name; no kernel's backward pass is run."""
    tensors = {name: x for name, x in tensors.items() if x is not None}
    y = attend(**tensors)
    g, h = drawn(y)
    targets = {edge_of(x): name for name, x in tensors.items() if x.requires_grad}
    (op,) = Graph([edge_of(y)[0]]).operations(targets, Settings())
    got = pass_diagonal(op, None if gauss_newton else [g], [h])
    return {targets[edge]: op.reduced(got[i], i) for i, edge in enumerate(op.edges) if op.needs[i]}


def unfused_waves(tensors, gauss_newton=False, **options):
    """The same through the unfused form."""
    y = unfused(*tensors.values(), **options)
    g, h = drawn(y)
    got = through([y], list(tensors.values()), None if gauss_newton else [g], [h], Settings(enumerate_up_to=EXACT))
    return {
        name: wave for (name, x), wave in zip(tensors.items(), got, strict=True) if x is not None and x.requires_grad
    }


def fused_cpu(q, k, v, mask=None, causal=False, scale=None):
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=True)


def flash(q, k, v, causal=False, scale=None):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[0]


def efficient(q, k, v, mask=None, causal=False, scale=None):
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, causal, scale=scale)[0]


def cudnn(q, k, v, mask=None, causal=False, scale=None):
    return aten._scaled_dot_product_cudnn_attention(q, k, v, mask, True, 0.0, causal, scale=scale)[0]


def overrideable(q, k, v, mask=None, causal=False, scale=None):
    return aten._scaled_dot_product_fused_attention_overrideable(q, k, v, mask, 0.0, causal, scale=scale)[0]


KERNELS = [fused_cpu, flash, efficient, cudnn, overrideable]


@pytest.mark.parametrize("fused", KERNELS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.2}])
@pytest.mark.parametrize("gauss_newton", [False, True])
def test_fused_equals_unfused(fused, options, gauss_newton):
    tensors = leaves(dtype=torch.float64, shared=4 if fused in (efficient, overrideable) else 2)
    got = waves(tensors, partial(fused, **options), gauss_newton)
    want = unfused_waves(tensors, gauss_newton, **options, gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [fused_cpu, efficient, cudnn, overrideable])
@pytest.mark.parametrize("trained", [False, True])
def test_masks(fused, trained):
    tensors = leaves(dtype=torch.float64, shared=4)
    hidden = torch.zeros(2, 4, 5, 6, dtype=torch.float64).masked_fill_(torch.rand(2, 4, 5, 6) < 0.4, -torch.inf)
    hidden[0, 1, 2] = -torch.inf  # a query that sees no key
    tensors["mask"] = torch.randn_like(hidden) if trained else hidden
    tensors["mask"].requires_grad_(trained and fused in (efficient, overrideable))
    torch.testing.assert_close(waves(tensors, fused), unfused_waves(tensors), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)])
def test_precisions(dtype, tolerance):
    small = leaves(shared=4, dtype=dtype)
    wide = {name: x.detach().float().requires_grad_() for name, x in small.items()}
    for name, wave in waves(small, partial(fused_cpu, causal=True)).items():
        want = waves(wide, partial(fused_cpu, causal=True))[name]
        assert wave.dtype is dtype
        assert (wave - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk", "kv"])
def test_frozen_parts(frozen):
    tensors = leaves(dtype=torch.float64)
    want = waves(tensors, fused_cpu)
    for name in frozen:
        tensors[name].requires_grad_(False)
    torch.testing.assert_close(waves(tensors, fused_cpu), {k: v for k, v in want.items() if k not in frozen})


def test_dropout():
    layer = nn.MultiheadAttention(4, 2, dropout=0.3)
    x = torch.randn(3, 2, 4)
    with extend(layer):  # the CPU takes the unfused form by itself
        layer(x, x, x, need_weights=False)[0].square().sum().backward()
    assert layer.in_proj_weight.hesscale.isfinite().all()


def test_dropout_in_a_fused_kernel():
    def attend(q, k, v):
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.5)[0]

    with pytest.raises(CurvatureError, match=r"which entries it dropped.*sdpa_kernel"):
        waves(leaves(shared=4), attend)


LAYERS = {
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0),
    "decoder": lambda: nn.TransformerDecoderLayer(8, 2, 6, dropout=0.0, norm_first=True, activation="gelu"),
    "both": lambda: nn.Transformer(8, 2, 1, 1, 6, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_transformer_layers_with_either_backend(name, float64):
    layer, inputs = LAYERS[name](), [torch.randn(3, 2, 8) for _ in range(1 if name == "encoder" else 2)]
    results = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(backend), extend(layer) as curvature:
            layer(*inputs).tanh().sum().backward()
        results.append(curvature.hesscale)
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
)
@pytest.mark.parametrize("causal", [False, True])
def test_cuda_kernels(backend, causal):
    tensors = leaves(shared=4, t=6, dtype=torch.float16, device="cuda")

    def attend(q, k, v):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    attended, steps = (f(**tensors).tanh().square().sum() for f in (attend, partial(unfused, causal=causal)))
    results = []
    for loss in (attended, steps):
        with extend(tensors) as curvature:
            loss.backward()
        results.append(curvature.hesscale)
    for name, want in results[1].items():
        assert (results[0][name] - want).float().norm() <= 0.05 * want.float().norm()


@pytest.mark.parametrize("quantity", [DiagHessian(), BatchDiagHessian(), HMP(), PCHMP()], ids=lambda q: q.savefield)
def test_what_differentiates_a_fused_kernel_twice_says_what_to_do(quantity):
    layer, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(3, 2, 4)

    def step():
        with extend(layer, quantity):
            layer(x, x, x, need_weights=False)[0].square().mean().backward()

    with pytest.raises(CurvatureError, match=r"SDPBackend\.MATH"):
        step()
    with sdpa_kernel(SDPBackend.MATH):
        step()
    assert hasattr(layer.in_proj_weight, quantity.savefield)
