"""Extension hooks, several backward passes in a block, and what a block leaves, where samples are told apart."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import (
    KFLR,
    BatchDiagGGNExact,
    BatchDotGrad,
    BatchGrad,
    BatchL2Grad,
    CurvatureError,
    DiagGGNExact,
    GGNBlock,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
    extend,
)

from .dense import near
from .models import MODELS, mlp

pytestmark = pytest.mark.usefixtures("float64")

ALONG_N = (BatchGrad(), BatchL2Grad(), BatchDiagGGNExact(), SqrtGGNExact())
SUMS = (SumGradSquared(), Variance(), DiagGGNExact(), GGNBlock())


def data(n=6):
    return torch.randn(n, 4), torch.randint(0, 3, (n,))


@pytest.fixture
def net():
    model, (x, y) = mlp(), data()
    return model, lambda: F.cross_entropy(model(x), y)


class TestHooks:
    def test_is_called_once_a_parameter_when_all_its_quantities_are_there(self, net):
        model, loss = net
        seen = []

        def hook(p):
            seen.append((id(p), p.grad_batch.sum(0), p.diag_ggn_exact.clone()))

        with extend(model, BatchGrad(), DiagGGNExact(), extension_hook=hook):
            loss().backward()
            assert {i for i, *_ in seen} == {id(p) for p in model.parameters()} and len(seen) == 6
        by_id = {id(p): p for p in model.parameters()}
        for i, gradient, diagonal in seen:
            near(gradient, by_id[i].grad)
            near(diagonal, by_id[i].diag_ggn_exact)

    def test_is_called_before_other_parameters_have_theirs(self, net):
        model, loss = net
        ready = []
        with extend(model, BatchGrad(), extension_hook=lambda p: ready.append(
            sum("grad_batch" in q.__dict__ for q in model.parameters())
        )):  # fmt: skip
            loss().backward()
        assert ready == [1, 2, 3, 4, 5, 6]

    @pytest.mark.parametrize("quantity", [BatchGrad(), SqrtGGNExact(), GGNBlock(), KFLR()], ids=lambda q: q.savefield)
    def test_what_it_deletes_is_freed(self, net, quantity):
        """When the next parameter's turn comes, nobody holds it; what an operation's inputs share, one later."""
        model, loss = net
        held, alive, field = [], [], quantity.savefield

        def hook(p):
            gc.collect()
            alive.append(any(ref() is not None for refs in held[:-1] for ref in refs))
            value = getattr(p, field)
            held.append([weakref.ref(v) for v in (value if isinstance(value, list) else [value])])
            delattr(p, field)

        with extend(model, quantity, extension_hook=hook) as curvature:
            loss().backward()
            assert not any(alive) and len(alive) == 6 and len(curvature[field]) == 0
            assert not any(ref() is not None for refs in held for ref in refs)
        assert not any(hasattr(p, field) for p in model.parameters())

    def test_what_it_replaces_is_freed_and_the_replacement_is_the_result(self, net):
        model, loss = net
        held = []

        def hook(p):
            held.append(weakref.ref(p.grad_batch))
            p.grad_batch = p.grad_batch.flatten(1).norm(dim=1)

        with extend(model, BatchGrad(), BatchL2Grad(), extension_hook=hook) as curvature:
            loss().backward()
            assert all(ref() is None for ref in held)
        for name, p in model.named_parameters():
            assert curvature.grad_batch[name] is p.grad_batch
            near(p.grad_batch.square(), p.batch_l2)

    def test_may_delete_what_other_parameters_have(self, net):
        """As a hook of modules does, at the last of their parameters."""
        model, loss = net
        left = []

        def hook(p):
            left.append(p)
            if len(left) == 6:
                for q in left:
                    del q.grad_batch

        with extend(model, BatchGrad(), extension_hook=hook) as curvature:
            loss().backward()
        assert not curvature.grad_batch

    def test_sums_over_several_passes_unless_it_takes_them(self, net):
        model, loss = net
        with extend(model, SumGradSquared(), BatchL2Grad(), extension_hook=lambda p: delattr(p, "batch_l2")):
            loss().backward()
            once = [p.sum_grad_squared.clone() for p in model.parameters()]
            loss().backward()
        for p, first in zip(model.parameters(), once, strict=True):
            near(p.sum_grad_squared, 2 * first)

    @pytest.mark.parametrize("quantity", [BatchGrad(), Variance()], ids=lambda q: q.savefield)
    @pytest.mark.parametrize("at", [0, 3])
    def test_its_errors_come_as_they_are_and_leave_nothing(self, net, quantity, at):
        model, loss = net
        loss().backward()
        want = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        calls, error = [], KeyError("mine")

        def hook(p):
            calls.append(p)
            if len(calls) > at:
                raise error

        block = extend(model, quantity, extension_hook=hook)
        with block as curvature, pytest.raises(KeyError) as raised:
            loss().backward()
        assert raised.value is error and len(calls) == at + 1
        assert not curvature[quantity.savefield]
        for p, g in zip(model.parameters(), want, strict=True):
            assert not hasattr(p, quantity.savefield)
            assert not p._backward_hooks
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0)

    def test_after_an_error_a_second_pass_counts_once(self, net):
        model, loss = net
        fail = [True]

        def hook(p):
            if fail and p is model[0].weight:
                raise KeyError

        with extend(model, SumGradSquared(), extension_hook=hook):
            with pytest.raises(KeyError):
                loss().backward()
            fail.clear()
            loss().backward()
        got = [p.sum_grad_squared.clone() for p in model.parameters()]
        with extend(model, SumGradSquared()):
            loss().backward()
        torch.testing.assert_close(got, [p.sum_grad_squared for p in model.parameters()])


@pytest.mark.parametrize("quantity", [*ALONG_N, *SUMS], ids=lambda q: type(q).__name__)
class TestSeveralPasses:
    """Two batches of three in one block are what their losses' sum gives for the batch of six."""

    def check(self, model, quantity, x, y):
        with extend(model, quantity):
            for rows in (slice(0, 3), slice(3, 6)):
                F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
        got = [getattr(p, quantity.savefield) for p in model.parameters()]
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        with extend(model, quantity):
            F.cross_entropy(model(x), y, reduction="sum").backward()
        for p, result, gradient in zip(model.parameters(), got, gradients, strict=True):
            near(result, getattr(p, quantity.savefield))
            near(gradient, p.grad)

    def test_add_up(self, quantity):
        self.check(mlp(), quantity, *data())

    def test_whatever_gradients_were_there_before(self, quantity):
        model, (x, y) = mlp(), data()
        F.cross_entropy(model(x), y).backward()
        before = [p.grad.clone() for p in model.parameters()]
        with extend(model, quantity):
            F.cross_entropy(model(x), y).backward()
        got = [getattr(p, quantity.savefield).clone() for p in model.parameters()]
        for p, g in zip(model.parameters(), before, strict=True):
            near(p.grad, 2 * g)
        model.zero_grad()
        with extend(model, quantity):
            F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(got, [getattr(p, quantity.savefield) for p in model.parameters()])

    def test_of_which_one_does_not_reach_a_parameter(self, quantity):
        """It then counts with zeros."""
        model, (x, y) = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]), data()
        with extend(model, quantity):
            F.cross_entropy(model[0](x) + 0 * model[1](x), y).backward()
        parts = getattr(model[1].weight, quantity.savefield)
        assert parts.isfinite().all() and not parts.any()

    def test_retained_graphs(self, quantity):
        model, (x, y) = mlp(), data()
        loss = F.cross_entropy(model(x), y)
        results = []
        for last in (False, True):
            with extend(model, quantity):
                loss.backward(retain_graph=not last)
            results.append([getattr(p, quantity.savefield).clone() for p in model.parameters()])
        torch.testing.assert_close(*results)

    @pytest.mark.filterwarnings("ignore:Using backward")
    def test_create_graph(self, quantity):
        """Gradients can be differentiated; results hold no graph."""
        model, (x, y) = mlp(), data()
        with extend(model, quantity):
            F.cross_entropy(model(x), y).backward(create_graph=True)
        assert all(p.grad.requires_grad for p in model.parameters())
        assert not any(getattr(p, quantity.savefield).requires_grad for p in model.parameters())
        for p in model.parameters():
            p.grad = None

    def test_asking_for_some_inputs(self, quantity):
        model, (x, y) = mlp(), data()
        with extend(model, quantity) as curvature:
            F.cross_entropy(model(x), y).backward(inputs=[model[2].weight, model[0].bias])
        assert list(curvature[quantity.savefield]) == ["0.bias", "2.weight"]
        assert model[0].weight.grad is None
        got = [model[0].bias, model[2].weight]
        got = [getattr(p, quantity.savefield).clone() for p in got]
        with extend(model, quantity) as curvature:
            F.cross_entropy(model(x), y).backward()
        near(got[0], curvature[quantity.savefield]["0.bias"])
        near(got[1], curvature[quantity.savefield]["2.weight"])

    @pytest.mark.parametrize("asked", [True, False])
    def test_a_tensor_that_is_not_a_leaf(self, quantity, asked):
        (x, y), w, v = data(), torch.randn(4, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        leaf = (x @ w).detach().requires_grad_()
        results = []
        for hidden in (x @ w, leaf):
            with extend({"h": hidden, "v": v}, quantity) as curvature:
                F.cross_entropy(torch.tanh(hidden) @ v, y).backward(inputs=[hidden, v] if asked else None)
            results.append({name: value.clone() for name, value in curvature[quantity.savefield].items()})
        torch.testing.assert_close(*results)

    def test_two_names(self, quantity):
        (x, y), w = data(), torch.randn(4, 3, requires_grad=True)
        with extend({"a": w, "b": w}, quantity) as curvature:
            F.cross_entropy(x @ w, y).backward()
        values = curvature[quantity.savefield]
        assert values["a"] is values["b"] is getattr(w, quantity.savefield)

    def test_a_copy_of_a_used_model(self, quantity):
        model, (x, y) = mlp(), data()
        results = []
        for _ in range(2):
            with extend(model, quantity):
                F.cross_entropy(model(x), y).backward()
            results.append([getattr(p, quantity.savefield) for p in model.parameters()])
            model = copy.deepcopy(model)
        torch.testing.assert_close(*results)

    def test_nested_blocks(self, quantity):
        """The inner block sees its own loss, the outer one both."""
        model, (x, y) = mlp(), data()
        with extend(model, BatchL2Grad()) as outer:
            with extend(model, quantity) as inner:
                F.cross_entropy(model(x[:3]), y[:3], reduction="sum").backward()
            F.cross_entropy(model(x[3:]), y[3:], reduction="sum").backward()
        got = dict(inner[quantity.savefield])
        with extend(model, *{quantity, BatchL2Grad()}) as want:
            F.cross_entropy(model(x[:3]), y[:3], reduction="sum").backward()
        torch.testing.assert_close(got, dict(want[quantity.savefield]))
        for name, value in outer.batch_l2.items():
            near(value[:3], want.batch_l2[name])
            assert len(value) == 6


@pytest.mark.parametrize("hooked", ["parameter", "hidden"])
def test_hooks_of_the_user(hooked):
    """On a hidden tensor they change what is below; on a parameter, p.grad alone."""
    model, (x, y) = mlp(), data()
    hidden = model[1](model[0](x))
    (hidden if hooked == "hidden" else model[0].weight).register_hook(lambda g: 2 * g)
    with extend(model, BatchGrad(), Variance()):
        F.cross_entropy(model[2:](hidden), y).backward()
    for p in model.parameters():
        near(p.variance, p.grad_batch.var(0, unbiased=False))
    factor = 1 if hooked == "hidden" else 2
    near(factor * model[0].weight.grad_batch.sum(0), model[0].weight.grad)


def test_variance_notices_that_gradients_were_changed():
    model, (x, y) = mlp(), data()
    with pytest.raises(CurvatureError, match="changed in place"), extend(model, Variance()):
        F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()


def test_inner_products_of_two_passes_are_refused():
    model, (x, y) = mlp(), data()
    with pytest.raises(Exception, match="BatchDotGrad"), extend(model, BatchDotGrad()):
        F.cross_entropy(model(x), y).backward()
        F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("name", MODELS)
def test_an_error_half_way_leaves_gradients_as_without_the_block(name):
    """A penalty on the first parameter is noticed there, after all others were read."""
    model, loss = MODELS[name]()
    model.eval()
    total = lambda: loss() + next(model.parameters()).square().sum()  # noqa: E731
    total().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with pytest.raises(CurvatureError, match="penalty"), extend(model, BatchGrad()) as curvature:
        total().backward()
    assert not curvature.grad_batch
    for p, g in zip(model.parameters(), want, strict=True):
        assert not hasattr(p, "grad_batch")
        torch.testing.assert_close(p.grad, g, rtol=0, atol=0)


def test_threads():
    """Each its own model and block; then one model, each its own graph."""
    models, batches = [mlp() for _ in range(4)], [data() for _ in range(4)]
    results: list = [None] * 4

    def run(k, model, only):
        for _ in range(20):
            with extend(model, BatchGrad(), DiagGGNExact(), only=only) as curvature:
                F.cross_entropy(model(batches[k][0]), batches[k][1]).backward()
        results[k] = {field: {n: v.clone() for n, v in values.items()} for field, values in curvature.items()}

    def all_at_once(models, only):
        threads = [threading.Thread(target=run, args=(k, models[k], only[k])) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = list(results)
        for k in range(4):
            run(k, models[k], only[k])
        torch.testing.assert_close(together, results)

    all_at_once(models, [None] * 4)
    all_at_once([models[0]] * 4, ["0.weight", "0.bias", "2.weight", "4"])
