"""Exact Hessian diagonals and block products against dense Hessians, in float64."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import (
    GGNMP,
    HMP,
    PCHMP,
    BatchDiagHessian,
    CurvatureError,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    HesScale,
    bending,
    extend,
    output,
    sources,
)
from curvext.quantities import hessian as hessian_quantities

from .dense import blocks
from .models import Attention, Branches, Residual, cnn, mlp
from .reference import close, computed, hessian, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")

N = 4


class Recurrent(nn.Module):
    """A weight that multiplies what was computed with it."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.cell(torch.tanh(self.cell(x)))))


class Scaled(nn.Module):
    """Nonlinear in a bare parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.temperature = nn.Linear(3, 3), nn.Parameter(torch.rand(3) + 1)

    def forward(self, x):
        return torch.tanh(self.layer(x)) / self.temperature


class Idle(nn.Module):
    """With an expert that no sample is sent to."""

    def __init__(self):
        super().__init__()
        self.layer, self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h, none = torch.tanh(self.layer(x)), torch.zeros(0, dtype=torch.long)
        return self.head(h.index_add(0, none, h[none] * self.expert(h[none])))


class Between(nn.Module):
    """A function between layers, of entries that depend on the same weights."""

    def __init__(self, function):
        super().__init__()
        self.first, self.function, self.last = (
            nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)),
            function,
            nn.Linear(3, 3),
        )

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def _products(h):
    return torch.ones(N, 3).scatter_reduce(1, torch.tensor([[0, 1, 0]]).expand(N, 3), h, "prod")


BY_COLUMNS = {
    "mlp": (mlp, (4,)),
    "gelu": (lambda: mlp(nn.GELU), (4,)),
    "relu": (lambda: mlp(nn.ReLU), (4,)),
    "cnn": (cnn, (2, 6, 6)),
    "residual": (lambda: Residual().eval(), (2, 3, 3)),
    "normalised": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "idle": (Idle, (4,)),
    "grouped": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "normalised inputs": (lambda: nn.Sequential(nn.LayerNorm(4), *mlp()), (4,)),
    "products": (lambda: Between(lambda h: h.cumprod(1)), (4,)),
    "reduced products": (lambda: Between(_products), (4,)),
    "branches": (lambda: Branches().eval(), (2, 4, 4)),
    "gated": (lambda: nn.Sequential(nn.Linear(4, 6), nn.GLU(), nn.Linear(3, 3)), (4,)),
}


class Normalised(nn.Module):
    """A weight that is a function of parameters, where no sample is."""

    def __init__(self):
        super().__init__()
        self.layer, self.mixed = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return torch.tanh(self.layer(x)) @ torch.softmax(self.mixed, 1)


class Interpolated(nn.Module):
    """A product of two functions of one parameter, put together with what holds the samples."""

    def __init__(self):
        super().__init__()
        self.layer, self.angle = nn.Linear(3, 3), nn.Parameter(torch.rand(3))

    def forward(self, x):
        return torch.lerp(self.layer(x), self.angle.sin(), self.angle.cos())


class Spectrum(nn.Module):
    """Complex in between."""

    def __init__(self):
        super().__init__()
        self.window, self.head = nn.Parameter(torch.rand(6)), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.fft.rfft(x * self.window).abs().log1p())


BY_PRODUCTS = {
    "recurrent": (Recurrent, (3,)),
    "scaled": (Scaled, (3,)),
    "normalised weight": (Normalised, (3,)),
    "interpolated": (Interpolated, (3,)),
    "spectrum": (Spectrum, (6,)),
}


def built(entry):
    model, shape = entry[0](), entry[1]
    x, y = torch.randn(N, *shape), torch.randint(0, 3, (N,))
    return model, lambda: F.cross_entropy(model(x), y, reduction="none") / N


def sample_diagonals(model, losses):
    parameters = list(model.parameters())
    rows = [hessian_diagonal(lambda n=n: losses()[n], parameters) for n in range(N)]
    return [torch.stack(row) for row in zip(*rows, strict=True)]


def refuse(*_):
    raise AssertionError("products were taken, or a Hessian formed")


@pytest.fixture
def no_products(monkeypatch):
    monkeypatch.setattr(DiagHessian, "_by_products", refuse)
    monkeypatch.setattr(BatchDiagHessian, "_by_products", refuse)
    monkeypatch.setattr(HMP, "compute", refuse)


@pytest.mark.parametrize("name", BY_COLUMNS)
def test_diagonals_by_columns(name, no_products):
    model, losses = built(BY_COLUMNS[name])
    want = sample_diagonals(model, losses)
    close(computed(DiagHessian(), model, lambda: losses().sum()), [w.sum(0) for w in want])
    close(computed(BatchDiagHessian(), model, lambda: losses().sum()), want)


@pytest.mark.parametrize("quantity", [DiagHessian(), BatchDiagHessian(), HMP(), PCHMP()])
def test_in_piecewise_linear_networks_only_the_loss_bends(quantity, monkeypatch, no_products):
    monkeypatch.setattr(sources, "dense_hessian", refuse)
    model, losses = built(BY_COLUMNS["branches"])
    computed(quantity, model, lambda: losses().sum())


def test_products_where_a_hessian_would_be_too_large(monkeypatch):
    for module in (bending, hessian_quantities):
        monkeypatch.setattr(module, "MOST", 8)
    model, losses = built(BY_PRODUCTS["normalised weight"])
    want = hessian_diagonal(lambda: losses().sum(), list(model.parameters()))
    close(computed(DiagHessian(), model, lambda: losses().sum()), want)


@pytest.mark.parametrize("quantity", [DiagHessian(), BatchDiagHessian(), PCHMP()])
def test_columns_come_with_the_one_backward_pass(quantity):
    model, losses = built(BY_COLUMNS["mlp"])
    passes = []
    model[0].register_forward_hook(lambda module, x, y: y.register_hook(passes.append) and None)
    computed(quantity, model, lambda: losses().sum())
    assert len(passes) == 1


def test_marked_outputs_are_where_the_gauss_newton_matrix_starts_only():
    model, x, y = mlp(), torch.randn(N, 4), torch.randint(0, 3, (N,))
    found = []
    for marked in (output, lambda z: z):
        with extend(model, DiagHessian(), PCHMP(), DiagGGNExact()):
            F.cross_entropy(marked(model(x)), y).backward()
        found.append([value for p in model.parameters() for value in (p.diag_h, p.pchmp(torch.ones(1, *p.shape)))])
    close(*found)


@pytest.mark.parametrize("name", ["mlp", "cnn", "normalised"])
def test_columns_in_parts(name):
    model, losses = built(BY_COLUMNS[name])
    for quantity in (DiagHessian(), BatchDiagHessian()):
        close(*[computed(quantity, model, lambda: losses().sum(), **limit) for limit in ({}, {"max_memory": 1})])


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_diagonals_by_products(name, products):
    model, losses = built(BY_PRODUCTS[name])
    want = sample_diagonals(model, losses)
    close(computed(DiagHessian(products=products), model, lambda: losses().sum()), [w.sum(0) for w in want])
    close(computed(BatchDiagHessian(products=products), model, lambda: losses().sum()), want)


@pytest.mark.parametrize("name", ["mlp", "normalised", "grouped"])
def test_columns_and_products_agree(name):
    model, losses = built(BY_COLUMNS[name])
    for quantity in (DiagHessian, BatchDiagHessian):
        by = [computed(quantity(products=p, chunk=7), model, lambda: losses().sum()) for p in (False, True)]
        close(*by)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, lambda z, y: (z * y).sin().sum()])
def test_other_losses_convex_or_not(loss, no_products):
    model, x, y = mlp(), torch.randn(N, 4), torch.randn(N, 3)
    close(
        computed(DiagHessian(), model, lambda: loss(model(x), y)),
        hessian_diagonal(lambda: loss(model(x), y), list(model.parameters())),
    )


def test_a_fused_loss_has_samples_too():
    """The sum over samples is within the operation."""
    model, x, y = Recurrent(), torch.randn(N, 3), torch.randn(N, 3)
    got = computed(BatchDiagHessian(), model, lambda: F.mse_loss(model(x), y))
    close(got, sample_diagonals(model, lambda: (model(x) - y).square().mean(1) / N))


def test_a_loss_of_terms_of_which_one_is_computed_from_the_other():
    """As label smoothing makes it."""
    model, x, y = Recurrent(), torch.randn(N, 3), torch.randint(0, 3, (N,))
    got = computed(BatchDiagHessian(), model, lambda: F.cross_entropy(model(x), y, label_smoothing=0.3))
    want = lambda: F.cross_entropy(model(x), y, label_smoothing=0.3, reduction="none") / N  # noqa: E731
    close(got, sample_diagonals(model, want))


@pytest.mark.parametrize("tied", [False, True])
def test_tokens(tied):
    model, tokens = Attention(tied=tied), torch.randint(0, 5, (2, 4))
    loss = lambda: F.cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:])  # noqa: E731
    close(computed(DiagHessian(), model, loss), hessian_diagonal(loss, list(model.parameters())))


def test_batches_are_joined():
    model, losses = built(BY_COLUMNS["mlp"])
    want = sample_diagonals(model, losses)
    with extend(model, BatchDiagHessian()):
        losses().sum().backward()
        (2 * losses().sum()).backward()
    close([p.diag_h_batch for p in model.parameters()], [torch.cat([w, 2 * w]) for w in want])


def test_penalties_belong_to_no_sample():
    model, losses = built(BY_COLUMNS["mlp"])
    loss = lambda: losses().sum() + sum(p.square().sum() for p in model.parameters())  # noqa: E731
    close(computed(DiagHessian(), model, loss), hessian_diagonal(loss, list(model.parameters())))
    for products in (False, True):
        with extend(model, BatchDiagHessian(products=products)), pytest.raises(CurvatureError, match="belongs to none"):
            loss().backward()


@pytest.mark.parametrize("samples", [1, 2])
def test_products_count_rows_as_samples(samples):
    model, losses = built(BY_PRODUCTS["recurrent"])
    with extend(model, BatchDiagHessian(), samples=samples), pytest.raises(CurvatureError, match="Leave out samples="):
        losses().sum().backward()


def test_samples_that_depend_on_each_other():
    model, x, y = Residual(), torch.randn(N, 2, 3, 3), torch.randint(0, 3, (N,))
    loss = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    close(computed(DiagHessian(), model, loss), hessian_diagonal(loss, list(model.parameters())))
    with extend(model, BatchDiagHessian()), pytest.raises(CurvatureError, match="mixes the samples"):
        loss().backward()


def split_blocks(matrix, parameters):
    places = [0]
    for p in parameters:
        places.append(places[-1] + p.numel())
    return [matrix[a:b, a:b] for a, b in itertools.pairwise(places)]


def as_matrix(function, p):
    """Its columns are the products with unit vectors."""
    return function(torch.eye(p.numel()).view(-1, *p.shape)).reshape(p.numel(), p.numel()).T


ON_ANY_GRAPH = {**BY_COLUMNS, **BY_PRODUCTS}


@pytest.mark.parametrize("name", ON_ANY_GRAPH)
def test_hessian_products(name):
    model, losses = built(ON_ANY_GRAPH[name])
    parameters = list(model.parameters())
    with extend(model, HMP()):
        losses().sum().backward()
    want = split_blocks(hessian(lambda: losses().sum(), parameters), parameters)
    close([as_matrix(p.hmp, p) for p in parameters], want)


@pytest.mark.parametrize("name", ON_ANY_GRAPH)
def test_gauss_newton_products(name):
    torch.manual_seed(0)
    model, shape = ON_ANY_GRAPH[name][0](), ON_ANY_GRAPH[name][1]
    x, y = torch.randn(N, *shape), torch.randint(0, 3, (N,))
    parameters = list(model.parameters())
    with extend(model, GGNMP()):
        F.cross_entropy(model(x), y).backward()
    want = blocks(lambda: model(x), lambda z: F.cross_entropy(z, y), parameters)
    close([as_matrix(p.ggnmp, p) for p in parameters], want)


def jacobian(function, x):
    return torch.autograd.functional.jacobian(function, x.detach()).reshape(-1, x.numel())


def below(module, x, g, h, modify):
    """Blocks of a module's parameters, and g and h at its input, in Chen et al.'s recursion."""
    found = [
        jacobian(lambda w, name=name: torch.func.functional_call(module, {name: w}, x), p)
        for name, p in module.named_parameters()
    ]
    bend = torch.autograd.functional.hessian(lambda x: (g * module(x)).sum(), x).reshape(x.numel(), -1).diagonal()
    j = jacobian(module, x)
    g = torch.autograd.functional.vjp(module, x, g)[1]
    return [k.T @ h @ k for k in found], g, j.T @ h @ j + torch.diag(modify(bend))


def positive_curvature(model, x, y, modify):
    """Blocks of a chain of linear and elementwise modules under cross entropy."""
    xs = [x]
    for module in model:
        xs.append(module(xs[-1]).detach())
    g = torch.autograd.functional.jacobian(lambda z: F.cross_entropy(z, y), xs[-1])
    h = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, y), xs[-1]).flatten(2).flatten(0, 1)
    found = []
    for module, below_it in zip(reversed(model), reversed(xs[:-1]), strict=True):
        own, g, h = below(module, below_it, g, h, modify)
        found = own + found
    return found


@pytest.mark.parametrize(("modify", "of"), [("clip", lambda b: b.clamp(min=0)), ("abs", torch.abs)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.ReLU])
def test_positive_curvature_products(activation, modify, of):
    model, x, y = mlp(activation), torch.randn(N, 4), torch.randint(0, 3, (N,))
    with extend(model, PCHMP(modify)):
        F.cross_entropy(model(x), y).backward()
    close([as_matrix(p.pchmp, p) for p in model.parameters()], positive_curvature(model, x, y, of))


def test_positive_curvature_products_of_an_unmodified_hessian():
    """Where activations bend upwards only, nothing is modified, and the products are the Hessian's (not BackPACK's)."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1))
    with torch.no_grad():
        model[2].weight.abs_()
    x = torch.randn(N, 4)
    with extend(model, PCHMP("clip"), HMP()):
        (F.softplus(model(x)) + model(x)).mean().backward()
    for p in model.parameters():
        close([as_matrix(p.pchmp, p)], [as_matrix(p.hmp, p)])


@pytest.mark.parametrize("quantity", [GGNMP(), HMP(), PCHMP()])
def test_products_of_several_passes_add_up(quantity):
    model, losses = built(BY_COLUMNS["mlp"])
    vectors = [torch.randn(2, *p.shape) for p in model.parameters()]
    once = computed(quantity, model, lambda: losses().sum())
    with extend(model, quantity) as curvature:
        losses().sum().backward()
        (2 * losses().sum()).backward()
    twice = curvature[quantity.savefield].values()
    close([f(v) for f, v in zip(twice, vectors, strict=True)], [3 * f(v) for f, v in zip(once, vectors, strict=True)])


def test_products_where_the_loss_is_linear_are_zero():
    w = torch.randn(3, 2, requires_grad=True)
    for quantity in (GGNMP(), HMP(), PCHMP()):
        with extend({"w": w}, quantity) as curvature:
            (w * 2).sum().backward()
        assert not curvature[quantity.savefield]["w"](torch.randn(4, 3, 2)).any()


class Halved(torch.autograd.Function):
    """A backward that leaves no graph, as if written in NumPy."""

    forward = staticmethod(lambda ctx, x: x / 2)
    backward = staticmethod(lambda ctx, g: g.detach() / 2)


def test_products_refuse_what_they_cannot_push_a_direction_through():
    w, x, y = torch.randn(3, 4, requires_grad=True), torch.randn(N, 4), torch.randint(0, 3, (N,))
    with extend({"w": w}, GGNMP()):
        F.cross_entropy(Halved.apply(x @ w.T), y).backward()
    with pytest.raises(CurvatureError, match=r"Halved.*tangent rule"):
        w.ggnmp(torch.ones(1, 3, 4))


def test_a_product_where_no_direction_gets_through_is_zero():
    w = torch.randn(3, 4, requires_grad=True)
    with extend({"w": w}, GGNMP()):
        (torch.randn(N, 4) @ w.T).pow(0).square().sum().backward()
    assert not w.ggnmp(torch.ones(1, 3, 4)).any()


def test_a_product_tells_what_is_wrong_with_its_argument():
    model, losses = built(BY_COLUMNS["mlp"])
    with extend(model, GGNMP()):
        losses().sum().backward()
    with pytest.raises(ValueError, match=r"\[V, 5, 4\].*\(5, 4\)"):
        model[0].weight.ggnmp(torch.randn(5, 4))


def test_products_pass_no_hooks_of_the_user():
    model, x, y = mlp(), torch.randn(N, 4), torch.randint(0, 3, (N,))
    first, rest = model[0].weight, model[1:]
    loss = lambda z: F.cross_entropy(z, y)  # noqa: E731
    want = blocks(lambda: model(x), loss, [first])
    h = model[0](x)
    h.retain_grad()
    want += blocks(lambda: rest(h), loss, [h])
    for hooked in (h, first):
        hooked.register_hook(lambda g: 2 * g)
    with extend({"first": first, "h": h}, GGNMP()) as curvature:
        loss(rest(h)).backward()
    gradient = h.grad.clone()
    close([as_matrix(curvature.ggnmp[name], p) for name, p in (("first", first), ("h", h))], want)
    close([h.grad], [gradient])


@pytest.mark.parametrize(("quantity", "name"), [(GGNMP(), "mlp"), (PCHMP(), "mlp"), (HMP(), "mlp"), (HMP(), "scaled")])
def test_no_products(quantity, name):
    model, losses = built(ON_ANY_GRAPH[name])
    for product, p in zip(computed(quantity, model, lambda: losses().sum()), model.parameters(), strict=True):
        assert product(torch.empty(0, *p.shape)).shape == (0, *p.shape)


@pytest.mark.parametrize("quantity", [HMP(), DiagHessian(), BatchDiagHessian(), DiagGGNMC(2)])
def test_parameters_that_this_loss_does_not_depend_on(quantity):
    model, unused, x = mlp(), nn.Linear(2, 2), torch.randn(N, 4)
    parameters = {"used": model[0].weight, "unused": unused.weight}
    with extend(parameters, HesScale(), quantity.only("unused")):
        model(x).square().sum().backward()
    with extend(unused, quantity, max_memory=1), pytest.raises(CurvatureError, match="does not depend on any of"):
        model(x).square().sum().backward()


def test_positive_curvature_is_refused_where_a_weight_meets_itself():
    model, losses = built(BY_PRODUCTS["recurrent"])
    with extend(model, PCHMP()), pytest.raises(CurvatureError, match="same parameter"):
        losses().sum().backward()
    with pytest.raises(ValueError, match="modify"):
        PCHMP("none")


def test_hmp_frees_its_graph_with_the_next_block():
    model, losses = built(BY_COLUMNS["mlp"])
    with extend(model, HMP()):
        losses().sum().backward()
    kept = weakref.ref(model[0].weight.hmp)
    with extend(model, HMP()):
        losses().sum().backward()
    assert kept() is None
