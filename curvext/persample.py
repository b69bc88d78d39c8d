"""What reaches a tensor that all samples share, kept apart by column v and sample n, in a form made for what is asked.

A :class:`PerSample` stands for a tensor ``[V, N, *shape]``: for a parameter, V columns of every sample's factor
``J_nᵀ S_n`` (with V = 1 and S = g, every sample's gradient). :class:`Dense` holds it. :class:`Outer` holds what the
weight of a linear map gets, a sum over positions t of outer products of the wave s and the map's input x,

    [v, n] = Σ_t s[v, n, t] ⊗ x[n, t],

from which norms, squares, inner products and Kronecker factors are had without ever forming it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .registry import laid_out

BLOCK = 1 << 18  # entries that are computed together, so that they stay in a CPU's cache
BLOCK_GPU = 1 << 26
SMALL = 1 << 12  # entries of rows that are faster added up together than one by one
HALVED = 256  # features beyond which half of a symmetric product is faster than all of it


def over(x: Tensor, dim: int) -> Tensor:
    """The sum over one dimension; PyTorch takes longer for one of size 1 than for a long one."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


def squared(x: Tensor) -> Tensor:
    """Σ of squares over the first dimension; on a CPU without a tensor of their size, whose memory would be fresh."""
    if x.device.type != "cpu" or len(x) < 2 or x[0].numel() < SMALL:
        return over(x.square(), 0)
    total = x[0].square()
    for row in x[1:]:
        total.addcmul_(row, row)
    return total


def inner(s: Tensor, y: Tensor) -> Tensor:
    """The inner products of ``s [V, N, ...]`` with every ``y [U, N, ...]``: ``[U, V, N]``."""
    return (s.flatten(2).transpose(0, 1) @ y.flatten(2).permute(1, 2, 0)).permute(2, 1, 0)


def combined(s: Tensor, weights: Tensor) -> Tensor:
    """Σ_v w s for every w of ``weights [U, V, N]``: ``[U, N, ...]``."""
    waves = weights.permute(2, 0, 1) @ s.flatten(2).transpose(0, 1)
    return waves.transpose(0, 1).reshape(len(weights), *s.shape[1:])


def gram(x: Tensor, alpha: float = 1) -> Tensor:
    """α xᵀx over the rows of ``x [G, M, F]``, ``[G, F, F]``."""
    if len(x) > 1 or x.shape[2] <= HALVED:
        return torch.baddbmm(x.new_zeros(1, 1, 1), x.mT, x, beta=0, alpha=alpha)
    out = x.new_empty(1, x.shape[2], x.shape[2])
    _fill_gram(out[0], x[0], alpha)
    return out


def _fill_gram(out: Tensor, x: Tensor, alpha: float) -> None:
    """By quarters: the one below the diagonal is that above."""
    if x.shape[1] <= HALVED:
        torch.addmm(out, x.mT, x, beta=0, alpha=alpha, out=out)
        return
    half = x.shape[1] // 2
    (first, above), (below, second) = ((rows[:, :half], rows[:, half:]) for rows in (out[:half], out[half:]))
    _fill_gram(first, x[:, :half], alpha)
    _fill_gram(second, x[:, half:], alpha)
    torch.addmm(above, x[:, :half].mT, x[:, half:], beta=0, alpha=alpha, out=above)
    below.copy_(above.mT)


class WaveGram:
    """Σ_v Σ_n s sᵀ ``[O, O]`` of a wave that a weight and its bias get, computed once; the wave in the form of each."""

    def __init__(self, of_weight: Tensor, of_bias: Tensor):
        self.of_weight, self.of_bias = of_weight, of_bias

    @cached_property
    def value(self) -> Tensor:
        """In float32 at least."""
        rows = self.of_bias.flatten(0, 1)
        rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
        return gram(rows.unsqueeze(0))[0]


class PerSample(ABC):
    """``[V, N, *shape]`` in some form."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """V and N."""

    @abstractmethod
    def dense(self, out: Tensor | None = None) -> Tensor:
        """All of it: ``[V, N, *shape]``; written into ``out``, if that is given and it is not there yet."""

    @abstractmethod
    def empty(self, shape: Sequence[int]) -> Tensor:
        """An uninitialised tensor of the same dtype and device."""

    @abstractmethod
    def squares(self) -> Tensor:
        """Σ_v Σ_n [v, n]²: ``[*shape]``."""

    @abstractmethod
    def sample_squares(self) -> Tensor:
        """Σ_v [v, n]²: ``[N, *shape]``."""

    @abstractmethod
    def sums(self) -> Tensor:
        """Σ_n [v, n]: ``[V, *shape]``."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Σ of squares over the tensor: ``[V, N]``."""

    @abstractmethod
    def select(self, samples: Sequence[int]) -> PerSample:
        """These samples alone."""

    @abstractmethod
    def through(self, op: Any, apply: Callable[[Tensor], Tensor]) -> PerSample:
        """The same for the input of an operation between shared tensors; ``apply`` is its Jᵀ, batched."""

    def gram(self) -> Tensor:
        """Inner products ``[V, N, V, N]``."""
        v, n = self.size
        rows = self.dense().reshape(v * n, -1)
        return (rows @ rows.mT).view(v, n, v, n)

    def block(self) -> Tensor:
        """Σ_v Σ_n [v, n] [v, n]ᵀ: ``[P, P]``, rows and columns in the order of the flattened tensor."""
        return gram(self.dense().unsqueeze(2).flatten(2).flatten(0, 1).unsqueeze(0))[0]

    @abstractmethod
    def inner(self, vectors: Tensor) -> Tensor:
        """⟨[v, n], u⟩ for every u of ``vectors [U, *shape]``: ``[U, V, N]``."""

    @abstractmethod
    def combined(self, weights: Tensor) -> Tensor:
        """Σ_v Σ_n w[v, n] [v, n] for every w of ``weights [U, V, N]``: ``[U, *shape]``."""

    @abstractmethod
    def entries(self, places: Tensor) -> Tensor:
        """The entries at ``places [M]`` of the flattened tensor, ``[M, V, N]``."""

    def plus(self, other: PerSample) -> PerSample:
        """Their sum: one tensor used in two places."""
        return Dense(self.dense() + other.dense())


@dataclass(frozen=True)
class Dense(PerSample):
    """``values [V, N, *shape]``."""

    values: Tensor
    wave: WaveGram | None = None

    def block(self) -> Tensor:
        same = self.wave is not None and self.wave.of_bias is self.values
        return self.wave.value if same and self.wave is not None else super().block()

    @property
    def size(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[2:])

    def dense(self, out: Tensor | None = None) -> Tensor:
        return self.values

    def empty(self, shape: Sequence[int]) -> Tensor:
        return self.values.new_empty(shape)

    def squares(self) -> Tensor:
        return squared(self.values.flatten(0, 1))

    def sample_squares(self) -> Tensor:
        return squared(self.values)

    def sums(self) -> Tensor:
        return self.values.sum(1)

    def norms(self) -> Tensor:
        return self.values.unsqueeze(2).flatten(2).square().sum(2)

    def inner(self, vectors: Tensor) -> Tensor:
        return (vectors.reshape(len(vectors), -1) @ self._rows().mT).unflatten(1, self.size)

    def combined(self, weights: Tensor) -> Tensor:
        return (weights.flatten(1) @ self._rows()).view(len(weights), *self.shape)

    def entries(self, places: Tensor) -> Tensor:
        return self._rows()[:, places].mT.unflatten(1, self.size)

    def _rows(self) -> Tensor:
        return self.values.unsqueeze(2).flatten(2).flatten(0, 1)

    def select(self, samples: Sequence[int]) -> Dense:
        return Dense(self.values[:, list(samples)])

    def through(self, op: Any, apply: Callable[[Tensor], Tensor]) -> Dense:
        return Dense(apply(self.values.flatten(0, 1)).unflatten(0, self.size))


def transposes(op: Any) -> bool:
    """Whether an operation swaps the two dimensions of a matrix."""
    if op.name == "PermuteBackward0":
        return [d % 2 for d in op.dims] == [1, 0]
    return op.name == "TBackward0" or (op.name == "TransposeBackward0" and op.dim0 % 2 != op.dim1 % 2)


@dataclass(frozen=True)
class Outer(PerSample):
    """Σ_t s ⊗ x, seen as a tensor of ``shape``.

    Args:
        s: the wave at the output of the linear map, ``[V, N, G, T, O]``: G groups, T positions, O features each.
        x: the input of the map, ``[N, G, T, I]``.
        shape: of the tensor; its entries are those of ``[G, O, I]`` in order, or of ``[G, I, O]`` if ``flipped``.
        flipped: whether the input's features come first.
    """

    s: Tensor
    x: Tensor
    shape: tuple[int, ...]
    flipped: bool = False
    wave: WaveGram | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.s.shape[0], self.s.shape[1]

    @property
    def positions(self) -> int:
        return self.s.shape[3]

    @property
    def _most(self) -> int:
        """Entries to compute at a time."""
        return BLOCK if self.s.device.type == "cpu" else BLOCK_GPU

    def _laid(self, matrix: Tensor) -> Tensor:
        """``[*, G, O, I]`` as ``[*, *shape]``."""
        if self.flipped:
            matrix = matrix.mT
        return matrix.reshape(*matrix.shape[:-3], *self.shape)

    def empty(self, shape: Sequence[int]) -> Tensor:
        return self.s.new_empty(shape)

    def dense(self, out: Tensor | None = None) -> Tensor:
        groups, o, i = self.s.shape[2], self.s.shape[4], self.x.shape[3]
        if out is not None:
            out = out.view(*self.size, groups, i, o).mT if self.flipped else out.view(*self.size, groups, o, i)
        multiply = torch.mul if self.positions == 1 else torch.matmul
        return self._laid(multiply(self.s.mT, self.x, out=out))

    def sums(self) -> Tensor:
        s = self.s.permute(0, 2, 4, 1, 3).flatten(3)  # V G O NT
        return self._laid(s @ self.x.transpose(0, 1).flatten(1, 2))

    def squares(self) -> Tensor:
        if self.positions == 1:
            s, x = squared(self.s).squeeze(2), self.x.squeeze(2).square()  # [N, G, O], [N, G, I]
            if s.shape[1] == 1:  # faster than a batch of one
                return self._laid((s.squeeze(1).mT @ x.squeeze(1)).unsqueeze(0))
            return self._laid(s.permute(1, 2, 0) @ x.transpose(0, 1))
        total = sum(block.square_().sum((0, 2)) for block in self._blocks())
        return self._laid(total)  # type: ignore[arg-type]

    def sample_squares(self) -> Tensor:
        if self.positions == 1:
            return self.squared().dense().squeeze(0)
        return self._laid(torch.cat([block.square_().sum(2) for block in self._blocks()]))

    def squared(self) -> Outer:
        """Σ_v [v, n]² of a map without positions, as one column that is not formed."""
        return replace(self, s=squared(self.s).unsqueeze(0), x=self.x.square(), wave=None)

    def _blocks(self) -> Iterator[Tensor]:
        """``[N', G, V, O, I]`` for a few samples at a time: one product of matrices a sample and group."""
        v, n, groups, _, o = self.s.shape
        step = max(1, self._most // (v * groups * o * self.x.shape[-1]))
        for start in range(0, n, step):
            s = self.s[:, start : start + step].permute(1, 2, 0, 4, 3).flatten(2, 3)
            yield (s @ self.x[start : start + step]).unflatten(2, (v, o))

    def norms(self) -> Tensor:
        t, o, i = self.positions, self.s.shape[-1], self.x.shape[-1]
        if t == 1:
            products = self.s.square().sum(4) * self.x.square().sum(3)
            return over(over(products, 3), 2)
        if t * (o + i) < o * i:  # inner products of positions, against the tensor itself
            return torch.einsum("vngts,ngts->vn", self.s @ self.s.mT, self.x @ self.x.mT)
        return torch.cat([block.square_().sum((1, 3, 4)) for block in self._blocks()]).mT

    def gram(self) -> Tensor:
        v, n, groups, t, o = self.s.shape
        i = self.x.shape[3]
        if groups == t == 1:
            s, x = self.s.flatten(0, 1).flatten(1), self.x.flatten(1)
            return (s @ s.mT).view(v, n, v, n) * (x @ x.mT).unsqueeze(1)
        if t * t * (o + i) < o * i:  # inner products of positions, against the tensor itself
            return self._gram_of_positions()
        out = self.s.new_zeros(v * n, v * n)
        step = max(1, 16 * self._most // max(1, v * n * groups * i))  # long rows: their products take the time
        for start in range(0, o, step):
            rows = (self.s[..., start : start + step].mT @ self.x).flatten(0, 1).flatten(1)
            out.addmm_(rows, rows.mT)
        return out.view(v, n, v, n)

    def _gram_of_positions(self) -> Tensor:
        """Σ_t Σ_p ⟨s_t, s_p⟩ ⟨x_t, x_p⟩, for a few samples against all of them at a time."""
        v, n, groups, t, _ = self.s.shape
        out = self.s.new_empty(v, n, v, n)
        step = max(1, self._most // max(1, groups * v * v * t * t * n))
        for start in range(0, n, step):
            few = slice(start, start + step)
            of_s = torch.einsum("ungto,vmgpo->nmuvgtp", self.s[:, few], self.s)
            of_x = torch.einsum("ngti,mgpi->nmgtp", self.x[few], self.x)
            out[:, few] = torch.einsum("nmuvgtp,nmgtp->unvm", of_s, of_x)
        return out

    def inner(self, vectors: Tensor) -> Tensor:
        groups, o, i = self.s.shape[2], self.s.shape[4], self.x.shape[3]
        matrices = vectors.reshape(-1, groups, *((i, o) if self.flipped else (o, i)))
        matrices = matrices if self.flipped else matrices.mT
        return inner(self.s, torch.einsum("ngti,ugio->ungto", self.x, matrices))

    def combined(self, weights: Tensor) -> Tensor:
        return self._laid(torch.einsum("ungto,ngti->ugoi", combined(self.s, weights), self.x))

    def entries(self, places: Tensor) -> Tensor:
        o, i = self.s.shape[4], self.x.shape[3]
        group, place = places // (o * i), places % (o * i)
        row, column = (place % o, place // o) if self.flipped else (place // i, place % i)
        s, x = self.s.permute(2, 4, 0, 1, 3)[group, row], self.x.permute(1, 3, 0, 2)[group, column]
        return over(s * x.unsqueeze(1), 3)  # M V N

    def select(self, samples: Sequence[int]) -> Outer:
        return replace(self, s=self.s[:, list(samples)], x=self.x[list(samples)])

    def plus(self, other: PerSample) -> PerSample:
        if not self._alike(other):
            return super().plus(other)
        assert isinstance(other, Outer)
        return replace(self, s=torch.cat([self.s, other.s], 3), x=torch.cat([self.x, other.x], 2))

    def _alike(self, other: PerSample) -> bool:
        return (
            isinstance(other, Outer)
            and (self.shape, self.flipped, self.size) == (other.shape, other.flipped, other.size)
            and (self.s.shape[2], self.s.shape[4]) == (other.s.shape[2], other.s.shape[4])
        )

    def through(self, op: Any, apply: Callable[[Tensor], Tensor]) -> PerSample:
        shape = tuple(op.inputs[0].shape)
        if laid_out(op, "reshaped") and op.inputs[0].dtype == op.outputs[0].dtype:
            return replace(self, shape=shape)
        matrix = (self.s.shape[4], self.x.shape[3])[:: -1 if self.flipped else 1]
        if self.s.shape[2] == 1 and self.shape == matrix and transposes(op):
            return replace(self, shape=shape, flipped=not self.flipped)
        return Dense(self.dense()).through(op, apply)
