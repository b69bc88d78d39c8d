"""The tree that says which entries are near each other."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.space import Space


class ClusterTree:
    """A complete binary tree over n indices in some order, padded at the end.

    Level l has 2ˡ nodes of ``size / 2ˡ`` neighbours, level ``depth`` the leaves, of ``leaf`` entries each. As all nodes
    of a level are of one size, a level is one batched operation.

    Args:
        n: the number of indices, or the :class:`~curvext.operators.Space` of parameters.
        leaf: the largest leaf; leaves are of ``ceil(n / 2^depth)`` entries, so that padding is below one entry a leaf.
        order: for parameters: ``"row"``, by module, output unit, inputs, a bias next to its unit's weights;
            ``"column"``, by module and input unit; ``"flat"``, as they are. For both: ``"random"``, to compare with; a
            permutation ``[n]``: the indices in the order of the tree; or where each of them is in space, ``[n, D]``:
            then nodes are cells of space (Morton's order).
    """

    def __init__(self, n: int | Space, leaf: int = 32, order: str | Tensor | Sequence[int] = "row"):
        self.n = n if isinstance(n, int) else n.size
        if leaf < 1 or self.n < 1:
            raise ValueError(f"ClusterTree: n={self.n} and leaf={leaf} must be positive")
        self.depth = max(0, math.ceil(math.log2(self.n / leaf)))
        self.leaf = math.ceil(self.n / 2**self.depth)
        self.size = self.leaf << self.depth
        modules = _modules(n, order)
        self.modules = [(len(units), units.shape[1]) for units in modules]
        self.permutation = _unless_sorted(torch.cat([units.flatten() for units in modules]))
        self._back = None if self.permutation is None else self.permutation.argsort()

    def enter(self, v: Tensor) -> Tensor:
        """``[n, K]`` in the order of the tree, with zeros at the end: ``[size, K]``."""
        self._move(v.device)
        v = v if self.permutation is None else v[self.permutation]
        return v if self.size == self.n else torch.cat([v, v.new_zeros(self.size - self.n, v.shape[1])])

    def leave(self, v: Tensor) -> Tensor:
        """``[size, K]`` in the order of the operator, without the padding: ``[n, K]``."""
        self._move(v.device)
        v = v[: self.n]
        return v if self._back is None else v[self._back]

    def _move(self, device: torch.device) -> None:
        """The permutation stays where it is used: to copy it would take longer than a product."""
        if self.permutation is not None and self._back is not None and self.permutation.device != device:
            self.permutation, self._back = self.permutation.to(device), self._back.to(device)

    def padding(self, device: torch.device) -> Tensor:
        """Ones where the padding is, ``[size]``."""
        return (torch.arange(self.size, device=device) >= self.n).double()

    def aligned(self) -> list[list[int]]:
        """Nodes of another tree, in the same order but of any size: where they begin, level by level, and the end.

        A node of more than ``leaf`` entries is split at the border nearest to its middle, between modules if there is
        one, else between units, else in half; others are nodes of the next level too.
        """
        borders, levels = self._borders(), [[0, self.n]]
        while max(b - a for a, b in pairwise(levels[-1])) > self.leaf:
            more = {_middle(a, b, borders) for a, b in pairwise(levels[-1]) if b - a > self.leaf}
            levels.append(sorted(more.union(levels[-1])))
        return levels

    def _borders(self) -> tuple[list[int], list[int]]:
        """Where modules begin, and where units do."""
        modules, units = [0], []
        for count, entries in self.modules:
            units += [modules[-1] + unit * entries for unit in range(count)]
            modules.append(modules[-1] + count * entries)
        return modules, units

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClusterTree):
            return NotImplemented
        same = (self.n, self.leaf, self.depth) == (other.n, other.leaf, other.depth)
        a, b = self.permutation, other.permutation
        return same and (a is b or (a is not None and b is not None and torch.equal(a, b.to(a.device))))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ClusterTree({self.n}, leaf={self.leaf}, depth={self.depth})"


def _middle(a: int, b: int, borders: tuple[list[int], list[int]]) -> int:
    """The border inside that is nearest to the middle, of the first kind that has any."""
    for ends in borders:
        i = bisect(ends, (a + b) // 2)
        inside = [end for end in ends[max(0, i - 1) : i + 1] if a < end < b]
        if inside:
            return min(inside, key=lambda end: abs(2 * end - a - b))
    return (a + b) // 2


def _modules(n: int | Space, order: str | Tensor | Sequence[int]) -> list[Tensor]:
    """The indices in their order, ``[units, entries of one]`` for each module; without modules, each is a unit."""
    if isinstance(n, Space) and isinstance(order, str) and order in ("row", "column"):
        return _by_module(n, order)
    return [_permutation(n if isinstance(n, int) else n.size, order).unsqueeze(1)]


def _permutation(size: int, order: str | Tensor | Sequence[int]) -> Tensor:
    if not isinstance(order, str):
        order = torch.as_tensor(order)
        return _checked(_along_curve(order) if order.dim() == 2 else order, size)
    if order == "random":
        return torch.randperm(size, generator=torch.Generator().manual_seed(0))
    if order not in ("row", "column", "flat"):
        raise ValueError(
            f"ClusterTree: order {order!r}; there are 'row', 'column', 'flat', 'random', permutations and places"
        )
    return torch.arange(size)


def _unless_sorted(order: Tensor) -> Tensor | None:
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order


def _checked(order: Tensor, size: int) -> Tensor:
    if order.shape != (size,) or not torch.equal(order.sort().values.cpu(), torch.arange(size)):
        raise ValueError(f"ClusterTree: order {tuple(order.shape)} is not a permutation of {size} indices")
    return order


def _along_curve(places: Tensor) -> Tensor:
    """By the bits of all coordinates in turn, the highest first, so that half of the indices are half of space."""
    dimensions = places.shape[1]
    bits = min(62 // dimensions, 30)
    inside = (places - places.amin(0)).double()
    x = (inside / inside.max().clamp(min=1e-300) * ((1 << bits) - 1)).long()
    code = torch.zeros_like(x[:, 0])
    for bit in range(bits):
        for dimension in range(dimensions):
            code |= ((x[:, dimension] >> bit) & 1) << (bit * dimensions + dimension)
    return code.argsort(stable=True)


def _by_module(space: Space, order: str) -> list[Tensor]:
    """Module after module; the tensors of one that agree on the number of units run side by side."""
    modules: dict[tuple[str, int], list[Tensor]] = {}
    start = 0
    for name, shape in space.shapes.items():
        places = torch.arange(start, start + shape.numel()).reshape(shape)
        start += shape.numel()
        if order == "column" and len(shape) > 1:
            places = places.transpose(0, 1)
        units = places.shape[0] if shape else 1
        modules.setdefault((name.rpartition(".")[0], units), []).append(
            places.reshape(units, places.numel() // max(1, units))
        )
    return [torch.cat(tensors, 1) for tensors in modules.values()]
