"""The Gauss-Newton matrix by stored columns is JᵀBJ of all parameters together, from one pass."""

from __future__ import annotations

import pickle

import torch
import torch.nn.functional as F
from pytest import approx, fixture, mark, raises
from torch import Tensor, nn

from curvext import CurvatureError, GGNFactor, extend
from curvext.operators import FactoredGaussNewton, HierarchicalOperator, Space
from curvext.testing_operators import check_operator

from .models import Attention, Residual, cnn, mlp
from .reference import gauss_newton

pytestmark = mark.usefixtures("float64")


def near(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def factored(model: nn.Module, *losses: Tensor, quantity: GGNFactor = GGNFactor(), **options) -> FactoredGaussNewton:  # noqa: B008
    with extend(model, quantity, **options) as curvature:
        for loss in losses:
            loss.backward()
    return FactoredGaussNewton(curvature.ggn_factor)


class Shared(nn.Module):
    """One layer twice, and one that is used transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(self.a(x))))) @ self.b.weight


def tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def groups() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten())


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2))


CASES = {
    "mlp": lambda: (mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,)), F.cross_entropy),
    "cnn": lambda: (cnn(), torch.randn(4, 2, 6, 6), torch.randint(0, 3, (4,)), F.cross_entropy),
    "groups": lambda: (groups(), torch.randn(2, 4, 3, 3), torch.randn(2, 18), F.mse_loss),
    "words": lambda: (words(), torch.randint(0, 7, (4, 5)), torch.randn(4, 2), F.mse_loss),
    "shared": lambda: (Shared(), torch.randn(5, 3), torch.randn(5, 3), F.mse_loss),
    "attention": lambda: (Attention(), *torch.randint(0, 5, (2, 3, 4)), tokens),
    "tied": lambda: (Attention(tied=True), *torch.randint(0, 5, (2, 3, 4)), tokens),
}


@mark.parametrize("name", CASES)
def test_definition(name):
    model, x, y, loss = CASES[name]()
    operator = factored(model, loss(model(x), y))
    operator.room = 500  # a few at a time
    dense = check_operator(operator)
    near(dense, gauss_newton(lambda: model(x), lambda z: loss(z, y), list(model.parameters())))
    near(operator.diagonal(), dense.diagonal())
    assert float(operator.trace()) == approx(float(dense.trace()))


def test_samples_that_depend_on_each_other():
    model, x, y = Residual(), torch.randn(4, 2, 3, 3), torch.randint(0, 3, (4,))
    operator = factored(model, F.cross_entropy(model(x), y), samples=1)
    want = gauss_newton(lambda: model(x), lambda z: F.cross_entropy(z, y), list(model.parameters()))
    near(check_operator(operator), want)


def test_weights_are_not_formed():
    model, x = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 2)), torch.randn(30, 50)
    operator = factored(model, model(x).square().sum())
    parts = [part for parts in operator.parts for part in parts.values()]
    kept = sum(t.numel() for part in parts for t in vars(part).values() if isinstance(t, Tensor))
    assert kept <= 30 * (50 + 40 + 2 * 2 * 40 + 2 * 2 * 2) and operator.columns == 60


class TestTerms:
    @fixture
    def model(self):
        return mlp()

    @fixture
    def parts(self):
        return [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (3, 5)]

    def test_batches_add_up(self, model, parts):
        x, y = (torch.cat(both) for both in zip(*parts, strict=True))
        operator = factored(model, *(F.cross_entropy(model(x), y, reduction="sum") / 8 for x, y in parts))
        near(operator.to_dense(), factored(model, F.cross_entropy(model(x), y)).to_dense())

    def test_two_heads(self, model, parts):
        (x, y), _ = parts
        both = factored(model, F.cross_entropy(model(x), y) + model(2 * x).square().mean(), samples=3)
        want = [
            factored(model, loss).to_dense() for loss in (F.cross_entropy(model(x), y), model(2 * x).square().mean())
        ]
        near(both.to_dense(), sum(want))

    def test_penalties(self, model, parts):
        (x, y), _ = parts

        def penalty() -> Tensor:
            every = torch.cat([p.flatten() for p in model.parameters()])
            return every.square().sum() + (model[0].weight[0] * model[0].bias[1] - every[:4]).square().sum()

        operator = factored(model, F.cross_entropy(model(x), y) + penalty())
        residuals = [lambda: torch.cat([p.flatten() for p in model.parameters()])]
        residuals += [lambda: model[0].weight[0] * model[0].bias[1] - residuals[0]()[:4]]
        terms = [gauss_newton(r, lambda r: r.square().sum(), list(model.parameters())) for r in residuals]
        near(check_operator(operator), sum(terms) + factored(model, F.cross_entropy(model(x), y)).to_dense())

    def test_few_columns_at_a_time(self, model, parts):
        (x, y), _ = parts
        loss = F.cross_entropy(model(x), y)
        near(
            factored(model, loss, max_memory=1).to_dense(),
            gauss_newton(lambda: model(x), lambda z: F.cross_entropy(z, y), list(model.parameters())),
        )

    def test_draws(self, model, parts):
        (x, y), _ = parts
        many = factored(model, F.cross_entropy(model(x), y), quantity=GGNFactor(mc_samples=4000)).to_dense()
        want = factored(model, F.cross_entropy(model(x), y)).to_dense()
        assert (many - want).norm() <= 0.1 * want.norm()
        with raises(ValueError, match="mc_samples"):
            GGNFactor(mc_samples=0)

    def test_parameters_without_curvature(self, model, parts):
        scale = nn.Parameter(torch.randn(2))
        loss = F.cross_entropy(model(parts[0][0]), parts[0][1]) + scale.sum()
        operator = factored(
            nn.ParameterDict({"scale": scale, **{str(i): p for i, p in enumerate(model.parameters())}}), loss
        )
        assert operator.shape[0] == 2 + sum(p.numel() for p in model.parameters())
        assert not operator.block("scale").to_dense().any() and operator.trace() > 0
        columns = factored_columns(model, F.cross_entropy(model(parts[0][0]), parts[0][1]))
        space = Space({"scale": torch.Size([2]), **{name: p.shape for name, p in model.named_parameters()}})
        near(FactoredGaussNewton(columns, space).to_dense()[2:, 2:], FactoredGaussNewton(columns).to_dense())


def factored_columns(model: nn.Module, loss: Tensor):
    with extend(model, GGNFactor()) as curvature:
        loss.backward()
    return curvature.ggn_factor


def test_no_columns():
    with raises(CurvatureError, match="no columns"):
        FactoredGaussNewton({})


def test_nothing_holds_the_graph():
    model, x = mlp(), torch.randn(4, 4)
    columns = factored_columns(model, model(x).square().sum())
    tensors = [t for c in columns.values() for part in c.parts.values() for t in vars(part).values()]
    assert not any(t.requires_grad for t in tensors if isinstance(t, Tensor))
    pickle.dumps(model)


@mark.parametrize("tolerance", [0.1, 1e-3, 1e-9])
def test_hierarchical_blocks_need_no_more_passes(tolerance):
    passes: list[int] = []
    model, x = (
        nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 7)),
        torch.randn(40, 7),
    )
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    operator = factored(model, F.mse_loss(model(x), x))
    h = HierarchicalOperator.from_operator(operator, tolerance, leaf=8)
    assert len(passes) == 1 and h.products % 16 == 0 and h.products <= 64
    handle.remove()
    dense = gauss_newton(lambda: model(x), lambda z: F.mse_loss(z, x), list(model.parameters()))
    assert (h.to_dense() - dense).norm() <= 1.1 * tolerance * dense.norm()
    assert h.tree.size > h.tree.n and h.tree.permutation is not None  # padded, and in an order of its own
