"""Where the factor wave starts: the Hessian B of the loss at the topmost nonlinear operation under it, and its factor.

Everything above that operation is linear in its output y = f(x), so B = ∂²⟨g, f(x)⟩/∂x² with g = ∂L/∂y: class
weights, ignored targets, smoothing, reductions and loss scaling are all in g, and need no care. B is block diagonal
over the samples. Rules of the wave ``"source"`` give it in closed form; where ``f`` goes entry by entry it is the
second term of equation (2); any other operation is differentiated twice (:class:`DenseHessian`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import registry
from .diagonal import bends, pass_diagonal
from .errors import CurvatureError
from .graph import Operation
from .hessians import DenseHessian, DiagonalHessian, LossHessian, entries, tracing
from .rules.default import others_fixed, quiet_vmap
from .samples import BATCH, Axis, front

MOST = 4096  # entries of a sample for which a dense Hessian is formed


def joint(op: Operation) -> list[list[int]]:
    """The inputs that the model's output may be: those that hold samples; if none does, all."""
    groups = op.groups
    return [group for group in groups if op.axes_in[group[0]] is not None] or groups


def may_start(op: Operation) -> bool:
    """Whether an operation may be nonlinear in its inputs, taken together."""
    return bends(op) or (len(op.edges) > 1 and len(joint(op)) > 1)


def loss_hessian(op: Operation, g: Sequence[Tensor | None]) -> dict[int, LossHessian]:
    """B = ∂²⟨g, f(x)⟩/∂x² at the inputs of an operation; empty if it bends nothing."""
    if not may_start(op) or not any(v is not None for v in g):
        return {}
    rule = registry.find(op, "source")
    if rule is not None and not op.coincident:
        return {i: hessian for i, hessian in rule.function(op, g).items() if op.needs[i]}
    groups = joint(op)
    separable = registry.find(op, "diagonal")
    if len(groups) == 1 and separable is not None and separable.separable:
        bend = pass_diagonal(op, g, [None] * len(g))
        i = groups[0][0]
        found = None if i >= len(bend) else bend[i]
        if found is None:
            return {}
        return {i: DiagonalHessian(op.reduced(found, i))}
    return dense_hessian(op, g, groups)


def dense_hessian(op: Operation, g: Sequence[Tensor | None], groups: list[list[int]]) -> dict[int, LossHessian]:
    """B of every sample by differentiating the node's backward, with its eigenvectors."""
    parts: dict[int, Tensor] = {}
    with torch.enable_grad():
        outs = op.vjp(*(None if v is None else v.detach().requires_grad_(op.is_python) for v in g))
        for group in groups:
            given = [op.reduced(out, i) for i in group if (out := outs[i]) is not None]
            if given:
                parts[group[0]] = sum(given[1:], start=given[0])
    if not any(part.requires_grad for part in parts.values()):
        return {}
    places = {i: BATCH if op.axes_in[i] is None else op.axes_in[i] for i in parts}
    n = 1 if BATCH in places.values() else op.n_samples
    size = sum(part.numel() // n for part in parts.values())
    if size > MOST:
        raise CurvatureError(
            f"its Hessian would have {size} rows a sample (at most {MOST} are formed), and it has no rule of the wave "
            "'source' (docs/rules.md)"
        )
    rows = torch.cat([_rows(op, parts, j, places, n) for j in parts])
    return _factored(rows, parts, places, n)


def _rows(op: Operation, parts: dict[int, Tensor], j: int, places: dict[int, Axis], n: int) -> Tensor:
    """Rows ``[D_j, N, D]`` of every sample's Hessian: those of the entries of input j."""
    number, size = entries(parts[j].shape, places[j], n, parts[j].device)
    basis = (number == torch.arange(size, device=number.device).view(-1, *[1] * number.dim())).to(parts[j].dtype)
    blocks = []
    for i, part in parts.items():
        found = None
        if parts[j].requires_grad:
            with others_fixed(op, i), quiet_vmap():
                (found,) = torch.autograd.grad(
                    *(parts[j], GradientEdge(*op.edges[i]), basis),
                    retain_graph=True, allow_unused=True, is_grads_batched=True,
                )  # fmt: skip
        found = torch.zeros(size, *part.shape, dtype=part.dtype, device=part.device) if found is None else found
        blocks.append(front(found.detach(), places[i], n, 1).flatten(2))
    return torch.cat(blocks, 2)


def _factored(rows: Tensor, parts: dict[int, Tensor], places: dict[int, Axis], n: int) -> dict[int, LossHessian]:
    if not tracing() and not bool(rows.any()):
        return {}
    values, vectors = torch.linalg.eigh(rows.movedim(1, 0))
    split = vectors.movedim(-1, 0).split([part.numel() // n for part in parts.values()], -1)  # [V, N, D]
    found: dict[int, LossHessian] = {}
    for (i, part), piece in zip(parts.items(), split, strict=True):
        shape = front(part, places[i], n).shape[1:]
        found[i] = DenseHessian(values.mT, piece.unflatten(-1, shape), part.shape)
    return found
