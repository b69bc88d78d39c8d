"""From an operator's products to an approximation whose error has been verified."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..operators.base import Operator
from ..solvers import cg
from .adaptive import adapted
from .hodlr import HierarchicalOperator
from .levels import pairs
from .lowrank import low_rank, with_diagonal
from .nested import columns, nested
from .peel import Peeling, Source, reader
from .tree import ClusterTree
from .update import compressed

PROBES = 16
ENTRIES = 4096  # rows up to which all entries are read unasked
ASYMMETRIC = "HierarchicalOperator: the operator is not symmetric. Take (A + A.T) / 2, or AᵀA"


def approximate(
    operator: Any,
    tolerance: float | None = None,
    *,
    max_bytes: int | None = None,
    max_products: int | None = None,
    format: str = "hodlr",
    order: str | Tensor = "row",
    leaf: int | None = None,
    shift: float | None = None,
    generator: torch.Generator | None = None,
) -> HierarchicalOperator:
    """A hierarchical approximation of a symmetric operator, from products alone.

    Peeling takes 2 × 16 + Σₗ (2 Rₗ + 8) + leaf products, with Rₗ columns drawn at level l (``sampled``), in O(log n)
    levels, where the blocks off the diagonal are of low rank; where the error is too large, some more. It pays where
    that is so: kernels, fields, many outputs, Hessians at initialisation. Gauss-Newton matrices of trained classifiers
    are closer to low rank across the whole: ``format="auto"`` finds out.

    Args:
        operator: symmetric, anything with ``.shape`` and ``@``; dense tensors too.
        tolerance: ‖A - result‖ / ‖A‖ in Frobenius norm. It holds up to the noise of 16 probes (about 10%).
        max_bytes: what the result may take. Alone, the best within them; with ``tolerance``, refused if both do not go
            together.
        max_products: refused beyond; n if not given, as then the whole matrix could be had.
        format: ``"hodlr"``, by peeling; ``"nested"``, the same from one batch of max(leaf, 2R) + R + 10 products, for
            rank R of whole rows off the diagonal; ``"lowrank"``, low rank and a diagonal; ``"lowrank+hodlr"``, low rank
            across the whole (half of the ranks that ``max_bytes`` allow; without, directions until 16 more leave over
            half of the squared norm), and HODLR of the rest; ``"adaptive"``, every block
            anywhere low rank, dense or split, from all entries in O(n³): the most accurate for its bytes, without
            ``factor``; ``"auto"``, the one with the smallest error within ``max_bytes``, or without, the smallest one
            within ``tolerance``. Adaptive is a candidate where entries can be read, up to 4096 rows.
        order: of the tree, see :class:`ClusterTree`.
        leaf: entries of a leaf; 32 (adaptive 16), or less where ``max_bytes`` are few.
        shift: for ``"auto"``, where ``result.factor(shift)`` is to precondition: of the formats that can be factored,
            the one that takes the fewest steps of conjugate gradients on A + shift I, for a random right-hand side.
            Each step is a product, on top of ``max_products``.
        generator: of random numbers.

    Entries are those of a tensor, or ``operator.entries(rows, columns)`` of slices or indices, in the operator's order
    (:class:`~curvext.operators.Readable`); others take n products. HODLR multiplies the blocks of a ``Readable`` one by
    one: 2 × 16 products are all, and no level sees what others left out.

    Source: Lin, Lu & Ying 2011; Martinsson 2016; Levitt & Martinsson 2022; Halko, Martinsson & Tropp 2011.
    """
    like = _like(operator)
    _check(operator, tolerance, max_bytes, format, like)
    if shift is not None and format != "auto":
        raise ValueError(f"HierarchicalOperator: shift is what format='auto' chooses by, not {format!r}")
    n = operator.shape[0]
    most = 16 if format == "adaptive" else 32
    leaf = _leaf(n, most, max_bytes, like.element_size()) if leaf is None else leaf
    tree = _tree(operator, leaf, order)
    source = Source(operator, tree, like, n if max_products is None else max_products, generator)
    if format == "auto":
        result = _best(source, tolerance, max_bytes, shift)
    else:
        result = FORMATS[format](source, tolerance, max_bytes)
    result.products = source.products
    return _labelled(result, operator)


def _like(operator: Any) -> Tensor:
    return torch.empty(0, dtype=getattr(operator, "dtype", None), device=getattr(operator, "device", None))


def _check(operator: Any, tolerance: float | None, max_bytes: int | None, format: str, like: Tensor) -> None:
    if len(operator.shape) != 2 or operator.shape[0] != operator.shape[1]:
        raise ValueError(f"HierarchicalOperator: an operator of shape {tuple(operator.shape)} is not square")
    if tolerance is None and max_bytes is None:
        raise ValueError("HierarchicalOperator: pass tolerance, max_bytes or both")
    if format not in (*FORMATS, "auto"):
        raise ValueError(f"HierarchicalOperator: format {format!r}; there are {[*FORMATS, 'auto']}")
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"HierarchicalOperator: an operator in {like.dtype}; pass it in torch.float32 or float64")
    if tolerance is not None:
        _check_tolerance(tolerance, like.dtype)


def _check_tolerance(tolerance: float, dtype: torch.dtype) -> None:
    least = 1e-6 if dtype == torch.float32 else 1e-12
    if not least <= tolerance < 1:
        raise ValueError(f"HierarchicalOperator: tolerance={tolerance} in {dtype}: from {least} to below 1")


def _leaf(n: int, most: int, max_bytes: int | None, size: int) -> int:
    return most if max_bytes is None else min(most, max(2, max_bytes // (2 * n * size)))


def _tree(operator: Any, leaf: int, order: str | Tensor) -> ClusterTree:
    """Matrices below two leaves are dense."""
    n = operator.shape[0]
    domain = operator.domain if isinstance(operator, Operator) else None
    return ClusterTree(n if domain is None else domain, n if n < 2 * leaf else leaf, order)


def _labelled(result: HierarchicalOperator, operator: Any) -> HierarchicalOperator:
    if isinstance(operator, Operator):
        result.domain, result.image = operator.domain, operator.domain
    return result


class Probes:
    """Products with Gaussian vectors: the norm of A, whether it is symmetric, and errors."""

    def __init__(self, source: Source):
        self.vectors = source.tree.enter(source.tree.leave(source.normal(source.tree.size, PROBES)))
        self.products = source(self.vectors)
        self.scale = float(self.products.double().square().sum().div(PROBES).sqrt())
        _check_scale(self.scale, self.products)

    def error(self, result: HierarchicalOperator) -> float:
        """‖(A - result) Ω‖ / ‖A Ω‖."""
        missing = float((self.products - result.inner(self.vectors)).double().square().sum().div(PROBES).sqrt())
        return missing / self.scale if self.scale else missing

    def check_symmetry(self) -> None:
        """Of Ωᵀ A Ω."""
        s = self.vectors.double().mT @ self.products.double()
        if float((s - s.mT).norm()) > PROBES * self.scale * _rounding(self.products.dtype):
            raise CurvatureError(ASYMMETRIC)


def _check_scale(norm: float, x: Tensor) -> None:
    """Of x, entries or products, that it has squares that are finite, and not zero unless x is."""
    if not 1e-150 < norm < 1e150 and bool((x != 0).any()):
        raise CurvatureError(f"HierarchicalOperator: the operator's norm, {norm:.1e}, is not finite or out of range")


def _rounding(dtype: torch.dtype) -> float:
    """What products may differ by, relatively."""
    return 1e-7 if dtype == torch.float64 else 1e-3


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def _begin(source: Source) -> Probes:
    probes = Probes(source)
    probes.check_symmetry()
    return probes


def hodlr(
    source: Source, tolerance: float | None, max_bytes: int | None, low: HierarchicalOperator | None = None
) -> HierarchicalOperator:
    """By peeling, beside ``low``; tightened until the error, as probes see it, is within the tolerance."""
    if not source.tree.depth:
        return _within(_dense(source), max_bytes, tolerance)
    probes = _begin(source)
    low = low or HierarchicalOperator(source.tree, [], source.like.new_zeros(source.tree.size, 1, 1))
    total = None if max_bytes is None else _ranks(source, max_bytes - low.basis.nbytes - low.values.nbytes)
    if tolerance is not None:
        result = _tightened(source, probes.scale, tolerance, low)
    else:
        cap = total + 8 if total is not None else None
        result = _peeled(source, probes.scale, 1e-9, low, cap)
    if total is not None and sum(result.ranks) > total:
        result = _carry(result, compressed(result, ranks=total))
    if result.error is None:
        result.error = Probes(source).error(result)
    return _within(result, max_bytes, tolerance)


def lowrank_and_hodlr(source: Source, tolerance: float | None, max_bytes: int | None) -> HierarchicalOperator:
    """Low rank across the whole, and HODLR of the rest."""
    if not source.tree.depth:
        return hodlr(source, tolerance, max_bytes)
    rank = None if max_bytes is None else (_ranks(source, max_bytes) - 1) // 2
    low = low_rank(source, _begin(source).scale, tolerance, rank, flat=rank is None)
    return hodlr(source, tolerance, max_bytes, low)


def _entries(source: Source) -> Tensor:
    """All of them, in the order of the tree."""
    a = source.matrix()
    _check_scale(_norm(a), a)
    if _norm(a - a.mT) > _norm(a) * _rounding(a.dtype):
        raise CurvatureError(ASYMMETRIC)
    return (a + a.mT) / 2


def _dense(source: Source) -> HierarchicalOperator:
    a = _entries(source)
    result = HierarchicalOperator(source.tree, [], a.unsqueeze(0))
    result.error, result.scale = 0.0, _norm(a)
    return result


def adaptive(source: Source, tolerance: float | None, max_bytes: int | None) -> HierarchicalOperator:
    """Every block as what is cheapest."""
    floats = None if max_bytes is None else max_bytes // source.like.element_size()
    return _within(adapted(_entries(source), source.tree, tolerance, floats), max_bytes, tolerance)


def _ranks(source: Source, max_bytes: int) -> int:
    """What the levels' ranks may add up to."""
    total = max_bytes // source.like.element_size() // source.tree.size - source.tree.leaf
    if total < 1:
        raise CurvatureError(
            f"HierarchicalOperator: max_bytes={max_bytes} leave nothing beside leaves of {source.tree.leaf} entries; "
            "pass a smaller leaf or more bytes"
        )
    return total


def _tightened(source: Source, scale: float, tolerance: float, near: HierarchicalOperator) -> HierarchicalOperator:
    """Passes to ever smaller budgets, each from the directions of the last, the first from those of ``near``."""
    inner, result = (0.4 if near.levels else 0.5) * tolerance, near
    for _ in range(8):
        result = _peeled(source, scale, inner, result, None)
        result.error = Probes(source).error(result)
        if result.error <= 0.9 * tolerance:
            return result
        inner *= min(0.7, 0.8 * tolerance / result.error)
    raise CurvatureError(
        f"HierarchicalOperator: the error stays at {result.error:.1e}, above tolerance={tolerance}: are products with "
        "the operator as accurate, and the same every time?"
    )


def _directions(result: HierarchicalOperator) -> list[Tensor]:
    """Orthonormal, of every level's left children."""
    return [torch.linalg.qr(pairs(f, level)[:, 0])[0] for level, f in enumerate(result.levels, 1)]


def _peeled(
    source: Source, scale: float, inner: float, near: HierarchicalOperator, cap: int | None
) -> HierarchicalOperator:
    """Beside the part of low rank of ``near``, from its directions if it has any."""
    start = _directions(near)
    peeling = Peeling(source, (inner * scale) ** 2, scale, near, cap, 4 if start else 8, start)
    result = peeling.run()
    result.sampled, result.scale = peeling.sampled, scale
    return result


def _carry(old: HierarchicalOperator, new: HierarchicalOperator) -> HierarchicalOperator:
    new.sampled, new.scale = old.sampled, old.scale
    return new


def _within(result: HierarchicalOperator, max_bytes: int | None, tolerance: float | None) -> HierarchicalOperator:
    if max_bytes is not None and result.bytes > max_bytes:
        raise CurvatureError(f"HierarchicalOperator: {result.bytes} bytes are needed, above max_bytes={max_bytes}")
    if tolerance is not None and result.error is not None and result.error > tolerance:
        raise CurvatureError(
            f"HierarchicalOperator: the error is {result.error:.1e} within the bytes or products allowed, above "
            f"tolerance={tolerance}; allow more, or a larger tolerance"
        )
    return result


def lowrank(source: Source, tolerance: float | None, max_bytes: int | None) -> HierarchicalOperator:
    """Low rank and a diagonal."""
    probes, fresh = _begin(source), Probes(source)
    floats = None if max_bytes is None else max_bytes // source.like.element_size()
    rank = None if floats is None else floats // (source.tree.size + 1) - 1
    result = with_diagonal(low_rank(source, probes.scale, tolerance, rank), probes, fresh)
    result.error, result.scale = fresh.error(result), probes.scale
    return _within(result, max_bytes, tolerance)


def nested_bases(source: Source, tolerance: float | None, max_bytes: int | None) -> HierarchicalOperator:
    """From one batch of products, of twice the rank until the error is within half the tolerance; then compressed."""
    tree = source.tree
    if not tree.depth:
        return _within(_dense(source), max_bytes, tolerance)
    probes = _begin(source)
    total = None if max_bytes is None else _ranks(source, max_bytes)
    rank = 8 if total is None else total
    result, omega, y = _sampled(source, rank)
    while tolerance is not None and total is None and rank < tree.n and probes.error(result) > tolerance / 2:
        rank *= 2
        result, omega, y = _sampled(source, rank, omega, y)
    result = compressed(result, ranks=total) if total is not None else compressed(result, 0.6 * (tolerance or 0.0))
    result.error, result.scale = Probes(source).error(result), probes.scale
    return _within(result, max_bytes, tolerance)


def _sampled(
    source: Source, rank: int, omega: Tensor | None = None, y: Tensor | None = None
) -> tuple[HierarchicalOperator, Tensor, Tensor]:
    """The approximation of that rank, with the columns it took; those there are, are used."""
    known = 0 if omega is None else omega.shape[1]
    new = source.normal(source.tree.size, columns(source.tree, rank) - known)
    products = source(new)
    omega = new if omega is None else torch.cat([omega, new], 1)
    y = products if y is None else torch.cat([y, products], 1)
    return nested(source.tree, omega, y, rank), omega, y


FORMATS = {
    "lowrank": lowrank,
    "nested": nested_bases,
    "hodlr": hodlr,
    "lowrank+hodlr": lowrank_and_hodlr,
    "adaptive": adaptive,
}


def _best(source: Source, tolerance: float | None, max_bytes: int | None, shift: float | None) -> HierarchicalOperator:
    """All formats, and of those that are possible the one with the least error, the least bytes or the fewest steps."""
    results, refused, limit = [], defaultdict(list), source.limit  # type: ignore[var-annotated]
    for name in FORMATS:
        if name == "adaptive" and not (shift is None and source.tree.n <= ENTRIES and reader(source.operator)):
            continue
        source.limit = limit if name in ("hodlr", "lowrank+hodlr", "adaptive") else limit // 2
        try:
            results.append(FORMATS[name](source, tolerance, max_bytes))
        except CurvatureError as error:
            refused[str(error)].append(name)
    if not results:
        raise CurvatureError("; ".join(f"{', '.join(names)}: {why}" for why, names in refused.items()))
    if shift is not None:
        return _fewest_steps(source, results, shift)
    return min(results, key=lambda r: r.bytes if max_bytes is None else r.error or 0.0)


def _fewest_steps(source: Source, results: list[HierarchicalOperator], shift: float) -> HierarchicalOperator:
    """With each as the preconditioner, up to the steps of the best so far; low rank without its diagonal as well.

    A diagonal brings low rank nearer to A, and its small eigenvalues further from those of A + δI.
    """
    bare = [r.with_parts([], torch.zeros_like(r.leaves)) for r in results if r.basis.shape[1] and not r.levels]
    b = source.tree.leave(source.normal(source.tree.size, 1)).squeeze(1)
    best, least = results[0], source.tree.n
    for result in bare + results:
        solver = result.factor(shift, compensate=True)
        steps = cg(source.operator, b, damping=shift, preconditioner=solver, tolerance=1e-6, steps=least).steps
        source.products += steps
        if steps < least:
            best, least = result, steps
    if best.error is None:
        source.limit = source.products + PROBES
        probes = Probes(source)
        best.error, best.scale = probes.error(best), probes.scale
    return best


def correct(
    old: HierarchicalOperator,
    operator: Any,
    tolerance: float,
    max_products: int | None = None,
    generator: torch.Generator | None = None,
) -> HierarchicalOperator:
    """See :func:`curvext.hierarchical.update.refreshed`."""
    _check_tolerance(tolerance, old.dtype)
    if tuple(operator.shape) != old.shape or getattr(operator, "dtype", old.dtype) != old.dtype:
        raise ValueError(f"refreshed: {old} by an operator of shape {tuple(operator.shape)}, {_like(operator).dtype}")
    source = Source(operator, old.tree, old.leaves, old.tree.n if max_products is None else max_products, generator)
    if old.whole and not old.levels:
        result = _dense(source)
        result.products = source.products
        return _labelled(result, operator)
    probes = _begin(source)
    result = old.with_parts(old.levels, old.leaves)
    result.error = probes.error(old)
    if result.error > 1.25 * tolerance:
        if not old.whole:
            raise CurvatureError(
                f"refreshed: the error is {result.error:.1e}, and only formats 'hodlr', 'nested' and "
                "'lowrank+hodlr' can be brought up to date; build it anew by HierarchicalOperator.from_operator"
            )
        result = _tightened(source, probes.scale, tolerance, old)
    result.products, result.scale = source.products, probes.scale
    return result
