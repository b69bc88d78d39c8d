"""Losses that autograd records as one node: y = c Σ φ(x, t), or its terms, so h_x = s² h + c φ'' g with s = c φ'.

The incoming h is not zero where a loss is transformed further, as in ``loss ** 2``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bending import Bending
from ..errors import CurvatureError
from ..graph import Operation
from ..hessians import LossHessian
from ..registry import rule
from .structure import decomposed, scale, scaling

Waves = Any

scaling("NllLossBackward0", "NllLoss2DBackward0")


def _per_entry(op: Operation) -> float:
    """c: one over the number of entries if the loss is their mean."""
    return 1 / max(op.self.numel(), 1) if op.reduction == 1 else 1.0


def symmetric(name: str, d1: Callable[..., Tensor], d2: Callable[..., Tensor | float]) -> None:
    """y = c Σ φ(x - t): the same wave for x and t. ``d1(op, x - t)`` is φ', ``d2(op, x - t)`` is φ''."""

    def symmetric_rule(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
        """y = c Σ φ(x - t): h_x = h_t = (c φ')² h + c φ'' g."""
        c, d = _per_entry(op), op.self - op.target
        wave = None if h is None else h * (c * d1(op, d)).square()
        if g is not None:
            bend = (c * g * d2(op, d)).expand_as(d)
            wave = bend if wave is None else wave + bend
        return wave, wave

    rule(name, separable=True)(symmetric_rule)


symmetric("MseLossBackward0", d1=lambda op, d: 2 * d, d2=lambda op, d: 2.0)
symmetric(
    "HuberLossBackward0",
    d1=lambda op, d: d.clamp(-op.delta, op.delta),
    d2=lambda op, d: (d.abs() < op.delta).to(d.dtype),
)
symmetric(
    "SmoothL1LossBackward0",
    d1=lambda op, d: (d / op.beta).clamp(-1, 1) if op.beta else d.sign(),
    d2=lambda op, d: (d.abs() < op.beta).to(d.dtype) / (op.beta or 1),
)


@rule("SoftMarginLossBackward0", separable=True)
def soft_margin(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = c Σ log(1 + exp(-t x)), σ = sigmoid(-t x): s = -c t σ, φ'' = t² σ (1 - σ)."""
    t = op.target
    sigma = torch.sigmoid(-t * op.self)
    slope = _per_entry(op) * t * sigma
    return _waved(slope, slope * t * (1 - sigma), g, h)


@rule("BinaryCrossEntropyBackward0", separable=True)
def binary_cross_entropy(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = -c Σ w (t log x + (1-t) log(1-x)): s = c w (x-t) / (x (1-x)), φ'' = w (x² - 2xt + t) / (x (1-x))²."""
    x, t, c = op.self, op.target, _weighted(op)
    below = (x * (1 - x)).clamp(min=1e-12)
    wave = _waved(c * (x - t) / below, c * (x * x - 2 * x * t + t) / below.square(), g, h) if op.needs[0] else None
    if not op.needs[1] or h is None:
        return wave, None
    return wave, h * (c * (torch.log1p(-x).clamp(min=-100) - x.log().clamp(min=-100))).square()


@rule("BinaryCrossEntropyWithLogitsBackward0", separable=True)
def binary_cross_entropy_with_logits(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = c Σ w ((1-t) x + l log(1 + e⁻ˣ)), l = 1 + (p-1) t: s = c w (1 - t - l σ), φ'' = w l σ (1-σ), σ = σ(-x)."""
    x, t, c = op.self, op.target, _weighted(op)
    sigma = torch.sigmoid(-x)
    both = sigma if op.pos_weight is None else (1 + (op.pos_weight - 1) * t) * sigma
    wave = _waved(c * (1 - t - both), c * both * (1 - sigma), g, h) if op.needs[0] else None
    if not op.needs[1] or h is None:
        return wave, None
    slope = -x if op.pos_weight is None else (op.pos_weight - 1) * F.softplus(-x) - x
    return wave, h * (c * slope).square()


def _weighted(op: Operation) -> Tensor | float:
    return _per_entry(op) if op.weight is None else _per_entry(op) * op.weight


def _waved(slope: Tensor, bend: Tensor, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    wave = None if h is None else h * slope.square()
    if g is None:
        return wave
    return g * bend if wave is None else wave + g * bend


@rule("MultilabelMarginLossBackward0", linear=True)
def multilabel_margin(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """Piecewise linear; each score feeds the loss of one sample: h_x = (Jᵀ1) ∘ (Jᵀh)."""
    return scale(op, None, h)


@rule("MultiMarginLossBackward0")
def multi_margin(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = c Σ_{j≠t} w_t max(0, m - x_t + x_j)^p: h_x = (Jᵀ1) ∘ (Jᵀh); if p = 2, 2 c w_t g per active term."""
    pulled = scale(op, None, h)
    wave = None if pulled is None else pulled[0]
    if g is None or op.p == 1:
        return wave
    active, t, weight = _margins(op, g)
    bend = (weight * active.scatter(1, t, active.sum(1, keepdim=True))).view(op.self.shape)
    return bend if wave is None else wave + bend


def _margins(op: Operation, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For p = 2: which terms are active ``[N, C]``, the targets ``[N, 1]``, and 2 c w_t g ``[N, 1]``."""
    x, t = op.self.view(-1, op.self.shape[-1]), op.target.view(-1, 1)
    active = (op.margin - x.gather(1, t) + x > 0).to(x.dtype).scatter(1, t, 0)
    c = 2 / x.shape[1] / (len(x) if op.reduction == 1 else 1)
    return active, t, c * g.reshape(-1, 1) if op.weight is None else c * g.reshape(-1, 1) * op.weight[t]


@rule("MultiMarginLossBackward0", wave="source")
def multi_margin_hessian(op: Operation, g: Sequence[Tensor | None]) -> dict[int, LossHessian]:
    """p = 1: B = 0. p = 2: B = 2 c w_t Σ (e_j - e_t)(e_j - e_t)ᵀ over the active terms j, for every sample."""
    if op.p == 1 or g[0] is None:
        return {}
    active, t, weight = _margins(op, g[0])

    def product(j: int, i: int, v: Tensor, batched: bool) -> Tensor:
        v = v.view(len(v), *active.shape)
        apart = active * (v - v.gather(2, t.expand(len(v), *t.shape)))
        return (weight * apart.scatter_add(2, t.expand(len(v), *t.shape), -apart.sum(2, keepdim=True))).view(-1, *shape)

    shape = op.self.shape
    axes = {0: op.axes_in[0] if len(shape) > 1 else None}
    return Bending({0: op.self}, axes, op.n_samples, product).hessians(alone=True)


@rule("CtcLossBackward0", "CtcLossBackward1")
def ctc(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = -log P, γ the posterior probability of a label at a time, p = exp(log_probs): s = p - γ, φ'' = p - γ + γ².

    P is linear in each p with γ = (∂P/∂log p) / P, so -log P alone has slope -γ and bends by γ² - γ. PyTorch adds the
    slope of Σ p, which is constant for normalised p, and so does this rule: it goes with PyTorch's gradient.
    """
    given = g if h is None else h
    slope: Any = op.vjp(torch.ones_like(given), *[None] * (len(op.outputs) - 1))[0]  # type: ignore[arg-type]
    wave = None if h is None else h.unsqueeze(-1) * slope.square()
    if g is None:
        return wave
    gamma = op.log_probs.exp() - slope
    lengths = torch.as_tensor(op.input_lengths, device=slope.device)
    within = torch.arange(len(slope), device=slope.device).unsqueeze(1) < lengths  # no slope after the end
    within = within & torch.isfinite(op.result0)  # nor, with zero_infinity, where no path exists
    bend = torch.where(within.unsqueeze(-1), g.unsqueeze(-1) * (slope + gamma.square()), 0)
    return bend if wave is None else wave + bend


@rule("CtcLossBackward0", "CtcLossBackward1", wave="source", how="refused")
def ctc_hessian(op: Operation, g: Sequence[Tensor | None]) -> NoReturn:
    """-log P is a difference of convex functions, in log-probabilities and in logits: no Gauss-Newton matrix."""
    raise CurvatureError(
        "CTC loss is convex neither in log-probabilities nor in logits, so that there is no Gauss-Newton matrix. Use "
        "HesScale(), whose diagonal needs none, or the samples' gradients: KFAC(empirical=True), SumGradSquared(); for "
        "a Jacobian, mark the output: z = curvext.output(model(x))"
    )


@rule("CudnnCtcLossBackward0", "CudnnCtcLossBackward1", how="refused")
def cudnn_ctc(op: Operation, g: Tensor | None, h: Tensor | None) -> None:
    """Keeps the slope alone, from which the curvature cannot be had."""
    raise CurvatureError(
        "cuDNN's CTC loss does not save what its curvature needs. Use PyTorch's own, with targets on the GPU or under "
        "torch.backends.cudnn.flags(enabled=False)."
    )


CHUNKED = "GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked_"


@decomposed(CHUNKED + "no_reduction_defaultBackward")
def linear_cross_entropy(op: Operation) -> Any:
    """Cross entropy of a linear layer, in chunks: that of all samples together."""
    x, w, target, b, weight = op.saved_tensors
    leaves: list[Any] = [
        None if v is None else v.detach().requires_grad_(k < len(op.needs) and op.needs[k])
        for k, v in ((0, x), (1, w), (3, b))
    ]
    loss = F.cross_entropy(F.linear(*leaves), target, weight, ignore_index=op._ignore_index, reduction="none")
    return [*leaves[:2], None, leaves[2]][: len(op.needs)], [loss]


@rule(CHUNKED + "defaultBackward", how="refused")
def reduced_linear_cross_entropy(op: Operation, g: Any, h: Any) -> None:
    """Keeps its gradient alone, and hands it out once."""
    raise CurvatureError(
        "linear_cross_entropy in chunks does not save what its curvature needs. Leave out options=, or use "
        "reduction='none' and reduce the result."
    )
