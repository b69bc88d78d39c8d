"""Defects of the code released with the papers on HesScale, each as a test that curvext does not have it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import BL89, HesScale, extend
from curvext.demo.estimators import Batch, hutchinson
from curvext.testing import EXACT

from .models import mlp
from .reference import chain, hessian_diagonal

N = 5


def hesscales(model, loss, *quantities):
    quantities = quantities or (HesScale(),)
    with extend(model, *quantities, enumerate_up_to=EXACT) as curvature:
        loss().backward()
    results = [list(curvature[quantity.savefield].values()) for quantity in quantities]
    return results if len(results) > 1 else results[0]


def close(got, want, tolerance=1e-12):
    for a, b in zip(got, want, strict=True):
        assert ((a - b).abs().max() / b.abs().max()).item() < tolerance


def is_chain(modules, x, loss):
    """HesScale of a sequence of modules is that of equation (2), layer by layer."""

    def layer(module):
        named = dict(module.named_parameters())

        def function(*args):
            return torch.func.functional_call(module, dict(zip(named, args[:-1], strict=True)), args[-1])

        return function, list(named.values())

    model = nn.Sequential(*modules)
    got = hesscales(model, lambda: loss(model(x)))
    close(got, chain([layer(module) for module in modules], x, loss), 1e-11)
    return model


def wavy(z):
    return (z**3 / 3 + z.sin()).sum()


@pytest.mark.usefixtures("float64")
class TestAveragePooling:
    """2. The wave was divided by k entries, not by k²."""

    @pytest.mark.parametrize(
        ("pool", "shape", "k"),
        [
            (nn.AvgPool1d(3), (N, 2, 9), 3),
            (nn.AvgPool2d(2), (N, 2, 4, 4), 4),
            (nn.AvgPool2d(12), (N, 2, 12, 12), 144),
            (nn.AdaptiveAvgPool2d(1), (N, 2, 3, 5), 15),
            (nn.AvgPool3d(2), (N, 1, 2, 4, 2), 8),
        ],
        ids=str,
    )
    def test_divides_by_the_square(self, pool, shape, k):
        x = torch.randn(shape, requires_grad=True)
        (got,) = hesscales([x], lambda: (pool(x) ** 2).sum() / 2)
        close([got], [torch.full(shape, k**-2.0)])

    def test_everything_below(self):
        head = nn.Sequential(nn.Linear(4, 18), nn.Tanh(), nn.Unflatten(1, (2, 3, 3)), nn.AvgPool2d(3))
        x = torch.randn(N, 4)
        want = hessian_diagonal(lambda: wavy(head(x)), list(head.parameters()))
        close(hesscales(head, lambda: wavy(head(x))), want)


@pytest.mark.usefixtures("float64")
class TestActivationBeforeTheLoss:
    """3. The term f''g of an activation directly before the loss was lost."""

    def test_sigmoid_and_mse(self):
        model, x, y = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Sigmoid()), torch.randn(N, 4), 0.3
        got, without = hesscales(model, lambda: ((model(x) - y) ** 2).mean(), HesScale(), HesScale(gauss_newton=True))
        close(got, hessian_diagonal(lambda: ((model(x) - y) ** 2).mean(), list(model.parameters())))
        assert all((a - b).abs().max() > 1e-3 * a.abs().max() for a, b in zip(got, without, strict=True))

    def test_log_softmax_and_nll(self):
        model, x, y = mlp(), torch.randn(N, 4), torch.randint(0, 3, (N,))
        got = hesscales(model, lambda: nn.NLLLoss()(nn.LogSoftmax(1)(model(x)), y))
        close(got, hesscales(model, lambda: F.cross_entropy(model(x), y)))
        close(got[-2:], hessian_diagonal(lambda: F.cross_entropy(model(x), y), list(model.parameters()))[-2:])
        assert all(h.abs().max() > 1e-4 for h in got)


@pytest.mark.usefixtures("float64")
def test_becker_and_lecun_have_a_last_layer():
    """4. The baseline was zero there; by the formula it is 1[y] q (1 - q)."""
    model, x, y = mlp(), torch.randn(N, 4), torch.randint(0, 3, (N,))
    weight, bias = hesscales(model, lambda: nn.NLLLoss()(nn.LogSoftmax(1)(model(x)), y), BL89())[-2:]
    with torch.no_grad():
        q = model(x).softmax(1)
        h = F.one_hot(y, 3) * q * (1 - q) / N
        close([weight, bias], [h.T @ model[:4](x) ** 2, h.sum(0)])
    assert (bias > 0).any()


def test_hutchinson_averages_its_draws():
    """5. ``sum += [...]`` joined lists, so that fifty draws were one of them over fifty."""
    model = mlp()
    problem = Batch(model, torch.randn(N, 4), torch.randint(0, 3, (N,)))
    for absolute in (False, True):
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        together = hutchinson(50, generators[0], absolute)(problem)
        each = [hutchinson(1, generators[1], absolute)(problem) for _ in range(50)]
        for got, draws in zip(together, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(draws).mean(0))


@pytest.mark.usefixtures("float64")
class TestShapes:
    """6. Conv-Flatten-Linear, inputs of other than two or four dimensions raised errors."""

    def test_convolution_flatten_linear(self):
        is_chain([nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)], torch.randn(2, 2, 3, 3), wavy)

    @pytest.mark.parametrize(
        ("conv", "transposed", "shape"),
        [
            (nn.Conv1d, nn.ConvTranspose1d, (2, 2, 4)),
            (nn.Conv2d, nn.ConvTranspose2d, (2, 2, 3, 2)),
            (nn.Conv3d, nn.ConvTranspose3d, (2, 2, 2, 3, 2)),
        ],
    )
    def test_convolutions_of_every_dimension(self, conv, transposed, shape):
        modules = [conv(2, 3, 2, padding=1), nn.Tanh(), transposed(3, 1, 2), nn.Sigmoid()]
        is_chain(modules, torch.randn(shape), wavy)

    @pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (2, 1, 2, 4)])
    def test_linear_on_inputs_of_any_dimension(self, shape):
        is_chain([nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)], torch.randn(shape), wavy)


class Values(nn.Module):
    """Attention of fixed queries and keys, over the batch."""

    def forward(self, x):
        fixed = torch.linspace(-1, 1, x.numel()).view(1, *x.shape)
        return F.scaled_dot_product_attention(fixed, fixed, x[None])[0]


MODULES = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "BatchNorm, eval": lambda: nn.BatchNorm1d(4).eval(),
    "GELU": nn.GELU,
    "GELU, tanh": lambda: nn.GELU("tanh"),
    "SiLU": nn.SiLU,
    "Softplus": nn.Softplus,
    "Softmax": lambda: nn.Softmax(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "attention": Values,
}


@pytest.mark.usefixtures("float64")
class TestModules:
    """7. No rule for LayerNorm, BatchNorm, GELU, softmax as a module; losses with options were refused or wrong."""

    @pytest.mark.parametrize("name", MODULES)
    def test_modules(self, name):
        is_chain([nn.Linear(3, 4), MODULES[name](), nn.Linear(4, 2)], torch.randn(N, 3), wavy)

    def test_residual_sum(self):
        """Where the branches act on their own entries alone, nothing is dropped but their product."""
        x, w = torch.randn(N, 4), torch.randn(4, requires_grad=True)
        (got,) = hesscales([w], lambda: wavy(x + torch.tanh(w * x)))
        close([got], hessian_diagonal(lambda: wavy(x + torch.tanh(w * x)), [w]))

    def test_embedding(self):
        table, index = nn.Embedding(6, 3), torch.tensor([[0, 2], [2, 5]])
        want = hessian_diagonal(lambda: wavy(table(index)), [table.weight])
        close(hesscales(table, lambda: wavy(table(index))), want)

    @pytest.mark.parametrize(
        "options",
        [
            {"weight": [0.2, 3.0, 1.1]},
            {"ignore_index": 1},
            {"label_smoothing": 0.2},
            {"weight": [0.2, 3.0, 1.1], "ignore_index": 1, "label_smoothing": 0.2, "reduction": "sum"},
        ],
        ids=str,
    )
    def test_last_layer_below_cross_entropy(self, options):
        options = {**options, "weight": torch.tensor(options["weight"])} if "weight" in options else options
        model, x, y = mlp(), torch.randn(N, 4), torch.tensor([0, 1, 2, 2, 1])

        def loss():
            return F.cross_entropy(model(x), y, **options)

        close(hesscales(model, loss)[-2:], hessian_diagonal(loss, list(model.parameters()))[-2:])


@pytest.mark.usefixtures("float64")
class TestReinforcementLearning:
    """8. Losses of actor-critic methods had diagonals of the wrong sign, of the wrong size, or of one action only."""

    def setup_method(self):
        generator = torch.Generator().manual_seed(5)
        draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.x, self.action, self.advantage = draw(N, 4), draw(N, 3), draw(N)
        self.old, self.chosen = draw(N) / 9, torch.tensor([0, 2, 1, 1, 2])

    def exact(self, model, loss):
        close(hesscales(model, loss), hessian_diagonal(loss, list(model.parameters())))

    def clipped(self, ratio):
        return -torch.minimum(ratio * self.advantage, ratio.clamp(0.8, 1.2) * self.advantage).mean()

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gaussian_nll_mean(self, reduction):
        model, variance = nn.Linear(4, 3), torch.rand(N, 3) + 0.5
        self.exact(model, lambda: F.gaussian_nll_loss(model(self.x), self.action, variance, reduction=reduction))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_gaussian_nll_variance(self, reduction):
        """With the exponential output of the papers."""
        model, mean = nn.Linear(4, 3), torch.randn(N, 3)

        def loss():
            return F.gaussian_nll_loss(mean, self.action, model(self.x).exp(), reduction=reduction)

        self.exact(model, loss)

    def test_actor_critic_weights_every_sample_by_its_advantage(self):
        model, variance = nn.Linear(4, 3), torch.rand(N, 3) + 0.5

        def loss():
            nll = F.gaussian_nll_loss(model(self.x), self.action, variance, reduction="none").sum(1)
            return (nll * self.advantage).mean()

        self.exact(model, loss)

    def test_softmax_ppo(self):
        """All actions count, not the chosen one alone (with log_softmax as one operation, unlike z - logsumexp z)."""
        model = nn.Linear(4, 3)

        def loss():
            log_p = model(self.x).log_softmax(1)[torch.arange(N), self.chosen]
            return self.clipped((log_p - log_p.detach() + self.old).exp())

        self.exact(model, loss)

    def test_gaussian_ppo_mean(self):
        model, std = nn.Linear(4, 3), torch.rand(N, 3) + 0.8

        def loss():
            log_p = torch.distributions.Normal(model(self.x), std).log_prob(self.action).sum(1)
            return self.clipped((log_p - log_p.detach() + self.old).exp())

        self.exact(model, loss)

    def test_gaussian_ppo_variance(self):
        """Its two branches meet below the exponential: 2 r s₁' s₂' is dropped, and nothing else."""
        variance, mean = (torch.rand(N, 3) + 0.8).requires_grad_(), torch.randn(N, 3)

        def ratio():
            terms = -((self.action - mean) ** 2) / (2 * variance) - variance.log() / 2
            return (terms.sum(1) - terms.sum(1).detach() + self.old).exp()

        (got,) = hesscales([variance], lambda: self.clipped(ratio()))
        (want,) = hessian_diagonal(lambda: self.clipped(ratio()), [variance])
        with torch.no_grad():
            weight = torch.autograd.functional.jacobian(self.clipped, ratio())[:, None] * ratio()[:, None]
            dropped = 2 * weight * (self.action - mean) ** 2 / (2 * variance**2) * (-1 / (2 * variance))
        assert ((got + dropped - want).abs().max() / want.abs().max()).item() < 1e-12


class TestDeviceAndImports:
    """9. Tensors were made on the CPU whatever the model's device; importing the package opened a window toolkit."""

    @pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("quantity", [HesScale(), HesScale(gauss_newton=True)], ids=["hesscale", "gauss_newton"])
    @pytest.mark.parametrize("name", ["mse", "nll", "cross entropy"])
    def test_results_are_on_the_model_s_device(self, name, quantity, device):
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        model, x = mlp().to(device), torch.ones(N, 4, device=device)
        y = torch.zeros(N, dtype=torch.long, device=device)
        losses = {
            "mse": lambda: F.mse_loss(model(x), torch.zeros(N, 3, device=device)),
            "nll": lambda: F.nll_loss(torch.log_softmax(model(x), 1), y),
            "cross entropy": lambda: F.cross_entropy(model(x), y),
        }
        for h, p in zip(hesscales(model, losses[name], quantity), model.parameters(), strict=True):
            assert h.device == p.device and h.shape == p.shape

    def test_import_needs_no_window_toolkit(self):
        program = (
            "import sys, curvext, curvext.optim; print(sorted({'turtle', 'tkinter', '_tkinter'} & set(sys.modules)))"
        )
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "[]"
