"""The block: what it accepts, what it leaves behind, and that it changes nothing else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvext
from curvext import BL89, CurvatureError, DiagHessian, HesScale, extend

from .models import MODELS, mlp, one_hidden
from .reference import chain, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")


def close(got, want):
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=1e-12)


def hesscales(model, loss, **options):
    """HesScale of every parameter by one plain block."""
    with extend(model, **options) as curvature:
        loss().backward()
    return list(curvature.hesscale.values())


def data(n=6):
    return torch.randn(n, 4), torch.randn(n, 3)


@pytest.fixture
def net():
    """A net and a loss for which HesScale is the Hessian diagonal."""
    model, (x, y) = one_hidden(), data()
    return model, lambda: F.mse_loss(model(x), y)


class TestTargets:
    def test_equals_the_recursion_layer_by_layer(self):
        model, (x, y) = mlp(), (torch.randn(6, 4), torch.randint(0, 3, (6,)))
        w1, b1, w2, b2, w3, b3 = model.parameters()

        def linear(w, b, x):
            return F.linear(x, w, b)

        layers = [(linear, (w1, b1)), (torch.tanh, ()), (linear, (w2, b2)), (torch.tanh, ()), (linear, (w3, b3))]
        want = chain(layers, x, lambda z: F.cross_entropy(z, y))
        close(hesscales(model, lambda: F.cross_entropy(model(x), y)), want)

    @pytest.mark.parametrize("inside", [True, False])
    def test_the_forward_may_run_before_the_block(self, net, inside):
        model, loss = net
        before = None if inside else loss()
        with extend(model):
            (loss() if inside else before).backward()
        close([p.hesscale for p in model.parameters()], hessian_diagonal(loss, list(model.parameters())))

    @pytest.mark.parametrize("kind", ["mapping", "list", "generator", "tensor"])
    def test_functional_code(self, kind):
        (x, y), w, b = data(), torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
        targets = {"mapping": {"w": w, "b": b}, "list": [w, b], "generator": (t for t in (w, b)), "tensor": w}[kind]

        def loss():
            return (torch.sigmoid(x @ w + b) - y).square().sum()

        with extend(targets) as curvature:
            loss().backward()
        want = dict(zip(["w", "b"] if kind == "mapping" else ["0", "1"], hessian_diagonal(loss, [w, b]), strict=True))
        assert list(curvature.hesscale) == list(want)[: 1 if kind == "tensor" else 2]
        for name, value in curvature.hesscale.items():
            close([value], [want[name]])
        assert hasattr(b, "hesscale") == (kind != "tensor")

    @pytest.mark.parametrize("asked", [True, False])
    def test_a_tensor_that_is_not_a_leaf(self, asked):
        (x, y), w = data(), torch.randn(4, 3, requires_grad=True)
        hidden = x @ w
        with extend({"hidden": hidden, "w": w}) as curvature:
            F.mse_loss(torch.tanh(hidden), y).backward(inputs=[hidden, w] if asked else None)
        leaf = hidden.detach().requires_grad_()
        close([curvature.hesscale["hidden"]], hessian_diagonal(lambda: F.mse_loss(torch.tanh(leaf), y), [leaf]))
        close([w.hesscale], hessian_diagonal(lambda: F.mse_loss(torch.tanh(x @ w), y), [w]))

    def test_only_a_tensor_that_is_not_a_leaf_is_asked_for(self):
        (x, y), w = data(), torch.randn(4, 3, requires_grad=True)
        hidden = x @ w
        with extend([hidden]):
            F.mse_loss(torch.tanh(hidden), y).backward(inputs=hidden)
        leaf = hidden.detach().requires_grad_()
        close([hidden.hesscale], hessian_diagonal(lambda: F.mse_loss(torch.tanh(leaf), y), [leaf]))
        assert w.grad is None

    def test_two_names_for_one_tensor(self):
        (x, y), w = data(), torch.randn(4, 3, requires_grad=True)
        with extend({"a": w, "b": w}, HesScale(), DiagHessian()) as curvature:
            F.mse_loss(torch.tanh(x @ w), y).backward()
        (want,) = hessian_diagonal(lambda: F.mse_loss(torch.tanh(x @ w), y), [w])
        for field in ("hesscale", "diag_h"):
            close([curvature[field]["a"], curvature[field]["b"], getattr(w, field)], [want, want, want])

    @pytest.mark.parametrize("how", ["module", "weight"])
    def test_a_weight_used_twice_gets_the_sum_over_its_uses(self, how):
        x, y = torch.randn(6, 3), torch.randn(6, 3)
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.load_state_dict(first.state_dict())
        apart = hesscales([first.weight, second.weight], lambda: F.mse_loss(second(torch.tanh(first(x))), y))
        if how == "module":
            second = first
        else:
            second.weight = first.weight
        model = nn.Sequential(first, nn.Tanh(), second)
        with extend(model) as curvature:
            F.mse_loss(model(x), y).backward()
        assert "2.weight" not in curvature.hesscale
        close([curvature.hesscale["0.weight"]], [apart[0] + apart[1]])

    def test_attributes_and_the_yielded_object_hold_the_same(self, net):
        model, loss = net
        with extend(model, HesScale(), BL89()) as curvature:
            loss().backward()
        assert list(curvature) == ["hesscale", "bl89"]
        for name, p in model.named_parameters():
            assert curvature.hesscale[name] is p.hesscale and curvature["bl89"][name] is p.bl89
            assert p.hesscale.shape == p.shape and p.hesscale.dtype == p.dtype and not p.hesscale.requires_grad
        with pytest.raises(AttributeError, match="kfac"):
            _ = curvature.kfac

    def test_linear_parameters_get_zeros_and_unreached_ones_nothing(self):
        linear, unused, (x, _) = nn.Linear(4, 3), nn.Linear(4, 3), data()
        model = nn.ModuleList([linear, unused])
        with extend(model, HesScale(), HesScale(gauss_newton=True), DiagHessian()) as curvature:
            linear(x).sum().backward()
        for field in ("hesscale", "hesscale_gn", "diag_h"):
            assert list(curvature[field]) == ["0.weight", "0.bias"]
            assert torch.equal(curvature[field]["0.weight"], torch.zeros(3, 4))
            assert not curvature[field]["0.weight"].requires_grad
        assert not hasattr(unused.weight, "hesscale")

    def test_parts_without_gradients(self, net):
        model, loss = net
        with extend(model):
            with torch.no_grad():
                scale = loss()
            (scale * loss()).backward()
        close([p.hesscale for p in model.parameters()], [scale * h for h in hesscales(model, loss)])


class TestBackward:
    def test_asked_for_some_inputs(self, net):
        model, loss = net
        want = hesscales(model, loss)
        with extend(model) as curvature:
            loss().backward(inputs=[model[0].weight])
        assert list(curvature.hesscale) == ["0.weight"]
        close([model[0].weight.hesscale], want[:1])
        assert not hasattr(model[0].bias, "hesscale")

    def test_retained_graph_and_a_second_backward(self, net):
        model, loss = net
        want = hesscales(model, loss)
        with extend(model):
            value = loss()
            value.backward(retain_graph=True)
            close([p.hesscale for p in model.parameters()], want)
            value.backward()
        close([p.hesscale for p in model.parameters()], [2 * h for h in want])

    def test_accumulation_is_the_sum(self):
        model, (x, y) = mlp(), data()
        parts = [lambda i=i: F.mse_loss(model(x[i : i + 2]), y[i : i + 2], reduction="sum") for i in (0, 2, 4)]
        with extend(model, HesScale(), DiagHessian()):
            for part in parts:
                part().backward()
        whole = [lambda: F.mse_loss(model(x), y, reduction="sum")]
        close([p.hesscale for p in model.parameters()], hesscales(model, *whole))
        close([p.diag_h for p in model.parameters()], hessian_diagonal(*whole, list(model.parameters())))

    def test_a_gradient_argument(self, net):
        model, _ = net
        (x, y), v = data(), torch.randn(6, 3)
        with extend(model, HesScale(), DiagHessian()):
            (model(x) - y).pow(4).backward(gradient=v)
        want = hessian_diagonal(lambda: (v * (model(x) - y).pow(4)).sum(), list(model.parameters()))
        close([p.hesscale for p in model.parameters()], want)
        close([p.diag_h for p in model.parameters()], want)

    @pytest.mark.parametrize("factor", [3.0, -0.5])
    def test_a_scaled_loss(self, factor):
        model, loss = MODELS["mlp"]()
        close(hesscales(model, lambda: factor * loss()), [factor * h for h in hesscales(model, loss)])

    def test_summed_losses(self):
        model, loss = MODELS["mlp"]()
        x, y = data()

        def other():
            return F.smooth_l1_loss(model(x), y)

        both = zip(hesscales(model, loss), hesscales(model, other), strict=True)
        close(hesscales(model, lambda: 2 * loss() + other()), [2 * a + b for a, b in both])

    def test_an_l2_term_in_the_loss(self):
        model, loss = MODELS["mlp"]()
        decay = 0.3
        got = hesscales(model, lambda: loss() + decay / 2 * sum(p.square().sum() for p in model.parameters()))
        close(got, [h + decay for h in hesscales(model, loss)])


class TestBlocks:
    def test_nested_blocks_of_different_quantities(self, net):
        model, loss = net
        want = hessian_diagonal(loss, list(model.parameters()))
        with extend(model, DiagHessian(chunk=3)) as outer, extend(model) as inner:
            loss().backward()
        close(outer.diag_h.values(), want)
        close(inner.hesscale.values(), want)
        with extend(model) as outer, extend(model, DiagHessian(chunk=3)) as inner:
            loss().backward()
        close(outer.hesscale.values(), want)
        close(inner.diag_h.values(), want)

    def test_a_loss_that_its_own_derivative_reads_in_nested_blocks(self, net):
        model, loss = net

        def root():  # the topmost node saves its result, so products pass through the root
            return loss().exp()

        with extend(model, DiagHessian()), extend(model):
            root().backward()
        close([p.hesscale for p in model.parameters()], hesscales(model, root))
        close([p.diag_h for p in model.parameters()], hessian_diagonal(root, list(model.parameters())))

    def test_nested_blocks_of_the_same_quantity(self, net):
        model, loss = net
        want = hesscales(model, loss)
        with extend(model) as outer:
            loss().backward()
            with extend(model[2]) as inner:
                loss().backward()
                close([model[2].weight.hesscale], [want[2]])
        close(inner.hesscale.values(), want[2:])
        close(outer.hesscale.values(), [2 * h for h in want])

    def test_one_object_reused_in_a_loop(self, net):
        model, loss = net
        model[0].weight.requires_grad_(False)
        block, fields = extend(model), []
        for _ in range(3):
            with block as curvature:
                loss().backward()
            fields.append(curvature.hesscale)
            model[0].weight.requires_grad_(True)
        assert "0.weight" not in fields[0]
        close(fields[1].values(), fields[2].values())
        close(fields[1].values(), hessian_diagonal(loss, list(model.parameters())))

    def test_one_object_cannot_be_entered_twice(self, net):
        block = extend(net[0])
        with pytest.raises(CurvatureError, match="running already"), block, block:
            pass
        with block:
            net[1]().backward()

    def test_a_new_block_starts_afresh(self, net):
        model, loss = net
        hesscales(model, loss)
        model[0].requires_grad_(False)
        with pytest.raises(ZeroDivisionError), extend(model):
            loss().backward()
            raise ZeroDivisionError
        assert not hasattr(model[0].weight, "hesscale") and hasattr(model[2].weight, "hesscale")
        with pytest.raises(ZeroDivisionError), extend(model):
            raise ZeroDivisionError
        assert not hasattr(model[2].weight, "hesscale")

    def test_without_backward(self, net):
        model, loss = net
        with pytest.raises(CurvatureError, match=r"no backward\(\) ran inside the block.*hesscale"), extend(model):
            loss()
        with pytest.raises(CurvatureError, match=r"torch\.autograd\.backward"), extend(model):
            torch.autograd.backward(loss())

    def test_a_loss_of_another_model(self, net):
        model, loss = net
        with extend(mlp()), pytest.raises(CurvatureError, match="does not depend on any of the 6 tensors"):
            loss().backward()
        assert model[0].weight.grad is not None

    def test_inputs_of_another_model(self, net):
        model, loss = net
        with extend(model[2]), pytest.raises(CurvatureError, match="names none of the 2 tensors"):
            loss().backward(inputs=[model[0].weight])

    def test_a_frozen_model(self, net):
        x = torch.randn(6, 4, requires_grad=True)
        model = net[0].requires_grad_(False)
        with extend(model), pytest.raises(CurvatureError, match="none of the tensors given requires a gradient"):
            model(x).square().sum().backward()


class TestNothingElseChanges:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_models_can_be_copied_and_pickled_after_use(self, net, copied):
        model, loss = net
        want = hesscales(model, loss)
        other = copied(model)
        close(other.parameters(), model.parameters())
        x, y = data()
        first = hesscales(other, lambda: F.mse_loss(other(x), y))
        close([p.hesscale for p in model.parameters()], want)
        close(first, hesscales(model, lambda: F.mse_loss(model(x), y)))

    @pytest.mark.parametrize("name", [*MODELS, "encoder"])
    def test_gradients_are_bitwise_the_same(self, name):
        torch.set_default_dtype(torch.float32)
        if name == "encoder":
            model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)

            def loss():
                return model(x).square().mean()
        else:
            model, loss = MODELS[name]()
        loss().backward()
        plain = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with extend(model, HesScale(), HesScale(gauss_newton=True), BL89()):
            loss().backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))

    def test_modules_get_no_attribute_and_no_hook(self, net):
        model, loss = net
        before = [dict(module.__dict__) for module in model.modules()]
        hesscales(model, loss)
        assert [dict(module.__dict__) for module in model.modules()] == before
        assert set(model[0].weight.__dict__) == {"hesscale"}

    def test_the_random_state_is_left_alone(self, net):
        model, loss = net
        state = torch.get_rng_state()
        hesscales(model, loss)
        assert torch.equal(torch.get_rng_state(), state)

    def test_public_names(self):
        assert all(
            hasattr(curvext, name) for name in ("extend", "Curvature", "HesScale", "BL89", "DiagHessian", "rule")
        )
