"""A memory budget divides the columns of the factor wave, and changes nothing else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peak import peak_bytes
from curvext import (
    EKFAC,
    KFLR,
    KFRA,
    NTK,
    BatchDiagGGNExact,
    BatchGrad,
    CurvatureError,
    DiagGGNExact,
    DiagGGNMC,
    GGNBlock,
    HesScale,
    Jacobian,
    Kronecker,
    SqrtGGNExact,
    SqrtGGNMC,
    extend,
)
from curvext.output import output
from curvext.sweep import Sweep

from .models import MODELS, mlp

pytestmark = pytest.mark.usefixtures("float64")

QUANTITIES = (DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact(), GGNBlock(), KFLR(), BatchGrad(),
              HesScale(ggn="exact"), Jacobian())  # fmt: skip


@pytest.fixture
def sweeps(monkeypatch):
    """How many sweeps ran."""
    entered = []
    enter = Sweep.__enter__
    monkeypatch.setattr(Sweep, "__enter__", lambda self: (entered.append(self), enter(self))[1])
    return entered


def computed(model, loss, *quantities, **options):
    model.zero_grad()
    with extend(model, *quantities, **options) as curvature:
        loss().backward()
    return {field: dict(values) for field, values in curvature.items()}, [p.grad for p in model.parameters()]


def same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0)


@pytest.mark.parametrize("budget", [1, 2000, 10**9])
@pytest.mark.parametrize("name", MODELS)
def test_equal_results(name, budget, sweeps):
    model, loss = MODELS[name]()
    model.eval()
    options = {} if name in ("mlp", "cnn", "residual") else {"samples": 2}
    want = computed(model, loss, *QUANTITIES, **options)
    sweeps.clear()
    same(computed(model, loss, *QUANTITIES, max_memory=budget, **options), want)
    assert (len(sweeps) == 1) == (budget == 10**9), len(sweeps)


def squared(model, x, y):
    return lambda: F.mse_loss(model(x), y)


def logistic(model, x, y):
    return lambda: F.binary_cross_entropy_with_logits(model(x), y.sigmoid())


def dense(model, x, y):
    """Without a closed form for its Hessian."""
    return lambda: (model(x).logsumexp(1) * y.exp().sum(1)).mean()


def penalised(model, x, y):
    return lambda: F.mse_loss(model(x), y) + sum((p**4).sum() for p in model.parameters())


def marked(model, x, y):
    return lambda: (output(model(x)) - y).cosh().mean()


@pytest.mark.parametrize("loss", [squared, logistic, dense, marked, penalised])
def test_losses(loss, sweeps):
    torch.manual_seed(1)
    model = mlp()
    closure = loss(model, torch.randn(4, 4), torch.randn(4, 3))
    quantities = (DiagGGNExact(), GGNBlock()) if loss is penalised else (*QUANTITIES[:4], Jacobian())
    want = computed(model, closure, *quantities)
    sweeps.clear()
    same(computed(model, closure, *quantities, max_memory=1), want)
    assert len(sweeps) == 3


def test_two_losses():
    """Of different numbers of outputs, in the same order."""
    model, x = mlp(), torch.randn(4, 4)
    loss = lambda: model(x).square().mean() + F.cross_entropy(model(x)[:, :2], torch.tensor([0, 1, 1, 0]))  # noqa: E731
    quantities = (*QUANTITIES[:3], Jacobian())
    same(computed(model, loss, *quantities, max_memory=1), computed(model, loss, *quantities))


def test_the_output_itself():
    x, z = torch.randn(4, 2, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    loss = lambda: (z - 1).square().sum() + (x**2).cosh().sum()  # noqa: E731
    results = []
    for options in ({}, {"max_memory": 1}):
        with extend({"x": x, "z": z}, Jacobian(), **options) as curvature:
            loss().backward()
        results.append(dict(curvature.jacobian))
    torch.testing.assert_close(*results)
    assert results[0]["z"].shape == (3, 4, 4, 3)


def test_eigenvectors_that_are_given():
    model, x = mlp(), torch.randn(4, 4)
    closure = squared(model, x, torch.randn(4, 3))
    found, _ = computed(model, closure, KFLR())
    shapes = {name: p.shape for name, p in model.named_parameters()}
    basis = {name: Kronecker(tuple(factors), tuple(shapes[name])).eigh() for name, factors in found["kflr"].items()}
    want, got = (
        computed(model, closure, EKFAC(mc_samples=None, basis=basis), **options)[0]["ekfac"]
        for options in ({}, {"max_memory": 1})
    )
    for name in basis:
        torch.testing.assert_close(got[name].values, want[name].values, rtol=1e-10, atol=1e-13)
    one, _ = computed(model, closure, EKFAC(), max_memory=1)
    assert one["ekfac"].keys() == basis.keys()


def test_random_columns():
    """As many as without a budget, and of the same expectation."""
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3)
    loss = squared(model, x, y)
    got, _ = computed(model, loss, SqrtGGNMC(5), max_memory=1)
    assert got["sqrt_ggn_mc"]["weight"].shape == (5, 6, 3, 4)
    torch.testing.assert_close(got["sqrt_ggn_mc"]["bias"].square().sum(0), torch.full((6, 3), 2 / 18))
    got, _ = computed(model, loss, DiagGGNMC(500), max_memory=10000)
    want, _ = computed(model, loss, DiagGGNExact())
    torch.testing.assert_close(got["diag_ggn_mc"], want["diag_ggn_exact"], rtol=0.05, atol=0.0)


@pytest.mark.parametrize("budget", [1, 10**9])
def test_several_backward_passes_add_up(budget):
    model, (x, y), (u, v) = mlp(), *[(torch.randn(4, 4), torch.randn(4, 3)) for _ in range(2)]
    with extend(model, DiagGGNExact(), SqrtGGNExact(), max_memory=budget):
        squared(model, x, y)().backward()
        squared(model, u, v)().backward()
    got = [(p.diag_ggn_exact, p.sqrt_ggn_exact) for p in model.parameters()]
    with extend(model, DiagGGNExact(), SqrtGGNExact(), samples=8):
        (2 * F.mse_loss(model(torch.cat([x, u])), torch.cat([y, v]))).backward()
    torch.testing.assert_close(got, [(p.diag_ggn_exact, p.sqrt_ggn_exact) for p in model.parameters()])


def test_an_error_in_a_part_leaves_the_gradients():
    model, x = mlp(), torch.randn(4, 4)
    loss = lambda: -model(x).cosh().mean()  # noqa: E731
    with pytest.raises(CurvatureError, match="convex"), extend(model, DiagGGNExact(), max_memory=1):
        loss().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss().backward()
    torch.testing.assert_close(got, [p.grad for p in model.parameters()], rtol=0, atol=0)
    assert not any(hasattr(p, "diag_ggn_exact") for p in model.parameters())


def test_what_is_refused():
    for quantity, why in ((EKFAC(2), "give them as basis="), (KFRA(), "one matrix"), (NTK(), "every other")):
        with pytest.raises(ValueError, match=f"{type(quantity).__name__} needs all columns at once .*{why}"):
            extend(mlp(), quantity, max_memory=1000)
    with pytest.raises(ValueError, match="max_memory must be an integer >= 1, got 0"):
        extend(mlp(), DiagGGNExact(), max_memory=0)


@pytest.mark.parametrize("rule", [True, False])
def test_memory_stays_below_the_budget(rule):
    """A wide output, with weights that have a rule, or none: then every sample's columns are formed."""
    n, outputs, width = 32, 128, 32

    class Gates(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(width))

        def forward(self, x):
            return torch.lerp(x, torch.tanh(x), self.w)

    model = nn.Sequential(nn.Linear(4, width), nn.Tanh() if rule else Gates(), nn.Linear(width, outputs))
    x, y = torch.randn(n, 4), torch.randn(n, outputs)

    def call(**options):
        model.zero_grad()
        with extend(model, DiagGGNExact(), **options):
            squared(model, x, y)().backward()

    def forget():
        for p in model.parameters():
            p.grad = p.diag_ggn_exact = None

    column, least = n * outputs * 8, 1 << 18
    free = peak_bytes(call, forget)
    assert free > outputs * column
    assert peak_bytes(lambda: call(max_memory=8 * column), forget) < 16 * column + least < free / 8
