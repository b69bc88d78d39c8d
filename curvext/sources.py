"""Where the factor wave starts: the Hessian B of the loss at the topmost nonlinear operation under it, and its factor.

Everything above that operation is linear in its output y = f(x), so B = ∂²⟨g, f(x)⟩/∂x² with g = ∂L/∂y: class
weights, ignored targets, smoothing, reductions and loss scaling are all in g, and need no care. If trained
weights come before any nonlinear operation, the loss is linear in the model's output (it may have kinks), and B = 0.

B is block diagonal over the samples; a loss that mixes them is found out, and B taken whole. Rules of the wave
``"source"`` give it in closed form; where ``f`` goes entry by entry it is the second term of equation (2); any other
operation is differentiated twice (:mod:`curvext.bending`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import registry
from .axes import BATCH
from .bending import Bending, derivative, twice_differentiable
from .diagonal import bends, pass_diagonal
from .graph import Operation
from .hessians import DiagonalHessian, LossHessian
from .rules.default import UNBATCHED, others_fixed


def joint(op: Operation) -> list[list[int]]:
    """The inputs that the model's output may be: those that hold samples; if none does, all."""
    groups = op.groups
    return [group for group in groups if op.axes_in[group[0]] is not None] or groups


def may_start(op: Operation) -> bool:
    """Whether the gradient is needed to tell if an operation is nonlinear in its inputs, taken together."""
    rule = registry.find(op, "complex" if op.is_complex else "diagonal")
    if rule is not None and rule.is_additive(op):
        return False
    return bends(op) or (len(op.edges) > 1 and len(joint(op)) > 1)


def starts(op: Operation, reached: bool) -> bool:
    """Whether an operation's own curvature belongs to the loss's Hessian, given whether curvature reached it already.

    It does at the topmost nonlinear operation, and where many entries become one number: in ``norm(z) ** 2`` the
    number is no model's output.
    """
    return not op.above and (not reached or _reduces(op))


def _reduces(op: Operation) -> bool:
    needed = [meta for meta, need in zip(op.inputs, op.needs, strict=True) if need]
    one = len(op.outputs) == len(needed) == prod(op.outputs[0].shape) == 1
    return one and (op.summed or op.axes_out[0] is BATCH) and prod(needed[0].shape) > 1


def filled(op: Operation) -> list[bool]:
    """By input: whether it leads to a target, and has entries."""
    return [need and 0 not in meta.shape for need, meta in zip(op.needs, op.inputs, strict=True)]


def is_layer(op: Operation) -> bool:
    """Whether samples meet trained weights here. What is below is the model: if nothing bent above, B = 0."""
    meets = any([axis is not None for axis in op.axes_out])
    return meets and not op.above and any([n and a is None for n, a in zip(op.needs, op.axes_in, strict=True)])


def loss_hessian(op: Operation, g: Sequence[Tensor | None]) -> dict[int, LossHessian]:
    """B = ∂²⟨g, f(x)⟩/∂x² at the inputs of an operation; empty if it bends nothing."""
    if not may_start(op) or not any(v is not None and v.numel() for v in g) or not any(filled(op)):
        return {}
    rule, groups = registry.find(op, "source"), joint(op)
    hessians = None if rule is None or op.coincident else rule.function(op, g)
    if hessians is not None:
        return {i: hessian for i, hessian in hessians.items() if op.needs[i]}
    if not _is_separable(op):
        return dense_hessian(op, g, groups)
    bend = pass_diagonal(op, g, [None] * len(g))
    i = groups[0][0]
    found = None if i >= len(bend) else bend[i]
    return {} if found is None else {i: DiagonalHessian(op.reduced(found, i))}


def is_dense(op: Operation) -> bool:
    """Whether B has no closed form."""
    return (registry.find(op, "source") is None or op.coincident) and not _is_separable(op)


def _is_separable(op: Operation) -> bool:
    rule = registry.find(op, "diagonal")
    return len(joint(op)) == 1 and rule is not None and rule.separable


def rows(op: Operation) -> int:
    """How many rows B has: the entries of a sample in the inputs together, or of all if some are shared."""
    inputs = [group[0] for group in joint(op)]
    n = 1 if any([op.axes_in[i] is None for i in inputs]) else op.n_samples
    return sum([prod(op.inputs[i].shape) for i in inputs]) // n


def dense_hessian(op: Operation, g: Sequence[Tensor | None], groups: list[list[int]]) -> dict[int, LossHessian]:
    """B of every sample by differentiating the node's backward, with its eigenvectors."""
    parts: dict[int, Tensor] = {}
    with torch.enable_grad(), twice_differentiable():
        outs = op.vjp(*(None if v is None else v.detach().requires_grad_(op.is_python) for v in g))
        for group in groups:
            given = [op.reduced(out, i) for i in group if (out := outs[i]) is not None]
            if given:
                parts[group[0]] = sum(given[1:], start=given[0])

    def product(j: int, i: int, v: Tensor, batched: bool) -> Tensor | None:
        with others_fixed(op, i):
            return derivative(parts[j], GradientEdge(*op.edges[i]), v, batched and op.kind not in UNBATCHED)

    axes = {i: op.axes_in[i] for i in parts}
    return Bending(parts, axes, op.n_samples, product).hessians(alone=not op.summed)
