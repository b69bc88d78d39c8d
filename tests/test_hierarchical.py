"""Hierarchical approximations are as accurate as they say, cost what they say, and refuse what they cannot do."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx, fixture, mark, raises
from torch import Tensor, nn

from curvext import CurvatureError
from curvext.hierarchical.tree import ClusterTree
from curvext.operators import Dense, GaussNewton, HierarchicalOperator, Space
from curvext.solvers import cg

from .kernels import error, kernel, plane, positive, spread
from .matrices import Counting

pytestmark = mark.usefixtures("float64")
build = HierarchicalOperator.from_operator


class TestTree:
    @given(n=st.integers(1, 200), leaf=st.integers(1, 40), order=st.sampled_from(["row", "random"]))
    def test_there_and_back(self, n, leaf, order):
        tree, v = ClusterTree(n, leaf, order), torch.randn(n, 2)
        assert torch.equal(tree.leave(tree.enter(v)), v)
        assert tree.leaf <= leaf and tree.size == tree.leaf << tree.depth and tree.size - n < 2**tree.depth
        assert tree.padding(v.device).sum() == tree.size - n

    def test_a_bias_is_next_to_its_row(self):
        space = Space.of(dict(nn.Linear(3, 2).named_parameters(prefix="a")))
        assert ClusterTree(space).permutation.tolist() == [0, 1, 2, 6, 3, 4, 5, 7]
        assert ClusterTree(space, order="column").permutation.tolist() == [0, 3, 1, 4, 2, 5, 6, 7]
        assert ClusterTree(space, order="flat").permutation is None
        none = ClusterTree(
            Space({"a.weight": torch.Size([0, 3]), "b.weight": torch.Size([2, 0]), "b.bias": torch.Size([2])})
        )
        assert none.permutation is None and none.n == 2
        assert ClusterTree(Space.of({"field": torch.zeros(9)})).permutation is None  # nothing is moved

    @given(n=st.integers(1, 200), leaf=st.integers(1, 40))
    def test_halves(self, n, leaf):
        tree = ClusterTree(n, leaf)
        assert len(tree.aligned()) - 1 in (tree.depth, tree.depth + 1)
        for level, places in enumerate(tree.aligned()):
            sizes = torch.tensor(places).diff()
            assert places[0] == 0 and places[-1] == n and sizes.sum() == n and sizes.min() >= min(tree.leaf / 2, n)
            assert sizes.max() <= max(tree.leaf, math.ceil(n / 2**level))

    @given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=4), leaf=st.integers(1, 30))
    def test_nodes_end_with_modules_and_units(self, sizes, leaf):
        layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
        levels = ClusterTree(Space.of(dict(nn.Sequential(*layers).named_parameters())), leaf).aligned()
        ends = torch.tensor([0, *(m.in_features + 1 for m in layers for _ in range(m.out_features))]).cumsum(0)
        modules = torch.tensor([0, *(m.out_features * (m.in_features + 1) for m in layers)]).cumsum(0).tolist()
        for above, places in pairwise(levels):
            assert set(above) < set(places)
            for a, b in pairwise(above):
                new = [x for x in places if a < x < b]
                assert len(new) <= 1
                for borders in (modules, ends.tolist()):
                    inside = [x for x in borders if a < x < b]
                    if new and inside:
                        assert abs(2 * new[0] - a - b) == min(abs(2 * x - a - b) for x in inside)
                        break

    def test_cells_of_space(self):
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4))
        order = ClusterTree(16, 4, places.float()).permutation
        assert {tuple(sorted(cell)) for cell in order.view(4, 4).tolist()} == {
            (0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)
        }  # fmt: skip

    def test_refused(self):
        with raises(ValueError, match="permutation"):
            ClusterTree(3, order=torch.ones(2, 2))
        with raises(ValueError, match="permutation"):
            ClusterTree(3, order=[0, 1, 1])
        with raises(ValueError, match="there are"):
            ClusterTree(3, order="best")
        with raises(ValueError, match="positive"):
            ClusterTree(3, leaf=0)


class TestPeeling:
    @mark.parametrize("tolerance", [1e-1, 1e-2, 1e-4, 1e-6])
    @mark.parametrize("matrix", [lambda: kernel(1000), lambda: plane(30)], ids=["line", "plane"])
    def test_error_products_and_bytes(self, matrix, tolerance):
        a = Counting(matrix())
        h = build(a, tolerance)
        assert error(h.to_dense(), a.matrix) <= 1.1 * tolerance
        assert h.error == approx(error(h.to_dense(), a.matrix), rel=0.35)
        assert h.products == a.products <= len(a.matrix)
        assert h.bytes == 8 * h.tree.size * (sum(h.ranks) + h.tree.leaf)

    @mark.slow
    @mark.parametrize(("tolerance", "floats"), [(0.1, 30), (1e-2, 40), (1e-3, 50), (1e-4, 60), (1e-5, 75), (1e-6, 85)])
    def test_four_thousand(self, tolerance, floats):
        a = kernel(4096)
        h = build(a, tolerance, leaf=16)
        assert error(h.to_dense(), a) <= tolerance
        assert h.bytes <= 8 * 4096 * floats and h.products <= 350

    def test_products_by_the_formula(self):
        a = kernel(2000)
        h = build(a, 1e-3)
        assert h.products == 2 * 16 + sum(2 * rank + 8 for rank in h.sampled) + h.tree.leaf

    def test_exact_where_the_matrix_is(self):
        n, tree = 300, ClusterTree(300, 20, "random")
        levels = [torch.randn(tree.size, 3) * (1 - tree.padding(torch.device("cpu"))).unsqueeze(1) for _ in range(4)]
        leaves = torch.randn(16, tree.leaf, tree.leaf)
        a = HierarchicalOperator(tree, levels, leaves + leaves.mT).to_dense()
        assert error(a, a.T) <= 1e-14
        h = build(a, 1e-12, leaf=20, order=tree.permutation)
        assert error(h.to_dense(), a) <= 1e-10 and h.ranks == [3] * 4 and h.shape == (n, n)

    def test_in_the_order_of_the_operator(self):
        a, mixed = kernel(500), torch.randperm(500)
        h = build(a[mixed][:, mixed], 1e-5, order=mixed.argsort())
        assert error(h.to_dense(), a[mixed][:, mixed]) <= 1e-5

    @mark.parametrize("exhausted", [lambda n: torch.ones(n, n), lambda n: torch.zeros(n, n), lambda n: spread(n, 5)])
    def test_exhausted_directions(self, exhausted):
        a = exhausted(400)
        assert (build(a, 1e-10).to_dense() - a).norm() <= 1e-9 * max(1.0, float(a.norm()))

    def test_growth(self):
        sizes = [256, 512, 1024, 2048]
        built = [build(kernel(n), 1e-6, max_products=10**4) for n in sizes]
        exponent = math.log2(built[-1].bytes / built[1].bytes) / 2
        assert exponent <= 1.2
        assert math.log2(built[-1].products / built[1].products) / 2 <= 0.25

    def test_full_rank_is_stored_as_it_is(self):
        a = torch.randn(100, 100)
        h = build(a + a.T, 1e-8, leaf=10, max_products=10**4)
        assert error(h.to_dense(), a + a.T) <= 1e-8

    def test_small_matrices_are_dense(self):
        a = torch.randn(40, 40)
        h = build(Counting(a + a.T), 1e-3)
        assert error(h.to_dense(), a + a.T) < 1e-14 and h.products == 40 and h.error == 0
        assert build(a + a.T, 1e-3).products == 0

    def test_single_precision(self):
        a = kernel(600).float()
        h = build(a, 1e-4)
        assert h.dtype == torch.float32 and error(h.to_dense(), a) <= 1.1e-4
        x = h.factor(0.1).solve(a[0])
        assert x.dtype == torch.float32 and error(h @ x + 0.1 * x, a[0]) < 1e-5

    def test_generator(self):
        draws = [build(kernel(200), 1e-3, generator=torch.Generator().manual_seed(1)).levels for _ in range(2)]
        assert all(torch.equal(*both) for both in zip(*draws, strict=True))


class Field:
    """exp(-10 r) between the points of a grid in the unit square, by products alone."""

    def __init__(self, side: int):
        i = torch.arange(2 * side)
        d = torch.minimum(i, 2 * side - i) / side
        self.spectrum = torch.fft.rfft2(torch.exp(-10 * (d[:, None] ** 2 + d**2).sqrt()))
        self.shape, self.dtype, self.device = (side**2, side**2), d.dtype, d.device
        self.places = torch.cartesian_prod(torch.arange(side), torch.arange(side))

    def __matmul__(self, v: Tensor) -> Tensor:
        side, wide = len(self.spectrum) // 2, self.spectrum.shape[:1] * 2
        x = torch.fft.rfft2(v.T.reshape(-1, side, side), wide)
        return torch.fft.irfft2(x * self.spectrum, wide)[:, :side, :side].flatten(1).T.contiguous()


def test_growth_in_two_dimensions():
    """Ranks at the top are those of a line through the plane; cells of space have half the floats of rows."""
    fields = [Field(side) for side in (16, 32, 64)]
    cells, rows = (
        [build(a, 1e-2, order=a.places if by_place else "flat", max_products=10**4) for a in fields]
        for by_place in (True, False)
    )
    exponents = [math.log2(built[-1].bytes / built[0].bytes) / 4 for built in (cells, rows)]
    assert exponents[0] <= 1.3 < exponents[1] and cells[-1].bytes <= 0.6 * rows[-1].bytes
    v = torch.randn(1024, 16)
    assert error(cells[1] @ v, fields[1] @ v) <= 1.3e-2


class TestNested:
    """One batch of products, whatever n is."""

    @mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
    @mark.parametrize("matrix", [lambda: kernel(1000), lambda: plane(30)], ids=["line", "plane"])
    def test_error(self, matrix, tolerance):
        a = Counting(matrix())
        h = build(a, tolerance, format="nested")
        assert error(h.to_dense(), a.matrix) <= 1.1 * tolerance and h.products == a.products
        assert h.products < build(a, tolerance).products

    def test_products_do_not_grow(self):
        built = [build(kernel(n), 1e-4, format="nested") for n in (500, 1000, 2000)]
        assert len({h.products for h in built}) == 1 and math.log2(built[2].bytes / built[0].bytes) / 2 <= 1.2

    def test_exact_where_the_matrix_is(self):
        x = torch.randn(700, 6)
        a = x @ x.T + torch.block_diag(*(positive(16) for _ in range(40)), positive(60))
        h = build(a, 1e-10, leaf=16, format="nested", order="flat")
        assert h.tree.leaf <= 16 and error(build(x @ x.T, 1e-10, format="nested").to_dense(), x @ x.T) <= 1e-10
        assert error(h.to_dense(), a) <= 1.1e-10

    def test_a_tolerance_out_of_reach(self):
        """No more columns than there are."""
        a = Counting(kernel(300).float())
        with raises(CurvatureError, match="above tolerance"):
            build(a, 1e-6, format="nested", max_products=10**5)
        assert a.products <= 6 * 300

    def test_within_bytes(self):
        a = kernel(1000)
        h = build(a, max_bytes=8 * 1000 * 64, format="nested")
        assert h.bytes <= 8 * 1000 * 64 and error(h.to_dense(), a) <= 5e-5
        rank = 8 * 1000 * 64 // 8 // h.tree.size - h.tree.leaf
        assert h.products == 2 * 16 + max(h.tree.leaf, 2 * rank) + rank + 10
        assert build(Counting(kernel(30)), 0.1, format="nested").products == 30


def test_a_field_is_solved_at_once():
    """Rank one off the diagonal, at every level: low rank across the whole is of little help."""
    t = torch.linspace(0, 1, 2000)
    a, b = torch.exp(-(t[:, None] - t).abs() / 0.01), torch.randn(2000)
    best = build(a, max_bytes=8 * 2000 * 32, format="auto", shift=1e-3, max_products=2000)
    steps = [
        cg(a, b, damping=1e-3, preconditioner=p, tolerance=1e-8).steps
        for p in (best.factor(1e-3), None, build(a, max_bytes=8 * 2048 * 32, format="lowrank").factor(1e-3, True))
    ]
    assert steps[0] <= 3 and min(steps[1:]) >= 30


class TestRefused:
    def test_more_products_than_rows(self):
        with raises(CurvatureError, match="more than 400 products"):
            build(spread(400, 400), 1e-6)
        with raises(CurvatureError, match="more than 60 products"):
            build(kernel(400), 1e-6, max_products=60)

    def test_what_is_not_symmetric(self):
        for n in (20, 300):
            with raises(CurvatureError, match="not symmetric"):
                build(torch.randn(n, n), 1e-2)

    def test_what_is_not_finite(self):
        with raises(CurvatureError, match="finite"):
            build(torch.full((300, 300), math.nan), 1e-2)

    @mark.parametrize("format", ["hodlr", "adaptive"])
    def test_squares_that_are_not(self, format):
        for scale in (1e-200, 1e200):
            with raises(CurvatureError, match="out of range"):
                build(scale * kernel(100), 1e-2, format=format)
        for scale in (1e-30, 1e25):  # whose squares single precision has not
            a = (scale * kernel(300)).float()
            assert error(build(a, 1e-2, format=format).to_dense().double(), a.double()) <= 1.1e-2

    def test_bytes_and_tolerance_that_do_not_go_together(self):
        with raises(CurvatureError, match="above tolerance"):
            build(kernel(1000), 1e-6, max_bytes=8 * 1000 * 24)
        with raises(CurvatureError, match="smaller leaf"):
            build(kernel(1000), max_bytes=8 * 1000 * 24, leaf=32)
        with raises(CurvatureError, match="max_bytes"):
            build(torch.eye(30), 1e-3, max_bytes=100)

    def test_arguments(self):
        with raises(ValueError, match="square"):
            build(torch.ones(2, 3), 0.1)
        with raises(ValueError, match="max_bytes or both"):
            build(torch.eye(3))
        with raises(ValueError, match="from 1e-06"):
            build(torch.eye(3).float(), 1e-8)
        with raises(ValueError, match="format"):
            build(torch.eye(3), 0.1, format="h2")
        with raises(ValueError, match="leaf=0"):
            build(kernel(100), 0.1, leaf=0)
        with raises(CurvatureError, match="more than 0 products"):
            build(kernel(300), 0.1).refreshed(kernel(300), 0.1, max_products=0)
        for dtype in (torch.complex128, torch.float16, torch.long):
            with raises(ValueError, match="float32 or float64"):
                build(torch.eye(3, dtype=dtype), 0.1)


class TestBytes:
    @mark.parametrize("rows", [24, 64])
    def test_within_them(self, rows):
        a = kernel(1000)
        h = build(a, max_bytes=8 * 1000 * rows)
        assert h.bytes <= 8 * 1000 * rows
        assert error(h.to_dense(), a) <= {24: 2e-2, 64: 5e-5}[rows]

    def test_low_rank_and_diagonal(self):
        a = 5 * spread(500, 20) + torch.diag(torch.full((500,), 0.01))
        h = build(a, format="lowrank", max_bytes=8 * 512 * 24)
        assert h.bytes <= 8 * 512 * 24 and error(h.to_dense(), a) <= 1e-2 and not h.ranks
        assert h.error == approx(error(h.to_dense(), a), rel=0.35)
        assert error(build(a, 0.05, format="lowrank").to_dense(), a) <= 0.055


CASES = {
    "line": lambda: build(kernel(1000), 1e-8),
    "plane, padded": lambda: build(plane(23), 1e-8, max_products=10**4),
    "low rank and diagonal": lambda: build(plane(20), 0.1, format="lowrank"),
    "dense": lambda: build(kernel(30), 0.1),
    "with a part of low rank": lambda: lifted(build(kernel(300), 1e-8)),
}


def lifted(h: HierarchicalOperator) -> HierarchicalOperator:
    basis, values = h.tree.enter(torch.randn(300, 3)), torch.tensor([2.0, 1.0, -1e-4])
    return HierarchicalOperator(h.tree, h.levels, h.leaves, basis, values)


@mark.parametrize("name", CASES)
def test_factorization(name):
    h, shift = CASES[name](), 0.3
    damped = h.to_dense() + shift * torch.eye(h.shape[0])
    p, inverse, b = h.factor(shift), torch.linalg.inv(damped), torch.randn(h.shape[0], 3)
    assert error(damped @ p.solve(b), b) <= 1e-9
    assert float(p.logdet()) == approx(float(torch.logdet(damped)), rel=1e-9)
    assert error(p.diagonal(), inverse.diagonal()) <= 1e-9
    assert float(p.trace()) == approx(float(inverse.trace()), rel=1e-9)
    dimension = (h.to_dense() @ inverse).trace()
    assert float(p.effective_dimension()) == approx(float(dimension), rel=1e-8)
    assert error(h.diagonal(), h.to_dense().diagonal()) <= 1e-12
    draws = 4000
    values, directions = p.sample(draws), torch.randn(h.shape[0], 5)
    want = (directions * (inverse @ directions)).sum(0)
    seen = (directions.T @ values).square().mean(1)
    assert ((seen - want).abs() <= 5 * want * (2 / draws) ** 0.5).all()


class TestPositive:
    def test_refused_or_compensated(self):
        h = build(kernel(300) - 2 * torch.eye(300), 1e-8)
        with raises(CurvatureError, match="positive definite"):
            h.factor(0.1)
        least = float(torch.linalg.eigvalsh(h.to_dense())[0])
        p = h.factor(0.1, compensate=True)
        assert -least - 0.1 <= p.added <= 1.34 * (-least - 0.1)
        damped = h.to_dense() + (0.1 + p.added) * torch.eye(300)
        assert error(p.to_dense(), torch.linalg.inv(damped)) < 1e-5
        assert h.factor(3.0).added == 0

    def test_a_diagonal_of_zeros(self):
        a = kernel(300).fill_diagonal_(0)
        h = build(Dense(a, symmetric=True), 1e-6)
        least = float(torch.linalg.eigvalsh(a)[0])
        assert -least - 0.1 <= h.factor(0.1, compensate=True).added <= 1.34 * (-least - 0.1)

    def test_what_is_not_finite(self):
        h = build(kernel(300), 1e-2)
        for part in (h.with_parts(h.levels, math.nan * h.leaves), h.with_parts([math.inf * h.levels[0]], h.leaves)):
            with raises(CurvatureError, match="not finite"):
                part.factor(0.1, compensate=True)
        with raises(CurvatureError, match="nan I is not finite"):
            h.factor(math.nan)

    @settings(max_examples=200)
    @given(n=st.integers(20, 90), rank=st.integers(0, 90), kept=st.integers(0, 40), seed=st.integers(0, 10**6))
    def test_compensated_truncation(self, n, rank, kept, seed):
        """A ≤ P ≤ A + 2 slack, so that P + δI is positive definite and a good preconditioner, whatever is left out."""
        torch.manual_seed(seed)
        x = torch.randn(n, rank)
        a, shift = x @ x.T / max(1, rank), 1e-3
        h = build(a, 1e-10, leaf=8, max_products=10**5)
        small = h.compressed(ranks=kept, compensate=True)
        assert sum(small.ranks) <= kept
        gap = torch.linalg.eigvalsh(small.to_dense() - a)
        assert gap[0] >= -1e-8 and gap[-1] <= 2 * small.slack + 1e-8
        root = torch.linalg.cholesky(small.factor(shift).to_dense())
        ratios = torch.linalg.eigvalsh(root.T @ (a + shift * torch.eye(n)) @ root)
        assert ratios[-1] <= 1 + 1e-4 and ratios[0] >= (1 - 1e-4) / (1 + 2 * small.slack / shift)

    def test_preconditions(self):
        a, b, shift = kernel(1000), torch.randn(1000), 1e-3
        p = build(a, max_bytes=8 * 1000 * 64).factor(shift, compensate=True)
        with_it = cg(a, b, damping=shift, preconditioner=p, tolerance=1e-8)
        assert with_it.converged and with_it.steps <= 12 < cg(a, b, damping=shift, tolerance=1e-8).steps / 5


class TestUpdates:
    @fixture
    def a(self):
        return kernel(400)

    def test_low_rank(self, a):
        x, c = torch.randn(400, 3), torch.tensor([1.0, -2.0, 0.5])
        h = build(a, 1e-6)
        more = h.add_low_rank(x, c)
        want = h.to_dense() + (x * c) @ x.T
        assert error(more.to_dense(), want) <= 1e-12
        assert error(more.compressed(1e-12).to_dense(), want) <= 1e-10
        assert error(more.compressed(1e-2).to_dense(), want) <= 1e-2
        assert sum(more.compressed(1e-2).ranks) < sum(more.ranks)

    @mark.parametrize("format", ["lowrank", "adaptive"])
    def test_low_rank_where_there_are_no_levels(self, a, format):
        x, c = torch.randn(400, 3), torch.tensor([1.0, -2.0, 0.5])
        h = build(a, 0.3, format=format)
        assert error(h.add_low_rank(x, c).to_dense(), h.to_dense() + (x * c) @ x.T) <= 1e-12
        with raises(ValueError, match="different formats"):
            h.averaged(build(a, 0.3), 0.5)
        small = build(positive(30), 0.3, format=format, max_products=100)
        assert error(small.add_low_rank(x[:30], c).to_dense(), small.to_dense() + (x[:30] * c) @ x[:30].T) <= 1e-12

    def test_average(self, a):
        old, new = build(a, 1e-6), build(a @ a / 400, 1e-6)
        want = 0.9 * old.to_dense() + 0.1 * new.to_dense()
        assert error(old.averaged(new, 0.9).to_dense(), want) <= 1e-12
        assert error(old.averaged(new, 0.9, tolerance=1e-3).to_dense(), want) <= 1e-3
        assert error(old.averaged(old, -1.0).to_dense(), a) <= 1e-5
        with raises(ValueError, match="different trees"):
            old.averaged(build(a, 1e-3, leaf=16), 0.5)

    def test_still_good(self, a):
        h = build(a, 1e-2)
        same = h.refreshed(a, 1e-2)
        assert same.products == 16 and error(same.to_dense(), h.to_dense()) == 0

    @mark.parametrize("tolerance", [0.05, 1e-2, 1e-4])
    def test_refreshed(self, a, tolerance):
        """From the directions it has, for at most 0.9 of the products of another build."""
        t = torch.linspace(0, 1, 400)
        moved = a + 4 * tolerance * torch.exp(-(t[:, None] - t).abs() / 0.5)
        old, another = build(a, tolerance), build(moved, tolerance)
        new = old.refreshed(moved, tolerance)
        assert error(old.to_dense(), moved) > 1.25 * tolerance >= 1.14 * error(new.to_dense(), moved)
        assert new.products <= 0.9 * another.products and new.error <= tolerance

    def test_only_levels_are_refreshed(self, a):
        for format in ("lowrank", "adaptive"):
            h = build(a, 0.3, format=format)
            assert h.refreshed(a, 0.3).error == approx(h.error, rel=0.35)
            with raises(CurvatureError, match="build it anew"):
                h.refreshed(a @ a, 0.3)

    def test_what_is_dense_is_read_anew(self):
        h = build(Counting(kernel(30)), 0.1).refreshed(Counting(2 * kernel(30)), 0.1)
        assert error(h.to_dense(), 2 * kernel(30)) < 1e-14 and (h.products, h.error) == (30, 0)

    def test_refused(self, a):
        h = build(a, 1e-2)
        for measure in ((0.1, 3), (None, None), (-0.1, None), (None, -1)):
            with raises(ValueError, match="one of"):
                h.compressed(*measure)
        for shapes in ((400,), (300, 2)):
            with raises(ValueError, match="add_low_rank"):
                h.add_low_rank(torch.ones(shapes))
        with raises(ValueError, match="add_low_rank"):
            h.add_low_rank(torch.ones(400, 2), torch.ones(3))
        for other in (kernel(300), a.float()):
            with raises(ValueError, match="refreshed"):
                h.refreshed(other, 1e-2)
        with raises(ValueError, match="tolerance=0"):
            h.refreshed(a, 0.0)

    def test_moved(self, a):
        h = build(a, 1e-2)
        assert (h.to(torch.float32).error, h.to(torch.float32).scale) == (h.error, h.scale)
        assert error(h.add_low_rank(torch.ones(400, 0)).to_dense(), h.to_dense()) == 0


def test_of_a_network():
    model = nn.Sequential(nn.Linear(12, 14), nn.Tanh(), nn.Linear(14, 12))
    x = torch.randn(200, 12)
    g = GaussNewton(model, F.mse_loss, (x, x))
    h = build(g, 0.1, leaf=16, max_products=10**4)
    assert error(h.to_dense(), g.to_dense()) <= 0.11 and h.domain == g.domain
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    torch.testing.assert_close((h @ v)["0.bias"], h.domain.like({}, h @ h.domain.flatten(v))["0.bias"])
    assert h.block("0").shape == (12 * 14 + 14,) * 2
    damped = Dense(h.to_dense() + torch.eye(h.shape[0]))
    assert error(h.inverse(1.0).to_dense(), torch.linalg.inv(damped.matrix)) <= 1e-10
