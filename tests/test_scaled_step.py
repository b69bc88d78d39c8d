"""Scaled steps against the rule written out, around several optimizers."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import CurvatureError, HesScale, extend
from curvext.optim import KFAC, AdaHesScale, NewtonCG, ScaledStep

from .models import mlp
from .stepping import X, Y, loss_of, same

pytestmark = pytest.mark.usefixtures("float64")

BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "AdaHesScale": lambda p: AdaHesScale(p, lr=0.05),
    "AdaHesScaleGN": lambda p: AdaHesScale(p, lr=0.05, gauss_newton=True),
}
with_bases = pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())
OPTIONS = [
    {},
    {"average": "absolute", "max_scale": 0.3, "delta": 1e-5, "beta": 0.5},
    {"curvature": "hesscale_gn", "beta": 0.5},
    {"curvature": "gradient", "delta": 1e-6},
]


def by_hand(make, steps, delta=1e-4, max_scale=1.0, beta=0.999, curvature="hesscale", average="square"):
    """Parameters and factors of the rule, with lists and a loop."""
    torch.manual_seed(3)
    model = mlp()
    optimizer, power = make(model.parameters()), 2 if average == "square" else 1
    v, factors = [0.0 for _ in model.parameters()], []
    for _ in range(steps):
        optimizer.zero_grad()
        with extend(model, HesScale(), HesScale(gauss_newton=True)):
            loss_of(model)().backward()
        h = [p.grad if curvature == "gradient" else getattr(p, curvature) for p in model.parameters()]
        v = [beta * a + (1 - beta) * b.abs() ** power for a, b in zip(v, h, strict=True)]
        start = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        u = [p.detach() - s for p, s in zip(model.parameters(), start, strict=True)]
        total = sum(float((a ** (1 / power) * b**2).sum()) for a, b in zip(v, u, strict=True))
        factors.append(min(max_scale, math.sqrt(2 * delta / total)))
        for p, s, b in zip(model.parameters(), start, u, strict=True):
            p.data = s + factors[-1] * b
    return list(model.parameters()), factors


def trained(make, steps, **options):
    torch.manual_seed(3)
    model = mlp()
    optimizer, factors = ScaledStep(make(model.parameters()), **options), []
    for _ in range(steps):
        optimizer.step(loss_of(model))
        factors.append(float(optimizer.scale))
    return model, optimizer, factors


@with_bases
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o.get("curvature", o.get("average", "defaults")))
def test_equals_the_rule(make, options):
    model, _, factors = trained(make, 5, **options)
    expected, expected_factors = by_hand(make, 5, **options)
    assert factors == pytest.approx(expected_factors, rel=1e-10)
    assert min(factors) < options.get("max_scale", 1.0)  # the rule has shortened something
    torch.testing.assert_close(list(model.parameters()), expected)


@with_bases
def test_a_large_delta_changes_nothing(make):
    model, _, factors = trained(make, 4, delta=1e9)
    torch.manual_seed(3)
    plain = mlp()
    optimizer = make(plain.parameters())
    for _ in range(4):
        if isinstance(optimizer, AdaHesScale):
            optimizer.step(loss_of(plain))
        else:
            optimizer.zero_grad()
            loss_of(plain)().backward()
            optimizer.step()
    assert factors == [1.0] * 4
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("eigenbasis", [False, True])
def test_around_an_optimizer_with_a_block_of_its_own(eigenbasis):
    models = []
    for wrap in (lambda optimizer: optimizer, lambda optimizer: ScaledStep(optimizer, delta=1e9)):
        torch.manual_seed(3)
        models.append(mlp())
        optimizer = wrap(KFAC(models[-1].parameters(), factors_every=2, eigenbasis=eigenbasis))
        for _ in range(4):
            optimizer.step(loss_of(models[-1]))
    same(*models)


@torch.no_grad()
def test_survives_a_step_size_that_diverges():
    losses = {}
    for delta in (1e-2, 1e9):
        torch.manual_seed(3)
        model = mlp()
        optimizer = ScaledStep(torch.optim.SGD(model.parameters(), lr=1e3), delta, beta=0.0)
        first = float(optimizer.step(loss_of(model)))
        for _ in range(60):
            optimizer.step(loss_of(model))
        losses[delta] = float(loss_of(model)())
    assert losses[1e-2] < first < losses[1e9]


@with_bases
def test_resumes_bit_by_bit(make):
    model, optimizer, _ = trained(make, 3)
    other = copy.deepcopy(model)
    again = ScaledStep(make(other.parameters()))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer))
    for each, one in ((model, optimizer), (other, again)):
        for _ in range(3):
            one.step(loss_of(each))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    assert again.param_groups is again.optimizer.param_groups


@with_bases
def test_copies_keep_their_own_groups(make):
    model, optimizer, _ = trained(make, 2)
    both = copy.deepcopy((model, optimizer))
    for each, one in ((model, optimizer), both):
        one.step(loss_of(each))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), both[0].parameters(), strict=True))
    assert both[1].param_groups is both[1].optimizer.param_groups is not optimizer.param_groups


def test_schedulers_and_new_groups():
    model = mlp()
    first, *rest = model.parameters()
    optimizer = ScaledStep(torch.optim.SGD([first], lr=1.0), delta=1e9)
    optimizer.add_param_group({"params": rest, "lr": 0.0})
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step(loss_of(model))
    scheduler.step()
    assert [g["lr"] for g in optimizer.optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups is optimizer.optimizer.param_groups


def test_schedulers_find_the_momentum():
    adam = torch.optim.Adam(mlp().parameters())
    torch.optim.lr_scheduler.OneCycleLR(ScaledStep(adam), max_lr=1.0, total_steps=4)
    assert adam.param_groups[0]["betas"][0] == 0.95  # where its cycle begins


def test_the_gradient_alone_needs_no_block(monkeypatch):
    model = mlp()
    monkeypatch.setattr("curvext.optim.block.extend", None)
    ScaledStep(torch.optim.SGD(model.parameters(), lr=0.1), curvature="gradient").step(loss_of(model))


def test_refuses_what_is_missing_or_stale():
    model = mlp()
    optimizer = ScaledStep(torch.optim.SGD(model.parameters(), lr=0.1))
    before = copy.deepcopy(model)
    loss_of(model)().backward()
    with pytest.raises(CurvatureError, match=r"ScaledStep: parameter .* no hesscale"):
        optimizer.step()
    same(before, model)
    optimizer.step(loss_of(model))
    with pytest.raises(CurvatureError, match="stale hesscale"):
        optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None and not hasattr(p, "hesscale") for p in model.parameters())


@pytest.mark.parametrize(
    "options", [{"delta": 0.0}, {"max_scale": -1.0}, {"beta": 1.0}, {"curvature": "exact"}, {"average": "cube"}]
)
def test_arguments(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ScaledStep(torch.optim.SGD(mlp().parameters(), lr=1.0), **options)


@pytest.mark.parametrize("make", [torch.optim.LBFGS, NewtonCG])
def test_refuses_optimizers_that_search(make):
    with pytest.raises(ValueError, match="evaluates the closure itself"):
        ScaledStep(make(mlp().parameters()))


@with_bases
def test_grad_scaler_scales_both(make):
    results = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(X.shape[1], 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer = ScaledStep(make(model.parameters()), delta=1e-6)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(3):
            optimizer.zero_grad()
            with extend(model, *optimizer._quantities()):
                scaler.scale(F.cross_entropy(model(X.double()), Y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results)
    with extend(model, *optimizer._quantities()):
        scaler.scale(F.cross_entropy(model(X.double()), Y)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(CurvatureError, match="gradients and not the curvature"):
        scaler.step(optimizer)
