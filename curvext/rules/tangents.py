"""Tangents across operations: t_y = Σ_i J_i t_i of tangents ``[V, *shape]`` at the inputs, of all V at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph import Operation
from ..registry import registered, rule
from . import samples as samples  # whose rules are read below
from .affine import sparse
from .columns import OTHER, sloped

Tangents = Sequence[Tensor | None]


def added(*terms: Tensor | None) -> Tensor | None:
    """Their sum, ``None`` being zero."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def entrywise(op: Operation, t: Tangents) -> Tensor | None:
    """Entry by entry: J is diagonal, hence its own transpose, of inputs broadcast to the output's shape."""
    if op.is_complex:
        return None
    rest = [None] * (len(op.outputs) - 1)
    wide = [None if x is None else broadcast(x, op).to(op.outputs[0].dtype) for x in t]
    found = [None if x is None else op.vjp(x, *rest)[i] for i, x in enumerate(wide)]
    alike = all([y is None or y.shape == x.shape for x, y in zip(wide, found, strict=True) if x is not None])
    return added(*found) if alike else None  # some sum over what was broadcast


def broadcast(x: Tensor, op: Operation) -> Tensor:
    """Tangents ``[V, *shape]`` in the shape of the output."""
    shape = op.outputs[0].shape
    return x.view(len(x), *[1] * (len(shape) - x.dim() + 1), *x.shape[1:]).expand(-1, *shape)


def viewed(op: Operation, t: Tangents) -> Tensor | None:
    """Entries keep their order: t in the output's shape and dtype."""
    (x,), meta = t, op.outputs[0]
    return None if x is None else x.reshape(len(x), *meta.shape).to(meta.dtype)


_layouts = {layout: [n for n, r in registered("samples") if r.layout == layout] for layout in ("aligned", "reshaped")}
rule(*[name for name in _layouts["aligned"] if not any(o in name for o in OTHER)], wave="tangent", how="structure")(
    entrywise
)
rule(*_layouts["reshaped"], wave="tangent", how="structure")(viewed)


@rule("GeluBackward0", wave="tangent", how="structure")
def gelu(op: Operation, t: Tangents) -> Tensor | None:
    """t_y = φ' t."""
    (x,) = t
    return None if x is None else sloped(op, x, (True,))[0]


@rule("TBackward0", "TBackward1", wave="tangent", how="structure")
def t(op: Operation, t: Tangents) -> Tensor | None:
    """The transpose of every tangent."""
    (x,) = t
    return x if x is None or x.dim() < 3 else x.mT


def _product(a: Any, b: Any, t_a: Tensor | None, t_b: Tensor | None) -> Tensor | None:
    return added(None if t_a is None else t_a @ b, None if t_b is None else a @ t_b)


@rule("MmBackward0", "BmmBackward0", wave="tangent")
def mm(op: Operation, t: Tangents) -> Tensor | None:
    """t_y = t_A B + A t_B."""
    return None if sparse(op.self, op.mat2) else _product(op.self, op.mat2, *t)


@rule("AddmmBackward0", "BaddbmmBackward0", wave="tangent")
def addmm(op: Operation, t: Tangents) -> Tensor | None:
    """t_y = β t_C + α (t_A B + A t_B)."""
    factors = (op.mat1, op.mat2) if op.name == "AddmmBackward0" else (op.batch1, op.batch2)
    offset, product = t[0], _product(*factors, *t[1:])
    if offset is not None:
        offset = broadcast(offset, op) * op.beta
    return added(offset, product if product is None or op.alpha == 1 else product * op.alpha)


@rule("LinearBackward0", wave="tangent")
def linear(op: Operation, t: Tangents) -> Tensor | None:
    """t_y = t_x Wᵀ + x t_Wᵀ + t_b."""
    x, w, b = [*t, None][:3]
    if w is not None:
        rows = op.node._saved_input.flatten(0, -2)  # type: ignore[attr-defined]
        w = (rows @ w.mT).view(len(w), *op.outputs[0].shape)
    return added(None if x is None else x @ op.weight.mT, w, None if b is None else broadcast(b, op))


@rule("ConvolutionBackward0", wave="tangent")
def convolution(op: Operation, t: Tangents) -> Tensor | None:
    """t_y = W ⋆ t_x + t_W ⋆ x + t_b."""
    node: Any = op.node
    geometry = (op.stride, op.padding, op.dilation, op.transposed, op.output_padding, node._saved_groups)
    x, w, b = [*t, None][:3]
    if x is not None:
        x = torch.convolution(x.flatten(0, 1), op.weight, None, *geometry).unflatten(0, x.shape[:2])
    if w is not None:
        w = torch.stack([torch.convolution(node._saved_input, v, None, *geometry) for v in w])
    if b is not None:
        b = b.view(len(b), 1, -1, *[1] * (len(op.outputs[0].shape) - 2)).expand(-1, *op.outputs[0].shape)
    return added(x, w, b)
