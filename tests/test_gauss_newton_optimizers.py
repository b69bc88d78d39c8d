"""GaussNewtonCG, HessianFree, CurveBall and DiagGaussNewton against dense matrices, and on data sets."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import CurvatureError
from curvext.optim import CurveBall, DiagGaussNewton, GaussNewtonCG, HessianFree
from curvext.optim.objective import Objective
from curvext.optim.stored import StoredGaussNewton
from curvext.solvers import Constant, FullStep, LevenbergMarquardt, Martens, cg

from .optimizers import Net, classified, digits, problem

pytestmark = pytest.mark.usefixtures("float64")
FULL = FullStep(always=True)


def trained(model):
    return [*model.lower.parameters(), *model.upper.parameters()]


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def gradient(model):
    parameters = trained(model)
    return flat(torch.autograd.grad(problem(model)()[0], parameters))


def gauss_newton(model, part=slice(None)):
    """JᵀBJ of the mean cross-entropy, from its definition."""
    _, z = problem(model, part)()
    J = torch.stack([flat(torch.autograd.grad(v, trained(model), retain_graph=True)) for v in z.flatten()])
    p = z.detach().softmax(1)
    B = torch.block_diag(*[(q.diag() - q.outer(q)) / len(p) for q in p])
    return J.T @ B @ J


# Gauss-Newton CG


@pytest.mark.parametrize("part", [slice(None), slice(0, 4)])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 0.8)])
def test_prediction_needs_no_product(part, rates):
    """dᵀ(-g - r - λd) = dᵀG d with CG stopped early; ρ and λ from dense matrices."""
    model, rule = Net(), LevenbergMarquardt(first=0.5)
    groups = [{"params": m.parameters(), "lr": lr} for m, lr in zip((model.lower, model.upper), rates, strict=True)]
    optimizer = GaussNewtonCG(groups, weight_decay=0.05, damping=rule)
    lr = torch.cat([torch.full_like(flat(m.parameters()), r)
                    for m, r in zip((model.lower, model.upper), rates, strict=True)])  # fmt: skip
    λ = 0.5
    for _ in range(6):
        θ = flat(trained(model))
        G, g = gauss_newton(model, part) + 0.05 * torch.eye(len(θ)), gradient(model) + 0.05 * θ
        d = cg(G, -g, damping=λ, tolerance=0.1).x * lr
        optimizer.step(problem(model), problem(model, part))
        report = optimizer.report
        α = report.details["step"]
        torch.testing.assert_close(flat(trained(model)) - θ, α * d, rtol=1e-7, atol=1e-10)
        assert report.details["curvature"] == pytest.approx(float(d @ G @ d), rel=1e-6)
        ratio = (report.after - report.before) / float(α * g @ d + 0.5 * α**2 * d @ G @ d)
        assert report.details["damping"] == pytest.approx(λ) and report.details["ratio"] == pytest.approx(ratio)
        λ = rule(λ, ratio, step=α)
        steps = cg(G, -g, damping=report.details["damping"], tolerance=0.1).steps
        assert report.products == steps + (rates[0] != rates[1])
    assert optimizer.carried["damping"] == pytest.approx(λ) and λ != 0.5


def test_damping_starts_again_after_two_solves_of_one_product():
    p = nn.Parameter(torch.tensor([3.0, 1.0]))
    optimizer = GaussNewtonCG([p], line_search=FULL)

    def closure():
        z = p.unsqueeze(0)
        return z.square().sum(), z

    optimizer.carried["damping"] = 50.0
    optimizer.step(closure)
    assert optimizer.carried["damping"] == pytest.approx(50 * 2 / 3) and optimizer.report.products == 1
    optimizer.step(closure)
    assert optimizer.carried["damping"] == 1.0


def test_damping_does_not_rise_with_shortened_steps():
    """A loss with a kink that the matrix does not see."""
    seen = []

    def rule(damping, ratio, *, step, short):
        seen.append((LevenbergMarquardt()(damping, ratio, step=step, short=0), ratio, step))
        return damping

    rule.first = 0.1
    p = nn.Parameter(torch.tensor([0.3, 1.0]))
    optimizer = GaussNewtonCG([p], damping=rule)

    def closure():
        z = p.unsqueeze(0)
        return (z.abs() + 0.01 * z.square()).sum(), z

    for _ in range(10):
        optimizer.step(closure)
        assert seen[-1][2] == optimizer.report.details["step"] < 1
    assert any(ratio < 0.25 for _, ratio, _ in seen) and all(λ <= 0.1 for λ, *_ in seen)


def test_damping_that_begins_large_falls():
    """Solves of one product are no sign of a λ that has risen, if it has not."""
    rule, λ = LevenbergMarquardt(first=100.0), 100.0
    for short in range(1, 9):
        λ = rule(λ, 0.9, short=short)
    assert λ == pytest.approx(100 * (2 / 3) ** 8)


class Words(nn.Module):
    """An embedding, convolutions with groups and transposed, a normalisation, a bare parameter, tied weights."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 6, 3, groups=2)
        self.back, self.norm = nn.ConvTranspose1d(6, 4, 2, bias=False), nn.LayerNorm(4)
        self.scale, self.tied = nn.Parameter(torch.ones(())), nn.Linear(4, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, words):
        z = torch.tanh(self.back(torch.tanh(self.conv(self.table(words).mT)))).mean(-1)
        return self.scale * self.tied(torch.tanh(self.tied(self.norm(z))))


@pytest.mark.parametrize("maximize", [False, True])
def test_stored_jacobian_multiplies_as_the_graph_does(maximize):
    torch.manual_seed(0)
    model = Words()
    words, y = torch.randint(0, 6, (5, 6)), torch.randint(0, 4, (5,))

    def closure():
        z = model(words)
        return (-1 if maximize else 1) * F.cross_entropy(z, y), z

    optimizer = GaussNewtonCG(model.parameters(), weight_decay=0.1, maximize=maximize)
    with torch.no_grad():
        point = Objective(optimizer, closure, None).point(products="gauss_newton")
        stored, products = StoredGaussNewton(point), point.curvature("gauss_newton")
        for _ in range(3):
            v = torch.randn(stored.shape[0])
            torch.testing.assert_close(stored @ v, products @ v, rtol=1e-9, atol=1e-11)


def test_where_a_jacobian_is_stored():
    for jacobian, max_memory, which in (("stored", 1, "stored"), ("auto", 1 << 30, "stored"), ("auto", 1, "products"),
                                        ("products", 1 << 30, "products")):  # fmt: skip
        model = Net()
        optimizer = GaussNewtonCG(model.parameters(), jacobian=jacobian, max_memory=max_memory)
        for _ in range(2):
            optimizer.step(problem(model))
            assert optimizer.report.details["jacobian"] == which
    model, x = Net(), torch.randn(12, 4)

    def elsewhere():
        """Outputs before a layer that bends."""
        z = model(x)
        return F.cross_entropy(torch.tanh(z), torch.arange(12) % 3), z

    optimizer = GaussNewtonCG(model.parameters(), jacobian="auto")
    optimizer.step(elsewhere)
    assert optimizer.report.details["jacobian"] == "products"
    with pytest.raises(CurvatureError, match="jacobian='products'"):
        GaussNewtonCG(model.parameters(), jacobian="stored").step(elsewhere)


# Hessian-free


def test_hessian_free_by_hand():
    """Warm starts, λ, CG's end and the step, from dense matrices, four times."""
    model, rule = Net(), LevenbergMarquardt(first=0.3, guard=False)
    stop = Martens(epsilon=1e-2, window=3)
    optimizer = HessianFree(trained(model), damping=rule, stop=stop, line_search=FULL, weight_decay=0.05)
    λ, x, one = 0.3, None, None
    for _ in range(5):
        θ = flat(trained(model))
        A, g = gauss_newton(model) + 0.05 * torch.eye(len(θ)), gradient(model) + 0.05 * θ

        def f(s, θ=θ):
            torch.nn.utils.vector_to_parameters(θ + s, trained(model))
            value = float(problem(model)()[0].detach()) + 0.025 * float((θ + s).square().sum())
            torch.nn.utils.vector_to_parameters(θ.clone(), trained(model))
            return value

        one = cg(A, -g, x0=None if x is None else 0.95 * x, damping=λ, tolerance=1e-5, stop=stop, store=1.3)
        x = one.x
        m = float(g @ x + 0.5 * x @ (A @ x + λ * x))
        ratio = (f(x) - f(0 * x)) / m
        kept = [one.iterates[k] for k in sorted(one.iterates, reverse=True) if one.iterates[k].any()]
        s = kept[0]
        for earlier in kept[1:]:
            if f(earlier) >= f(s):
                break
            s = earlier
        optimizer.step(problem(model))
        torch.testing.assert_close(flat(trained(model)) - θ, s, rtol=1e-6, atol=1e-9)
        assert optimizer.report.details["damping"] == pytest.approx(λ)
        assert optimizer.report.details["ratio"] == pytest.approx(ratio, rel=1e-6)
        λ = rule(λ, ratio)
    assert λ != 0.3


def test_the_preconditioner_changes_the_iterates():
    """With few steps of CG; with many, the step is the same."""
    for steps, same in ((3, False), (200, True)):
        ends = []
        for name in (None, "fisher", "hesscale"):
            model = Net()
            options = {"stop": None, "tolerance": 1e-13, "backtracking": False, "steps": steps}
            HessianFree(trained(model), preconditioner=name, **options).step(problem(model))
            ends.append(flat(trained(model)))
        for end in ends[1:]:
            assert torch.allclose(ends[0], end, rtol=1e-7, atol=1e-9) == same


@pytest.mark.parametrize("blocks", ["group", "layer"])
def test_blocks_are_solved_on_their_own(blocks):
    model = Net()
    θ, g, A, λ = flat(trained(model)), gradient(model), gauss_newton(model), 0.1
    n = flat(model.lower.parameters()).numel()
    expected = torch.cat([-torch.linalg.solve(A[at, at] + λ * torch.eye(len(θ))[at, at], g[at])
                          for at in (slice(0, n), slice(n, None))])  # fmt: skip
    groups = [{"params": model.lower.parameters()}, {"params": model.upper.parameters()}]
    params = groups if blocks == "group" else [(k, p) for k, p in model.named_parameters() if k != "unused"]
    options = {"stop": None, "tolerance": 1e-13, "backtracking": False, "line_search": FULL, "damping": Constant(λ)}
    optimizer = HessianFree(params, blocks=blocks, **options)
    optimizer.step(problem(model))
    torch.testing.assert_close(flat(trained(model)) - θ, expected, rtol=1e-8, atol=1e-10)
    m = float(g @ expected + 0.5 * sum(expected[at] @ A[at, at] @ expected[at] for at in (slice(0, n), slice(n, None)))
              + 0.5 * λ * expected @ expected)  # fmt: skip
    ratio = (optimizer.report.after - optimizer.report.before) / m
    assert optimizer.report.details["ratio"] == pytest.approx(ratio, rel=1e-6)
    with pytest.raises(ValueError, match="named_parameters"):
        HessianFree(model.parameters(), blocks="layer").step(problem(model))


# CurveBall and the diagonal


def test_curveball_minimises_its_model_on_two_directions():
    model, λ = Net(), 0.2
    optimizer = CurveBall(trained(model), damping=Constant(λ), line_search=FULL)
    z = None
    for _ in range(4):
        θ, g = flat(trained(model)), gradient(model)
        A = gauss_newton(model) + λ * torch.eye(len(θ))
        B = torch.stack([A @ z + g, z], 1) if z is not None else g[:, None]
        z = -B @ torch.linalg.solve(B.T @ A @ B, B.T @ g)
        optimizer.step(problem(model))
        torch.testing.assert_close(flat(trained(model)) - θ, z, rtol=1e-6, atol=1e-9)


def test_curveball_forgets_a_step_that_is_not_finite():
    model = Net()
    optimizer = CurveBall(trained(model))
    for factor in (1.0, math.nan, 1.0):
        curvature = classified(model, factor * torch.ones(2, 4), torch.arange(2))
        optimizer.step(problem(model), curvature)
    assert optimizer.report.reason == "CurveBall"


@pytest.mark.parametrize("rescale", [True, False])
def test_diagonal_by_hand(rescale):
    model, rule = Net(), LevenbergMarquardt(first=0.05, guard=False)
    optimizer = DiagGaussNewton(trained(model), damping=rule, rescale=rescale, lr=0.5, line_search=FULL)
    λ = 0.05
    for _ in range(3):
        θ, g, A = flat(trained(model)), gradient(model), gauss_newton(model)
        p = -g / (A.diagonal() + λ)
        s = -(g @ p) / (p @ A @ p + λ * p @ p) if rescale else 1.0
        optimizer.step(problem(model))
        d = 0.5 * s * p
        torch.testing.assert_close(flat(trained(model)) - θ, d, rtol=1e-7, atol=1e-10)
        report = optimizer.report
        ratio = (report.after - report.before) / float(g @ d + 0.5 * d @ A @ d)
        assert report.details["ratio"] == pytest.approx(ratio, rel=1e-6)
        λ = rule(λ, ratio)


def test_refused_settings():
    p = [nn.Parameter(torch.ones(2))]
    wrong = [(GaussNewtonCG, {"steps": 0}), (GaussNewtonCG, {"tolerance": 1.0}), (HessianFree, {"curvature": "fisher"}),
             (GaussNewtonCG, {"jacobian": "dense"}), (HessianFree, {"blocks": "row"}),
             (HessianFree, {"blocks": "group", "preconditioner": "fisher"}),
             (HessianFree, {"decay": 2.0}), (CurveBall, {"interval": 0})]  # fmt: skip
    for cls, settings in wrong:
        with pytest.raises(ValueError, match=next(iter(settings))):
            cls(p, **settings)
    for cls in (GaussNewtonCG, HessianFree, CurveBall, DiagGaussNewton):
        with pytest.raises(CurvatureError, match="outputs"):
            cls(p).step(lambda: p[0].square().sum())


# data


NEWTON_TYPE = {
    "Gauss-Newton-CG": (GaussNewtonCG, {}, None),
    "Gauss-Newton-CG, 5 %": (GaussNewtonCG, {}, 0.05),
    "Hessian-free": (HessianFree, {}, None),
    "Hessian-free, fisher": (HessianFree, {"preconditioner": "fisher"}, None),
    "Hessian-free, layers": (HessianFree, {"blocks": "layer"}, None),
}


def perceptron(seed, scale=1.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    with torch.no_grad():
        [p.mul_(scale) for p in model.parameters()]
    return model


def run(model, optimizer, steps, share=None):
    """Objective and test accuracy on digits."""
    x, x_test, y, y_test = digits()
    for k in range(steps):
        closures = [classified(model, x, y)]
        if share:
            some = torch.randperm(len(x), generator=torch.Generator().manual_seed(k))[: int(share * len(x))]
            closures.append(classified(model, x[some], y[some]))
        optimizer.step(*closures)
    return optimizer.report.after, float((model(x_test).argmax(1) == y_test).double().mean())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NEWTON_TYPE)
def test_digits(name, seed):
    cls, settings, share = NEWTON_TYPE[name]
    model = perceptron(seed)
    f, accuracy = run(model, cls(model.named_parameters(), weight_decay=1e-3, **settings), 20, share)
    assert f <= 0.16 and accuracy >= 0.96


@pytest.mark.slow
@pytest.mark.parametrize("first", [1e-2, 1.0, 1e2])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_settings_hardly_matter(first, scale):
    """Lin's claim: over four decades of damping and a factor of four in the initial weights."""
    model = perceptron(0, scale)
    optimizer = GaussNewtonCG(model.parameters(), weight_decay=1e-3, damping=LevenbergMarquardt(first=first))
    assert run(model, optimizer, 30, 0.05)[1] >= 0.95


def mnist():
    """2,000 training images and 1,000 for testing, without the mean of the former."""
    scipy = pytest.importorskip("scipy.io")
    folder = Path(os.environ.get("CURVEXT_MNIST_DEMO", Path(__file__).parents[2] / "shared" / "data"))
    names = [folder / "mnist-demo.mat", folder / "mnist-demo.t.mat"]
    if not all(name.exists() for name in names):
        pytest.skip("mnist-demo.mat and mnist-demo.t.mat are needed; CURVEXT_MNIST_DEMO names their folder")
    files = [scipy.loadmat(name) for name in names]
    (x, y), (x_test, y_test) = [
        (torch.tensor(f["Z"]).float().view(-1, 1, 28, 28) / 255, torch.tensor(f["y"].ravel().astype("int64")))
        for f in files
    ]
    return x - x.mean(0), x_test - x.mean(0), y, y_test


def convolutional():
    """16, 16 and 32 channels, with Lin's initial values."""
    torch.manual_seed(0)
    layers = []
    for channels in ((1, 16, 5), (16, 16, 3), (16, 32, 3)):
        layers += [nn.Conv2d(*channels, padding="same"), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 9, 10)).float()
    for p in model.parameters():
        nn.init.normal_(p, std=math.sqrt(2 / p[0].numel())) if p.dim() > 1 else nn.init.zeros_(p)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("user", "goal"), [(0.01, 0.95), (0.1, 0.96)])
def test_mnist_as_lin(user, goal):
    """25 iterations, 5 % of the data for the matrix, in turn; the source's numbers are 95.6 and 97.0 %."""
    x, x_test, y, y_test = mnist()
    model, onehot = convolutional(), F.one_hot(y, 10).float()
    optimizer = GaussNewtonCG(model.parameters(), weight_decay=1 / (user * len(x)))
    generator = torch.Generator().manual_seed(0)
    blocks = [block for _ in range(2) for block in torch.randperm(len(x), generator=generator).view(20, -1)]

    def closure(part=slice(None)):
        z = model(x[part])
        return (z - onehot[part]).square().sum(1).mean(), z

    for k in range(25):
        optimizer.step(closure, lambda k=k: closure(blocks[k]))
    assert float((model(x_test).argmax(1) == y_test).float().mean()) >= goal
