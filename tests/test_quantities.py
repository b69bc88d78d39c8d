"""Quantities against dense matrices and against the default on small models of every architecture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import BL89, CurvatureError, DiagHessian, HesScale, extend
from curvext.testing import check_quantity, without_rules

from .models import MODELS, mlp, one_hidden
from .reference import chain, gauss_newton_diagonal, hessian, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")


def close(got, want, tolerance=1e-9):
    torch.testing.assert_close(list(got), list(want), rtol=tolerance, atol=tolerance)


def computed(quantity, model, loss):
    with extend(model, quantity) as curvature:
        loss().backward()
    return list(curvature[quantity.savefield].values())


class TestRulesAgainstTheDefault:
    """A rule is only a speed-up: deleting it changes time, never results."""

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("quantity", [HesScale(), HesScale(gauss_newton=True)], ids=["hesscale", "gauss_newton"])
    def test_on_models(self, quantity, name):
        model, loss = MODELS[name]()
        got = check_quantity(quantity, model, loss)
        assert got.keys() == dict(model.named_parameters()).keys()
        assert all(value.any() for value in got.values())

    def test_catches_a_difference(self):
        model, loss = MODELS["mlp"]()
        states = iter([0.0, 1e-3])
        with pytest.raises(AssertionError, match=r"0\.weight"):
            check_quantity(HesScale(), model, lambda: loss() * (1 + next(states)))


class TestHesScale:
    def test_last_layer_with_cross_entropy_is_exact_and_lower_ones_are_not(self):
        model, loss = MODELS["mlp"]()
        got, want = computed(HesScale(), model, loss), hessian_diagonal(loss, list(model.parameters()))
        close(got[-2:], want[-2:], 1e-12)
        assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(got[:-2], want[:-2], strict=True))

    @pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ReLU, nn.Softplus, nn.ELU])
    @pytest.mark.parametrize("loss", [F.mse_loss, lambda z, y: F.binary_cross_entropy_with_logits(z, torch.sigmoid(y))])
    def test_one_hidden_layer_with_a_separable_loss_is_exact(self, activation, loss):
        model, x, y = one_hidden(activation), torch.randn(6, 4), torch.randn(6, 3)
        want = hessian_diagonal(lambda: loss(model(x), y), list(model.parameters()))
        close(computed(HesScale(), model, lambda: loss(model(x), y)), want)

    def test_is_the_mean_of_single_samples(self):
        model, x, y = mlp(), torch.randn(5, 4), torch.randint(0, 3, (5,))
        whole = computed(HesScale(), model, lambda: F.cross_entropy(model(x), y))
        ones = [
            computed(HesScale(), model, lambda i=i: F.cross_entropy(model(x[i, None]), y[i, None])) for i in range(5)
        ]
        close(whole, [torch.stack(parts).mean(0) for parts in zip(*ones, strict=True)])


class TestGaussNewton:
    def test_is_the_ggn_diagonal_where_that_is_diagonal(self):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        got = computed(HesScale(gauss_newton=True), model, lambda: F.mse_loss(model(x), y))
        close(got, gauss_newton_diagonal(lambda: model(x), lambda z: F.mse_loss(z, y), list(model.parameters())))

    def test_is_hesscale_bitwise_for_piecewise_linear_nets(self):
        model, x, y = mlp(nn.ReLU), torch.randn(6, 4), torch.randint(0, 3, (6,))
        with extend(model, HesScale(), HesScale(gauss_newton=True)):
            F.cross_entropy(model(x), y).backward()
        assert all(torch.equal(p.hesscale, p.hesscale_gn) and (p.hesscale >= 0).all() for p in model.parameters())

    @pytest.mark.parametrize(
        "top",
        [
            lambda z, y: F.cross_entropy(z, y),
            lambda z, y: F.nll_loss(torch.log_softmax(z, 1), y) * 3 + 2,
            lambda z, y: F.cross_entropy(z[:, [2, 0, 1]] * 2, y).mean(),
        ],
        ids=["fused", "by hand", "linear around"],
    )
    def test_the_topmost_nonlinear_operation_is_the_source(self, top):
        """Linear operations above and below the loss change nothing; only the loss keeps its second derivative."""
        model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
        z = model(x).detach().requires_grad_()
        h = hessian(lambda: top(z, y), [z]).diagonal().view_as(z)
        w1, b1, w2, b2, w3, _ = (p.detach() for p in model.parameters())
        a1 = torch.tanh(x @ w1.T + b1)
        a2 = torch.tanh(a1 @ w2.T + b2)
        h2 = (h @ w3**2) * (1 - a2**2) ** 2
        h1 = (h2 @ w2**2) * (1 - a1**2) ** 2
        want = [h1.T @ x**2, h1.sum(0), h2.T @ a1**2, h2.sum(0), h.T @ a2**2, h.sum(0)]
        close(computed(HesScale(gauss_newton=True), model, lambda: top(model(x), y)), want)

    def test_without_a_loss_the_last_activation_is_the_source(self):
        w, x = torch.randn(3, 3, requires_grad=True), torch.randn(5, 3)
        got = computed(HesScale(gauss_newton=True), [w], lambda: (torch.tanh(torch.sigmoid(x @ w)) * 2).sum())
        s = torch.sigmoid(x @ w.detach())
        t = torch.tanh(s)
        close(got, [(x**2).T @ (2 * -2 * t * (1 - t**2) * (s * (1 - s)) ** 2)])

    def test_each_term_of_a_sum_has_its_own_source(self):
        model, loss = MODELS["mlp"]()
        plain = computed(HesScale(gauss_newton=True), model, loss)
        got = computed(
            HesScale(gauss_newton=True), model, lambda: loss() + sum(p.pow(4).sum() for p in model.parameters())
        )
        close(got, [h + 12 * p.detach() ** 2 for h, p in zip(plain, model.parameters(), strict=True)])

    def test_both_forms_in_one_block_are_the_same_as_alone(self):
        model, loss = MODELS["residual"]()
        both = HesScale(), HesScale(gauss_newton=True), BL89()
        alone = [computed(quantity, model, loss) for quantity in both]
        with extend(model, *both) as curvature:
            loss().backward()
        for quantity, want in zip(both, alone, strict=True):
            close(curvature[quantity.savefield].values(), want, 1e-12)


class TestBL89:
    def test_by_the_formula(self):
        """Only the true class keeps curvature at the output: 1[i = y] q (1 - q); then the recursion of HesScale."""
        model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
        q = torch.softmax(model(x).detach(), 1)
        h = F.one_hot(y, 3) * q * (1 - q) / 6
        # a loss whose Hessian diagonal is h and whose gradient is that of cross entropy gives the same recursion
        z, g = model(x).detach(), (q - F.one_hot(y, 3)) / 6
        w1, b1, w2, b2, w3, b3 = model.parameters()

        def linear(w, b, x):
            return F.linear(x, w, b)

        layers = [(linear, (w1, b1)), (torch.tanh, ()), (linear, (w2, b2)), (torch.tanh, ()), (linear, (w3, b3))]
        want = chain(layers, x, lambda v: (g * v).sum() + (h * (v - z) ** 2).sum() / 2)
        close(computed(BL89(), model, lambda: F.cross_entropy(model(x), y)), want)

    def test_is_hesscale_without_softmax(self):
        model, x, y = mlp(), torch.randn(6, 4), torch.randn(6, 3)
        got, want = (computed(q, model, lambda: F.mse_loss(model(x), y)) for q in (BL89(), HesScale()))
        close(got, want, 1e-12)


class TestDiagHessian:
    @pytest.mark.parametrize("chunk", [1, 3, 64, 10**6])
    def test_chunks(self, chunk):
        model, loss = MODELS["mlp"]()
        close(computed(DiagHessian(chunk=chunk), model, loss), hessian_diagonal(loss, list(model.parameters())))

    @pytest.mark.parametrize("name", MODELS)
    def test_on_models(self, name):
        model, loss = MODELS[name]()
        close(computed(DiagHessian(), model, loss), hessian_diagonal(loss, list(model.parameters())))

    def test_scaled_and_accumulated(self):
        model, loss = MODELS["mlp"]()
        with extend(model, DiagHessian()):
            (3 * loss()).backward()
            loss().backward(torch.tensor(0.5))
        close(
            [p.diag_h for p in model.parameters()], [3.5 * h for h in hessian_diagonal(loss, list(model.parameters()))]
        )

    def test_unreached_and_linear_parameters(self):
        model, x = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(2, 2), "linear": nn.Linear(3, 1)}), 1
        x = torch.randn(5, 4)
        with extend(model, DiagHessian()) as curvature:
            model["linear"](torch.tanh(model["used"](x))).sum().backward()
        assert sorted(curvature.diag_h) == ["linear.bias", "linear.weight", "used.bias", "used.weight"]
        assert not curvature.diag_h["linear.weight"].any() and curvature.diag_h["used.weight"].any()

    def test_an_operation_that_cannot_be_differentiated_twice(self):
        attention, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(1, 3, 4)
        with extend(attention, DiagHessian()), pytest.raises(CurvatureError, match=r"twice.*flash.*sdpa_kernel"):
            attention(x, x, x, need_weights=False)[0].square().sum().backward()
        assert attention.in_proj_weight.grad is not None and not hasattr(attention.in_proj_weight, "diag_h")

    def test_a_second_derivative_that_pytorch_has_wrong_is_refused(self):
        layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
        with extend(layer, DiagHessian()), pytest.raises(CurvatureError, match="WeightNormInterfaceBackward0 is wrong"):
            layer(torch.randn(4, 3)).square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())

    def test_does_not_change_gradients_of_a_retained_graph(self):
        model, loss = MODELS["cnn"]()
        want = torch.autograd.grad(loss(), list(model.parameters()))
        value = loss()
        with extend(model, DiagHessian()):
            value.backward(retain_graph=True)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))

    def test_needs_no_rule(self):
        model, loss = MODELS["attention"]()
        want = computed(DiagHessian(), model, loss)
        with without_rules():
            close(computed(DiagHessian(), model, loss), want)

    def test_a_parameter_without_entries(self):
        w, empty = torch.randn(3, requires_grad=True), torch.randn(0, 3, requires_grad=True)
        with extend({"w": w, "empty": empty}, DiagHessian(), HesScale()):
            (w.pow(3).sum() + empty.pow(3).sum()).backward()
        assert empty.diag_h.shape == empty.hesscale.shape == (0, 3)
        close([w.diag_h, w.hesscale], [6 * w.detach()] * 2)
