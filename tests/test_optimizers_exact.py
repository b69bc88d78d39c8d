"""Optimizers against what is known: dense solves, closed forms, other libraries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import KFLR, HesScale, SumGradSquared, extend
from curvext.optim import (
    LBFGS,
    DiagonalPreconditioner,
    FisherPreconditioner,
    GradientDescent,
    KroneckerPreconditioner,
    NewtonCG,
    SaddleFreeNewton,
)
from curvext.optim.lbfgs import two_loops
from curvext.optim.objective import Objective
from curvext.optim.precondition import NAMED
from curvext.optim.saddle_free import _on_span
from curvext.solvers import Armijo, Constant, FullStep, LevenbergMarquardt, StrongWolfe

from .optimizers import Net, problem

pytestmark = pytest.mark.usefixtures("float64")


def spd(n, seed=0, low=-2):
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed)))
    return q @ torch.logspace(low, 0, n).diag() @ q.T


def quadratic(A, b, p):
    return lambda: 0.5 * p @ A @ p - b @ p


def hessian(f, p):
    return torch.autograd.functional.hessian(f, p)


# gradient descent


def test_gradient_descent_by_hand():
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    h = torch.tensor([1.0, 7.0])
    optimizer = GradientDescent([p], weight_decay=1.0)
    for _ in range(3):
        θ, full = p.detach().clone(), h + 1
        g, α = full * θ, 1.0
        while 0.5 * (full * (θ - α * g) ** 2).sum() > 0.5 * (full * θ**2).sum() - 1e-4 * α * g @ g:
            α /= 2
        optimizer.step(lambda: 0.5 * (h * p**2).sum())
        torch.testing.assert_close(p.detach(), θ - α * g, rtol=1e-14, atol=0)
        assert optimizer.report.details["step"] == α < 1


# L-BFGS


def test_two_loops_is_the_inverse_of_bfgs():
    s, y = torch.randn(4, 6), torch.randn(4, 6)
    y = y * (s * y).sum(1, keepdim=True).sign()
    H = torch.eye(6) * (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    for a, b in zip(s, y, strict=True):
        V = torch.eye(6) - torch.outer(b, a) / (a @ b)
        H = V.T @ H @ V + torch.outer(a, a) / (a @ b)
    g = torch.randn(6)
    torch.testing.assert_close(two_loops(g, s, y), H @ g, rtol=1e-10, atol=1e-12)


def test_lbfgs_keeps_pairs_of_positive_curvature_only():
    for search, skips in ((Armijo(), True), (StrongWolfe(), False)):
        p = nn.Parameter(torch.tensor([0.05, 1.0]))
        optimizer = LBFGS([p], memory=4, line_search=search)
        kept = []
        for _ in range(20):
            optimizer.step(lambda p=p: torch.cos(3 * p[0]) + 0.1 * (p**2).sum())
            kept.append(optimizer.report.details["kept"] or optimizer.report.details["gradient"] < 1e-7)
            state = optimizer.state[p]
            if "s" in state:
                assert bool(((state["s"] * state["y"]).sum(1) > 0).all()) and len(state["s"]) <= 4
        assert all(kept) != skips
        assert optimizer.report.details["gradient"] < 1e-5


def test_lbfgs_is_fast_on_a_quadratic():
    A, b = spd(20), torch.randn(20)
    p = nn.Parameter(torch.zeros(20))
    optimizer = LBFGS([p], memory=20, line_search=StrongWolfe())
    for _ in range(60):
        optimizer.step(quadratic(A, b, p))
    torch.testing.assert_close(p.detach(), torch.linalg.solve(A, b), rtol=1e-6, atol=1e-6)


# Newton-CG


def test_newton_solves_a_quadratic_in_one_step():
    A, b = spd(12), torch.randn(12)
    for options in ({}, {"preconditioner": lambda point, δ: 1 / A.diagonal()}):
        p = nn.Parameter(torch.randn(12))
        NewtonCG([p], tolerance=1e-13, steps=60, **options).step(quadratic(A, b, p))
        torch.testing.assert_close(p.detach(), torch.linalg.solve(A, b), rtol=1e-9, atol=1e-9)


def test_newton_never_ascends_and_stays_at_a_saddle():
    for ε in (1e-8, 0.5, 3.0):
        p = nn.Parameter(torch.tensor([1.0, ε]))
        optimizer = NewtonCG([p])
        optimizer.step(lambda p=p: p[0] ** 2 - p[1] ** 2)
        assert optimizer.report.moved and optimizer.report.after < optimizer.report.before
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    optimizer = NewtonCG([p])
    for _ in range(3):
        optimizer.step(lambda: p[0] ** 2 - p[1] ** 2 + p[1] ** 4)
    assert p.detach().tolist() == [0, 0] and optimizer.report.reason == "the gradient is zero"


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_newton_damping_and_ratio(kind):
    """One step, and λ's course, from dense matrices."""
    model = Net()
    closure = problem(model)
    rule = LevenbergMarquardt(first=0.3)
    parameters = list(model.lower.parameters()) + list(model.upper.parameters())
    optimizer = NewtonCG(
        parameters, curvature=kind, damping=rule, tolerance=1e-12, negative="absolute", weight_decay=0.1, lr=0.5
    )
    λ = 0.3
    for _ in range(4):
        θ = torch.nn.utils.parameters_to_vector(parameters).detach()
        A, g, f = dense(closure, parameters, kind)
        A, g, f = A + 0.1 * torch.eye(len(θ)), g + 0.1 * θ, f + 0.05 * θ @ θ
        if kind == "hessian" and torch.linalg.eigvalsh(A)[0] + λ <= 0:
            optimizer.carried["damping"] = λ = 3.0
        optimizer.step(closure)
        d = torch.nn.utils.parameters_to_vector(parameters).detach() - θ
        α = optimizer.report.details["step"]
        torch.testing.assert_close(d, -0.5 * α * torch.linalg.solve(A + λ * torch.eye(len(θ)), g), rtol=1e-6, atol=1e-8)
        ratio = (optimizer.report.after - float(f)) / float(g @ d + 0.5 * d @ A @ d)
        assert optimizer.report.details["ratio"] == pytest.approx(ratio, rel=1e-6)
        assert optimizer.report.details["damping"] == λ
        λ = rule(λ, ratio, step=α)
        assert optimizer.carried["damping"] == pytest.approx(λ)


def dense(closure, parameters, kind):
    loss, z = closure()
    g = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([v.flatten() for v in g])
    if kind == "hessian":
        rows = [torch.autograd.grad(v, parameters, retain_graph=True) for v in flat]
        return torch.stack([torch.cat([r.flatten() for r in row]) for row in rows]), flat.detach(), loss.detach()
    J = [torch.autograd.grad(v, parameters, retain_graph=True) for v in z.flatten()]
    J = torch.stack([torch.cat([r.flatten() for r in row]) for row in J])
    y = torch.arange(12) % 3
    B = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z.view(12, 3), y), z.detach().flatten())
    return J.T @ B @ J, flat.detach(), loss.detach()


def test_curvature_of_the_second_closure():
    p, target = nn.Parameter(torch.randn(5)), torch.randn(5)
    θ = p.detach().clone()
    optimizer = NewtonCG([p], line_search=FullStep(always=True), tolerance=1e-14)
    optimizer.step(lambda: 0.5 * (p - target).square().sum(), lambda: 2.0 * p.square().sum())
    torch.testing.assert_close(p.detach(), θ - (θ - target) / 4)


# preconditioners


def point_of(model, **settings):
    optimizer = NewtonCG(model.parameters(), **settings)
    with torch.no_grad():
        return Objective(optimizer, problem(model)).point()


def test_preconditioners_are_what_they_say():
    model = Net()
    point = point_of(model, weight_decay=0.2)
    with extend(model, HesScale(), KFLR(), SumGradSquared()):
        problem(model)()[0].backward()
    parameters = list(model.parameters())
    zero = torch.zeros(2)

    def flat(name):
        return torch.cat([getattr(p, name, zero).flatten() for p in parameters])

    M = DiagonalPreconditioner(HesScale())(point, 0.1)
    torch.testing.assert_close(M, 1 / (flat("hesscale").abs() + 0.2 + 0.1))
    M = FisherPreconditioner()(point, 0.1)
    torch.testing.assert_close(M, (12 * flat("sum_grad_squared") + 0.2 + 0.1) ** -0.75)
    M = FisherPreconditioner(mean=False, power=1.0)(point, 0.1)
    torch.testing.assert_close(M, 1 / (flat("sum_grad_squared") + 0.2 + 0.1))
    M = KroneckerPreconditioner(pi=False)(point, 0.1)
    start = 0
    for p in parameters:
        n = p.numel()
        v = torch.zeros(sum(q.numel() for q in parameters))
        v[start : start + n] = w = torch.randn(n)
        block = torch.zeros(n, n)
        if hasattr(p, "kflr"):
            block = torch.kron(*p.kflr) if len(p.kflr) == 2 else p.kflr[0]
        expected = torch.linalg.solve(block + 0.3 * torch.eye(n), w)
        torch.testing.assert_close((M @ v)[start : start + n], expected)
        start += n


@pytest.mark.parametrize("name", NAMED)
def test_preconditioners_change_the_way_and_not_the_end(name):
    steps = {}
    ends = {}
    for given in (None, name):
        model = Net()
        optimizer = NewtonCG(
            model.parameters(), curvature="gauss_newton", preconditioner=given, tolerance=1e-11, steps=500,
            weight_decay=1e-4, damping=Constant(1e-3),
        )  # fmt: skip
        optimizer.step(problem(model))
        steps[given], ends[given] = optimizer.report.products, [p.detach() for p in model.parameters()]
    for a, b in zip(ends[None], ends[name], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert steps[name] != steps[None]


def test_an_exact_preconditioner_takes_one_product():
    """One layer and squared error: the Kronecker factors are the matrix."""
    model, target = nn.Linear(6, 3), torch.randn(20, 3)
    x = torch.randn(20, 6) * torch.logspace(-2, 2, 6)
    for given, most in ((None, 400), (KroneckerPreconditioner(pi=False, floor=0.0), 2)):
        nn.init.zeros_(model.weight)
        model.bias.requires_grad_(False)
        optimizer = NewtonCG(model.parameters(), tolerance=1e-10, preconditioner=given, steps=400)
        optimizer.step(lambda: F.mse_loss(model(x), target))
        assert optimizer.report.products <= most and optimizer.report.details["solver"] == "tolerance"
        assert given is not None or optimizer.report.products > 5


class Attentive(nn.Module):
    """A convolution and fused attention, which PyTorch cannot differentiate twice as it is."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv1d(2, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        z = self.conv(x).mT.unsqueeze(1).contiguous()
        return self.out(F.scaled_dot_product_attention(z, z, z).squeeze(1).mean(1))


@pytest.mark.parametrize("given", [None, "hesscale", "kflr"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_attention_and_convolutions(kind, given):
    model, x, y = Attentive(), torch.randn(6, 2, 5), torch.arange(6) % 2
    optimizer = NewtonCG(model.parameters(), curvature=kind, preconditioner=given)

    def closure():
        z = model(x)
        return F.cross_entropy(z, y), z

    for _ in range(3):
        optimizer.step(closure)
        assert optimizer.report.moved


def test_unknown_preconditioner():
    with pytest.raises(ValueError, match="'newton': one of hesscale"):
        NewtonCG(Net().parameters(), preconditioner="newton")


# saddle-free Newton


def absolute(A, λ):
    values, vectors = torch.linalg.eigh(A)
    return vectors @ torch.diag(1 / (values.abs() + λ)) @ vectors.T


@pytest.mark.parametrize(
    "options",
    [
        {"products": 8},
        {"products": 8, "two_passes": True},
        {"products": 8, "momentum": "adaptive"},
        {"method": "series", "terms": 300, "order": 0, "scale": 1.0},
        {"method": "series", "terms": 61, "order": 8, "scale": 1.0},
    ],
    ids=["lanczos", "two passes", "adaptive", "series", "shanks"],
)
def test_saddle_free_step_is_that_of_the_dense_hessian(options):
    q, _ = torch.linalg.qr(torch.randn(8, 8))
    A = q @ torch.tensor([-1.0, -0.8, -0.6, 0.5, 0.6, 0.7, 0.9, 1.0]).diag() @ q.T
    b = torch.randn(8)
    p = nn.Parameter(torch.zeros(8))
    optimizer = SaddleFreeNewton([p], damping=Constant(0.2), line_search=FullStep(always=True), lr=0.5, **options)
    for _ in range(3):
        θ = p.detach().clone()
        optimizer.step(quadratic(A, b, p))
        torch.testing.assert_close(p.detach(), θ - 0.5 * absolute(A, 0.2) @ (A @ θ - b), rtol=1e-7, atol=1e-7)


def test_saddle_free_ratios():
    """Of the undamped model with Lanczos, of the damped one with the series; both from dense matrices."""
    for method in ("lanczos", "series"):
        p = nn.Parameter(torch.tensor([0.4, -0.3, 0.2]))
        rule = LevenbergMarquardt(first=0.5)
        optimizer = SaddleFreeNewton([p], method=method, terms=500, order=0, scale=9.0, damping=rule)

        def f(p):
            return torch.sin(p).prod() + (p**4).sum() - p[0] * p[1]

        for _ in range(3):
            θ = p.detach().clone()
            λ, H = optimizer.carried.get("damping", 0.5), hessian(f, θ)
            g = torch.autograd.functional.jacobian(f, θ)
            optimizer.step(lambda p=p: f(p))
            d = p.detach() - θ
            curvature = H if method == "lanczos" else torch.linalg.inv(absolute(H, λ))
            ratio = float(f(θ + d) - f(θ)) / float(g @ d + 0.5 * d @ curvature @ d)
            assert optimizer.report.details["ratio"] == pytest.approx(ratio, rel=1e-4)
            assert optimizer.carried["damping"] == rule(λ, ratio, step=optimizer.report.details["step"])


def test_scale_of_the_series():
    A = torch.diag(torch.tensor([5.0, 1.0]))
    p = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = SaddleFreeNewton([p], method="series", scale=2.0, scale_decay=0.9, momentum=0.5)
    V = 2.0
    for _ in range(4):
        g = A @ p.detach()
        V = max(0.9 * V, float((A @ A @ g).norm() / g.norm()))
        optimizer.step(quadratic(A, torch.zeros(2), p))
        assert optimizer.carried["scale"] == pytest.approx(V)


def test_adaptive_momentum_is_no_longer_the_identity():
    """The source's rule has (α, μ) = (1, 0) always; this one takes up the step before where u is not exact."""
    A, b = spd(30, low=-4), torch.randn(30)
    ends, rule = [], Constant(1e-3)
    for momentum in (0.0, "adaptive"):
        p = nn.Parameter(torch.zeros(30))
        optimizer = SaddleFreeNewton(
            [p], method="series", terms=5, scale=1.0, momentum=momentum, damping=Constant(1e-3)
        )
        for _ in range(30):
            optimizer.step(quadratic(A, b, p))
        ends.append(optimizer.report.after)
        p = nn.Parameter(torch.zeros(30))
        optimizer = SaddleFreeNewton([p], products=3, momentum=momentum, damping=rule)
        for _ in range(10):
            optimizer.step(quadratic(A, b, p))
        ends.append(optimizer.report.after)
    best = float(-0.5 * b @ torch.linalg.solve(A, b))
    assert ends[2] - best < 0.5 * (ends[0] - best) and ends[3] - best < 0.7 * (ends[1] - best)


def test_the_step_on_a_span():
    A, g = spd(9) - 0.2 * torch.eye(9), torch.randn(9)
    values, vectors = torch.linalg.eigh(A)
    p, κ = _on_span(A, vectors[:, [0, 5]] @ torch.randn(2, 2), g, 0.1)  # invariant: exact
    P = vectors[:, [0, 5]]
    torch.testing.assert_close(p, -P @ ((P.T @ g) / (values[[0, 5]].abs() + 0.1)))
    assert κ == pytest.approx(float(p @ (vectors @ values.abs().diag() @ vectors.T) @ p + 0.1 * p @ p))
    B = torch.randn(9, 2)
    p, κ = _on_span(A, B, g, 0.1)
    assert κ >= float(p @ (vectors @ values.abs().diag() @ vectors.T) @ p + 0.1 * p @ p) and float(g @ p) < 0


def deep_linear(depth=2):
    weights = [nn.Parameter(torch.zeros(3, 3)) for _ in range(depth)]
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(1))
    target = x @ torch.tensor([[1.0, 0.5, 0], [0, -1, 0], [0, 0, 2]])

    def loss():
        z = x
        for w in weights:
            z = z @ w
        return (z - target).square().mean()

    return weights, loss


def monkey():
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    return [p], lambda: p[0] ** 3 - 3 * p[0] * p[1] ** 2 + (p**2).sum() ** 2 / 4


def strict():
    p = nn.Parameter(torch.tensor([1.0, 0.0]))
    return [p], lambda: p[0] ** 2 - p[1] ** 2 + p[1] ** 4


@pytest.mark.parametrize("saddle, lowest", [(deep_linear, 0.1), (monkey, -1.0), (strict, -0.249)])
@pytest.mark.parametrize("method", ["lanczos", "series"])
def test_leaves_saddles_where_newton_does_not(saddle, lowest, method):
    """From the saddle itself, or from its stable manifold (there f = 0)."""
    parameters, loss = saddle()
    newton = NewtonCG(parameters)
    for _ in range(40):
        newton.step(loss)
    stuck = newton.report
    assert stuck.after > -1e-3 and stuck.details["gradient"] < 1e-3
    parameters, loss = saddle()
    rule = LevenbergMarquardt(first=0.1)
    optimizer = SaddleFreeNewton(parameters, method=method, scale=9.0, damping=rule, stationary=1e-4)
    for _ in range(60):
        optimizer.step(loss)
    assert float(loss().detach()) < lowest
    staying = SaddleFreeNewton((found := saddle())[0], stationary=-1.0)
    for _ in range(40):
        staying.step(found[1])
    assert staying.report.after > -1e-3


@pytest.mark.parametrize(
    "wrong",
    [{"method": "exact"}, {"momentum": "nesterov"}, {"momentum": -0.1}, {"products": 0}, {"scale": 0.0},
     {"order": 10}, {"two_passes": True, "momentum": "adaptive"}],
    ids=str,
)  # fmt: skip
def test_saddle_free_refuses(wrong):
    with pytest.raises(ValueError, match="SaddleFreeNewton"):
        SaddleFreeNewton(Net().parameters(), **wrong)


def test_stationary_without_negative_curvature():
    p = nn.Parameter(torch.zeros(3))
    optimizer = SaddleFreeNewton([p])
    optimizer.step(lambda: p.square().sum())
    assert "met no negative curvature" in optimizer.report.reason and not optimizer.report.moved
    with torch.no_grad():
        p += 1e-8
    optimizer.step(lambda: p.square().sum())
    assert optimizer.report.moved and float(p.detach().abs().max()) < 1e-9
