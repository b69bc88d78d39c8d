"""Blocks of the Gauss-Newton matrix as sums of Kronecker products, from its stored columns.

The block between two layers a and b is Σ (s_a s_bᵀ) ⊗ (x_a x_bᵀ), over columns, samples and positions. With its
entries in another order, R = Σ vec(s_a s_bᵀ) vec(x_a x_bᵀ)ᵀ ``[O_a O_b, I_a I_b]``, the nearest sum of K Kronecker
products is the nearest matrix of rank K. R is not formed: products with it are enough.

Source: Van Loan & Pitsianis, Approximation with Kronecker products, 1993; Halko, Martinsson & Tropp 2011.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..persample import Dense, Outer, PerSample
from .factored import FactoredGaussNewton

Parts = Mapping[object, PerSample]
START, MORE = 8, 8  # the first rank that is tried; columns beyond it


@dataclass(frozen=True)
class Layer:
    """Entries of parameters whose columns are Σ_t s ⊗ x.

    Args:
        places: of the entries, ``[O, I]``.
        parts: by source, s ``[V, N, T, O]`` and x ``[N, T, I]``.
    """

    places: Tensor
    parts: Mapping[object, tuple[Tensor, Tensor]]

    def with_bias(self, places: Tensor) -> Layer:
        """The input gets a last feature 1."""
        parts = {k: (s, torch.cat([x, torch.ones_like(x[..., :1])], 2)) for k, (s, x) in self.parts.items()}
        return Layer(torch.cat([self.places, places.unsqueeze(1)], 1), parts)


def layers(operator: FactoredGaussNewton) -> list[Layer]:
    """Weights of linear maps, each with the bias that follows it, and other parameters."""
    found: list[Layer] = []
    places = torch.arange(operator.shape[0], device=operator.device).split(operator.space.sizes)
    for here, parts in zip(places, operator.parts, strict=True):
        if found and _is_bias(parts, found[-1]):
            found[-1] = found[-1].with_bias(here)
        elif parts:
            found += _of_groups(here, parts)
    return found


def _is_bias(parts: Parts, layer: Layer) -> bool:
    """Whether the columns are those of the layer's outputs."""
    if parts.keys() != layer.parts.keys() or not all(isinstance(part, Dense) for part in parts.values()):
        return False
    pairs = [(part.dense().flatten(2), layer.parts[source][0].sum(2)) for source, part in parts.items()]
    return all(b.shape == s.shape and (b - s).norm() <= 1e3 * torch.finfo(s.dtype).eps * s.norm() for b, s in pairs)


def _of_groups(places: Tensor, parts: Parts) -> list[Layer]:
    """One for each group of a map. What is no map, or not in all of its uses, is the bias of one without inputs."""
    forms = {_form(part) for part in parts.values()}
    if len(forms) > 1 or None in forms:
        whole = {source: part.dense().unsqueeze(2).flatten(3) for source, part in parts.items()}
        return [Layer(places.unsqueeze(1), {k: (s, torch.ones_like(s[0, ..., :1])) for k, s in whole.items()})]
    ((flipped, groups, o, i),) = forms  # type: ignore[misc]
    places = places.view(groups, i, o).mT if flipped else places.view(groups, o, i)
    return [Layer(places[g], {k: (p.s[:, :, g], p.x[:, g]) for k, p in parts.items()}) for g in range(groups)]  # type: ignore[attr-defined]


def _form(part: PerSample) -> tuple[bool, int, int, int] | None:
    return (part.flipped, part.s.shape[2], part.s.shape[4], part.x.shape[3]) if isinstance(part, Outer) else None


@dataclass(frozen=True)
class Rearranged:
    """R of the block between two layers; ``room`` numbers may be held at a time."""

    a: Layer
    b: Layer
    room: int

    @property
    def shape(self) -> tuple[int, int]:
        """O_a O_b and I_a I_b."""
        sizes = [p * q for p, q in zip(self.a.places.shape, self.b.places.shape, strict=True)]
        return sizes[0], sizes[1]

    @property
    def common(self) -> list[object]:
        """The sources of both."""
        return [source for source in self.a.parts if source in self.b.parts]

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For some samples: Σ_v s_a s_bᵀ ``[N T_a T_b, O_a O_b]``, x_a and x_b."""
        for source in self.common:
            (s, x), (r, y) = self.a.parts[source], self.b.parts[source]
            few = max(1, self.room // (s.shape[2] * r.shape[2] * self.shape[0]))
            for start in range(0, len(x), few):
                here = slice(start, start + few)
                products = torch.einsum("vnto,vnup->ntuop", s[:, here], r[:, here])
                yield products.reshape(-1, self.shape[0]), x[here], y[here]

    def times(self, w: Tensor) -> Tensor:
        """``[K, I_a I_b]`` to ``[K, O_a O_b]``."""
        w, found = w.view(len(w), self.a.places.shape[1], -1), w.new_zeros(len(w), self.shape[0])
        for p, x, y in self._pieces():
            inner = torch.einsum("kntj,nuj->kntu", torch.einsum("nti,kij->kntj", x, w), y)
            found += inner.flatten(1) @ p
        return found

    def adjoint(self, z: Tensor) -> Tensor:
        """``[K, O_a O_b]`` to ``[K, I_a I_b]``."""
        found = z.new_zeros(len(z), self.shape[1])
        for p, x, y in self._pieces():
            inner = (z @ p.mT).view(len(z), *x.shape[:2], y.shape[1])
            found += torch.einsum("nti,kntj->kij", x, torch.einsum("kntu,nuj->kntj", inner, y)).flatten(1)
        return found


@dataclass(frozen=True)
class Triplets:
    """Singular triplets, those of large values first: ``left [K, O_a O_b]``, ``values [K]``, ``right [K, I_a I_b]``."""

    left: Tensor
    values: Tensor
    right: Tensor


def triplets(r: Rearranged, rank: int, generator: torch.Generator | None) -> Triplets:
    """The first ``rank``, or all that are not rounding, by products with a random subspace, iterated twice."""
    like = r.a.parts[next(iter(r.a.parts))][0]
    k = min(rank + MORE, *r.shape)
    home = like.device if generator is None else generator.device
    w = torch.randn(k, r.shape[1], generator=generator, dtype=like.dtype, device=home).to(like.device)
    for _ in range(2):
        w = _orthonormal(r.adjoint(_orthonormal(r.times(w))))
    u, s, v = torch.linalg.svd(r.times(w).mT, full_matrices=False)
    kept = min(rank, int((s > 10 * torch.finfo(s.dtype).eps * s[0]).sum()))
    return Triplets(u.mT[:kept], s[:kept], (v @ w)[:kept])


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT)[0].mT


def nearest(
    parts: list[Layer], floats: int, room: int, generator: torch.Generator | None
) -> dict[tuple[int, int], Triplets]:
    """Of all pairs of layers, the triplets with most energy for their memory.

    Eight of every pair are computed at first, and twice as many where all were chosen.
    """
    pairs = {(i, j): Rearranged(a, b, room) for i, a in enumerate(parts) for j, b in enumerate(parts[i:], i)}
    pairs = {key: r for key, r in pairs.items() if r.common and sum(r.shape) <= floats}
    ranks, found, grown = dict.fromkeys(pairs, START), {}, list(pairs)  # type: ignore[var-annotated]
    while grown:
        found.update({key: triplets(pairs[key], ranks[key], generator) for key in grown})
        chosen = _chosen({key: t.values for key, t in found.items()}, pairs, floats)
        grown = [key for key, count in chosen.items() if count == ranks[key]]
        ranks.update({key: 2 * ranks[key] for key in grown})
    return {key: Triplets(t.left[:n], t.values[:n], t.right[:n]) for key, t in found.items() if (n := chosen[key])}


def _chosen(
    values: Mapping[tuple[int, int], Tensor], pairs: Mapping[tuple[int, int], Rearranged], floats: int
) -> Counter[tuple[int, int]]:
    """How many of each pair fit; what is off the diagonal counts twice."""
    terms = [
        (value**2 * (1 + (i < j)) / sum(pairs[i, j].shape), i, j)
        for (i, j), found in values.items()
        for value in found.tolist()
    ]
    chosen: Counter[tuple[int, int]] = Counter()
    for _, i, j in sorted(terms, reverse=True):
        if sum(pairs[i, j].shape) <= floats:
            floats -= sum(pairs[i, j].shape)
            chosen[i, j] += 1
    return chosen
