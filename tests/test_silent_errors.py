"""Where peers were found to be silently wrong: each case against its dense definition, sample by sample, in float64.

BackPACK 1.7.1: the input's gradient with quantities used again, ignored targets, padding modes, views between layers,
branches, tied weights, divisors of pooling, dropout at zeros, probability targets, penalties, what an exception leaves
behind. curvlinops 3.0.1 and HEAD: class weights, ignored targets, batches of unequal weight, layers called twice,
circular padding and groups. asdl: Monte-Carlo scaling.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvext import (
    BatchDiagGGNExact,
    BatchGrad,
    BatchL2Grad,
    CurvatureError,
    DiagGGNExact,
    DiagGGNMC,
    GGNBlock,
    HesScale,
    SqrtGGNExact,
    SumGradSquared,
    extend,
)

from .dense import blocks, check, near, sample_gradients
from .reference import hessian, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")

N = 5
Y = torch.tensor([0, 2, 1, 1, 0])


def parts(z: Tensor, **options) -> Tensor:
    return F.cross_entropy(z, Y, reduction="none", **options) / N


def classify(model: nn.Module, x: Tensor) -> None:
    check(model, x, lambda z: F.cross_entropy(z, Y), parts)


class Of(nn.Module):
    """A model written as a function of its layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 3))


# BackPACK


def test_input_requires_a_gradient_and_quantities_are_used_again():
    """The same objects over many steps: nothing of an earlier step, or of the input, is in a later one."""
    model, quantities = mlp(), (DiagGGNExact(), BatchGrad())
    parameters = list(model.parameters())
    for _ in range(6):
        x = torch.randn(N, 4, requires_grad=True)
        with extend(model, *quantities):
            F.cross_entropy(model(x), Y).backward()
        wanted = blocks(lambda x=x: model(x), lambda z: F.cross_entropy(z, Y), parameters)
        gradients = sample_gradients(lambda x=x: parts(model(x)), parameters)
        for p, block, g in zip(parameters, wanted, gradients, strict=True):
            near(p.diag_ggn_exact.flatten(), block.diagonal())
            near(p.grad_batch, g)
        assert x.grad is not None
        assert not hasattr(x, "diag_ggn_exact")


@pytest.mark.parametrize("ignored", [-100, 1])
def test_ignored_targets(ignored):
    y = torch.where(torch.arange(N) % 2 == 0, Y, ignored)
    count = (y != ignored).sum()
    options = {"ignore_index": ignored}
    check(mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, y, **options),
          lambda z: F.cross_entropy(z, y, reduction="none", **options) / count)  # fmt: skip


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_padding_modes(mode):
    convolution = nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode=mode)
    classify(nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), torch.randn(N, 2, 4, 3))


def test_views_between_layers():
    model = Of(lambda m, x: m.b(m.a(x.view(4, N).t())), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    classify(model, torch.randn(4 * N))
    square = Of(lambda m, x: m.b(torch.tanh(m.a(x)).transpose(1, 2)).sum(1), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    classify(square, torch.randn(N, 4, 4))


@pytest.mark.parametrize("first", [False, True])
def test_branches_of_views(first):
    """A transposed view of a square input beside a layer, in either order."""

    def forward(m, x):
        x = m.a(x)
        branches = [lambda: x.transpose(1, 2), lambda: m.b(x)]
        return m.c(sum(branch() for branch in (branches if first else reversed(branches)))).sum(1)

    classify(Of(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3), c=nn.Linear(3, 3)), torch.randn(N, 3, 3))


def test_tied_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    classify(model, torch.randn(N, 4))
    transposed = Of(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t()), a=nn.Linear(3, 4))
    classify(transposed, torch.randn(N, 3))


@pytest.mark.parametrize(
    "options", [{"divisor_override": 3}, {"count_include_pad": False}, {"ceil_mode": True}], ids=str
)
def test_average_pooling(options):
    pool = nn.AvgPool2d(2, stride=2, padding=1, **options)
    classify(nn.Sequential(nn.Conv2d(1, 2, 2), pool, nn.Flatten(), nn.LazyLinear(3)), torch.randn(N, 1, 6, 6))


def test_dropout_of_exact_zeros():
    """The mask is the operation's own, not read off its output."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    with torch.no_grad():
        model[0].weight[:4], model[0].bias[:4] = 0, 0
    x, parameters = torch.randn(N, 4), list(model.parameters())

    def outputs() -> Tensor:
        torch.manual_seed(3)
        return model(x)

    with extend(model, DiagGGNExact()):
        F.cross_entropy(outputs(), Y).backward()
    for p, block in zip(parameters, blocks(outputs, lambda z: F.cross_entropy(z, Y), parameters), strict=True):
        near(p.diag_ggn_exact.flatten(), block.diagonal())


def test_probabilities_that_do_not_sum_to_one():
    y = 2 * torch.rand(N, 3)
    check(mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, y),
          lambda z: F.cross_entropy(z, y, reduction="none") / N)  # fmt: skip


class Unfinished(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("not today")


def test_an_exception_leaves_nothing_behind():
    """Half way down, the next step is right, and no graph is kept alive."""
    model, quantities, x = mlp(), (DiagGGNExact(), BatchGrad()), torch.randn(N, 4)
    broken = Of(lambda m, x: m.model[1:](Unfinished.apply(m.model[0](x))), model=model)
    with pytest.raises(RuntimeError, match="not today"), extend(model, *quantities):
        F.cross_entropy(broken(x), Y).backward()
    assert not any(hasattr(p, field) for p in model.parameters() for field in ("diag_ggn_exact", "grad_batch"))
    model.zero_grad()
    hidden = model[0](x)
    alive = weakref.ref(hidden)
    with extend(model, *quantities):
        F.cross_entropy(model[1:](hidden), Y).backward()
    del hidden
    gc.collect()
    assert alive() is None
    classify(model, x)


# Penalties

STRENGTH = 0.3


def every(model: nn.Module) -> Tensor:
    return torch.cat([p.flatten() for p in model.parameters()])


SQUARES = {
    "p.pow(2).sum()": lambda m: sum(p.pow(2).sum() for p in m.parameters()),
    "(p * p).sum()": lambda m: sum((p * p).sum() for p in m.parameters()),
    "p.square().mean()": lambda m: sum(p.square().mean() for p in m.parameters()),
    "p.norm() ** 2": lambda m: sum(p.norm() ** 2 for p in m.parameters()),
    "vector_norm": lambda m: sum(torch.linalg.vector_norm(p).square() for p in m.parameters()),
    "cat.pow(2).sum()": lambda m: every(m).pow(2).sum(),
    "cat.norm() ** 2": lambda m: every(m).norm() ** 2,
    "parameters_to_vector": lambda m: nn.utils.parameters_to_vector(m.parameters()).square().sum(),
    "distance to an anchor": lambda m: (every(m) - 1).square().sum(),
    "mse": lambda m: sum(F.mse_loss(p, torch.zeros_like(p), reduction="sum") for p in m.parameters()),
    "weighted": lambda m: (torch.arange(3.0).unsqueeze(1) * m[0].weight ** 2).sum(),
    "quartic": lambda m: every(m).pow(4).sum(),
    "cosh": lambda m: every(m).cosh().sum(),
}


@pytest.mark.parametrize("form", SQUARES)
def test_penalties_count(form):
    """A convex term in the weights: its exact Hessian is in the Gauss-Newton quantities that no sample need own."""
    model, x, penalty = mlp(), torch.randn(N, 4), SQUARES[form]
    parameters = list(model.parameters())
    with extend(model, DiagGGNExact(), GGNBlock(), DiagGGNMC(1)):
        (F.cross_entropy(model(x), Y) + STRENGTH * penalty(model)).backward()
    wanted = blocks(lambda: model(x), lambda z: F.cross_entropy(z, Y), parameters)
    for p, block in zip(parameters, wanted, strict=True):
        if form != "weighted" or p is model[0].weight:
            block = block + STRENGTH * hessian(lambda: penalty(model), [p])
        near(p.ggn_block, block)
        near(p.diag_ggn_exact.flatten(), block.diagonal())
        assert (p.diag_ggn_mc > 0).all()


def test_orthogonality_has_its_own_split():
    """|WWᵀ - I|²: Gauss-Newton at WWᵀ - I, the topmost nonlinear operation's input."""
    model, x, eye = mlp(), torch.randn(N, 4), torch.eye(3)
    w = model[0].weight
    with extend(model, GGNBlock(), DiagGGNExact()):
        (F.cross_entropy(model(x), Y) + STRENGTH * (w @ w.T - eye).pow(2).sum()).backward()
    block = blocks(lambda: model(x), lambda z: F.cross_entropy(z, Y), [w])[0]
    block = block + STRENGTH * blocks(lambda: w @ w.T - eye, lambda r: r.pow(2).sum(), [w])[0]
    near(w.ggn_block, block)
    near(w.diag_ggn_exact.flatten(), block.diagonal())


@pytest.mark.parametrize(
    "residual",
    [
        lambda w: torch.cat([w.sin(), 2 * w.exp()]),
        lambda w: torch.cat([w, w.exp()]),
        lambda w: w.flatten().split(5)[1],
        lambda w: torch.cat(w.unbind()[1:]),
        lambda w: torch.stack([a @ b for a, b in zip(w[0].split(2), w[1].split(2), strict=True)]),
    ],
)
def test_penalties_on_parts(residual):
    """A weight that enters in several ways, or in part."""
    model, x = mlp(), torch.randn(N, 4)
    w = model[0].weight
    with extend(model, GGNBlock()):
        (F.cross_entropy(model(x), Y) + STRENGTH * residual(w).pow(2).sum()).backward()
    block = blocks(lambda: model(x), lambda z: F.cross_entropy(z, Y), [w])[0]
    near(w.ggn_block, block + STRENGTH * blocks(lambda: residual(w), lambda r: r.pow(2).sum(), [w])[0])


@pytest.mark.parametrize("form", ["p.pow(2).sum()", "p.norm() ** 2", "cat.pow(2).sum()"])
@pytest.mark.parametrize(
    "quantity", [BatchGrad(), BatchL2Grad(), SumGradSquared(), BatchDiagGGNExact(), SqrtGGNExact()]
)
def test_penalties_belong_to_no_sample(quantity, form):
    """What is asked of single samples is refused, in words, with the gradient kept."""
    model, x, penalty = mlp(), torch.randn(N, 4), SQUARES[form]

    def loss() -> Tensor:
        return F.cross_entropy(model(x), Y) + STRENGTH * penalty(model)

    with pytest.raises(CurvatureError, match="weight_decay"), extend(model, quantity):
        loss().backward()
    for p, g in zip(model.parameters(), torch.autograd.grad(loss(), list(model.parameters())), strict=True):
        assert torch.equal(p.grad, g)
        assert not hasattr(p, quantity.savefield)


# curvlinops and others


def test_class_weights():
    w = torch.tensor([0.5, 1.0, 4.0])
    check(mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, Y, weight=w),
          lambda z: F.cross_entropy(z, Y, weight=w, reduction="none") / w[Y].sum())  # fmt: skip


def test_one_ignored_datum():
    """Its curvature is zero, and so is its gradient; not that of the others."""
    model, x, y = mlp(), torch.randn(2, 4), torch.tensor([-100, 1])
    with extend(model, BatchDiagGGNExact(), BatchGrad()):
        F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        for found in (p.diag_ggn_exact_batch, p.grad_batch):
            assert not found[0].any()
            assert found[1].any()


@pytest.mark.parametrize("options", [{}, {"weight": [0.5, 1.0, 4.0]}, {"ignore_index": 1}], ids=str)
def test_unequal_batches_in_one_block(options):
    """Batches of 4 and 1, divided by what the whole batch is divided by, give what the whole batch gives."""
    model, x = mlp(), torch.randn(N, 4)
    weight = torch.tensor(options.get("weight", [1.0, 1.0, 1.0]))
    options = {**options, "weight": weight}
    total = weight[Y][options.get("ignore_index", -100) != Y].sum()
    with extend(model, DiagGGNExact(), GGNBlock(), SumGradSquared()):
        F.cross_entropy(model(x), Y, **options).backward()
    whole = [(p.diag_ggn_exact, p.ggn_block, p.sum_grad_squared) for p in model.parameters()]
    with extend(model, DiagGGNExact(), GGNBlock(), SumGradSquared()):
        for some in (slice(0, 4), slice(4, 5)):
            (F.cross_entropy(model(x[some]), Y[some], reduction="sum", **options) / total).backward()
    for p, wanted in zip(model.parameters(), whole, strict=True):
        for got, want in zip((p.diag_ggn_exact, p.ggn_block, p.sum_grad_squared), wanted, strict=True):
            near(got, want)


def test_a_layer_called_twice():
    model = Of(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    classify(model, torch.randn(N, 4))
    filters = Of(lambda m, x: m.b(m.a(torch.tanh(m.a(x))).flatten(1)),
                 a=nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), b=nn.Linear(18, 3))  # fmt: skip
    classify(filters, torch.randn(N, 2, 3, 3))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_groups(kind, groups):
    layer = kind(4, 4, 2, stride=2, dilation=1, groups=groups)
    classify(nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)), torch.randn(N, 4, 2, 2))


def test_monte_carlo_does_not_shrink_with_the_number_of_draws():
    model, x = mlp(), torch.randn(N, 4)
    with extend(model, DiagGGNExact(), DiagGGNMC(500), generator=torch.Generator().manual_seed(0)):
        F.cross_entropy(model(x), Y).backward()
    for p in model.parameters():
        assert 0.8 < p.diag_ggn_mc.sum() / p.diag_ggn_exact.sum() < 1.25


# Views of memory that overlaps

STRIDED = {
    "expanded input": lambda x: torch.as_strided(x.expand(2, 3), (2, 3), (0, 1)),
    "expanded input, other strides": lambda x: torch.as_strided(x.unsqueeze(1).expand(3, 2), (5, 2), (0, 1)),
    "windows": lambda x: torch.as_strided(x * 1, (2, 2), (1, 1)),
    "windows of an expanded input": lambda x: torch.as_strided((x * 1).expand(4, 3), (2, 2), (1, 1)),
}


@pytest.mark.parametrize("name", STRIDED)
def test_as_strided(name):
    """PyTorch shares the gradient among entries at one place in memory; what was expanded gets all of it."""
    view, x = STRIDED[name], torch.randn(3, requires_grad=True)
    weights = torch.rand(view(x).shape)

    def loss(x: Tensor) -> Tensor:
        return (weights * view(x) ** 4).sum()

    with extend([x], HesScale(), DiagGGNExact(), GGNBlock(), samples=1) as found:
        loss(x).backward()
    near(found.hesscale["0"], hessian_diagonal(lambda: loss(x), [x])[0])
    near(found.hesscale["0"], torch.autograd.functional.hessian(loss, x.detach()).diagonal())
    near(found.ggn_block["0"], hessian(lambda: loss(x), [x]))
    near(found.diag_ggn_exact["0"], found.hesscale["0"])
