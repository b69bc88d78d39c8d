"""Every operator does what an operator promises, and is the matrix it is said to be."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
import torch.nn.functional as F
from pytest import fixture, mark, raises
from torch import Tensor, nn

import curvext
from curvext import CurvatureError
from curvext.operators import (
    BlockDiagonal,
    Dense,
    Diagonal,
    EmpiricalFisher,
    Fisher,
    GaussNewton,
    Hessian,
    HierarchicalOperator,
    Identity,
    Jacobian,
    Kronecker,
    KroneckerBlock,
    LowRank,
    Operator,
    Residual,
    Space,
)
from curvext.testing_operators import check_operator

from .models import Attention, cnn, mlp
from .models import Residual as ResidualNet
from .reference import _jacobian, gauss_newton, hessian

pytestmark = mark.usefixtures("float64")
SPACE = Space({"a": torch.Size([2, 3]), "b": torch.Size([3]), "c": torch.Size([])})


def near(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert (got - want).abs().max() <= tolerance * want.abs().max()


def positive(n: int) -> Tensor:
    a = torch.randn(n, n)
    return a @ a.T + torch.eye(n)


def small() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    return mlp(), (torch.randn(6, 4), torch.randint(0, 3, (6,)))


def curvature(kind: type, **options) -> Operator:
    model, data = small()
    return kind(model, nn.CrossEntropyLoss(), data, **options)


def jacobian(**options) -> Operator:
    model, data = small()
    return Jacobian(model, data, **options)


def kronecker(m: int, n: int) -> Operator:
    return Kronecker(torch.randn(m, n), torch.randn(n, m), symmetric=False)


def hierarchical(**options) -> Operator:
    return HierarchicalOperator.from_operator(Dense(positive(10), SPACE, symmetric=True), 1e-12, **options)


STRUCTURED = {
    "identity": lambda: Identity(10, space=SPACE),
    "diagonal": lambda: Diagonal(torch.rand(10) + 1, SPACE),
    "dense": lambda: Dense(positive(10), SPACE, symmetric=True),
    "dense, rectangular": lambda: Dense(torch.randn(4, 7)),
    "low rank": lambda: LowRank(torch.randn(10, 3), torch.tensor([2.0, -1.0, 0.5]), SPACE),
    "Kronecker": lambda: Kronecker(positive(2), positive(5), space=SPACE),
    "Kronecker, rectangular": lambda: kronecker(3, 2),
    "Kronecker, three": lambda: Kronecker(positive(2), positive(3), positive(2)),
    "Kronecker, in groups": lambda: KroneckerBlock(curvext.Kronecker([torch.stack([positive(2)] * 2), positive(3)])),
    "hierarchical": lambda: hierarchical(leaf=2, max_products=1000),
    "hierarchical, nested": lambda: hierarchical(format="nested", leaf=2, max_products=1000),
    "hierarchical, both": lambda: hierarchical(format="lowrank+hodlr", leaf=2, max_products=1000),
    "hierarchical, adaptive": lambda: hierarchical(format="adaptive", leaf=2),
    "block diagonal": lambda: BlockDiagonal([Kronecker(positive(2), positive(3)), Dense(positive(4))], SPACE),
    "block diagonal, by name": lambda: BlockDiagonal({"w": Kronecker(positive(2), positive(3)), "b": Identity(2)}),
}
CURVATURE = {
    "Hessian": lambda: curvature(Hessian),
    "Hessian, column by column": lambda: curvature(Hessian, memory=1),
    "Gauss-Newton": lambda: curvature(GaussNewton),
    "residual": lambda: curvature(Residual),
    "Fisher": lambda: curvature(Fisher),
    "Fisher, drawn": lambda: curvature(Fisher, mc_samples=2),
    "empirical Fisher": lambda: curvature(EmpiricalFisher),
    "Jacobian": jacobian,
    "of some parameters": lambda: curvature(Hessian, only="*.bias"),
}
DERIVED = {
    "low rank and diagonal": lambda: hierarchical(format="lowrank", max_products=1000),
    "factored inverse": lambda: hierarchical(leaf=2, max_products=1000).factor(0.3),
    "sum": lambda: STRUCTURED["diagonal"]() + 2 * STRUCTURED["dense"]() - STRUCTURED["low rank"](),
    "product": lambda: STRUCTURED["diagonal"]() @ STRUCTURED["dense"](),
    "adjoint": lambda: jacobian().T,
    "kernel": lambda: (j := jacobian()) @ j.T,
    "Gauss-Newton of the Jacobian": lambda: (j := jacobian()).T @ j / 3,
    "block": lambda: curvature(Hessian).block("0"),
    "block of some parameters": lambda: Dense(positive(10), SPACE, symmetric=True).block("[ab]"),
    "block off the diagonal": lambda: curvature(Hessian).block("*.weight", ["0.bias", "4"]),
    "converted": lambda: STRUCTURED["dense"]().to(torch.float32).to(torch.float64),
    "inverse": lambda: STRUCTURED["dense"]().inverse(0.3),
    "inverse by a solver": lambda: curvature(GaussNewton).inverse(0.1, solve),
    "inverse of a product": lambda: (STRUCTURED["Kronecker"]() @ STRUCTURED["diagonal"]()).inverse(solver=solve),
}
ALL = STRUCTURED | CURVATURE | DERIVED


def solve(operator: Operator, b: Tensor) -> Tensor:
    return torch.linalg.solve(operator.to_dense(), b)


@mark.parametrize("name", ALL)
def test_conformance(name):
    tolerance = 1e-5 if name == "converted" else 1e-9
    check_operator(ALL[name](), rtol=tolerance, atol=tolerance)


class TestStructured:
    def test_entries(self):
        d, u, c = torch.randn(4), torch.randn(4, 2), torch.randn(2)
        a, b = torch.randn(2, 3), torch.randn(3, 2)
        near(Diagonal(d).to_dense(), torch.diag(d))
        near(LowRank(u, c).to_dense(), u @ torch.diag(c) @ u.T)
        near(LowRank(u).to_dense(), u @ u.T)
        near(Kronecker(a, b, symmetric=False).to_dense(), torch.kron(a, b))
        near(BlockDiagonal([Dense(a), Dense(b)]).to_dense(), torch.block_diag(a, b))
        near(Identity(3).to_dense(), torch.eye(3))

    def test_kronecker_is_a_map_of_weights(self):
        g, a, w = positive(2), positive(3), torch.randn(2, 3)
        near((Kronecker(g, a) @ w.flatten()).view(2, 3), g @ w @ a.T)

    @mark.parametrize("name", [n for n in STRUCTURED if "rectangular" not in n])
    @mark.parametrize("damping", [0.0, 0.7])
    def test_inverse(self, name, damping):
        operator = STRUCTURED[name]()
        if name == "low rank" and not damping:
            with raises(CurvatureError, match="damping"):
                operator.inverse()
            return
        n = len(operator.to_dense())
        inverse = operator.inverse(damping)
        near(inverse.to_dense(), torch.linalg.inv(operator.to_dense() + damping * torch.eye(n)), 1e-9)
        assert inverse.symmetric or isinstance(operator, BlockDiagonal)

    def test_singular(self):
        with raises(CurvatureError, match="damping"):
            Diagonal(torch.tensor([1.0, 0.0])).inverse()
        with raises(CurvatureError, match="damping"):
            Kronecker(torch.diag(torch.tensor([1.0, -1.0])), positive(2)).inverse(1e-3)

    def test_diagonal_of_parameters(self):
        operator = Diagonal({"w": torch.ones(2, 3), "b": 2 * torch.ones(3)})
        product = operator @ {"w": torch.ones(2, 3), "b": torch.ones(3)}
        assert product["b"].tolist() == [2, 2, 2] and product["w"].shape == (2, 3)

    def test_what_does_not_fit(self):
        with raises(ValueError, match="shape"):
            Identity(3) + Identity(4)
        with raises(ValueError, match="shape"):
            Dense(torch.ones(2, 3)) @ Dense(torch.ones(2, 3))
        with raises(ValueError, match="float32"):
            Identity(3) + Identity(3, torch.float32)
        with raises(TypeError, match="A @ B"):
            Identity(3) * Identity(3)
        with raises(TypeError, match="parameters"):
            Identity(3) @ {"a": torch.ones(3)}
        with raises(ValueError, match="2 dimensions"):
            Dense(torch.ones(3))
        with raises(ValueError, match="entries"):
            Diagonal(torch.ones(3), SPACE)
        with raises(ValueError, match="not square"):
            BlockDiagonal({"a": Dense(torch.ones(2, 3))})


class TestBlocks:
    def test_entries(self):
        operator = Dense(torch.randn(10, 10), SPACE)
        a = operator.to_dense()
        near(operator.block(["a", "c"]).to_dense(), a[[*range(6), 9]][:, [*range(6), 9]])
        near(operator.block("b", "a").to_dense(), a[6:9, :6])

    def test_in_the_form_of_parameters(self):
        block = Dense(torch.randn(10, 10), SPACE).block("b", "a")
        assert (block @ {"a": torch.ones(2, 3)})["b"].shape == (3,)

    def test_of_curvature(self):
        for kind in (Hessian, EmpiricalFisher):
            operator = curvature(kind)
            dense, (_, places) = operator.to_dense(), operator.domain.part(["0", "4.bias"])
            near(operator.block(["0", "4.bias"]).to_dense(), dense[places][:, places])
            near(operator.block("4", "0").to_dense(), dense[-21:, :25])
            near(operator.to_dense(), dense)

    def test_no_match(self):
        with raises(ValueError, match="matches"):
            Dense(torch.randn(10, 10), SPACE).block("d")
        with raises(TypeError, match="parameters"):
            Identity(3).block("a")


class TestForms:
    def test_refused(self):
        operator = Identity(10, space=SPACE)
        good = SPACE.like({}, torch.randn(10))
        for wrong in ({"a": good["a"]}, list(good.values())[:2], {**good, "b": torch.ones(4)}, "a"):
            with raises(ValueError, match="expected"):
                operator @ wrong


class NotConverged:
    x, converged = torch.ones(10), False


class TestInverse:
    def test_by_name(self):
        g, b = curvature(GaussNewton), torch.randn(4 * 5 + 5 + 36 + 21)
        want = torch.linalg.solve(g.to_dense() + 0.1 * torch.eye(len(b)), b)
        near(g.inverse(0.1, tolerance=1e-12) @ b, want)
        near(g.inverse(0.1, solver="minres", tolerance=1e-12) @ b, want)
        with raises(ValueError, match="has no 'none'"):
            g.inverse(0.1, solver="none")
        with raises(CurvatureError, match="did not converge"):
            g.inverse(0.1, steps=1) @ b

    def test_without_convergence_there_is_none(self):
        inverse = DERIVED["sum"]().inverse(solver=lambda operator, b: NotConverged)
        with raises(CurvatureError, match="did not converge"):
            inverse @ torch.ones(10)

    def test_options_reach_the_solver(self):
        seen = []

        def solver(operator, b, steps):
            seen.append(steps)
            return b

        (STRUCTURED["dense"]() + STRUCTURED["diagonal"]()).inverse(solver=solver, steps=3) @ torch.ones(10)
        assert seen == [3]

    def test_rectangular(self):
        with raises(ValueError, match="inverse"):
            jacobian().inverse()


class LSTM(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def tokens(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def labels(n: int) -> Tensor:
    return torch.randint(0, 3, (n,))


ARCHITECTURES = {
    "mlp": lambda: (mlp(), torch.randn(6, 4), labels(6), F.cross_entropy),
    "cnn": lambda: (cnn(), torch.randn(6, 2, 6, 6), labels(6), nn.CrossEntropyLoss(label_smoothing=0.1)),
    "lstm": lambda: (LSTM(), torch.randn(6, 3, 2), labels(6), F.cross_entropy),
    "attention, tied": lambda: (Attention(tied=True), *torch.randint(0, 5, (2, 6, 3)), tokens),
    "batch normalisation": lambda: (ResidualNet(), torch.randn(6, 2, 3, 3), labels(6), F.cross_entropy),
    "squared error": lambda: (mlp(), torch.randn(6, 4), torch.randn(6, 3), nn.MSELoss()),
}


@mark.parametrize("name", ARCHITECTURES)
def test_dense_matrices(name):
    model, x, y, loss = ARCHITECTURES[name]()
    parameters = list(model.parameters())
    h = hessian(lambda: loss(model(x), y), parameters)
    g = gauss_newton(lambda: model(x), lambda z: loss(z, y), parameters)
    near(Hessian(model, loss, (x, y)).to_dense(), h)
    near(GaussNewton(model, loss, (x, y)).to_dense(), g)
    near(Fisher(model, loss, (x, y)).to_dense(), g)
    near(Residual(model, loss, (x, y)).to_dense(), h - g)
    near(Jacobian(model, x).to_dense(), _jacobian(model(x).flatten(), parameters))
    near(Hessian.of(lambda: loss(model(x), y), model).to_dense(), h)
    near(GaussNewton.of(lambda: (loss(z := model(x), y), z), parameters).to_dense(), g)


@mark.parametrize("name", ["mlp", "attention, tied", "squared error"])
def test_fishers_by_sample(name):
    model, x, y, loss = ARCHITECTURES[name]()
    parameters = list(model.parameters())
    options = {"reduction": "mean"} if loss is tokens else {}
    g = gauss_newton(lambda: model(x), lambda z: loss(z, y), parameters)
    drawn = Fisher(model, loss, [(x[:4], y[:4]), (x[4:], y[4:])], mc_samples=4000, **options).to_dense()
    assert (drawn - g).norm() < 0.1 * g.norm()
    factor = 1 if name != "squared error" else 3  # its mean is over entries
    rows = [torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]) * factor, parameters) for i in range(len(x))]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    near(EmpiricalFisher(model, loss, (x, y), **options).to_dense(), flat.T @ flat / (len(x) * factor))


def test_draws_stay():
    model, (x, y) = small()
    fisher = Fisher(model, nn.CrossEntropyLoss(), [(x[:4], y[:4]), (x[4:], y[4:])], mc_samples=1)
    v = torch.randn(fisher.shape[0])
    assert torch.equal(fisher @ v, fisher @ v)
    other = Fisher(model, nn.CrossEntropyLoss(), (x, y), mc_samples=1, seed=1)
    assert not torch.allclose(fisher @ v, other @ v)


class TestPiecewiseLinear:
    """ReLU networks without normalisation: no curvature of their own in any one parameter."""

    @fixture
    def relu(self):
        torch.manual_seed(3)
        model = nn.Sequential(
            *(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(8, 5), nn.LeakyReLU(), nn.Linear(5, 3)),
        )  # fmt: skip
        return model, F.cross_entropy, (torch.randn(3, 1, 5, 5), labels(3))

    def test_residual_has_no_diagonal(self, relu):
        h, g, s = (kind(*relu).to_dense() for kind in (Hessian, Fisher, Residual))
        assert s.trace().abs() <= 1e-10 * s.norm() and s.norm() > 1e-3 * h.norm()
        near(h.diagonal(), g.diagonal())

    def test_rank_of_fisher(self, relu):
        assert torch.linalg.matrix_rank(Fisher(*relu).to_dense()) <= 3 * 3
        assert torch.linalg.matrix_rank(EmpiricalFisher(*relu).to_dense()) <= 3


CONVOLUTIONS = {
    "1d": lambda: (nn.Conv1d(2, 4, 3, stride=2, padding=1, groups=2), (3, 2, 7)),
    "2d": lambda: (nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (2, 2, 6, 5)),
    "3d": lambda: (nn.Conv3d(2, 2, 2, bias=False), (2, 2, 3, 4, 3)),
    "same": lambda: (nn.Conv2d(2, 2, 3, padding="same"), (2, 2, 4, 4)),
    "same, uneven": lambda: (nn.Conv2d(2, 2, 2, padding="same"), (2, 2, 4, 4)),
    "valid": lambda: (nn.Conv2d(2, 2, 2, padding="valid"), (2, 2, 4, 4)),
    "reflected": lambda: (nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 2, 4)),
    "one sample": lambda: (nn.Conv2d(2, 2, 2), (2, 4, 4)),
    "depthwise": lambda: (nn.Conv2d(2, 4, 3, groups=2, stride=2), (2, 2, 5, 5)),
}


@mark.filterwarnings("ignore:Using padding='same'")
@mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    first, shape = CONVOLUTIONS[name]()
    z = first(torch.randn(shape))
    model = nn.Sequential(first, nn.Tanh(), type(first)(z.shape[1 - (name == "one sample")], 2, 2))
    x = torch.randn(shape)
    y = torch.randn_like(model(x))
    for only in ("*", "0.weight", "2.*"):
        parameters = [p for n, p in model.named_parameters() if fnmatch(n, only)]
        h = hessian(lambda: F.mse_loss(model(x), y), parameters)
        g = gauss_newton(lambda: model(x), lambda z: F.mse_loss(z, y), parameters)
        near(Hessian(model, F.mse_loss, (x, y), only=only).to_dense(), h)
        near(GaussNewton(model, F.mse_loss, (x, y), only=only, memory=1).to_dense(), g)
