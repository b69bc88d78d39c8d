"""Newton's equations with preconditioners that are kept for several steps, and by MINRES."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from curvext import CurvatureError
from curvext.optim import (
    DiagonalPreconditioner,
    FisherPreconditioner,
    GaussNewtonCG,
    HessianFree,
    HierarchicalPreconditioner,
    KroneckerPreconditioner,
    Lagged,
    NewtonCG,
)
from curvext.optim.objective import Objective
from curvext.quantities import HesScale
from curvext.solvers import Constant, LevenbergMarquardt, minres

from .optimizers import Net, classified, digits, equal, problem, values

pytestmark = pytest.mark.usefixtures("float64")


def field(n, length=0.01):
    """A kernel on a line: rank one off the diagonal."""
    t = torch.linspace(0, 1, n)
    return torch.exp(-(t[:, None] - t).abs() / length)


class Field:
    """½ pᵀK p - bᵀp, K to be exchanged."""

    def __init__(self, n, length=0.01):
        torch.manual_seed(0)
        self.p, self.K, self.b = nn.Parameter(torch.zeros(n)), field(n, length), torch.randn(n)

    def __call__(self):
        return 0.5 * self.p @ self.K @ self.p - self.b @ self.p


def blocks(n, **settings):
    given = {"max_bytes": 8 * n * 32, "format": "hodlr", "curvature": "hessian", "floor": 0.0, **settings}
    return HierarchicalPreconditioner(**given)


def said(optimizer):
    return optimizer.report.details


def test_damping_is_that_of_the_rule():
    """And none without one, whatever the state_dict was of."""
    model = Net()
    damped, plain = (NewtonCG(model.parameters(), damping=rule) for rule in (LevenbergMarquardt(first=5.0), None))
    damped.step(problem(model))
    plain.load_state_dict(damped.state_dict())
    plain.step(problem(model))
    assert said(plain)["damping"] == 0


def test_a_field_is_solved_in_three_iterations():
    """2048 unknowns, 32 floats for each; and whatever the damping is, without another product."""
    problem = Field(2048)
    damping = LevenbergMarquardt(first=1e-2, drop=0.1)
    optimizer = NewtonCG([problem.p], preconditioner=Lagged(blocks(2048)), tolerance=1e-8, damping=damping)
    for step in range(3):
        optimizer.step(problem)
        assert said(optimizer)["iterations"] <= 3 and said(optimizer)["solver"] == "tolerance"
        assert said(optimizer)["damping"] == pytest.approx(10.0 ** (-2 - step))
        assert said(optimizer)["preconditioner_products"] == (0 if step else optimizer.report.products - 2)
    torch.testing.assert_close(problem.K @ problem.p, problem.b, rtol=1e-3, atol=1e-3)
    plain = Field(2048)
    optimizer = NewtonCG([plain.p], tolerance=1e-8, damping=Constant(1e-3), steps=60)
    optimizer.step(plain)
    assert said(optimizer)["solver"] == "steps"


def test_short_solves_with_a_preconditioner_do_not_start_the_damping_again():
    """Without one, they would tell of a damping that has wound up."""
    problem = Field(100)
    optimizer = NewtonCG([problem.p], preconditioner=Lagged(blocks(100)), damping=LevenbergMarquardt(), lr=0.5)
    optimizer.carried["damping"] = 50.0
    for step in range(4):
        optimizer.step(problem)
        assert said(optimizer)["iterations"] == 1
        assert said(optimizer)["damping"] == pytest.approx(50 * (2 / 3) ** step)


def test_computed_anew_where_the_curvature_is_another():
    """The solver loses more than Â took, then Â is computed, and it is fast again."""
    problem = Field(300)
    optimizer = NewtonCG([problem.p], preconditioner=Lagged(blocks(300), check=99), tolerance=1e-8, steps=900,
                         damping=Constant(1e-3))  # fmt: skip
    optimizer.step(problem)
    took = said(optimizer)["preconditioner_products"]
    assert said(optimizer)["preconditioner"] == "computed" and took > 100 and said(optimizer)["iterations"] <= 2
    problem.K, lost = 2 * field(300, 0.1) + 0.1 * torch.eye(300), 0
    while lost < took:
        optimizer.step(problem)
        lost += said(optimizer)["iterations"] - 1
        assert said(optimizer)["preconditioner_products"] == 0 and said(optimizer)["iterations"] > 10
        problem.p.data.zero_()
    optimizer.step(problem)
    assert said(optimizer)["preconditioner"].startswith("computed anew") and "slow" in said(optimizer)["preconditioner"]
    assert said(optimizer)["preconditioner_products"] >= 116 and said(optimizer)["iterations"] <= 2


def test_slow_for_another_reason():
    """Â is exact and the tolerance is tightened: 16 products show that it need not be computed anew."""
    problem = Field(300)
    rough = Lagged(blocks(300, floor=1.0), check=99)
    optimizer = NewtonCG([problem.p], preconditioner=rough, tolerance=0.3, steps=900, damping=Constant(1e-3))
    optimizer.step(problem)
    optimizer.tolerance = 1e-10
    verified = 0
    while not verified:
        problem.p.data.zero_()
        optimizer.step(problem)
        verified = said(optimizer)["preconditioner_products"]
    assert verified == 16 and "anew" not in said(optimizer)["preconditioner"]
    optimizer.step(problem)
    assert not said(optimizer)["preconditioner_products"]


def test_the_error_is_verified():
    problem = Field(300)
    kept = Lagged(blocks(300, tolerance=0.05), check=2)
    optimizer = NewtonCG([problem.p], preconditioner=kept, damping=Constant(1.0))
    products, texts = [], []
    for share in (0.0, 0.0, 0.04, 0.04, 0.2, 0.2, 0.2):
        problem.K = field(300) + share * field(300).norm() / 300**0.5 * torch.eye(300)
        optimizer.step(problem)
        products.append(said(optimizer)["preconditioner_products"])
        texts.append(said(optimizer)["preconditioner"])
    assert products[1:4] == [0, 16, 0] and products[4] > 100 and products[5:] == [0, 16]
    drift = (problem.K - field(300)).norm() / problem.K.norm() / 0.05
    assert texts[4].startswith("computed anew: 4 steps old, ")
    assert float(texts[4].split()[5]) == pytest.approx(float(drift), rel=0.3)


def point_of(model, **settings):
    with torch.no_grad():
        return Objective(NewtonCG(model.named_parameters(), **settings), problem(model)).point()


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_hierarchical_preconditioner_by_definition(kind):
    point = point_of(Net(), weight_decay=0.7)
    A = point.curvature(kind).to_dense()
    given = HierarchicalPreconditioner(tolerance=1e-8, format="hodlr", curvature=kind)
    approximation, δ = given.approximate(point, 0.0), 1.5
    M = given.inverse(approximation, point.objective, δ).to_dense()
    torch.testing.assert_close(M, torch.linalg.inv(A + δ * torch.eye(len(A))), rtol=1e-6, atol=1e-8)
    moved = point_of(Net(1), weight_decay=0.7)
    error = (moved.curvature(kind).to_dense() - A).norm() / moved.curvature(kind).to_dense().norm()
    assert given.drift(approximation, point) < 1e-6
    assert given.drift(approximation, moved) * max(1e-2, approximation["error"]) == pytest.approx(float(error), rel=0.5)


def test_low_rank_beside_blocks():
    problem = Field(300)
    x = torch.randn(300, 2)
    problem.K = K = problem.K + x @ x.T
    with torch.no_grad():
        point = Objective(NewtonCG([problem.p]), problem).point()
    given = blocks(300, format="lowrank+hodlr", tolerance=1e-8, max_bytes=None, max_products=2000)
    approximation = given.approximate(point, 1.0)
    assert approximation["levels"] and approximation["basis"].shape[1] >= 2
    M = given.inverse(approximation, point.objective, 1.0)
    torch.testing.assert_close(M.to_dense(), torch.linalg.inv(K + torch.eye(300)), rtol=1e-5, atol=1e-6)
    assert given.drift(approximation, point) < 1e-5


def test_the_format_with_the_fewest_iterations():
    """Blocks, for a field, although low rank and a diagonal may have as many bytes."""
    problem = Field(500)
    with torch.no_grad():
        point = Objective(NewtonCG([problem.p]), problem).point()
    given = blocks(500, format="auto", max_products=2000)
    assert given.approximate(point, 1e-3)["levels"]


def test_what_is_not_positive_definite_is_made_so():
    point = point_of(Net())
    assert torch.linalg.eigvalsh(point.curvature("hessian").to_dense())[0] < -1e-3
    M = HierarchicalPreconditioner(curvature="hessian")(point, 0.0).to_dense()
    assert torch.linalg.eigvalsh(M)[0] > 0
    zero = nn.Parameter(torch.zeros(3))
    with torch.no_grad():
        flat = Objective(NewtonCG([zero]), lambda: zero.sum() ** 3).point()
    torch.testing.assert_close(HierarchicalPreconditioner(curvature="hessian")(flat, 0.0).to_dense(), torch.eye(3))


@pytest.mark.parametrize(
    "given", [DiagonalPreconditioner(HesScale()), FisherPreconditioner(), KroneckerPreconditioner()], ids=repr
)
def test_both_parts_together_are_the_preconditioner(given):
    point, moved = point_of(Net(), weight_decay=0.1), point_of(Net(1), weight_decay=0.1)
    kept, _ = Lagged(given).updated(None, point, 0.3)
    kept, text = Lagged(given).updated(kept, moved, 0.3)
    v = torch.randn(len(point.theta))
    there, here = (M * v if M.dim() == 1 else M @ v for M in map(operator, (given(point, 0.3), given(moved, 0.3))))
    now = operator(Lagged(given).inverse(kept, moved.objective, 0.3))
    torch.testing.assert_close(now * v if now.dim() == 1 else now @ v, there)
    assert text == "1 steps old" and not torch.allclose(there, here)


def operator(M):
    return M if isinstance(M, torch.Tensor) else M.to_dense()


KINDS = [
    (NewtonCG, {"curvature": "gauss_newton", "tolerance": 1e-3}),
    (GaussNewtonCG, {"tolerance": 1e-2, "damping": LevenbergMarquardt(first=1e-3)}),
    (HessianFree, {"damping": LevenbergMarquardt(first=1e-3), "decay": 0.0}),
]


def trained(steps):
    """A network on digits, and its data."""
    x, _, y, _ = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    optimizer = GaussNewtonCG(model.parameters(), weight_decay=1e-3)
    for _ in range(steps):
        optimizer.step(classified(model, x[:200], y[:200]))
    return model, x[:200], y[:200]


def test_fewer_iterations_on_digits():
    """One approximation serves all steps."""
    fitted = trained(22)
    for cls, settings in KINDS:
        iterations, after = {}, {}
        for given in (None, "lowrank"):
            model = copy.deepcopy(fitted[0])
            optimizer = cls(model.named_parameters(), preconditioner=given, weight_decay=1e-3, **settings)
            iterations[given] = 0
            for _ in range(4):
                optimizer.step(classified(model, *fitted[1:]))
                iterations[given] += said(optimizer)["iterations"]
            after[given] = optimizer.report.after
        assert iterations["lowrank"] <= 0.75 * iterations[None]
        assert after["lowrank"] == pytest.approx(after[None], rel=3e-2)


def test_resumes_bit_by_bit():
    """A low-rank approximation two steps old, in the order of named parameters, and through a file."""
    model, x, y = trained(2)
    kept = Lagged(HierarchicalPreconditioner(max_bytes=8 * 610 * 60, format="hodlr"), check=5)
    optimizers = [NewtonCG(model.named_parameters(), curvature="gauss_newton", steps=9, preconditioner=kept)]
    for _ in range(3):
        optimizers[0].step(classified(model, x, y))
    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    file.seek(0)
    models = [model, copy.deepcopy(model)]
    optimizers.append(NewtonCG(models[1].named_parameters(), curvature="gauss_newton", steps=9, preconditioner=kept))
    optimizers[1].load_state_dict(torch.load(file))
    for step in range(3, 6):
        for one, its in zip(models, optimizers, strict=True):
            its.step(classified(one, x, y))
        assert equal(*map(values, models)) and optimizers[0].report == optimizers[1].report
        assert said(optimizers[1])["preconditioner"].startswith("computed anew" if step == 5 else f"{step} steps old")


def test_minres_newton_is_newton():
    """Where the Hessian is positive definite, both solvers come to the same end."""
    steps = []
    for solver in ("cg", "minres"):
        problem = Field(60, 0.05)
        NewtonCG([problem.p], solver=solver, tolerance=1e-12).step(problem)
        steps.append(problem.p.detach())
    torch.testing.assert_close(*steps)


def test_minres_on_an_indefinite_hessian():
    """It never ascends, makes use of negative curvature, and ends at a minimum."""
    for given in (None, "kflr", "lowrank"):
        model = Net()
        optimizer = NewtonCG(
            model.parameters(), solver="minres", preconditioner=given, weight_decay=0.02, tolerance=1e-6
        )
        reasons = []
        while optimizer.report is None or said(optimizer)["gradient"] > 1e-8:
            optimizer.step(problem(model))
            assert optimizer.report.after <= optimizer.report.before
            reasons.append(said(optimizer)["solver"])
        assert {"negative curvature", "tolerance"} <= {*reasons} and len(reasons) <= 30


def test_minres_with_a_preconditioner_takes_fewer_products():
    """K - ½ I is indefinite, M positive definite, from K."""
    problem = Field(400)
    with torch.no_grad():
        point = Objective(NewtonCG([problem.p]), problem).point()
    K, M = point.curvature(), blocks(400)(point, 0.0)
    w = torch.linalg.eigvalsh(problem.K - 0.5 * torch.eye(400))
    assert w[0] < -0.3 and (w < 0).sum() > 50
    plain, found = (minres(K, problem.b, damping=-0.5, preconditioner=m, tolerance=1e-8) for m in (None, M))
    assert plain.converged and found.converged and found.steps < 0.7 * plain.steps
    torch.testing.assert_close(K @ found.x - 0.5 * found.x, problem.b, rtol=0, atol=1e-5)


def test_minres_leaves_a_saddle():
    p = nn.Parameter(torch.tensor([1.0, 1e-3]))
    optimizer = NewtonCG([p], solver="minres")
    for _ in range(16):
        optimizer.step(lambda: p[0] ** 2 - p[1] ** 2 + p[1] ** 4)
    torch.testing.assert_close(p.detach().abs(), torch.tensor([0.0, 0.5**0.5]), atol=1e-4, rtol=0)


def test_refused():
    with pytest.raises(TypeError, match="cannot be kept"):
        Lagged(lambda point, damping: None)
    for wrong in ({"growth": 0.5}, {"check": 0}, {"most": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Lagged(KroneckerPreconditioner(), **wrong)
    for settings in ({"solver": "lsmr"}, {"solver": "minres", "negative": "absolute"}):
        with pytest.raises(ValueError, match="solver"):
            NewtonCG(Net().parameters(), **settings)
    with pytest.raises(ValueError, match="adaptive"):
        HierarchicalPreconditioner(format="adaptive")
    with pytest.raises(CurvatureError, match="more than 40 products"):
        NewtonCG(Net().parameters(), preconditioner=HierarchicalPreconditioner(max_products=40)).step(problem(Net()))
    model, negative = Net(), lambda point, damping: -torch.ones(len(point.theta))
    for solver in ("cg", "minres"):
        with pytest.raises(CurvatureError, match="not positive definite"):
            NewtonCG(model.parameters(), preconditioner=negative, solver=solver).step(problem(model))
