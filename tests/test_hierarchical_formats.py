"""Every block as what is cheapest, and the choice between formats."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pytest import approx, fixture, mark, raises
from torch import Tensor, nn

from curvext import CurvatureError
from curvext.hierarchical.adaptive import _level, _nodes, _plan
from curvext.hierarchical.tree import ClusterTree
from curvext.operators import Dense, GaussNewton, Hessian, HierarchicalOperator
from curvext.solvers import cg

from .kernels import error, kernel, plane, positive, spread
from .matrices import Counting

pytestmark = mark.usefixtures("float64")
build = HierarchicalOperator.from_operator


def network(kind: type, trained: bool) -> Dense:
    """Curvature of a small autoencoder of random data of rank 4."""
    model = nn.Sequential(nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 12))
    x = torch.randn(100, 4) @ torch.randn(4, 12) / 2
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(200 if trained else 0):
        optimizer.zero_grad()
        F.mse_loss(model(x), x).backward()
        optimizer.step()
    operator = kind(model, F.mse_loss, (x, x))
    a = operator.to_dense()
    return Dense((a + a.T) / 2, operator.domain, symmetric=True)


NETWORKS = {
    "Gauss-Newton": lambda: network(GaussNewton, False),
    "Hessian": lambda: network(Hessian, False),
    "Gauss-Newton, trained": lambda: network(GaussNewton, True),
    "Hessian, trained": lambda: network(Hessian, True),
}


class Entries:
    """Entries alone: no products."""

    def __init__(self, a: Tensor):
        self.a, self.shape, self.dtype, self.device = a, a.shape, a.dtype, a.device

    def entries(self, rows: slice | Tensor, columns: slice | Tensor) -> Tensor:
        return self.a[rows][:, columns]


class TestAdaptive:
    @mark.parametrize("tolerance", [0.3, 1e-2, 1e-4, 1e-10, 1e-12])
    @mark.parametrize("matrix", [lambda: kernel(300), lambda: plane(17), lambda: spread(200, 9)])
    def test_error(self, matrix, tolerance):
        a = matrix()
        h = build(a, tolerance, format="adaptive")
        assert error(h.to_dense(), a) <= 1.001 * tolerance
        assert h.error == approx(error(h.to_dense(), a), rel=1e-5, abs=1e-8) and h.scale == approx(float(a.norm()))

    @mark.parametrize("rows", [3, 16, 60])
    @mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_within_bytes(self, rows, dtype):
        a = plane(20).to(dtype)
        bytes = a.element_size() * 400 * rows
        h = build(a, max_bytes=bytes, format="adaptive")
        assert 0.7 * bytes <= h.bytes <= bytes and h.dtype == dtype
        assert h.error == approx(error(h.to_dense(), a), rel=1e-2, abs=1e-5)

    @mark.parametrize("mu", [1e-6, 1e-4, 1e-3, 1e-2, 0.1])
    def test_no_partition_is_better(self, mu):
        """Against recursion over all of them, block by block."""
        a = kernel(40)[:32, :32] + 0.1 * spread(32, 3)
        plan = _plan([_level(a, nodes) for nodes in _nodes(ClusterTree(32, 4), a.device)], mu)
        assert plan.missing + mu * plan.floats == approx(cheapest(a, mu, True), rel=1e-9)

    @mark.parametrize("rows", [8, 16])
    @mark.parametrize("name", NETWORKS)
    def test_never_much_worse_than_others(self, name, rows):
        a = NETWORKS[name]()
        bytes = 8 * a.shape[0] * rows
        errors = {f: error(build(a, max_bytes=bytes, format=f, max_products=10**4).to_dense(), a.matrix)
                  for f in ("adaptive", "hodlr", "lowrank")}  # fmt: skip
        assert errors["adaptive"] <= 1.12 * min(errors.values())

    def test_a_hessian_at_initialisation(self):
        """Blocks of two layers are of low rank here and there only."""
        a = NETWORKS["Hessian"]()
        errors = [build(a, max_bytes=8 * a.shape[0] * 16, format=f).error for f in ("adaptive", "lowrank")]
        assert errors[0] <= 0.6 * errors[1]

    def test_blocks_end_with_units(self):
        """A weight acts on the layers above through its own unit alone: its block with another unit is of rank one."""
        a = NETWORKS["Hessian"]()
        order, options = ClusterTree(a.domain).permutation, {"max_bytes": 8 * a.shape[0] * 16, "format": "adaptive"}
        assert build(a, **options).error <= 0.8 * build(a, order=order, **options).error

    @fixture
    def h(self):
        return build(plane(20), 1e-3, format="adaptive", order="random")

    def test_as_an_operator(self, h):
        dense = h.to_dense()
        assert error(dense, dense.T) <= 1e-14 and error(h.diagonal(), plane(20).diagonal()) <= 1e-12
        assert float(h.trace()) == approx(float(dense.trace()))
        assert error(h.to(torch.float32).to_dense().double(), dense) <= 1e-6
        assert error(h.averaged(h, 3.0).to_dense(), dense) <= 1e-12
        assert h.to(torch.float32).bytes < 0.6 * h.bytes

    def test_inverse(self, h):
        b, damped = torch.randn(400), h.to_dense() + 0.1 * torch.eye(400)
        assert error(h.inverse(0.1, tolerance=1e-10) @ b, torch.linalg.solve(damped, b)) <= 1e-8
        with raises(CurvatureError, match="format='auto', shift"):
            h.factor(0.1)
        p = build(h, max_bytes=8 * 400 * 40, format="auto", shift=0.1, max_products=1000)
        assert cg(h, b, damping=0.1, preconditioner=p.factor(0.1)).steps < cg(h, b, damping=0.1).steps

    def test_entries_or_products(self):
        a = plane(20)
        read, multiplied = (build(x, 1e-3, format="adaptive") for x in (Entries(a), Counting(a)))
        assert torch.equal(read.to_dense(), multiplied.to_dense())
        assert (read.products, multiplied.products) == (0, 400)
        with raises(CurvatureError, match="400 x 400 entries"):
            build(Counting(a), 1e-3, format="adaptive", max_products=399)

    def test_small_and_empty(self):
        for a in (positive(3), torch.zeros(50, 50), torch.eye(70)):
            assert (build(a, 1e-12, format="adaptive").to_dense() - a).abs().max() <= 1e-11

    def test_refused(self):
        with raises(CurvatureError, match="not symmetric"):
            build(torch.randn(50, 50), 0.1, format="adaptive")
        with raises(CurvatureError, match="finite"):
            build(torch.full((50, 50), math.nan), 0.1, format="adaptive")
        with raises(CurvatureError, match="max_bytes"):
            build(positive(50), format="adaptive", max_bytes=100)
        with raises(CurvatureError, match="above tolerance"):
            build(positive(100), 1e-3, format="adaptive", max_bytes=8 * 100 * 10)


def cheapest(a: Tensor, mu: float, own: bool) -> float:
    """min ‖A - result‖² + μ floats over all partitions; ``own``: on the diagonal, else mirrored."""
    n, sides = len(a), 1 if own else 2
    s2 = sides * torch.linalg.svdvals(a).square()
    low = min(float(s2[k:].sum()) + mu * k * (n * sides + 2) for k in range(n + 1))
    if n == 4:
        return min(low, mu * (n * n + 1))
    b = a.view(2, n // 2, 2, n // 2).transpose(1, 2)
    quarters = [(0, 0), (0, 1), (1, 1)] + ([] if own else [(1, 0)])
    return min(low, sum(cheapest(b[i, j], mu, own and i == j) for i, j in quarters))


def lifted(n: int) -> Tensor:
    """A kernel, and eight directions across the whole that no block can share."""
    q = torch.linalg.qr(torch.randn(n, 8))[0]
    return kernel(n) + n / 10 * (q * torch.linspace(1, 2, 8)) @ q.T


class TestLowRankAndLevels:
    @fixture
    def a(self):
        return lifted(600)

    @fixture
    def h(self, a):
        return build(a, max_bytes=8 * 600 * 48, format="lowrank+hodlr", max_products=2000)

    def test_far_better_than_either(self, a):
        built = {f: build(Counting(a), max_bytes=8 * 600 * 48, format=f, max_products=3000)
                 for f in ("lowrank", "hodlr", "lowrank+hodlr", "auto")}  # fmt: skip
        errors = {f: error(h.to_dense(), a) for f, h in built.items()}
        both = built["lowrank+hodlr"]
        assert errors["lowrank+hodlr"] <= 0.4 * min(errors["lowrank"], errors["hodlr"])
        assert both.bytes <= 8 * 600 * 48 and both.error == approx(errors["lowrank+hodlr"], rel=0.35)
        assert all(built[f].levels and built[f].basis.shape[1] for f in ("lowrank+hodlr", "auto"))

    @mark.parametrize("tolerance", [0.1, 1e-2, 1e-5])
    def test_to_a_tolerance(self, tolerance):
        a = Counting(lifted(600))
        h = build(a, tolerance, format="lowrank+hodlr", max_products=2000)
        assert error(h.to_dense(), a.matrix) <= 1.1 * tolerance and h.products == a.products
        assert h.levels and h.basis.shape[1] >= 8

    def test_the_least_bytes(self, a):
        built = [build(Counting(a), 0.1, format=f, max_products=3000) for f in ("lowrank+hodlr", "lowrank", "hodlr")]
        assert built[0].bytes <= 0.85 * min(h.bytes for h in built[1:])
        assert build(Counting(a), 0.1, format="auto", max_products=3000).bytes <= 1.1 * built[0].bytes

    def test_from_entries(self, a):
        h = build(Dense(a, symmetric=True), 1e-4, format="lowrank+hodlr")
        assert error(h.to_dense(), a) <= 1.1e-4 and h.basis.shape[1] and h.levels

    def test_a_preconditioner(self, a):
        h = build(Counting(a), max_bytes=8 * 600 * 48, format="auto", shift=0.5, max_products=3000)
        assert h.levels and h.basis.shape[1] and h.error < 0.1

    @mark.parametrize("above", [0.1, 100.0])
    def test_factor(self, h, above):
        """Where blocks alone are positive, and where they are not."""
        dense, low = h.to_dense(), h.tree.leave(h.basis)
        blocks = dense - (low * h.values) @ low.T
        shift = above - float(torch.linalg.eigvalsh(dense)[0])
        assert (float(torch.linalg.eigvalsh(blocks)[0]) + shift > 0) == (above == 100.0)
        damped, b = dense + shift * torch.eye(600), torch.randn(600, 3)
        inverse, p = torch.linalg.inv(damped), h.factor(shift)
        assert error(p.solve(b), inverse @ b) <= 1e-8 and error(p.diagonal(), inverse.diagonal()) <= 1e-8
        assert float(p.logdet()) == approx(float(torch.logdet(damped)), rel=1e-8) and p.added == 0
        with raises(CurvatureError, match="positive definite"):
            h.factor(shift - above - 1e-3)
        assert 0.0999 <= h.factor(shift - above - 0.1, compensate=True).added <= 0.134

    def test_updates(self, h):
        x, c, dense = torch.randn(600, 2), torch.tensor([1.0, -2.0]), h.to_dense()
        assert error(h.add_low_rank(x, c).to_dense(), dense + (x * c) @ x.T) <= 1e-12
        assert error(h.averaged(h.add_low_rank(x, c), 0.5).to_dense(), dense + (x * c) @ x.T / 2) <= 1e-12
        assert error(h.averaged(h, 0.5, tolerance=1e-9).to_dense(), dense) <= 1e-9
        small = h.compressed(ranks=5, compensate=True)
        gap = torch.linalg.eigvalsh(small.to_dense() - dense)
        assert sum(small.ranks) == 5 and gap[0] >= -1e-9 and gap[-1] <= 2 * small.slack + 1e-9

    def test_refreshed(self, a):
        h = build(a, 0.05, format="lowrank+hodlr", max_products=2000)
        assert h.refreshed(a, 0.05).products == 16
        moved = a + 20 * spread(600, 3) + kernel(600).square()
        assert error(h.to_dense(), moved) > 0.0625
        new, another = h.refreshed(moved, 0.05, max_products=2000), build(moved, 0.05, format="lowrank+hodlr")
        assert error(new.to_dense(), moved) <= 0.055 and torch.equal(new.basis, h.basis)
        assert new.products < another.products


class TestAuto:
    def test_the_least_error(self):
        local, whole = kernel(500), spread(500, 20)
        assert build(Counting(local), max_bytes=8 * 512 * 40, format="auto").ranks
        assert build(Counting(whole), max_bytes=8 * 512 * 24, format="auto").basis.shape[1] >= 20
        assert build(Counting(local), 1e-3, format="auto").ranks

    def test_adaptive_where_entries_are(self):
        a = NETWORKS["Hessian"]()
        assert build(a, max_bytes=8 * a.shape[0] * 24, format="auto").blocks
        assert not build(Counting(a.matrix), max_bytes=8 * a.shape[0] * 24, format="auto", max_products=999).blocks

    def test_not_all_entries_of_large_matrices(self, monkeypatch):
        a = NETWORKS["Hessian"]()
        monkeypatch.setattr("curvext.hierarchical.build.ENTRIES", a.shape[0] - 1)
        assert not build(a, max_bytes=8 * a.shape[0] * 24, format="auto", max_products=999).blocks

    @mark.parametrize("share", [1e-2, 1e-4])
    @mark.parametrize("name", ["Gauss-Newton", "Gauss-Newton, trained"])
    def test_as_a_preconditioner(self, name, share):
        """Never more than 1.1 times the steps of low rank and a diagonal."""
        a = NETWORKS[name]()
        shift = share * float(torch.linalg.eigvalsh(a.matrix)[-1])
        assert_no_worse(a, shift, 16)

    def test_counts_its_steps(self):
        a = Counting(positive(100) / 100)
        h = build(a, max_bytes=8 * 100 * 8, format="auto", shift=0.02, max_products=200)
        assert h.products == a.products > 200 and 0 < h.error < 1

    def test_one_reason_is_said_once(self):
        with raises(CurvatureError, match=r"^lowrank, nested, hodlr, lowrank\+hodlr, adaptive: .*not symmetric[^;]*$"):
            build(torch.randn(100, 100), 0.1, format="auto")

    def test_shift_is_for_auto(self):
        with raises(ValueError, match="shift"):
            build(kernel(100), 0.1, shift=0.1)


def assert_no_worse(a: Dense, shift: float, rows: int) -> None:
    bytes, b = 8 * a.shape[0] * rows, torch.randn(a.shape[0], 5)
    best = build(a, max_bytes=bytes, format="auto", shift=shift, max_products=10**4)
    other = build(a, max_bytes=bytes, format="lowrank", max_products=10**4)
    steps = [cg(a, b, damping=shift, preconditioner=h.factor(shift, True), tolerance=1e-6).steps for h in (best, other)]
    assert steps[0] <= 1.1 * steps[1] and best.bytes <= bytes and best.error < 1
