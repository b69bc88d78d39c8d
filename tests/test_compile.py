"""Forward, backward and wave traced into one graph and compiled give the same numbers on new inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from curvext import BL89, DiagHessian, HesScale, extend
from curvext.compile import compile_step

from .models import Attention, Residual, cnn, mlp

pytestmark = pytest.mark.usefixtures("float64")


def of_tokens(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def classes(*shape):
    return lambda: (torch.randn(shape), torch.randint(0, 3, shape[:1]))


def tokens():
    return torch.randint(0, 5, (2, 4)), torch.randint(0, 5, (2, 4))


MODELS = {
    "mlp": (mlp, classes(6, 4), F.cross_entropy),
    "cnn": (cnn, classes(3, 2, 6, 6), F.cross_entropy),
    "residual": (Residual, classes(3, 2, 3, 3), F.cross_entropy),
    "attention": (Attention, tokens, of_tokens),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: (torch.randn(2, 5, 8), torch.randn(2, 5, 8)),
        F.mse_loss,
    ),
}


def functional(model, loss):
    """The whole step as a function of parameters and data."""
    names = [name for name, _ in model.named_parameters()]

    def step(parameters, x, y):
        leaves = dict(zip(names, [p.detach().requires_grad_() for p in parameters], strict=True))
        with extend(leaves, HesScale(), HesScale(gauss_newton=True), BL89()) as curvature:
            value = loss(functional_call(model, leaves, (x,)), y)
            value.backward()
        return value.detach(), [p.grad for p in leaves.values()], [list(c.values()) for c in curvature.values()]

    return step


def close(got, want, tolerance=1e-8):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def check(name, transform, tolerance=1e-8):
    """The transformed step equals the eager one on other parameters and data than it was traced with."""
    build, data, loss = MODELS[name]
    model = build()
    step, parameters = functional(model, loss), list(model.parameters())
    transformed = transform(make_fx(step)(parameters, *data()))
    for _ in range(2):
        parameters, (x, y) = [torch.randn_like(p) / 2 for p in parameters], data()
        close(transformed(parameters, x, y), step(parameters, x, y), tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_traced(name):
    check(name, lambda graph: graph, 1e-12)


@pytest.mark.parametrize("name", ["mlp", pytest.param("encoder", marks=pytest.mark.slow)])
def test_compiled_ahead_of_time(name):
    torch._dynamo.reset()
    check(name, lambda graph: torch.compile(graph, backend="aot_eager"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch uses what it has deprecated
def test_compiled_by_inductor(name):
    torch._dynamo.reset()
    check(name, torch.compile)


def test_the_graph_holds_operations_only():
    """No constant of the traced values and no Python callback is left in the graph."""
    build, data, loss = MODELS["mlp"]
    model = build()
    graph = make_fx(functional(model, loss))(list(model.parameters()), *data())
    assert {node.op for node in graph.graph.nodes} <= {"placeholder", "call_function", "output", "get_attr"}
    constants = [getattr(graph, node.target) for node in graph.graph.nodes if node.op == "get_attr"]
    assert all(constant.numel() == 1 for constant in constants)


class TestCompiledStep:
    def both(self, model, other, loss, data, *quantities, times=2):
        """A compiled step of one model against the block of the other."""
        step = compile_step(model, loss, *quantities, backend="aot_eager")
        for inputs in [data() for _ in range(times)]:
            value = step(*inputs)
            with extend(other, *quantities) as curvature:
                want = loss(other, *inputs)
                want.backward()
            close(value, want.detach())
            for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                for field in ("grad", *curvature):
                    close(getattr(p, field, None) if p.grad is not None else None, getattr(q, field, None))
            for a, b in zip(model.buffers(), other.buffers(), strict=True):
                close(a, b)

    def twins(self, build):
        torch._dynamo.reset()
        model, other = build(), build()
        other.load_state_dict(model.state_dict())
        return model, other

    @pytest.mark.parametrize("quantities", [(), (HesScale(gauss_newton=True), DiagHessian())], ids=["", "several"])
    def test_leaves_what_a_block_leaves(self, quantities):
        self.both(*self.twins(mlp), lambda m, x, y: F.cross_entropy(m(x), y), classes(6, 4), *quantities)

    @pytest.mark.slow
    def test_running_statistics_move_once_a_step(self):
        self.both(*self.twins(Residual), lambda m, x, y: F.cross_entropy(m(x), y), classes(3, 2, 3, 3), times=3)

    @pytest.mark.slow
    def test_tied_weights_and_frozen_parts_and_new_shapes(self):
        model, other = self.twins(lambda: Attention(tied=True))
        model.qkv.requires_grad_(False), other.qkv.requires_grad_(False)
        lengths = iter([3, 4])

        def data():
            return torch.randint(0, 5, (2, 2, next(lengths))).unbind()

        self.both(model, other, lambda m, x, y: of_tokens(m(x), y), data)
        assert model.qkv.weight.grad is None and not hasattr(model.qkv.weight, "hesscale")
