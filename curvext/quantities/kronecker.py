"""Kronecker-factored curvature: for every parameter a block A ⊗ B, from sums over columns, samples and positions.

The weight of a linear map gets, from sample n at position t, outer products s ⊗ x of the waves s at the map's output
with its input x. Taking s and x for independent over what is summed leaves of its block of the Gauss-Newton matrix

    expand:  Σ_{v,n,t} s sᵀ ⊗ 1/(N·T) Σ_{n,t} x xᵀ        positions count as samples
    reduce:  Σ_{v,n} s̄ s̄ᵀ ⊗ 1/N Σ_n x̄ x̄ᵀ                with s̄ = Σ_t s and x̄ = 1/T Σ_t x

in the loss's scaling. Positions are those of a convolution or a sequence, and all uses of a shared weight.

Source: Martens & Grosse 2015, https://arxiv.org/abs/1503.05671; Grosse & Martens 2016 (convolutions),
https://arxiv.org/abs/1602.01407; Eschenhagen et al. 2023 (expand, reduce), https://arxiv.org/abs/2311.00636.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CurvatureError
from ..kronecker import Eigenbasis, Kronecker
from ..persample import Outer, PerSample, gram
from ..rows import Rows
from ..wave import Wave
from .base import Quantity, Target, positive
from .readings import arrived
from .waves import Factor, SampleGradients, owned

SETTINGS = ("expand", "reduce")


@dataclass(frozen=True)
class Sums:
    """The two factors of a linear map's weight, and what else is needed to add them up and to append a bias.

    Args:
        out: Σ s sᵀ, ``[G, O, O]``.
        inputs: the mean of x xᵀ, ``[G, I, I]``, or its diagonal ``[I]``.
        first: the mean of x, ``[G, I]``.
        count: the number of x.
        flipped: whether the input's features come first in the weight.
    """

    out: Tensor
    inputs: Tensor
    first: Tensor
    count: int
    flipped: bool

    def __add__(self, other: Any) -> Sums:
        if not isinstance(other, Sums) or (self.flipped, self.out.shape) != (other.flipped, other.out.shape):
            raise _mixed()
        count = self.count + other.count
        share = other.count / max(1, count)
        inputs, first = self.inputs.lerp(other.inputs, share), self.first.lerp(other.first, share)
        return Sums(self.out + other.out, inputs, first, count, self.flipped)

    def factors(self, bias: bool = False) -> list[Tensor]:
        """In the order of the weight's entries; with a bias, the input has a last feature 1."""
        pair = self.out, self._with_one() if bias else self.inputs
        out, inputs = [f.squeeze(0) if f.dim() == 3 else f for f in pair]
        return [inputs, out] if self.flipped else [out, inputs]

    def joint(self, weight: Any, bias: Any) -> Kronecker | None:
        """Of a weight and the bias of its outputs together, if it is one of theirs; of the weight if there is none."""
        shape = tuple(weight.shape)
        if bias is None or not bias.requires_grad:
            return Kronecker(tuple(self.factors()), shape)
        if bias.numel() != self.out.shape[:2].numel():  # a transposed convolution adds up its outputs before the bias
            return None
        return Kronecker.later(partial(self.factors, True), shape, 1 if self.flipped else 2)

    def _with_one(self) -> Tensor:
        groups, size = self.first.shape
        joint = self.inputs.new_ones(groups, size + 1, size + 1)
        joint[:, :size, :size] = self.inputs
        joint[:, :size, size] = joint[:, size, :size] = self.first
        return joint


def _mixed() -> CurvatureError:
    return CurvatureError(
        "several backward passes used a parameter in ways whose Kronecker factors cannot be added; use one pass a block"
    )


def wide(x: Tensor) -> Tensor:
    """Sums of products need more digits than 16 bits hold."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sums(part: Outer | Rows, setting: str, out: Tensor | None = None) -> Sums:
    """Of one weight; ``out`` may be known already."""
    reduce, n = setting == "reduce", part.size[1]
    out = _gram(part, reduce) if out is None else out
    if isinstance(part, Rows):  # x is 1 in the row that was looked up: x xᵀ is diagonal, and x̄ x̄ᵀ is taken to be
        t = part.s.shape[2] if reduce else 1
        ones = replace(part, s=torch.ones_like(part.s[:1, ..., :1]), shape=(part.shape[0], 1))
        uses = wide((ones.squares() if reduce else ones.sums()[0]).squeeze(1)) / t**2
        count = n if reduce else part.index.numel()
        return Sums(out, uses / count, uses / count, count, True)
    x = wide(part.x)
    x = (x.mean(2, keepdim=True) if reduce else x).transpose(0, 1).flatten(1, 2)
    return Sums(out, gram(x, 1 / max(1, x.shape[1])), x.mean(1), x.shape[1], part.flipped)


def _gram(part: Outer | Rows, reduce: bool) -> Tensor:
    """Σ over columns, samples and positions of outer products of waves, ``[G, O, O]``."""
    if isinstance(part, Outer) and part.wave is not None and part.wave.of_weight is part.s:
        return part.wave.value.unsqueeze(0)
    s = wide(part.s.unsqueeze(2) if isinstance(part, Rows) else part.s)
    s = (s.sum(3, keepdim=True) if reduce else s).permute(2, 0, 1, 3, 4).flatten(1, 3)
    return gram(s)


def block(parts: Sequence[PerSample], setting: str, dense_up_to: int, size: int) -> Sums | Tensor:
    """What is kept of a parameter's curvature: factors for weights, else ``[P, P]`` or its diagonal ``[P]``."""
    found: list[Any]
    if all(isinstance(part, (Outer, Rows)) for part in parts):
        found = [sums(part, setting) for part in parts if isinstance(part, (Outer, Rows))]
    elif size <= dense_up_to:
        found = [wide(part.block()) for part in parts]
    else:
        found = [wide(part.squares()).flatten() for part in parts]
    return sum(found[1:], start=found[0])  # type: ignore[no-any-return]


class Kept(Quantity):
    """Factors, a block or its diagonal of every parameter: :class:`Sums`, ``[P, P]`` or ``[P]``; ``None`` for zero."""

    dense_up_to: int

    def add(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return a if b is None else b
        if type(a) is not type(b) or (isinstance(a, Tensor) and a.shape != b.shape):
            raise _mixed()
        return a + b

    def zero(self, target: Target) -> Any:
        return None

    def result(self, held: Any, target: Target) -> Any:
        if held is None:
            size = target.tensor.numel()
            return [wide(target.tensor.new_zeros([size] * (1 + (size <= self.dense_up_to))))]
        return held.factors() if isinstance(held, Sums) else [held]

    def attach(self, model: Any, held: Mapping[str, Any]) -> None:
        """Leave a :class:`~curvext.Kronecker` of weight and bias together on their module."""
        for module in model.modules() if isinstance(model, nn.Module) else ():
            module.__dict__.pop(self.savefield, None)
        for module, (weight, bias) in _layers(model):
            of_weight = held.get(weight)
            if isinstance(of_weight, Sums) and (bias is None or bias in held):
                joint = of_weight.joint(module._parameters["weight"], module._parameters.get("bias"))
                if joint is not None:
                    setattr(module, self.savefield, joint)


class _Kronecker(Kept):
    """From the factor wave, or from every sample's gradient."""

    mc_samples: int | None  # None: the exact factor
    empirical: bool
    setting: str

    def __post_init__(self) -> None:
        positive(self, mc_samples=self.mc_samples)
        if self.setting not in SETTINGS:
            raise ValueError(f"{type(self).__name__}: setting must be one of {SETTINGS}, got {self.setting!r}")

    @property
    def waves(self) -> tuple[Wave, ...]:
        if self.empirical:
            return (SampleGradients(),)
        return (Factor("fewest") if self.mc_samples is None else Factor("draws", self.mc_samples),)

    def read(self, target: Target, *waves: Any) -> Any:
        name = type(self).__name__
        if self.empirical:
            gradients = owned(waves[0], name)
            parts = [] if gradients is None else [gradients]
        else:
            found = arrived(waves[0], target)
            parts = found.samples
            if found.whole or found.diagonal:
                found.owned(name)
        return self.of(parts, target) if parts else None

    def join(self, a: Any, b: Any) -> Any:
        """Inputs are the same for all columns."""
        return replace(a, out=a.out + b.out) if isinstance(a, Sums) else a + b

    def of(self, parts: Sequence[PerSample], target: Target) -> Any:
        return block(parts, self.setting, self.dense_up_to, target.tensor.numel())


def _layers(model: Any) -> list[tuple[nn.Module, tuple[str, str | None]]]:
    """Modules with a trained weight, and the names of it and of its bias, that no other module has."""
    if not isinstance(model, nn.Module):
        return []
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    found: list[tuple[nn.Module, tuple[str, str | None]]] = []
    for module in model.modules():
        weight, bias = (id(module._parameters.get(k)) for k in ("weight", "bias"))
        if weight in names and uses[weight] == 1 and (bias not in names or uses[bias] == 1):
            found.append((module, (names[weight], names.get(bias))))
    return found


@dataclass(frozen=True)
class KFAC(_Kronecker):
    """Kronecker factors of every parameter's block of the Gauss-Newton matrix, from random columns: ``p.kfac``.

    A list whose Kronecker product is the block over the parameter's entries in row-major order, in the loss's scaling:

    ========================  ===================================================================================
    weight of Linear          ``[[O, O], [I, I]]``
    of a convolution          ``[[O, O], [I·k, I·k]]``, k the kernel's size; transposed ``[[I, I], [O·k, O·k]]``
    with groups               the same per group, ``[[G, O/G, O/G], [G, I/G·k, I/G·k]]``
    of an embedding           ``[[rows], [O, O]]``: the first is diagonal, and kept as a vector
    any other parameter       ``[[P, P]]``, its own block; above ``dense_up_to`` entries ``[[P]]``, its diagonal
    ========================  ===================================================================================

    Modules with such a weight get ``module.kfac``, a :class:`~curvext.Kronecker` of weight and bias together (the input
    has a last feature 1), unless one of the two belongs to several modules; transposed convolutions only without bias.

    Args:
        mc_samples: random columns a sample; their expectation gives :class:`KFLR`'s first factor.
        empirical: gradients in place of columns, Σ_n g_n g_nᵀ (:class:`~curvext.SumGradSquared`'s scaling).
        setting: how positions share a weight, ``"expand"`` or ``"reduce"``; see :mod:`curvext.quantities.kronecker`.
        dense_up_to: see the table.

    Raises:
        CurvatureError: if a term of the loss that no sample owns has curvature at the parameter.
    """

    mc_samples: int = 1
    empirical: bool = False
    setting: str = "expand"
    dense_up_to: int = 1024
    savefield = "kfac"


@dataclass(frozen=True)
class KFLR(_Kronecker):
    """As :class:`KFAC` with the exact factor of the loss's Hessian: ``p.kflr``, of the same form.

    Source: Botev, Ritter & Barber, Practical Gauss-Newton optimisation for deep learning, 2017.
    """

    setting: str = "expand"
    dense_up_to: int = 1024
    mc_samples = None
    empirical = False
    savefield = "kflr"


@dataclass(frozen=True)
class EKFAC(_Kronecker):
    """The block in the eigenbasis of its Kronecker factors, with the exact diagonal there: ``p.ekfac``.

        (Q_A ⊗ Q_B) diag(λ) (Q_A ⊗ Q_B)ᵀ,   λ = Σ_{v,n} ((Q_A ⊗ Q_B)ᵀ vec Σ_t s ⊗ x)²

    an :class:`~curvext.Eigenbasis`, of all matrices with these eigenvectors the nearest to the block. Parameters that
    are no weights of linear maps have their own block, or its diagonal, as with :class:`KFAC`.

    Args:
        mc_samples: random columns a sample; ``None`` for the exact factor.
        empirical, setting, dense_up_to: as for :class:`KFAC`.
        basis: by parameter name, :class:`~curvext.Eigenbasis` objects whose eigenvectors are used as they are, such as
            an earlier ``curvature.ekfac``. Without, several backward passes in one block cannot be added up.

    Source: George et al. 2018, https://arxiv.org/abs/1806.03884.
    """

    mc_samples: int | None = 1
    empirical: bool = False
    setting: str = "expand"
    dense_up_to: int = 1024
    basis: Mapping[str, Eigenbasis] | None = field(default=None, hash=False, compare=False)
    savefield = "ekfac"

    def undivided(self) -> str:
        if self.mc_samples == 1 or self.basis is not None:
            return ""
        return "its eigenvectors are those of all columns together; give them as basis="

    def join(self, a: Any, b: Any) -> Any:
        return replace(a, values=a.values + b.values)

    def of(self, parts: Sequence[PerSample], target: Target) -> Eigenbasis:
        given = None if self.basis is None else self._given(target)
        if given is None:
            found = super().of(parts, target)
            factors = found.factors() if isinstance(found, Sums) else [found]
            given = Kronecker(tuple(factors), tuple(target.tensor.shape)).eigh()
            if not isinstance(found, Sums):
                return given  # its own block: exact already
        values = [_squares(part, given) for part in parts]
        return replace(given, values=sum(values[1:], start=values[0]))

    def _given(self, target: Target) -> Eigenbasis:
        name, shape = target.names[0], tuple(target.tensor.shape)
        given = (self.basis or {}).get(name)
        if not isinstance(given, Eigenbasis) or (given.like or (1,)) != (shape or (1,)):
            raise CurvatureError(
                f"EKFAC: basis has no Eigenbasis of shape {shape} for {name!r}; pass the curvature.ekfac of a block "
                "with the same parameters"
            )
        return given

    def add(self, a: Any, b: Any) -> Any:
        if a is None or b is None:
            return a if b is None else b
        if self.basis is None:
            raise CurvatureError(
                "EKFAC: the backward passes of one block have each their own eigenbasis; pass an earlier one as "
                "EKFAC(basis=curvature.ekfac), or use one backward pass"
            )
        return self.join(a, b)

    def result(self, held: Any, target: Target) -> Eigenbasis:
        if held is None:
            return Kronecker(tuple(super().result(None, target)), tuple(target.tensor.shape)).eigh()
        return held  # type: ignore[no-any-return]

    def attach(self, model: Any, held: Mapping[str, Any]) -> None:
        pass


def _squares(part: PerSample, basis: Eigenbasis) -> Tensor:
    """Σ_{v,n} of the squares of the columns in the basis: ``[G, d1, ...]``."""
    vectors = basis.vectors
    if isinstance(part, Rows) and len(vectors) == 2 and vectors[0] is None and vectors[1] is not None:
        return replace(part, s=wide(part.s) @ vectors[1]).squares().view(basis.dims)
    if isinstance(part, Outer) and len(vectors) == 2:
        out, inputs = [q if q.dim() == 3 else q.unsqueeze(0) for q in vectors if q is not None][:: _step(part)]
        return replace(part, s=wide(part.s) @ out, x=wide(part.x) @ inputs).squares().view(basis.dims)
    columns = wide(part.dense()).flatten(0, 1)
    return basis.turned(columns.reshape(len(columns), *basis.dims).movedim(0, -1), False).square().sum(-1)


def _step(part: Outer) -> int:
    return -1 if part.flipped else 1
