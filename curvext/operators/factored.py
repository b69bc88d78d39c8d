"""The Gauss-Newton matrix by stored columns: products, entries and blocks without another pass over the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..factor import Diagonal
from ..persample import PerSample
from ..quantities.factored import Columns
from .base import Readable
from .space import Space
from .structured import Structured

ROOM, ROOM_GPU = 1 << 22, 1 << 28  # entries of S that are formed together


class FactoredGaussNewton(Structured, Readable):
    """G = S Sᵀ ``[P, P]``, from the columns S that one backward pass leaves on the parameters.

        with extend(model, GGNFactor()) as curvature:
            loss_fn(model(x), y).backward()
        G = FactoredGaussNewton(curvature.ggn_factor)

    At the weight of a linear map a column is Σ_t s ⊗ x, of which s and x are stored; S itself is formed a few rows at
    a time, if at all. A product costs O(N V (I + O)) a layer and position, an entry O(N V). The split into model and
    convex loss is that of all Gauss-Newton quantities (:func:`curvext.output`).

    Args:
        columns: by parameter, of :class:`~curvext.GGNFactor`.
        space: the parameters, if there are more; without columns a parameter is taken to have no curvature.

    Raises:
        CurvatureError: if there are no columns.

    Source: Chen et al. 2021, https://arxiv.org/abs/1910.12184 (entries); Wang, Tan & Lin 2020, section 4 (products).
    """

    symmetric = True

    def __init__(self, columns: Mapping[str, Columns], space: Space | None = None):
        if not columns:
            raise CurvatureError("FactoredGaussNewton: there are no columns; give those of a block with GGNFactor()")
        space = space or Space({name: c.shape for name, c in columns.items()})
        like = next(iter(columns.values())).like
        self._describe((space.size, space.size), like, space)
        self.space, self.like = space, like
        self.parts = [
            {k: v for k, v in columns[name].parts.items() if isinstance(v, PerSample)} if name in columns else {}
            for name in space.shapes
        ]  # type: list[dict[object, PerSample]]
        self.own = _own(columns, space, like)
        sizes = {source: part.size for parts in self.parts for source, part in parts.items()}
        ends = torch.tensor([0, *map(prod, sizes.values())]).cumsum(0).tolist()
        self.sources = dict(zip(sizes, pairwise(ends), strict=True))
        self.columns: int = ends[-1]
        self.room = ROOM if self.device.type == "cpu" else ROOM_GPU

    def _apply(self, v: Tensor) -> Tensor:
        return torch.cat([self._product(few) for few in v.split(self._few(self.shape[0]), 1)], 1)

    def _few(self, size: int) -> int:
        """How many at once, if every one comes with ``size`` numbers."""
        return max(1, self.room // max(1, size))

    def _product(self, v: Tensor) -> Tensor:
        inner: dict[object, Any] = {}
        for parts, piece in zip(self.parts, self.space.split(v), strict=True):
            for source, part in parts.items():
                inner[source] = inner.get(source, 0) + part.inner(piece)
        found = [
            sum((part.combined(inner[source]) for source, part in parts.items()), start=v.new_zeros(v.shape[1], *shape))
            for parts, shape in zip(self.parts, self.space.shapes.values(), strict=True)
        ]
        out = torch.cat([t.reshape(v.shape[1], -1).mT for t in found])
        return out if self.own is None else out + self.own.unsqueeze(1) * v

    def rows(self, places: Tensor) -> Tensor:
        """Rows of S, ``[*places, columns]``."""
        flat = places.flatten()
        found, start = self.like.new_zeros(len(flat), self.columns), 0
        for parts, size in zip(self.parts, self.space.sizes, strict=True):
            here = ((flat >= start) & (flat < start + size)).nonzero().squeeze(1)
            for source, part in parts.items() if len(here) else ():
                found[here, slice(*self.sources[source])] = part.entries(flat[here] - start).flatten(1)
            start += size
        return found.view(*places.shape, self.columns)

    def _entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        return self._by_blocks(self._few_entries, rows, columns)

    def block_times(self, rows: Tensor, columns: Tensor, v: Tensor) -> Tensor:
        """S[rows] (S[columns]ᵀ v), so that the block is not formed."""
        return self._by_blocks(self._few_times, rows, columns, v)

    def _by_blocks(self, function: Callable[..., Tensor], rows: Tensor, *others: Tensor) -> Tensor:
        """A function of ``[B, r]`` and others, for a few of the blocks at a time."""
        few = self._few(self.columns * rows.shape[-1])
        pieces = [x.reshape(-1, *x.shape[rows.dim() - 1 :]).split(few) for x in (rows, *others)]
        found = torch.cat([function(*piece) for piece in zip(*pieces, strict=True)])
        return found.view(*rows.shape, found.shape[-1])

    def _few_entries(self, rows: Tensor, columns: Tensor) -> Tensor:
        few, strips = self._few(self.columns * len(rows)), []
        for r in rows.split(few, 1):
            s = self.rows(r)
            strips.append(torch.cat([s @ self.rows(c).mT for c in columns.split(few, 1)], 2))
        found = torch.cat(strips, 1)
        return found if self.own is None else found + self.own[rows].unsqueeze(2) * _same(rows, columns)

    def _few_times(self, rows: Tensor, columns: Tensor, v: Tensor) -> Tensor:
        few = self._few(self.columns * len(rows))
        pieces = zip(columns.split(few, 1), v.split(few, 1), strict=True)
        inner = sum(self.rows(c).mT @ piece for c, piece in pieces)
        found = torch.cat([self.rows(r) @ inner for r in rows.split(few, 1)], 1)
        return found if self.own is None else found + self.own[rows].unsqueeze(2) * (_same(rows, columns).to(v) @ v)

    def diagonal(self) -> Tensor:
        """The diagonal ``[P]``."""
        squares = [
            sum((part.squares() for part in parts.values()), start=self.like.new_zeros(shape)).flatten()
            for parts, shape in zip(self.parts, self.space.shapes.values(), strict=True)
        ]
        return torch.cat(squares) + (0.0 if self.own is None else self.own)

    def trace(self) -> Tensor:
        """tr G."""
        return self.diagonal().sum()


def _same(rows: Tensor, columns: Tensor) -> Tensor:
    """Where an entry is on the diagonal."""
    return rows.unsqueeze(2) == columns.unsqueeze(1)


def _own(columns: Mapping[str, Columns], space: Space, like: Tensor) -> Tensor | None:
    """What the parameters have of diagonal matrices, ``[P]``, if anything."""
    found = {name: [p.h for p in c.parts.values() if isinstance(p, Diagonal)] for name, c in columns.items()}
    if not any(found.values()):
        return None
    return torch.cat(
        [sum(found.get(name, []), start=like.new_zeros(shape)).flatten() for name, shape in space.shapes.items()]
    )
