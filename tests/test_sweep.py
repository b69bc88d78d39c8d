"""The sweep: visits no more than it must, shares graphs with other backward passes, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvext
from curvext import CurvatureError, DiagHessian, HesScale, extend, registry
from curvext.graph import Graph, edge_of, nearest
from curvext.sweep import Sweep
from curvext.testing import without_rules

from .models import MODELS, mlp, one_hidden
from .reference import hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")


class Token:
    """Something that lives as long as the node that holds it; nodes themselves take no weak references."""


def watched(loss):
    token = loss.grad_fn.metadata["token"] = Token()
    return weakref.ref(token), weakref.ref(loss)


@pytest.fixture
def visits(monkeypatch):
    """The operations visited, in order, with what they were asked for."""
    seen = []
    visit = Sweep.visit

    def recorded(self, op, grads):
        seen.append((op.name, op.needs))
        return visit(self, op, grads)

    monkeypatch.setattr(Sweep, "visit", recorded)
    return seen


def names(visits):
    return [name for name, _ in visits]


class TestFrozen:
    def test_nothing_is_visited_below_the_lowest_trained_layer(self, visits):
        model, x = mlp(), torch.randn(6, 4, requires_grad=True)
        model[:4].requires_grad_(False)
        with extend(model):
            model(x).square().mean().backward()
        assert names(visits) == ["MeanBackward0", "PowBackward0", "AddmmBackward0", "TBackward0"]
        assert visits[2][1] == (True, False, True)
        assert x.grad is not None

    def test_no_weight_of_a_frozen_layer_is_worked_for(self, visits):
        model, x = mlp(), torch.randn(6, 4)
        model[2].requires_grad_(False)
        with extend(model):
            model(x).square().mean().backward()
        needs = [needs for name, needs in visits if name == "AddmmBackward0"]
        assert needs[1][0] is False and needs[1][1:] in [(True,), (True, False)]

    def test_a_module_of_the_model_selects(self, visits):
        model, x = mlp(), torch.randn(6, 4)
        with extend(model[4]):
            model(x).square().mean().backward()
        assert names(visits) == ["MeanBackward0", "PowBackward0", "AddmmBackward0", "TBackward0"]
        assert model[0].weight.grad is not None and not hasattr(model[0].weight, "hesscale")

    def test_inputs_asked_for_select(self, visits):
        model, x = mlp(), torch.randn(6, 4)
        with extend(model):
            model(x).square().mean().backward(inputs=[model[4].bias])
        assert visits[-1] == ("AddmmBackward0", (True, False, False))

    def test_inputs_that_require_gradients_cost_nothing(self, visits):
        model, x = one_hidden(), torch.randn(6, 4, requires_grad=True)
        with extend(model) as curvature:
            model(x).square().mean().backward()
        assert ("AddmmBackward0", (True, False, True)) in visits
        assert len(curvature.hesscale) == 4 and not hasattr(x, "hesscale")


class TestGraph:
    def test_operations_come_roots_first_and_lead_to_the_targets(self):
        a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        y = (torch.tanh(a) * torch.sigmoid(b)).sum()
        ops = Graph([y.grad_fn]).operations({edge_of(a): "a"})
        assert [op.name for op in ops] == ["SumBackward0", "MulBackward0", "TanhBackward0"]
        assert ops[1].needs == (True, False)

    def test_the_nearest_target(self):
        a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        y = (torch.tanh(a) * b).sum()
        assert nearest(y.grad_fn, {edge_of(a): "a", edge_of(b): "b"}) == "b"
        assert nearest(y.grad_fn, {edge_of(a): "a"}) == "a"
        assert nearest(y.grad_fn, {}) is None

    def test_a_dimension_of_minus_one_reads_as_such(self):
        y = torch.log_softmax(torch.randn(2, 3, requires_grad=True), dim=-1)
        (op,) = Graph([y.grad_fn]).operations({y.grad_fn.next_functions[0]: "x"})
        assert op.dim == -1 and torch.equal(op.result, y)


class Silent(torch.autograd.Function):
    """The identity, with no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


LINEAR = {
    "one": lambda w: w.t().tanh().pow(2).sum(),
    "used twice": lambda w: (w.t() * 2 + w.t().sum(0)).tanh().sum() + w.t().pow(3).sum(),
    "used by a function without gradient": lambda w: (lambda v: Silent.apply(v).exp().sum() + v.exp().sum())(w.t() * 2),
    "outputs not used": lambda w: w.view(3, 4).unbind(0)[1].exp().sum() + w.split([1, 2])[0].pow(3).sum(),
    "only linear": lambda w: (w * 3).t().sum() + 0 * w.exp().sum(),
    "linear and not": lambda w: (lambda v: v.sum() + v.pow(3).sum())(w.view(-1)),
    "linear above": lambda w: (w.exp().t().reshape(2, 6) * 5).sum(0).mean(),
    "concatenated": lambda w: torch.cat([w.flatten(), w.flatten().exp(), w.sum().view(1)]).pow(2).mul(2).sum(),
    "in place": lambda w: (w * 2).t().add_(1).mul_(w.t()).exp().sum(),
    "expanded": lambda w: w.mean(0, keepdim=True).expand(2, 4).exp().sum(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_waves_meet_at_operations_that_bend_nothing(name):
    """The same with rules as without, where every operation needs its gradient."""
    w, function = torch.randn(3, 4, requires_grad=True), LINEAR[name]
    with extend([w], enumerate_up_to=10**6):
        loss = function(w)
        loss.backward(retain_graph=True)
    got, grad = w.hesscale, w.grad.clone()
    with extend([w], enumerate_up_to=10**6), without_rules():
        loss.backward()
    torch.testing.assert_close(got, w.hesscale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(w.grad, 2 * grad)
    if name in ("one", "outputs not used", "linear and not", "linear above"):  # nothing meets but at w
        torch.testing.assert_close([got], hessian_diagonal(lambda: function(w), [w]), rtol=1e-9, atol=1e-12)


class TestSharedGraphs:
    def run(self, *steps):
        errors = []

        def guarded(step):
            try:
                step()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(step,)) for step in steps]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors

    def test_two_threads_share_a_model(self):
        model = one_hidden()
        batches = [(torch.randn(6, 4), torch.randn(6, 3)) for _ in range(2)]
        losses = [lambda x=x, y=y: F.mse_loss(model(x), y) for x, y in batches]
        results = [[], []]

        def step(i):
            for _ in range(10):
                with extend(model) as curvature:
                    losses[i]().backward()
                results[i].append(list(curvature.hesscale.values()))

        self.run(lambda: step(0), lambda: step(1))
        for i, loss in enumerate(losses):
            want = hessian_diagonal(loss, list(model.parameters()))
            for got in results[i]:
                torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("shared", ["layer", "loss"])
    def test_two_threads_share_a_part_of_the_graph(self, shared):
        model, x = one_hidden(), torch.randn(6, 4)
        hidden = torch.tanh(model[0](x))
        losses = [model[2](hidden).square().mean()]
        losses.append(losses[0].exp() if shared == "loss" else model[2](hidden).pow(4).sum())
        want = []
        for loss in losses:
            with extend(model) as curvature:
                loss.backward(retain_graph=True)
            want.append(list(curvature.hesscale.values()))
        entered, results = threading.Barrier(2), [[], []]

        def step(i):
            for _ in range(50):
                entered.wait()
                with extend(model) as curvature:
                    losses[i].backward(retain_graph=True)
                results[i].append(list(curvature.hesscale.values()))

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            self.run(lambda: step(0), lambda: step(1))
        finally:
            sys.setswitchinterval(interval)
        for i in range(2):
            for got in results[i]:
                torch.testing.assert_close(got, want[i], rtol=1e-9, atol=1e-12)

    def test_another_thread_passes_through_the_root_half_way(self):
        model, x = one_hidden(), torch.randn(6, 4)
        hidden = torch.tanh(model[0](x))
        loss = model[2](hidden).square().mean()
        above, done = loss.exp(), []

        def hook(g):
            if not done:
                done.append(True)
                self.run(lambda: above.backward(retain_graph=True))

        hidden.register_hook(hook)
        with extend(model) as curvature:
            loss.backward(retain_graph=True)
        want = hessian_diagonal(lambda: model(x).square().mean(), list(model.parameters()))
        torch.testing.assert_close(list(curvature.hesscale.values()), want, rtol=1e-9, atol=1e-12)

    def test_a_backward_pass_in_a_hook_on_part_of_the_graph(self):
        model, x = one_hidden(), torch.randn(6, 4)
        with extend(model) as curvature:
            hidden = torch.tanh(model[0](x))
            loss = model[2](hidden).square().mean()
            other = hidden.sum()
            loss.register_hook(lambda g: torch.autograd.grad(other, model[0].bias, retain_graph=True) and None)
            loss.backward()
        want = hessian_diagonal(lambda: model(x).square().mean(), list(model.parameters()))
        torch.testing.assert_close(list(curvature.hesscale.values()), want, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("top", [torch.exp, torch.tanh, torch.sqrt])
    def test_a_root_that_the_default_passes_through_again(self, top):
        """These nodes save their result, so their second derivative leads through themselves."""
        model, x = one_hidden(), torch.randn(6, 4)

        def loss():
            return top(model(x).square().mean())

        results = []
        for rules in (True, False):
            with extend(model) as curvature:
                value = loss()
                with contextlib.nullcontext() if rules else without_rules():
                    value.backward()
            results.append(list(curvature.hesscale.values()))
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)

    def test_another_thread_is_not_seen(self):
        model, x = one_hidden(), torch.randn(6, 4)
        with pytest.raises(CurvatureError, match="no backward"), extend(model):
            self.run(lambda: model(x).sum().backward())


@pytest.fixture
def failing_tanh():
    """Within the test, the rule for tanh fails after half of the graph has been passed."""
    kept = curvext.unregister("TanhBackward0")

    @curvext.rule("TanhBackward0")
    def fails(op, g, h):
        raise ZeroDivisionError("no luck")

    yield
    registry.RULES["TanhBackward0", "diagonal"] = kept


class TestFailures:
    def plain(self, loss, model):
        return torch.autograd.grad(loss(), list(model.parameters()))

    def silent(self, root, visits):
        """No hook is left: a plain backward pass visits nothing."""
        del visits[:]
        root.backward(retain_graph=True)
        assert not visits

    def test_in_a_rule(self, failing_tanh, visits):
        model, loss = MODELS["mlp"]()
        value = loss()
        message = r"operation TanhBackward0, nearest parameter 2.bias: .*ZeroDivisionError: no luck.*check_rule"
        with extend(model) as curvature, pytest.raises(CurvatureError, match=message) as caught:
            value.backward(retain_graph=True)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        for p, g in zip(model.parameters(), self.plain(loss, model), strict=True):
            assert torch.equal(p.grad, g)
            assert not hasattr(p, "hesscale")
        assert curvature.hesscale == {}
        self.silent(value, visits)

    def test_a_failed_pass_leaves_the_results_of_the_one_before(self, failing_tanh):
        model, x = mlp(), torch.randn(6, 4)
        with extend(model[4]) as curvature:
            model(x).square().mean().backward()
            before = curvature.hesscale["weight"].clone()
            with pytest.raises(CurvatureError, match="TanhBackward0"):
                torch.tanh(model(x)).sum().backward()
        assert torch.equal(curvature.hesscale["weight"], before)

    def test_the_default_names_operation_parameter_and_remedy(self):
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, g):
                return 3 * ctx.saved_tensors[0] ** 2 * g

        model, x = one_hidden(), torch.randn(6, 4)
        message = r"operation Once, nearest parameter 2\.(weight|bias): .*curvext.rule.*differentiable operations"
        with extend(model), pytest.raises(CurvatureError, match=message):
            Once.apply(model(x)).sum().backward()
        for p, g in zip(model.parameters(), self.plain(lambda: (model(x) ** 3).sum(), model), strict=True):
            torch.testing.assert_close(p.grad, g)

    def test_in_a_hook_of_the_user(self, visits):
        model, x = mlp(), torch.randn(6, 4)

        def hook(g):
            raise KeyError("mine")

        hidden = torch.tanh(model[0](x))
        handle = hidden.register_hook(hook)
        value = model[1:](hidden).square().mean()
        with extend(model, HesScale(), DiagHessian()), pytest.raises(KeyError, match="mine"):
            value.backward(retain_graph=True)
        assert not any(hasattr(p, "hesscale") for p in model.parameters())
        handle.remove()
        self.silent(value, visits)

    def test_in_the_forward(self, visits):
        model, x = mlp(), torch.randn(6, 4)
        with pytest.raises(RuntimeError, match="shapes"), extend(model):
            value = model(x).sum()
            model(x.T)
        self.silent(value, visits)
        assert not hasattr(model[0].weight, "hesscale")

    def test_hooks_of_the_user_change_gradient_and_curvature(self):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        z = torch.tanh(model[0](x))
        z.register_hook(torch.zeros_like)
        with extend(model):
            model[2](z).sub(y).pow(2).mean().backward()
        assert not model[0].weight.grad.any()
        slope, out = 1 - z.detach() ** 2, torch.full((6, 3), 2 / 18)
        want = ((out @ model[2].weight.detach() ** 2) * slope**2).T @ x**2
        torch.testing.assert_close(model[0].weight.hesscale, want)


class TestNothingIsLeft:
    def test_no_hook(self, visits):
        model, loss = MODELS["cnn"]()
        value = loss()
        with extend(model, enumerate_up_to=10**6):
            value.backward(retain_graph=True)
        del visits[:]
        value.backward()
        assert not visits

    def test_nothing_in_the_block_itself(self):
        model, loss = MODELS["mlp"]()
        block = extend(model)
        before = set(vars(block))
        for _ in range(2):
            with block:
                loss().backward()
            assert set(vars(block)) == before

    @pytest.mark.parametrize("name", MODELS)  # in two of them batch norm mixes the samples
    def test_no_reference_to_the_graph(self, name):
        model, loss = MODELS[name]()
        gc.collect()
        gc.disable()
        try:
            with extend(model, HesScale(), DiagHessian()) as curvature:
                value = loss()
                node, tensor = watched(value)
                value.backward()
                del value
                assert tensor() is None and node() is None
            assert len(curvature.hesscale) == len(list(model.parameters()))
        finally:
            gc.enable()

    def test_no_reference_to_the_graph_after_a_failure(self, failing_tanh):
        model, loss = MODELS["mlp"]()
        value = loss()
        node, tensor = watched(value)
        with extend(model):
            try:
                value.backward()
            except CurvatureError:
                del value
        gc.collect()
        assert tensor() is None and node() is None

    def test_the_number_of_tensors_does_not_grow(self):
        model, loss = MODELS["residual"]()
        counts = []
        for step in range(200):
            with extend(model, HesScale()):
                loss().backward()
            if step % 50 == 49:
                gc.collect()
                counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
        assert len(set(counts)) == 1, counts

    def test_memory_does_not_grow(self):
        resource = pytest.importorskip("resource")
        model, x = nn.Sequential(nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 10)), torch.randn(64, 500)
        peaks = []
        for step in range(200):
            with extend(model):
                model(x).square().mean().backward()
            if step in (49, 199):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        one_step = 500 * 500 * 8 // 1024
        assert peaks[1] - peaks[0] < 20 * one_step, peaks
