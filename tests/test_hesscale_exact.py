"""Where HesScale is the diagonal of the Hessian (HesScaleGN: of the Gauss-Newton matrix) to rounding, and where not.

Principle: the diagonal of a layer is exact if the Hessian of every sample's loss in the outputs of the next layer is
diagonal, and the layer's own weights are not shared over positions whose cross terms are not zero. Negative facts are
tests too: a reference that agrees with everything would fail them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvext import HesScale, extend
from curvext.testing import EXACT

from .reference import gauss_newton_diagonal, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")

N = 5
FORMS = {"hesscale": HesScale(), "gauss_newton": HesScale(gauss_newton=True)}
ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.ReLU]


def mse(z: Tensor) -> Tensor:
    return F.mse_loss(z, torch.linspace(-1, 1, z.numel()).sin().view_as(z))


def bce(z: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, torch.linspace(0, 1, z.numel()).view_as(z))


def poisson(z: Tensor) -> Tensor:
    return F.poisson_nll_loss(z, torch.arange(z.numel()).remainder(3.0).view_as(z), log_input=True)


def cross_entropy(z: Tensor) -> Tensor:
    z = z.flatten(0, -2) if z.dim() > 2 else z
    return F.cross_entropy(z, torch.arange(len(z)) % z.shape[-1])


LOSSES = [mse, bce, poisson, cross_entropy]


def mlp(*sizes: int, bend: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of these sizes with an activation between them."""
    layers = [nn.Linear(i, o) for i, o in pairwise(sizes)]
    return nn.Sequential(*[module for layer in layers for module in (layer, bend())][:-1])


def orthogonal(model: nn.Sequential, *places: int) -> nn.Sequential:
    for k in places:
        nn.init.orthogonal_(model[k].weight)
    return model


def scaled_permutations(model: nn.Sequential) -> nn.Sequential:
    """Every weight but the first a permutation with scales and signs."""
    for layer in model[2::2]:
        n = layer.in_features
        layer.weight.data = torch.eye(n)[torch.randperm(n)] * torch.randn(n)
    return model


def diagonals(model: nn.Sequential) -> nn.Sequential:
    for layer in model[::2]:
        layer.weight.data = torch.diag(torch.randn(layer.in_features))
    return model


@dataclass
class Fact:
    """A model, its input, its loss, and the first module from which on everything is exact (all before are not)."""

    name: str
    model: Callable[[], nn.Sequential]
    x: Sequence[int]
    loss: Callable[[Tensor], Tensor]
    exact_from: int = 0

    def build(self) -> tuple[nn.Sequential, Tensor]:
        torch.manual_seed(0)
        return self.model(), torch.randn(N, *self.x)


def linear(*sizes: int) -> nn.Sequential:
    return mlp(*sizes, bend=nn.Identity)


def conv(channels: int, kernel: int, *rest: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, channels, kernel), *rest)


def head(inputs: int, *below: nn.Module) -> list[nn.Module]:
    """Activation, and a linear layer on everything that it gives."""
    return [nn.Tanh(), *below, nn.Flatten(), nn.Linear(inputs, 3)]


FACTS = [
    Fact("A1 deep tanh, cross entropy: last layer", lambda: mlp(4, 5, 6, 5, 3), [4], cross_entropy, 6),
    Fact("A1 deep sigmoid, cross entropy: last layer", lambda: mlp(4, 5, 5, 3, bend=nn.Sigmoid), [4], cross_entropy, 4),
    Fact("A2 deep tanh, MSE: last two layers", lambda: mlp(4, 5, 6, 5, 3), [4], mse, 4),
    *[
        Fact(f"B1 one hidden layer, {loss.__name__}, {bend.__name__}", lambda b=bend: mlp(4, 6, 3, bend=b), [4], loss)
        for loss in (mse, bce, poisson)
        for bend in ACTIVATIONS
    ],
    *[
        Fact(f"B2 cross entropy, {b.__name__}", lambda b=b: mlp(4, 6, 3, bend=b), [4], cross_entropy, 2)
        for b in ACTIVATIONS
    ],
    Fact("B3 output activation", lambda: mlp(4, 6, 3).append(nn.Sigmoid()), [4], mse),
    Fact("B4 one output", lambda: mlp(5, 8, 1), [5], bce),
    Fact("B4 one output, another smooth loss", lambda: mlp(5, 8, 1), [5], lambda z: F.softplus(z).mean()),
    Fact("B5 stacked activations", lambda: mlp(4, 6, 3, bend=lambda: nn.Sequential(nn.Tanh(), nn.Sigmoid())), [4], mse),
    Fact("C1 chain of single units", lambda: mlp(3, 1, 1, 1, 1), [3], mse),
    Fact("C2 bottlenecks of one unit", lambda: mlp(5, 6, 1, 1, 4), [5], mse),
    Fact("C2 bottlenecks of one unit, BCE", lambda: mlp(5, 6, 1, 1, 4), [5], bce),
    Fact("C3 bottleneck and cross entropy: last layer", lambda: mlp(5, 6, 1, 4), [5], cross_entropy, 4),
    *[
        Fact(f"{name}, {bend.__name__}, {loss.__name__}", lambda b=bend, f=form: f(mlp(4, 4, 4, 4, bend=b)), [4], loss)
        for name, form in (("D1 diagonal weights", diagonals), ("D2 scaled permutations", scaled_permutations))
        for bend in (nn.Tanh, nn.Sigmoid)
        for loss in (mse, bce)
    ],
    Fact("E1 deep linear net: last two layers", lambda: linear(4, 5, 6, 3), [4], mse, 2),
    Fact("E2 deep linear net, orthogonal weights", lambda: orthogonal(linear(3, 4, 4, 4), 2, 4), [3], mse),
    Fact("E3 two hidden layers, the last weight orthogonal", lambda: orthogonal(mlp(4, 5, 3, 3), 4), [4], mse),
    Fact("E4 three hidden layers, two orthogonal", lambda: orthogonal(mlp(4, 3, 3, 3, 3), 4, 6), [4], mse, 2),
    Fact("G1 convolution", lambda: conv(3, 3), [2, 5, 5], mse),
    Fact("G2 overlapping max pooling", lambda: conv(3, 2, nn.Tanh(), nn.MaxPool2d(3, 2)), [2, 8, 8], mse),
    Fact("G3 kernel of the size of the image", lambda: conv(4, 3, *head(4)), [2, 3, 3], mse),
    Fact("G4 convolution below a layer", lambda: conv(2, 2, *head(18)), [2, 4, 4], mse, 3),
    Fact("G5 convolution, cross entropy", lambda: conv(1, 2, nn.Flatten()), [2, 3, 3], cross_entropy, 9),
    Fact("G6 convolution, average pooling", lambda: conv(2, 2, nn.AvgPool2d(2)), [2, 5, 5], mse, 9),
    Fact(
        "G7 average pooling",
        lambda: nn.Sequential(nn.Linear(3, 32), nn.Unflatten(1, (2, 4, 4)), nn.AvgPool2d(2)),
        [3],
        mse,
    ),
    Fact("H1 tokens", lambda: nn.Sequential(nn.Linear(3, 4)), [6, 3], mse),
    Fact("H2 tokens below a layer", lambda: nn.Sequential(nn.Linear(3, 2), *head(8)), [4, 3], mse, 3),
    Fact("I1 LayerNorm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6)), [4], mse),
    Fact("I2 softmax", lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1)), [4], mse),
]


def computed(form: str, model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    with extend(model, FORMS[form], enumerate_up_to=EXACT) as curvature:
        loss().backward()
    return list(curvature[FORMS[form].savefield].values())


def true(form: str, model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
    if form == "gauss_newton":
        return gauss_newton_diagonal(lambda: model(x), loss, list(model.parameters()))
    return hessian_diagonal(lambda: loss(model(x)), list(model.parameters()))


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return ((got - want).abs().max() / torch.maximum(want.abs().max(), got.abs().max())).item()


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    assert len(got) == len(want) > 0
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact.name)
def test_fact(fact, form):
    model, x = fact.build()
    got, want = computed(form, model, lambda: fact.loss(model(x))), true(form, model, x, fact.loss)
    for (name, _), a, b in zip(model.named_parameters(), got, want, strict=True):
        if int(name.split(".")[0]) >= fact.exact_from:
            assert error(a, b) < 1e-12, f"{name} is not exact"
        else:
            assert error(a, b) > 1e-6, f"{name} is exact"


def test_f1_piecewise_linear_nets():
    """HesScale is HesScaleGN bitwise, the Hessian has the Gauss-Newton diagonal, and nothing is negative."""
    nets = [
        (mlp(4, 6, 5, 3, bend=nn.ReLU), [4]),
        (mlp(4, 6, 3, bend=lambda: nn.LeakyReLU(0.3)), [4]),
        (conv(3, 2, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)), [2, 5, 5]),
    ]
    for model, shape in nets:
        x = torch.randn(N, *shape)
        both = [computed(form, model, lambda m=model, x=x: cross_entropy(m(x))) for form in FORMS]
        assert all(torch.equal(a, b) and (a >= 0).all() for a, b in zip(*both, strict=True))
        assert_equal(*[true(form, model, x, cross_entropy) for form in FORMS])


def test_f1_does_not_hold_for_smooth_nets():
    model, x = mlp(4, 6, 5, 3), torch.randn(N, 4)
    both = [computed(form, model, lambda: cross_entropy(model(x))) for form in FORMS]
    assert all(error(a, b) > 1e-3 for a, b in zip(both[0][:-2], both[1][:-2], strict=True))
    assert any((h < 0).any() for h in both[0])


def test_g5_bias_of_a_convolution_below_cross_entropy():
    """All logits move together, so the loss does not depend on the bias at all; HesScale cannot know."""
    model, x = conv(1, 2, nn.Flatten()), torch.randn(N, 2, 3, 3)
    bias = computed("hesscale", model, lambda: cross_entropy(model(x)))[1]
    assert true("hesscale", model, x, cross_entropy)[1].abs() < 1e-15 and bias > 0.1


def test_j1_error_in_closed_form():
    """One hidden layer and cross entropy: (HS - H)_k = mean f'(a_k)² [(W'p)_k² - ((W∘W)'p²)_k]."""
    model, x = mlp(4, 6, 3), torch.randn(N, 4)
    got, want = computed("hesscale", model, lambda: cross_entropy(model(x))), true("hesscale", model, x, cross_entropy)
    with torch.no_grad():
        w, p, slope = model[2].weight, model(x).softmax(-1), 1 - model[:2](x) ** 2
        e = slope**2 * ((p @ w) ** 2 - p**2 @ w**2) / N
    assert e.abs().max() > 1e-3
    for k, closed in enumerate((e.T @ x**2, e.sum(0))):
        assert ((got[k] - want[k]) - closed).abs().max() < 1e-14


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_j2_batch_is_the_mean_or_sum_of_its_samples(form, reduction):
    model, x, y = mlp(4, 5, 5, 3), torch.randn(N, 4), torch.randint(0, 3, (N,))
    whole = computed(form, model, lambda: F.cross_entropy(model(x), y, reduction=reduction))
    ones = [
        computed(form, model, lambda n=n: F.cross_entropy(model(x[n, None]), y[n, None], reduction=reduction))
        for n in range(N)
    ]
    total = [torch.stack(parts).sum(0) for parts in zip(*ones, strict=True)]
    assert_equal(whole, [t / N if reduction == "mean" else t for t in total])


@pytest.mark.parametrize("form", FORMS)
def test_j3_log_softmax_and_nll_is_cross_entropy_at_every_layer(form):
    model, x, y = mlp(4, 5, 5, 3), torch.randn(N, 4), torch.randint(0, 3, (N,))
    want = computed(form, model, lambda: F.cross_entropy(model(x), y))
    ways = {
        "modules": lambda: nn.NLLLoss()(nn.LogSoftmax(1)(model(x)), y),
        "gather": lambda: -model(x).log_softmax(1).gather(1, y[:, None]).mean(),
        "index": lambda: -model(x).log_softmax(1)[torch.arange(N), y].mean(),
    }
    for way in ways.values():
        assert_equal(computed(form, model, way), want)


@pytest.mark.parametrize("form", FORMS)
def test_j4_rescaling_of_relu_layers(form):
    """W₁ a and W₂ / a are the same function; the diagonals are divided and multiplied by a²."""
    a, x = 3.0, torch.randn(N, 4)
    model = mlp(4, 6, 5, 3, bend=nn.ReLU)
    before = computed(form, model, lambda: cross_entropy(model(x)))
    with torch.no_grad():
        model[0].weight *= a
        model[0].bias *= a
        model[2].weight /= a
    after = computed(form, model, lambda: cross_entropy(model(x)))
    assert_equal(after, [h * factor for h, factor in zip(before, [a**-2, a**-2, a**2, 1, 1, 1], strict=True)])


@pytest.mark.parametrize("form", FORMS)
def test_j5_permutation_of_hidden_units(form):
    model, x, order = mlp(4, 6, 5, 3), torch.randn(N, 4), torch.randperm(6)
    before = computed(form, model, lambda: cross_entropy(model(x)))
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight[order])
        model[0].bias.copy_(model[0].bias[order])
        model[2].weight.copy_(model[2].weight[:, order])
    after = computed(form, model, lambda: cross_entropy(model(x)))
    assert_equal(after, [before[0][order], before[1][order], before[2][:, order], *before[3:]])


@pytest.mark.parametrize("form", FORMS)
def test_j6_one_sample_gives_outer_products(form):
    model, x = mlp(4, 6, 5, 3), torch.randn(1, 4)
    got = computed(form, model, lambda: cross_entropy(model(x)))
    for k in range(3):
        with torch.no_grad():
            below = model[: 2 * k](x)[0]
        assert_equal([got[2 * k]], [torch.outer(got[2 * k + 1], below**2)])


def test_linear_in_gradient_and_diagonal_of_the_output():
    """The loss <g, z> + ½ <h, (z - z₀)²> has gradient g and Hessian diag(h) at z₀: HesScale adds up in (g, h)."""
    model, x = mlp(4, 6, 5, 3), torch.randn(N, 4)
    z0 = model(x).detach()
    (g1, h1), (g2, h2) = torch.randn(2, 2, N, 3)

    def at(form: str, g: Tensor, h: Tensor) -> list[Tensor]:
        def loss() -> Tensor:
            z = model(x)
            return (g * z + h * (z - z0) ** 2 / 2).sum()

        return computed(form, model, loss)

    def combined(first: list[Tensor], second: list[Tensor], factor: float) -> list[Tensor]:
        return [a + factor * b for a, b in zip(first, second, strict=True)]

    zero = torch.zeros_like(g1)
    whole = at("hesscale", g1, h1)
    assert_equal(at("hesscale", g1 + 2 * g2, h1 + 2 * h2), combined(whole, at("hesscale", g2, h2), 2))
    assert_equal(combined(at("hesscale", g1, zero), at("hesscale", zero, h1), 1), whole)
    assert_equal(at("gauss_newton", g1, h1), at("hesscale", zero, h1))
    residual = combined(whole, at("gauss_newton", g1, h1), -1)
    assert_equal(residual[:-2], at("hesscale", g1, zero)[:-2])  # the last layer has none
    assert all(r.abs().max() < 1e-15 for r in residual[-2:])


REPAIRED = [
    Fact("K1 one hidden layer", lambda: mlp(4, 6, 3), [4], cross_entropy),
    Fact("K1 one hidden layer, MSE", lambda: mlp(4, 6, 3), [4], mse),
    Fact("K2 two hidden layers", lambda: mlp(4, 5, 6, 3), [4], cross_entropy),
    Fact("K2 two hidden layers, softplus, Poisson", lambda: mlp(4, 5, 6, 3, bend=nn.Softplus), [4], poisson),
    Fact("K4 convolution and head", lambda: conv(2, 2, *head(18)), [2, 4, 4], cross_entropy),
    Fact("K5 with max pooling", lambda: conv(2, 2, *head(8, nn.MaxPool2d(2))), [2, 5, 5], cross_entropy),
    Fact("K9 tokens", lambda: nn.Sequential(nn.Linear(3, 2), *head(8)), [4, 3], cross_entropy),
    Fact("K three hidden layers: not the first", lambda: mlp(4, 5, 6, 5, 3), [4], cross_entropy, 2),
    Fact(
        "K two convolutions: not the first",
        lambda: conv(2, 2, nn.Tanh(), nn.Conv2d(2, 2, 2), *head(8)),
        [2, 4, 4],
        cross_entropy,
        2,
    ),
]


@pytest.mark.parametrize("fact", REPAIRED, ids=lambda fact: fact.name)
def test_k_exact_gauss_newton_part(fact):
    """GGN + (HesScale - HesScaleGN): the error of the Gauss-Newton part goes away, that of the residual stays."""
    model, x = fact.build()
    parts = [computed(form, model, lambda: fact.loss(model(x))) for form in FORMS]
    ggn, want = true("gauss_newton", model, x, fact.loss), true("hesscale", model, x, fact.loss)
    for (name, _), g, hs, hsgn, h in zip(model.named_parameters(), ggn, *parts, want, strict=True):
        if int(name.split(".")[0]) >= fact.exact_from:
            assert error(g + hs - hsgn, h) < 1e-12, f"{name} is not exact"
        else:
            assert error(g + hs - hsgn, h) > 1e-6, f"{name} is exact"


def test_k_is_closer_than_hesscale_where_it_is_not_exact():
    model, x = mlp(4, 5, 6, 5, 3), torch.randn(N, 4)
    hs, hsgn = (computed(form, model, lambda: cross_entropy(model(x))) for form in FORMS)
    ggn, want = (true(form, model, x, cross_entropy) for form in ("gauss_newton", "hesscale"))
    repaired = [g + a - b for g, a, b in zip(ggn, hs, hsgn, strict=True)]

    def distance(estimate: list[Tensor]) -> float:
        return sum((a - b).abs().sum().item() for a, b in zip(estimate, want, strict=True))

    assert distance(repaired) < distance(hs) / 2 < distance(ggn) / 4
