"""Scaled dot product attention: the CPU's fused kernel, those of other devices by stand-ins, and the unfused form."""

import torch
import torch.nn.functional as F

from ..stand_ins import aten
from ..stand_ins import unfused_attention as unfused
from . import Built, Draw, add_case, case, of_module


def inputs(d: Draw, gqa: bool = True) -> tuple[list[torch.Tensor], int, int]:
    """Query, key and value, and the numbers of queries and keys."""
    b, t, s, e, f = d.sizes(5, high=3)
    heads, groups = d.choice((1, 1), (2, 1), (4, 2)) if gqa else (2, 1)
    shared = heads // groups if gqa else heads
    return [d.tensor(b, heads, t, e), d.tensor(b, shared, s, e), d.tensor(b, shared, s, e if gqa else f)], t, s


@case
def attention_flash_cpu(d: Draw) -> Built:
    (q, k, v), t, s = inputs(d)
    mask = d.choice(None, d.mask(t, s), d.tensor(t, s, grad=False))
    return attend(mask, d.choice(False, True) and mask is None, d.choice(None, 0.3)), [q, k, v]


def attend(mask, causal, scale):
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=True)

    return function


@case
def attention_unfused(d: Draw) -> Built:
    (q, k, v), t, s = inputs(d, gqa=False)
    return unfused, [q, k, v, d.tensor(t, s)]


@case
def attention_of_one_tensor(d: Draw) -> Built:
    return lambda x: F.scaled_dot_product_attention(x, x, x), [d.tensor(*d.sizes(4, high=3))]


@case
def attention_flash(d: Draw) -> Built:
    causal, scale = d.boolean(), d.choice(None, 0.3)
    function = aten._scaled_dot_product_flash_attention
    return lambda q, k, v: function(q, k, v, 0.0, causal, scale=scale)[0], inputs(d)[0]


@case
def attention_cudnn(d: Draw) -> Built:
    qkv, t, s = inputs(d)
    bias = d.choice(None, d.tensor(t, s, grad=False))
    function = aten._scaled_dot_product_cudnn_attention
    return lambda q, k, v: function(q, k, v, bias, True, 0.0, bias is None)[0], qkv


def _add_with_bias(name: str, after_bias: tuple) -> None:
    def build(d: Draw) -> Built:
        (q, k, v), t, s = inputs(d, gqa=False)
        scale = d.choice(None, 0.3)
        function = getattr(aten, "_scaled_dot_product_" + name)
        b, heads = q.shape[:2]

        def attend(q, k, v, bias):
            return function(q, k, v, bias.expand(b, heads, t, s), *after_bias, scale=scale)[0]

        return attend, [q, k, v, d.tensor(t, s)]

    add_case("attention_" + name.removesuffix("_attention"), build)


_add_with_bias("efficient_attention", (True,))
_add_with_bias("fused_attention_overrideable", ())


def _layer(module_of, *shapes):
    def build(d: Draw) -> Built:
        return of_module(d, module_of(), *(d.tensor(*shape) for shape in shapes))

    return build


class SelfAttention(torch.nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class AttentionWithWeights(torch.nn.MultiheadAttention):
    def forward(self, q, k):
        return super().forward(q, k, k)


SMALL = dict(d_model=4, nhead=2, dim_feedforward=3, dropout=0.0, batch_first=True)
add_case("multihead_attention", _layer(lambda: SelfAttention(4, 2, batch_first=True), (2, 3, 4)), examples=2)
add_case("multihead_attention_weights", _layer(lambda: AttentionWithWeights(4, 2), (3, 2, 4), (2, 2, 4)), examples=2)
add_case("transformer_encoder_layer", _layer(lambda: torch.nn.TransformerEncoderLayer(**SMALL), (2, 3, 4)), examples=1)
add_case(
    "transformer_decoder_layer",
    _layer(lambda: torch.nn.TransformerDecoderLayer(**SMALL), (2, 3, 4), (2, 2, 4)),
    examples=1,
)
