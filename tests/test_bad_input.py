"""Bad or unusual input: either right or a clear error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from curvext import (
    EKFAC,
    KFAC,
    BatchDiagHessian,
    BatchGrad,
    CurvatureError,
    DiagGGNMC,
    DiagHessian,
    GGNFactor,
    HesScale,
    SqrtGGNExact,
    SqrtGGNMC,
    extend,
)
from curvext.testing import check_quantity

from .models import MODELS, mlp, one_hidden
from .reference import hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")


def close(got, want):
    torch.testing.assert_close(list(got), list(want), rtol=1e-9, atol=1e-12)


class TestArguments:
    def test_a_class_instead_of_an_instance(self):
        with pytest.raises(TypeError, match=r"HesScale; write HesScale\(\)"):
            extend(mlp(), HesScale)

    @pytest.mark.parametrize("option", [{"samples": 2.0}, {"probes": 0}, {"max_memory": -1}, {"enumerate_up_to": -1}])
    def test_no_number_of_things(self, option):
        with pytest.raises(ValueError, match=f"extend: {next(iter(option))} must be .*>= "):
            extend(mlp(), **option)

    def test_something_else_than_a_quantity(self):
        with pytest.raises(TypeError, match="expected quantities such as HesScale"):
            extend(mlp(), "hesscale")

    def test_two_quantities_of_one_name(self):
        with pytest.raises(ValueError, match="two quantities would be saved as 'hesscale'"):
            extend(mlp(), HesScale(), DiagHessian(), HesScale())
        extend(mlp(), HesScale(), HesScale(gauss_newton=True))

    @pytest.mark.parametrize("model", [3, None, lambda x: x], ids=["int", "None", "function"])
    def test_something_else_than_a_model(self, model):
        with pytest.raises(TypeError, match="expected a module, a mapping or an iterable of tensors"):
            extend(model)

    @pytest.mark.parametrize("model", [mlp().named_parameters(), {"a": {"b": torch.ones(1)}}, [mlp()]])
    def test_something_else_than_tensors(self, model):
        with pytest.raises(TypeError, match="expected a tensor for"):
            extend(model)

    @pytest.mark.parametrize("count", [0, -1, 2.5])
    @pytest.mark.parametrize("quantity", [DiagGGNMC, SqrtGGNMC, KFAC, EKFAC, GGNFactor, HesScale])
    def test_numbers_of_draws(self, quantity, count):
        with pytest.raises(ValueError, match="mc_samples must be an integer >= 1"):
            quantity(mc_samples=count)

    @pytest.mark.parametrize("quantity", [DiagHessian, BatchDiagHessian])
    def test_chunks_of_products(self, quantity):
        with pytest.raises(ValueError, match="chunk must be an integer >= 1"):
            quantity(chunk=0)

    @pytest.mark.parametrize("quantity", [BatchGrad, SqrtGGNExact])
    def test_samples_to_keep(self, quantity):
        model, x, y = mlp(), torch.randn(4, 4), torch.randint(0, 3, (4,))
        with extend(model, quantity(subsampling=torch.tensor([3, -4]))) as curvature:
            F.cross_entropy(model(x), y).backward()
        assert curvature[quantity.savefield]["0.weight"].shape[-3] == 2
        for k in (4, -5):
            with extend(model, quantity([k])), pytest.raises(CurvatureError, match="but there are 4 samples"):
                F.cross_entropy(model(x), y).backward()

    def test_complex_parameters(self):
        w = torch.randn(3, dtype=torch.complex128, requires_grad=True)
        with pytest.raises(CurvatureError, match=r"'w' is complex .*view_as_complex"):
            extend({"w": w})
        extend({"w": w.detach(), "v": torch.ones(1, requires_grad=True)})

    def test_complex_numbers_between_real_ones(self):
        w = torch.randn(3, 2, requires_grad=True)

        def loss():
            z = torch.view_as_complex(w) * (2 - 1j)
            return torch.view_as_real(z).pow(4).sum()

        check_quantity(HesScale(), [w], loss)


class TestLosses:
    def test_not_a_scalar(self):
        model, x = mlp(), torch.randn(6, 4)
        with extend(model, HesScale(), DiagHessian()), pytest.raises(RuntimeError, match="only for scalar outputs"):
            model(x).backward()
        assert model[0].weight.grad is None and not hasattr(model[0].weight, "hesscale")

    def test_without_a_graph(self):
        model, x = mlp(), torch.randn(6, 4)
        with extend(model), pytest.raises(RuntimeError, match="does not require grad"):
            model(x).sum().detach().backward()

    def test_a_graph_that_is_gone(self):
        model, loss = MODELS["mlp"]()
        value = loss()
        value.backward()
        with extend(model), pytest.raises(RuntimeError, match="second time"):
            value.backward()

    def test_saved_tensors_changed_in_place(self):
        w = torch.randn(3, requires_grad=True)
        y = torch.tanh(w)
        value = y.pow(2).sum()
        y.detach().zero_()
        with extend([w]), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()

    def test_infinite_and_undefined_values_are_passed_on(self):
        w = torch.tensor([0.0, 1.0, float("nan")], requires_grad=True)
        with extend([w]):
            w.log().sum().backward()
        assert w.hesscale[0] == -float("inf") and w.hesscale[1] == -1 and w.hesscale[2].isnan()


class TestGradients:
    def test_sparse_gradients(self):
        dense, sparse = nn.Embedding(6, 3), nn.Embedding(6, 3, sparse=True)
        sparse.load_state_dict(dense.state_dict())
        tokens, y = torch.tensor([[0, 1, 1], [4, 1, 0]]), torch.randn(2, 3, 3)
        for embedding in (dense, sparse):
            with extend(embedding, HesScale(), DiagHessian() if embedding is dense else HesScale(gauss_newton=True)):
                F.mse_loss(torch.tanh(embedding(tokens)), y).backward()
        assert sparse.weight.grad.is_sparse and not sparse.weight.hesscale.is_sparse
        close([sparse.weight.hesscale, dense.weight.hesscale], [dense.weight.diag_h] * 2)

    @pytest.mark.filterwarnings("ignore:Using backward")
    def test_double_backward_through_the_block(self):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        parameters = list(model.parameters())
        want = hessian_diagonal(lambda: F.mse_loss(model(x), y), parameters)
        with extend(model):
            F.mse_loss(model(x), y).backward(create_graph=True)
        close([p.hesscale for p in parameters], want)
        assert not any(p.hesscale.requires_grad for p in parameters)
        (product,) = torch.autograd.grad(parameters[0].grad[1, 2], parameters[0])
        close([product[1, 2]], [want[0][1, 2]])
        model.zero_grad()

    def test_a_gradient_penalty_in_the_loss(self):
        model, x, y = one_hidden(), torch.randn(3, 4, requires_grad=True), torch.randn(3, 3)

        def loss():
            z = model(x)
            (slope,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)
            return F.mse_loss(z, y) + slope.square().sum()

        results = check_quantity(HesScale(), model, loss)
        assert all(h.isfinite().all() and h.any() for h in results.values())

    def test_a_penalty_on_gradients_of_entries_is_exact(self):
        s, x = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)

        def loss():
            (slope,) = torch.autograd.grad((x.pow(3) * s).sum(), x, create_graph=True)
            return slope.pow(4).sum()

        with extend([s]):
            loss().backward()
        close([s.hesscale], hessian_diagonal(loss, [s]))


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(checkpoint(self.inner, x, use_reentrant=False))


class TestTransformedModels:
    def test_a_checkpointed_model(self):
        model, x = Checkpointed(mlp()), torch.randn(6, 4)
        with extend(model), pytest.raises(CurvatureError, match=r"activation checkpointing.*without torch.utils"):
            model(x).square().sum().backward()
        assert not hasattr(model.head.weight, "hesscale")
        model.zero_grad()
        model(x).square().sum().backward()
        assert model.inner[0].weight.grad is not None

    def test_a_checkpointed_part_below_the_trained_one(self):
        model, x = Checkpointed(mlp()), torch.randn(6, 4)
        with extend(model.head):
            model(x).square().sum().backward()
        want = hessian_diagonal(lambda: model(x).square().sum(), list(model.head.parameters()))
        close([p.hesscale for p in model.head.parameters()], want)

    @pytest.mark.parametrize("saved", ["cpu", "hooks"])
    def test_saved_tensors_kept_elsewhere(self, saved):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        hooks = (
            torch.autograd.graph.save_on_cpu()
            if saved == "cpu"
            else torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(force=True), torch.from_numpy)
        )
        with extend(model):
            with hooks:
                value = F.mse_loss(model(x), y)
            value.backward()
        want = hessian_diagonal(lambda: F.mse_loss(model(x), y), list(model.parameters()))
        close([p.hesscale for p in model.parameters()], want)

    @pytest.mark.parametrize("inside", [True, False])
    def test_a_model_traced_by_dynamo_alone(self, inside):
        torch._dynamo.reset()
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        compiled = torch.compile(model, backend="eager")
        before = None if inside else F.mse_loss(compiled(x), y)
        with extend(model):
            (F.mse_loss(compiled(x), y) if inside else before).backward()
        want = hessian_diagonal(lambda: F.mse_loss(model(x), y), list(model.parameters()))
        close([p.hesscale for p in model.parameters()], want)

    @pytest.mark.slow
    @pytest.mark.parametrize("inside", [True, False])
    def test_a_compiled_model(self, inside):
        torch._dynamo.reset()
        model, x = mlp(), torch.randn(6, 4)
        compiled = torch.compile(model, backend="aot_eager")
        before = None if inside else compiled(x).square().sum()
        with extend(model), pytest.raises(CurvatureError, match=r"torch\.compile"):
            (compiled(x).square().sum() if inside else before).backward()
        close(
            [p.grad for p in model.parameters()], torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        )

    def test_a_functional_call(self):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        values = {name: (2 * p.detach()).requires_grad_() for name, p in model.named_parameters()}
        with extend(values) as curvature:
            F.mse_loss(torch.func.functional_call(model, values, x), y).backward()
        want = hessian_diagonal(
            lambda: F.mse_loss(torch.func.functional_call(model, values, x), y), list(values.values())
        )
        close(curvature.hesscale.values(), want)
