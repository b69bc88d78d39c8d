"""Sums of Kronecker products between all pairs of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..kronecker import times
from .factored import FactoredGaussNewton
from .rearranged import layers, nearest
from .space import Space
from .structured import Structured

PROBES = 16
Terms = Mapping[tuple[int, int], tuple[Tensor, Tensor]]


class KroneckerSum(Structured):
    """A symmetric matrix whose block between layers a and b is Σₖ Aₖ ⊗ Bₖ, with as many terms as each pair needs.

    K-FAC has one product for each layer, and nothing between layers. A product with a vector costs O(K O I (O + I)) a
    pair. The matrix need not be positive semi-definite, and its inverse has no closed form.

    Args:
        places: for every layer, which entries are its own: ``[O, I]``.
        terms: by pair a ≤ b: A ``[K, O_a, O_b]`` and B ``[K, I_a, I_b]``. The block between b and a is the transpose;
            that of a layer with itself is made symmetric.
        n: number of rows.
        space: the parameters that they belong to.

    Attributes:
        error: ‖G - this‖ / ‖G‖ in Frobenius norm, as seen by 16 random vectors, where :meth:`nearest` made it.
    """

    symmetric = True
    error: float | None = None

    def __init__(self, places: Sequence[Tensor], terms: Terms, n: int, space: Space | None = None):
        if not terms:
            raise CurvatureError("KroneckerSum: there are no terms")
        self.places, self.terms = list(places), dict(terms)
        self._describe((n, n), next(iter(self.terms.values()))[0], space)
        for (a, b), (left, right) in self.terms.items():
            sizes = list(zip(self.places[a].shape, self.places[b].shape, strict=True))
            if a > b or [tuple(left.shape[1:]), tuple(right.shape[1:])] != sizes or len(left) != len(right):
                raise ValueError(f"KroneckerSum: {tuple(left.shape)} and {tuple(right.shape)} between {a} and {b}")

    @classmethod
    def nearest(
        cls, operator: FactoredGaussNewton, max_bytes: int, generator: torch.Generator | None = None
    ) -> KroneckerSum:
        """The nearest sums of Kronecker products to the Gauss-Newton matrix, within ``max_bytes``.

        Every pair of layers has the singular triplets of its rearranged block, by products with it; over all pairs
        those are kept that bring most for their bytes. A weight and its bias are one layer; what is no weight of a
        linear map is a layer of one input. Work and memory grow with the square of the positions.

        Raises:
            CurvatureError: if there is no room for any, or the loss has a penalty with a diagonal of its own.

        Source: Van Loan & Pitsianis 1993.
        """
        if operator.own is not None:
            raise CurvatureError(
                "KroneckerSum: a penalty has a diagonal Hessian of its own. Leave it out of the loss, and add its "
                "curvext.operators.Diagonal to the result"
            )
        parts = layers(operator)
        kept = nearest(parts, max_bytes // operator.like.element_size(), operator.room, generator)
        if not kept:
            raise CurvatureError(f"KroneckerSum: max_bytes={max_bytes} leave no room for a single product")
        terms = {}
        for (a, b), t in kept.items():
            (o, i), (p, j) = parts[a].places.shape, parts[b].places.shape
            terms[a, b] = (t.left * t.values.unsqueeze(1)).view(-1, o, p), t.right.reshape(-1, i, j)
        result = cls([part.places for part in parts], terms, operator.shape[0], operator.domain)
        result.error = result._error(operator, generator)
        return result

    def _error(self, operator: FactoredGaussNewton, generator: torch.Generator | None) -> float:
        home = self.device if generator is None else generator.device
        v = torch.randn(self.shape[0], PROBES, generator=generator, dtype=self.dtype, device=home).to(self.device)
        true = operator @ v
        return float((true - self @ v).norm() / true.norm())

    def _apply(self, v: Tensor) -> Tensor:
        out = torch.zeros_like(v)
        for (a, b), (left, right) in self.terms.items():
            weight = 0.5 if a == b else 1.0
            self._add(out, a, weight * left, right, v[self.places[b]])
            self._add(out, b, weight * left.mT, right.mT, v[self.places[a]])
        return out

    def _add(self, out: Tensor, to: int, left: Tensor, right: Tensor, x: Tensor) -> None:
        """Σₖ (A ⊗ B) x, into the rows of a layer."""
        product = times([left, right], x.expand(len(left), *x.shape)).sum(0)
        out.index_add_(0, self.places[to].flatten(), product.flatten(0, 1))

    def diagonal(self) -> Tensor:
        """The diagonal ``[n]``."""
        found = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for (a, b), (left, right) in self.terms.items():
            if a == b:
                found[self.places[a]] = torch.einsum("koo,kii->oi", left, right)
        return found

    def trace(self) -> Tensor:
        """The sum of the diagonal."""
        return self.diagonal().sum()

    @property
    def bytes(self) -> int:
        """What the terms take."""
        return sum(left.nbytes + right.nbytes for left, right in self.terms.values())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> KroneckerSum:
        """With its entries moved."""
        there = (device or self.device, dtype or self.dtype)
        terms = {pair: (left.to(*there), right.to(*there)) for pair, (left, right) in self.terms.items()}
        return KroneckerSum([p.to(there[0]) for p in self.places], terms, self.shape[0], self.domain)
