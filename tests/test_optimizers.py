"""The contract of optimizers that step by a closure, for every one of them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import curvext.optim
from curvext import CurvatureError
from curvext.optim import ClosureOptimizer

from .optimizers import CASES, Net, equal, make, problem, values

pytestmark = pytest.mark.usefixtures("float64")
every = pytest.mark.parametrize("name", CASES)


def run(model, optimizer, steps, closure=None):
    return [optimizer.step(closure or problem(model)) for _ in range(steps)]


def test_every_optimizer_is_here():
    exported = {v for v in vars(curvext.optim).values() if isinstance(v, type) and issubclass(v, ClosureOptimizer)}
    missing = exported - {cls for cls, _ in CASES.values()} - {ClosureOptimizer}
    assert not missing, f"not in tests/optimizers.py: {sorted(cls.__name__ for cls in missing)}"


@every
def test_descends_and_reports(name):
    model = Net()
    optimizer = make(name, model.parameters(), weight_decay=1e-2)
    first = None
    for _ in range(8):
        before = values(model)
        penalty = 0.005 * sum(p.square().sum() for p in before)
        loss = optimizer.step(problem(model))
        report = optimizer.report
        first = report.before if first is None else first
        assert not loss.requires_grad and report.before == pytest.approx(float(loss + penalty), rel=1e-12)
        here = problem(model)()[0].detach() + 0.005 * sum(p.square().sum() for p in values(model))
        assert report.after == pytest.approx(float(here), rel=1e-12)
        assert report.moved == (not equal(before, values(model))) and report.reason
        assert report.after < report.before if report.moved else report.after == report.before
        assert report.evaluations > 0
    assert report.after < 0.97 * first


@every
def test_resumes_bit_by_bit(name):
    model, other = Net(), Net()
    optimizer = make(name, model.parameters())
    run(model, optimizer, 3)
    taken = optimizer.state_dict()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": taken}, buffer)
    snapshot = copy.deepcopy(taken)
    losses = run(model, optimizer, 3)
    assert repr(taken) == repr(snapshot), "an earlier state_dict changed"
    buffer.seek(0)
    saved = torch.load(buffer)  # weights_only, as is the default
    other.load_state_dict(saved["model"])
    resumed = make(name, other.parameters())
    resumed.load_state_dict(saved["optimizer"])
    assert equal(losses, run(other, resumed, 3)) and equal(values(model), values(other))
    assert resumed.report == optimizer.report


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy with a scheduler"])
def test_copies_go_on_alike(name, how):
    model = Net()
    optimizer = make(name, model.parameters())
    if "scheduler" in how:
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=99)
    run(model, optimizer, 2)
    pair = (model, optimizer)
    other, twin = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert type(twin) is type(optimizer) and twin.report == optimizer.report
    assert equal(run(model, optimizer, 2), run(other, twin, 2)) and equal(values(model), values(other))


@every
def test_groups_and_schedulers(name):
    model = Net()
    groups = [
        {"params": model.lower.parameters()},
        {"params": model.upper.parameters(), "lr": 0.0, "weight_decay": 1.0},
    ]
    optimizer = make(name, groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
    lower, upper = values(model.lower), values(model.upper)
    run(model, optimizer, 1)
    scheduler.step()
    assert optimizer.report.moved and equal(upper, values(model.upper)) and not equal(lower, values(model.lower))
    run(model, optimizer, 1)
    scheduler.step()
    before = values(model)
    run(model, optimizer, 1)
    assert not optimizer.report.moved and optimizer.report.reason and equal(before, values(model))


@every
def test_learning_rate_scales_the_step(name):
    """With two learning rates, the direction is scaled group by group."""
    moves = []
    for lr in (1e-3, 2e-3):
        model = Net()
        before = values(model)
        groups = [{"params": model.lower.parameters()}, {"params": model.upper.parameters(), "lr": lr}]
        optimizer = make(name, groups, lr=1e-3)
        run(model, optimizer, 1)
        moves.append([(b - a) / optimizer.report.details["step"] for a, b in zip(before, values(model), strict=True)])
    plain, scaled = ([m for m in move if m.any()] for move in moves)
    for k, (a, b) in enumerate(zip(plain, scaled, strict=True)):
        torch.testing.assert_close(a * (1 if k < 2 else 2), b, rtol=1e-6, atol=1e-12)


@every
def test_hooks(name):
    model = Net()
    optimizer = make(name, model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    run(model, optimizer, 1)
    assert seen == ["before", "after"]


@every
def test_maximize(name):
    up, down = Net(), Net()
    closure = problem(up)

    def negated():
        loss, z = closure()
        return -loss, z

    run(up, make(name, up.parameters(), maximize=True, weight_decay=0.1), 3, negated)
    run(down, make(name, down.parameters(), weight_decay=0.1), 3)
    for a, b in zip(up.parameters(), down.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@every
def test_parameters_of_others_get_no_gradients(name):
    model = Net()
    run(model, make(name, model.upper.parameters()), 2)
    assert all(p.grad is None for p in model.parameters())


def test_pairs_are_of_the_same_steps():
    """A parameter that was frozen for a while has none of those that the others have by now."""
    model = Net()
    optimizer = curvext.optim.LBFGS(model.parameters(), memory=2)
    for trained, steps in ((True, 3), (False, 3), (True, 1)):
        model.lower.requires_grad_(trained)
        run(model, optimizer, steps)
    assert optimizer.report.reason == "steepest descent" and optimizer.report.details["pairs"] == 1


@every
def test_frozen_unused_and_gradients_stay(name):
    model = Net()
    model.lower.bias.requires_grad_(False)
    kept = model.upper.weight.grad = torch.ones_like(model.upper.weight)
    bias, attributes = model.lower.bias.clone(), {k: set(vars(p)) for k, p in model.named_parameters()}
    optimizer = make(name, model.parameters())
    run(model, optimizer, 3)
    assert torch.equal(model.lower.bias, bias) and bool((model.unused == 1).all())
    assert model.upper.weight.grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in model.parameters() if p is not model.upper.weight)
    assert attributes == {k: set(vars(p)) for k, p in model.named_parameters()}
    assert model.lower.bias not in optimizer.state


@every
def test_parameters_come_and_go(name):
    model = Net()
    optimizer = make(name, model.lower.parameters())
    run(model, optimizer, 2)
    optimizer.add_param_group({"params": model.upper.parameters(), "lr": 0.5})
    before = values(model.upper)
    run(model, optimizer, 2)
    assert not equal(before, values(model.upper))
    model.lower.weight.requires_grad_(False)
    run(model, optimizer, 1)
    model.lower.weight.requires_grad_(True)
    run(model, optimizer, 2)
    with pytest.raises(ValueError, match="lr must not be negative"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": -1})
    assert len(optimizer.param_groups) == 2


@every
def test_without_improvement_nothing_changes(name):
    """A loss whose gradient leads up."""
    p = nn.Parameter(torch.tensor([[1e-3, -0.1, 0.3]]))
    before = p.detach().clone()

    def closure():
        z = torch.eye(3) @ p.mT
        told, true = (z - 3).square().sum(), -(z - 3).square().sum()
        return told + (true - told).detach(), z

    optimizer = make(name, [p])
    for _ in range(2):
        optimizer.step(closure)
        assert torch.equal(p, before) and not optimizer.report.moved and optimizer.report.reason
        assert optimizer.report.before == optimizer.report.after


@every
def test_at_the_minimum(name):
    p = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    before = p.detach().clone()
    optimizer = make(name, [p])

    def closure():
        z = torch.eye(2) @ p.mT - before.mT
        return z.square().sum(), z

    optimizer.step(closure)
    assert torch.equal(p, before) and "the gradient is zero" in optimizer.report.reason


@every
@pytest.mark.parametrize("after", [0, 2, 4])
def test_an_error_half_way_changes_nothing(name, after):
    model = Net()
    optimizer = make(name, model.parameters())
    run(model, optimizer, 1)
    before, calls = values(model), []

    def closure():
        calls.append(1)
        if len(calls) > after:
            raise KeyError("data")
        loss, z = problem(model)()
        return (loss if len(calls) == 1 else loss + 100), z

    with pytest.raises(KeyError):
        for _ in range(5):
            optimizer.step(closure)
            before = values(model)
    assert equal(before, values(model))


@every
def test_closures_that_are_refused(name):
    model = Net()
    closure, dropout = problem(model), nn.Dropout(0.5)
    before = values(model)

    def backward():
        loss, z = closure()
        loss.backward()
        return loss, z

    def random():
        loss, z = closure()
        return loss * dropout(torch.ones(1000)).mean(), z

    def detached():
        loss, z = closure()
        return loss.detach(), z

    def infinite():
        loss, z = closure()
        return loss / 0, z

    refused = {
        "backward": backward,
        "not deterministic": random,
        "does not depend": detached,
        "finite": infinite,
        "scalar loss": lambda: closure()[1],
        "one tensor or a list": lambda: (closure()[0], {"logits": closure()[1]}),
        "needs a closure": None,
    }
    for message, wrong in refused.items():
        model.zero_grad()
        with pytest.raises(CurvatureError, match=message):
            make(name, model.parameters()).step(wrong)
        assert equal(before, values(model))


@every
def test_refused_parameters_and_settings(name):
    embedding = nn.Embedding(5, 3, sparse=True)

    def closure():
        z = embedding(torch.tensor([0, 3]))
        return z.square().sum(), z

    with pytest.raises(CurvatureError, match="sparse"):
        make(name, embedding.parameters()).step(closure)
    for wrong in ({"lr": -1.0}, {"weight_decay": -1.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make(name, embedding.parameters(), **wrong)
    p = nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(CurvatureError, match="requires a gradient"):
        make(name, [p]).step(closure)
    model = Net()
    mixed = [{"params": model.lower.parameters()}, {"params": model.upper.parameters(), "maximize": True}]
    with pytest.raises(ValueError, match="maximize"):
        make(name, mixed).step(problem(model))


@every
def test_the_loss_may_be_made_of_derivatives(name):
    """As for differential equations: the closure differentiates, so it must never run without gradients."""
    model = Net()

    def closure():
        x = torch.linspace(-1, 1, 20).view(5, 4).requires_grad_()
        (slope,) = torch.autograd.grad(model(x)[:, 0].sum(), x, create_graph=True)
        return (slope - 1).square().mean(), slope

    optimizer = make(name, model.parameters())
    before = closure()[0]
    run(model, optimizer, 3, closure)
    assert closure()[0] < before


@every
def test_curvature_of_other_data(name):
    model = Net()
    optimizer = make(name, model.parameters())
    calls = []

    def curvature():
        calls.append(1)
        return problem(model, slice(0, 4))()

    if not optimizer.second_order:
        with pytest.raises(TypeError, match="curvature_closure"):
            optimizer.step(problem(model), curvature)
        return
    optimizer.step(problem(model), curvature)
    once = len(calls)
    optimizer.step(problem(model), curvature_closure=curvature)
    assert once >= 2 and len(calls) > once and optimizer.report.products
    plain = Net()
    make(name, plain.parameters()).step(problem(plain))
    other = Net()
    make(name, other.parameters()).step(problem(other), lambda: problem(other, slice(0, 4))())
    assert not equal(values(plain), values(other))


@every
def test_float32(name):
    model = Net().float()
    optimizer = make(name, model.parameters())
    losses = run(model, optimizer, 5)
    assert losses[-1] < losses[0] and all(p.dtype == torch.float32 for p in model.parameters())


@every
def test_one_group_of_named_parameters_or_tensors_of_settings(name):
    model = Net()
    run(model, optimizer := make(name, model.named_parameters(), lr=torch.tensor(0.5)), 2)
    assert optimizer.report.after < optimizer.report.before
