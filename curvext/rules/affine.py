"""Products of tensors: y is linear in each factor, so h_A = (J_A∘J_A)ᵀ h and nothing bends.

For y = A B:  h_A = h (B∘B)ᵀ,  h_B = (A∘A)ᵀ h.  With a weight this is HesScale's h_W = hᵀ(x∘x), h_x = h (W∘W).
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm as grouped

from ..axes import BATCH, Axis, front
from ..graph import Operation
from ..persample import Dense, Outer, PerSample, WaveGram, over
from ..registry import rule
from .structure import factor_fixed, pointwise_rule

Waves = tuple[Tensor | None, ...] | None


def _scaled(wave: Tensor, factor: float) -> Tensor:
    return wave if factor == 1 else wave * factor**2


def _left(h: Tensor, b: Tensor) -> Tensor:
    return h @ (b * b).mT


def _right(h: Tensor, a: Tensor, transposed: bool = False) -> Tensor:
    return (h.mT @ (a * a)).mT if transposed else (a * a).mT @ h


def _transposed(op: Operation) -> bool:
    """Whether the second matrix is a transposed view, such as a layer's weight: its wave then has that layout too."""
    strides = getattr(op.node, "_saved_mat2_sym_strides", None)
    return strides is not None and strides[0] == 1


@rule("MmBackward0", "BmmBackward0", coincident=True, linear=True)
def mm(op: Operation, g: Tensor | None, h: Tensor | None) -> Any:
    """y = A B, also batched: h_A = h (B∘B)ᵀ, h_B = (A∘A)ᵀ h."""
    if op.coincident:
        return _matrix_square(op, g, h)
    if h is None:
        return None
    a = _left(h, op.mat2) if op.needs[0] else None
    return a, (_right(h, op.self, _transposed(op)) if op.needs[1] else None)


def _matrix_square(op: Operation, g: Tensor | None, h: Tensor | None) -> Tensor | None:
    """y = X X: h_X = h (X∘X)ᵀ + (X∘X)ᵀ h + 2 h ∘ (d dᵀ) + 2 diag(g), with d = diag X.

    y_ij = Σ_k x_ik x_kj has the slope δ_ip x_qj + δ_jq x_ip in x_pq; both terms are there where (i, j) = (p, q).
    """
    wave = None
    if h is not None:
        square, d = op.self.square().mT, op.self.diagonal(dim1=-2, dim2=-1)
        wave = h @ square + square @ h + 2 * h * d.unsqueeze(-1) * d.unsqueeze(-2)
    if g is not None:
        bend = torch.diag_embed(2 * g.diagonal(dim1=-2, dim2=-1))
        wave = bend if wave is None else wave + bend
    return wave


@rule("AddmmBackward0", "SparseAddmmBackward0", linear=True, additive=factor_fixed(1, 2))
def addmm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = β C + α A B: h_C = β² h, h_A = α² h (B∘B)ᵀ, h_B = α² (A∘A)ᵀ h."""
    return None if h is None else _added(op, h, op.mat1, op.mat2)


@rule("BaddbmmBackward0", "AddbmmBackward0", linear=True, additive=factor_fixed(1, 2))
def baddbmm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = β C + α A B, batched, or summed over the batch: as addmm; the sum's wave is that of each term."""
    return None if h is None else _added(op, h, op.batch1, op.batch2)


def _added(op: Operation, h: Tensor, a: Tensor, b: Tensor) -> Waves:
    return (
        _scaled(h, op.beta) if op.needs[0] else None,
        _scaled(_left(h, b), op.alpha) if op.needs[1] else None,
        _scaled(_right(h, a, _transposed(op)), op.alpha) if op.needs[2] else None,
    )


@rule("MvBackward0", linear=True)
def mv(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = A v: h_A = h (v∘v)ᵀ, h_v = (A∘A)ᵀ h."""
    if h is None:
        return None
    a = torch.outer(h, op.vec * op.vec) if op.needs[0] else None
    return a, (_right(h, op.self) if op.needs[1] else None)


@rule("AddmvBackward0", linear=True)
def addmv(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = β c + α A v: h_c = β² h, h_A = α² h (v∘v)ᵀ, h_v = α² (A∘A)ᵀ h."""
    if h is None:
        return None
    return (
        _scaled(h, op.beta) if op.needs[0] else None,
        _scaled(torch.outer(h, op.vec * op.vec), op.alpha) if op.needs[1] else None,
        _scaled(_right(h, op.mat), op.alpha) if op.needs[2] else None,
    )


@rule("AddrBackward0", linear=True)
def addr(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = β C + α a bᵀ: h_C = β² h, h_a = α² h (b∘b), h_b = α² hᵀ (a∘a)."""
    if h is None:
        return None
    return (
        _scaled(h, op.beta) if op.needs[0] else None,
        _scaled(h @ op.vec2.square(), op.alpha) if op.needs[1] else None,
        _scaled(h.mT @ op.vec1.square(), op.alpha) if op.needs[2] else None,
    )


@rule("DotBackward0", "VdotBackward0", coincident=True, linear=True)
def dot(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves | list[Tensor | None]:
    """y = a · b: h_a = h b∘b, h_b = h a∘a."""
    if op.coincident:
        return pointwise_rule(op, g, h)
    if h is None:
        return None
    second = op.tensor if op.name == "DotBackward0" else op.other
    return h * second.square() if op.needs[0] else None, h * op.self.square() if op.needs[1] else None


@rule("LinalgCrossBackward0", linear=True)
def cross(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = a × b, yᵢ = aⱼ bₖ - aₖ bⱼ with (i, j, k) cyclic: h_aᵢ = hⱼ bₖ² + hₖ bⱼ², and so for b."""
    if h is None:
        return None
    dim = op.dim

    def pulled(other: Tensor) -> Tensor:
        square = other * other
        return h.roll(-1, dim) * square.roll(-2, dim) + h.roll(-2, dim) * square.roll(-1, dim)

    return pulled(op.other) if op.needs[0] else None, pulled(op.self) if op.needs[1] else None


@rule("TrilinearBackward0", linear=True)
def trilinear(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = Σ a ∘ b ∘ c: h_a = Σ h (Σ b ∘ c)², the inner sum over what a has no dimension for.

    nn.Bilinear is y_bo = Σ_ij x_bi W_oij z_bj. Each dimension of the product is a letter; a factor has no letter of its
    ``expand``, the output none of ``sumdim``.
    """
    if h is None:
        return None
    letters = string.ascii_letters[: h.dim() + len(op.sumdim)]
    names = [_without(letters, dims) for dims in (op.expand1, op.expand2, op.expand3)]
    factors, out = (op.i1, op.i2, op.i3), _without(letters, op.sumdim)

    def pulled(i: int, j: int, k: int) -> Tensor:
        slope = "".join(x for x in letters if x in out + names[i] and x in names[j] + names[k])
        jacobian = torch.einsum(f"{names[j]},{names[k]}->{slope}", factors[j], factors[k])
        ones = jacobian.new_ones(()).expand(op.inputs[i].shape)  # for dimensions that only this factor has
        return torch.einsum(f"{slope},{out},{names[i]}->{names[i]}", jacobian * jacobian, h, ones)

    return tuple(pulled(*order) if op.needs[order[0]] else None for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)))


def _without(letters: str, dims: Sequence[int]) -> str:
    return "".join(x for d, x in enumerate(letters) if d not in dims)


@rule("ForeachMmBackward0", outputs="all", linear=True)
def foreach_mm(op: Operation, g: Any, h: Sequence[Tensor | None] | None) -> list[Tensor | None] | None:
    """y_i = A_i B_i: as mm, for each i."""
    if h is None:
        return None
    n = len(h)
    a = [_left(w, op.mat2[i]) if w is not None and op.needs[i] else None for i, w in enumerate(h)]
    return a + [_right(w, op.self[i]) if w is not None and op.needs[n + i] else None for i, w in enumerate(h)]


@rule("GroupedMmBackward0", linear=True)
def grouped_mm(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y_i = A_i B_i for the groups i of a mixture of experts: as mm, for each i."""
    if h is None:
        return None
    a = grouped(h, op.mat2.square().mT, offs=op.offs) if op.needs[0] else None
    return a, (grouped(op.self.square().mT, h, offs=op.offs) if op.needs[1] else None)


@rule("LinearBackward0", linear=True, additive=factor_fixed(0, 1))
def linear(op: Operation, g: Tensor | None, h: Tensor | None) -> Waves:
    """y = x Wᵀ + b where it is one operation: h_x = h (W∘W), h_W = hᵀ (x∘x), h_b = h."""
    if h is None:
        return None
    x = h @ op.weight.square() if op.needs[0] else None
    w = None
    if op.needs[1]:
        rows = op.node._saved_input.square().reshape(-1, op.inputs[1].shape[1])  # type: ignore[attr-defined]
        w = h.reshape(-1, h.shape[-1]).mT @ rows
    return x, w, h


@rule("MmBackward0", "BmmBackward0", wave="factor")
def mm_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """S_A = S Bᵀ, S_B = Aᵀ S, of all columns in one product."""
    if sparse(op.self, op.mat2):
        return None
    return (s @ op.mat2.mH if wanted[0] else None), (op.self.mH @ s if wanted[1] else None)


def sparse(*matrices: Tensor | None) -> bool:
    """Whether any of them is."""
    return any([m is not None and m.layout is not torch.strided for m in matrices])


def _added_factors(op: Operation) -> tuple[Tensor, Tensor]:
    return (op.mat1, op.mat2) if op.name == "AddmmBackward0" else (op.batch1, op.batch2)


@rule("AddmmBackward0", "BaddbmmBackward0", wave="factor")
def addmm_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """S_C = β S, S_A = α S Bᵀ, S_B = α Aᵀ S."""
    a, b = _added_factors(op)
    return (
        _by(s, op.beta) if wanted[0] else None,
        _by(s @ b.mH, op.alpha) if wanted[1] else None,
        _by(a.mH @ s, op.alpha) if wanted[2] else None,
    )


def _by(s: Tensor, factor: float) -> Tensor:
    return s if factor == 1 else s * factor.conjugate()


@rule("MmBackward0", "BmmBackward0", wave="shared")
def mm_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """The factor that the samples share gets Σ over a sample's rows (columns) of outer products."""
    return _products(op, s, op.self, op.mat2, wanted, 0)


@rule("AddmmBackward0", "BaddbmmBackward0", wave="shared")
def addmm_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """As mm, scaled by α; the added vector gets Σ over a sample's rows."""
    found = _products(op, _by(s, op.alpha), *_added_factors(op), wanted[1:], 1)
    if wanted[0] and op.axes_out[0].dim <= 0 and list(op.inputs[0].shape) == list(op.outputs[0].shape[1:]):
        bias, weight = Dense(_by(over(front(s, op.axes_out[0], op.n_samples, 1), 2), op.beta)), found.get(2)
        found[0] = bias
        if isinstance(weight, Outer) and weight.s.shape[2:4] == (1, 1) and op.alpha == op.beta == 1:
            wave = WaveGram(weight.s, bias.values)
            found[0], found[2] = replace(bias, wave=wave), replace(weight, wave=wave)
    return found


def _products(op: Operation, s: Any, a: Any, b: Any, wanted: Sequence[bool], first: int) -> dict[int, PerSample]:
    """y = A B: B gets a ⊗ s where the samples are rows of y, A gets s ⊗ b where they are columns; G matrices or one."""
    if sparse(a, b):
        return {}
    rank, axis, n, found = s.dim() - 1, op.axes_out[0], op.n_samples, dict[int, PerSample]()
    if rank == 2:
        s, a, b = (t if t is None else t.unsqueeze(-3) for t in (s, a, b))
    rows = BATCH if axis is BATCH else Axis(1, axis.inner)
    if wanted[1] and axis.dim in (-1, rank - 2):
        waves, x = front(s, rows, n, 1), front(a.conj(), rows, n)
        found[first + 1] = Outer(waves, x, tuple(op.inputs[first + 1].shape), flipped=True)
    if wanted[0] and axis.dim in (-1, rank - 1):
        waves, x = front(s.mT, rows, n, 1), front(b.mH, rows, n)
        found[first] = Outer(waves, x, tuple(op.inputs[first].shape))
    return found


@rule("MvBackward0", wave="shared")
def mv_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """y = A v: v gets Σ over a sample's rows of A, each times its entry of s."""
    axis, n = op.axes_out[0], op.n_samples
    if not wanted[1] or sparse(op.self):
        return {}
    return {1: Dense(torch.einsum("vnt,nti->vni", front(s, axis, n, 1), front(op.self.conj(), axis, n)))}


@rule("LinearBackward0", wave="factor")
def linear_factor(op: Operation, s: Tensor, wanted: Sequence[bool]) -> Any:
    """S_x = S W; between shared tensors it is left to the node."""
    return None if any(wanted[1:]) else (s @ op.weight.conj(), *[None] * (len(wanted) - 1))


@rule("LinearBackward0", wave="shared")
def linear_shared(op: Operation, s: Tensor, wanted: Sequence[bool]) -> dict[int, PerSample]:
    """W gets Σ over a sample's rows of s ⊗ x, the bias gets Σ s."""
    axis, n, found = op.axes_out[0], op.n_samples, dict[int, PerSample]()
    if axis.dim == s.dim() - 2:
        return found
    rows = front(s, axis, n, 1).flatten(2, -2).unsqueeze(2)  # V N 1 T O
    if wanted[1]:
        x = front(op.node._saved_input.conj(), axis, n).flatten(1, -2).unsqueeze(1)  # type: ignore[attr-defined]
        found[1] = Outer(rows, x, tuple(op.inputs[1].shape))
    if len(wanted) > 2 and wanted[2]:
        found[2] = Dense(rows.sum((2, 3)))
    return found
