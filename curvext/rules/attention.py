"""Scaled dot product attention, whichever kernel ran: equation (2) across each of its steps.

    S = s Q Kᵀ + mask,   P = softmax S,   O = P V

A fused kernel saves neither S nor P; they are computed again, as its backward pass does. Stepping back,

    h_V = (P∘P)ᵀ h
    h_P = h (V∘V)ᵀ,  g_P = g Vᵀ
    h_S = P² ((1 - 2P) h_P + ΣP²h_P) + P (1 - 2P) (g_P - ΣPg_P),  sums over keys
    h_Q = s² h_S (K∘K),  h_K = s² h_Sᵀ (Q∘Q),  h_mask = h_S

so the result is the one the unfused ("math") backend leads to, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast, overload

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..graph import Operation
from ..registry import rule

Waves = tuple[Tensor | None, ...]
BIASED = (
    "ScaledDotProductEfficientAttentionBackward0",
    "ScaledDotProductCudnnAttentionBackward0",
    "ScaledDotProductFusedAttentionOverrideableBackward0",
)
FUSED = "ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0", *BIASED
UNFUSED = (
    "run the forward pass with its unfused form: "
    "with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)."
)
BLOCK = 1 << 18  # scores that are computed together: 1 MB in float32
GPU_BLOCK = 1 << 26


@rule("ScaledDotProductFlashAttentionForCpuBackward0", how="decomposed", coincident=True)
def flash_cpu(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """S = s Q Kᵀ + mask, P = softmax S, O = P V, step by step."""
    return attention(op, g, h, op.attn_mask)


@rule("ScaledDotProductFlashAttentionBackward0", how="decomposed", coincident=True)
def flash(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """S = s Q Kᵀ, P = softmax S, O = P V, step by step."""
    return attention(op, g, h, None)


@rule(*BIASED, how="decomposed", coincident=True)
def biased(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """S = s Q Kᵀ + bias, P = softmax S, O = P V, step by step."""
    return attention(op, g, h, op.attn_bias)


def attention(op: Operation, g: Tensor | None, h: Tensor | None, mask: Tensor | None) -> Waves:
    """The waves of query, key, value and mask."""
    heads, q, k, v, mask = _tensors(op, mask)
    steps = _Steps(_scale(op), op.is_causal, (*op.needs, False))
    h_q, h_k, h_v, h_s = _by_blocks(steps, (q, k, v, mask, _wide(op.output), _wide(g), _wide(h)))
    return (h_q, _summed(h_k, heads), _summed(h_v, heads), h_s)[: len(op.needs)]


def _tensors(op: Operation, mask: Tensor | None) -> tuple[int, Tensor, Tensor, Tensor, Tensor | None]:
    """The number of query heads that share a key and value head; query, key, value and mask of every query head."""
    if op.dropout_p > 0:
        raise CurvatureError(
            f"{op.name}: a fused attention kernel does not keep which entries it dropped, so its curvature cannot be "
            f"computed. Set the attention's dropout to 0, or {UNFUSED}"
        )
    heads = op.query.shape[-3] // op.key.shape[-3]
    q, k, v = _wide(op.query), _shared(_wide(op.key), heads), _shared(_wide(op.value), heads)
    return heads, q, k, v, None if mask is None else _wide(mask).expand(*q.shape[:-1], k.shape[-2])


def _scale(op: Operation) -> float:
    return op.query.shape[-1] ** -0.5 if op.scale is None else op.scale  # type: ignore[no-any-return]


@rule(*FUSED, wave="source", how="refused")
def fused_hessian(op: Operation, g: Sequence[Tensor | None]) -> NoReturn:
    """Not kept by the kernels, which cannot be differentiated twice."""
    raise CurvatureError(f"a fused attention kernel cannot be differentiated twice, as is needed here; {UNFUSED}")


@rule("ScaledDotProductFlashAttentionForCpuBackward0", wave="tangent", how="decomposed")
def flash_cpu_tangent(op: Operation, t: Sequence[Tensor | None]) -> Tensor | None:
    """t_S = s (t_Q Kᵀ + Q t_Kᵀ) + t_mask, t_P = P ∘ (t_S - ΣP t_S), t_O = t_P V + P t_V."""
    return _attention_tangent(op, t, op.attn_mask)


@rule("ScaledDotProductFlashAttentionBackward0", wave="tangent", how="decomposed")
def flash_tangent(op: Operation, t: Sequence[Tensor | None]) -> Tensor | None:
    """t_S = s (t_Q Kᵀ + Q t_Kᵀ), t_P = P ∘ (t_S - ΣP t_S), t_O = t_P V + P t_V."""
    return _attention_tangent(op, t, None)


@rule(*BIASED, wave="tangent", how="decomposed")
def biased_tangent(op: Operation, t: Sequence[Tensor | None]) -> Tensor | None:
    """t_S = s (t_Q Kᵀ + Q t_Kᵀ) + t_bias, t_P = P ∘ (t_S - ΣP t_S), t_O = t_P V + P t_V."""
    return _attention_tangent(op, t, op.attn_bias)


def _attention_tangent(op: Operation, t: Sequence[Tensor | None], mask: Tensor | None) -> Tensor | None:
    heads, q, k, v, mask = _tensors(op, mask)
    scale, p = _scale(op), _Steps(_scale(op), op.is_causal, ()).probabilities(q, k, mask)
    t_q, t_k, t_v, t_mask = [None if x is None else _wide(x) for x in [*t, None][:4]]
    t_k, t_v = (None if x is None else _shared(x, heads) for x in (t_k, t_v))
    if t_mask is not None:
        t_mask = t_mask.view(len(t_mask), *[1] * (q.dim() + 1 - t_mask.dim()), *t_mask.shape[1:])
    scores = [t_mask, None if t_q is None else t_q @ k.mT * scale, None if t_k is None else q @ t_k.mT * scale]
    total: Any = sum(s for s in scores if s is not None)
    out = None if t_v is None else p @ t_v
    if isinstance(total, Tensor):
        pulled = p * total
        through = (pulled - p * pulled.sum(-1, keepdim=True)) @ v
        out = through if out is None else out + through
    return None if out is None else out.to(op.outputs[0].dtype)


@dataclass(frozen=True)
class _Steps:
    """Back through O = P V, P = softmax S and S = s Q Kᵀ + mask, for some of the heads."""

    scale: float
    causal: bool
    needs: tuple[bool, ...]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        out: Tensor,
        g: Tensor | None,
        h: Tensor | None,
    ) -> Waves:
        p, needs = self.probabilities(q, k, mask), self.needs
        h_v = p.square().mT @ h if h is not None and needs[2] else None
        if not (needs[0] or needs[1] or needs[3]):
            return None, None, h_v, None
        # softmax: p (p Σp²h + (1 - 2p) (p h + g - Σpg)), where Σpg over keys is ΣOg over features
        wave = torch.zeros_like(p) if h is None else (h @ v.square().mT).mul_(p)
        total = (wave * p).sum(-1, keepdim=True)
        if g is not None:
            wave += g @ v.mT
            wave -= (g * out).sum(-1, keepdim=True)
        wave.mul_(torch.rsub(p, 1, alpha=2)).addcmul_(p, total).mul_(p)
        h_q = self.scale**2 * (wave @ k.square()) if needs[0] else None
        h_k = self.scale**2 * (wave.mT @ q.square()) if needs[1] else None
        return h_q, h_k, h_v, wave if needs[3] else None

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q * self.scale) @ k.mT
        if self.causal:  # the first query sees the first key only, also when there are more keys than queries
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        if mask is None:
            return scores.softmax(-1)
        return torch.ops.aten._safe_softmax(scores + mask, -1)  # rows that are masked throughout are zero


def _by_blocks(steps: Callable[..., Waves], tensors: Waves) -> Waves:
    """The steps for a few samples and heads at a time: scores that stay in cache, and are never all in memory."""
    q, k = cast(tuple[Tensor, Tensor], tensors[:2])
    n, heads = q.shape[:2]
    if n * heads == 1 or n * heads * q.shape[2] * k.shape[2] <= (BLOCK if q.is_cpu else GPU_BLOCK):
        return steps(*tensors)
    dim = 0 if n > 1 else 1
    halves = zip(*((None, None) if x is None else x.chunk(2, dim) for x in tensors), strict=True)
    results = [_by_blocks(steps, half) for half in halves]
    return tuple(None if a is None else torch.cat((a, b), dim) for a, b in zip(*results, strict=True))


@overload
def _wide(x: Tensor) -> Tensor: ...
@overload
def _wide(x: Tensor | None) -> Tensor | None: ...
def _wide(x: Tensor | None) -> Tensor | None:
    """Half precision in float32, in which the kernels accumulate."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def _shared(x: Tensor, heads: int) -> Tensor:
    return x if heads == 1 else x.repeat_interleave(heads, -3)


def _summed(wave: Tensor | None, heads: int) -> Tensor | None:
    """The wave of a head that several query heads share."""
    return wave if wave is None or heads == 1 else wave.unflatten(-3, (-1, heads)).sum(-3)


@rule(
    "FlashAttentionBackward0",
    "EfficientAttentionBackward0",
    "CudnnAttentionBackward0",
    how="refused",
    outputs="all",
    coincident=True,
)
def internal(op: Operation, g: Any, h: Any) -> NoReturn:
    """Kernels called directly, with layouts and masks of their own."""
    raise CurvatureError(
        f"{op.name}: curvature is not computed through PyTorch's internal attention kernels. Call "
        "torch.nn.functional.scaled_dot_product_attention instead."
    )
