"""CPU kernels for operations that only other devices have, so that their autograd nodes can be recorded here.

Forward only. What a kernel returns beside its outputs is for its own backward pass; no rule reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LIBRARY = torch.library.Library("aten", "IMPL")
aten = torch.ops.aten


def unfused_attention(q, k, v, mask=None, causal=False, scale=None, gqa=False):
    """The steps of attention as ordinary operations."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


def stand_in(name: str, kernel: Callable[[dict[str, Any]], list[Any]]) -> None:
    """Register a CPU kernel; it is given the arguments by name, and returns the first outputs."""
    schema = getattr(aten, name).default._schema

    def run(*args: Any, **kwargs: Any) -> list[Any]:
        values = {a.name: a.default_value for a in schema.arguments}
        values.update(zip(values, args, strict=False), **kwargs)
        outputs = kernel(values)
        rest = [torch.zeros(()) if "Tensor" in str(r.type) else 0 for r in schema.returns[len(outputs) :]]
        return outputs + rest

    LIBRARY.impl(name, run, "CPU")


def attention(values: dict[str, Any]) -> list[Tensor]:
    q, k, v = (values[name] for name in ("query", "key", "value"))
    gqa = q.shape[1] != k.shape[1]
    return [unfused_attention(q, k, v, values.get("attn_bias"), values["is_causal"], values["scale"], gqa)]


def lstm_cell(values: dict[str, Any]) -> list[Tensor]:
    i, f, u, o = (gate for gate in gates(values).chunk(4, 1))
    c = f.sigmoid() * values["cx"] + i.sigmoid() * u.tanh()
    return [o.sigmoid() * c.tanh(), c]


def gru_cell(values: dict[str, Any]) -> list[Tensor]:
    h, b_x, b_h = (values[name] for name in ("hx", "input_bias", "hidden_bias"))
    x_r, x_z, x_u = (values["input_gates"] + (0 if b_x is None else b_x)).chunk(3, 1)
    h_r, h_z, h_u = (values["hidden_gates"] + (0 if b_h is None else b_h)).chunk(3, 1)
    z = (x_z + h_z).sigmoid()
    return [z * h + (1 - z) * (x_u + (x_r + h_r).sigmoid() * h_u).tanh()]


def gates(values: dict[str, Any]) -> Tensor:
    biases = [b for b in (values["input_bias"], values["hidden_bias"]) if b is not None]
    return sum(biases, start=values["input_gates"] + values["hidden_gates"])


for _name in ("flash", "efficient", "cudnn"):
    stand_in(f"_scaled_dot_product_{_name}_attention", attention)
stand_in("_scaled_dot_product_fused_attention_overrideable", attention)
stand_in("_thnn_fused_lstm_cell", lstm_cell)
stand_in("_thnn_fused_gru_cell", gru_cell)
