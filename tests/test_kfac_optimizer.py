"""The K-FAC optimizer against its formula on dense matrices, and the contract of an optimizer without line search."""

from __future__ import annotations

import copy
import io
import math
import pickle
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvext
from curvext import CurvatureError, extend
from curvext.optim import KFAC
from curvext.optim.checked import numbers

from .optimizers import digits, equal, values

pytestmark = pytest.mark.usefixtures("float64")
EXACT = curvext.KFLR()


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))


def loss(model, k=0):
    generator = torch.Generator().manual_seed(k)
    return F.cross_entropy(model(torch.randn(12, 4, generator=generator)), torch.arange(12) % 3)


def kron(factors):
    dense = [f.diag() if f.dim() == 1 else f for f in factors]
    return torch.kron(*dense) if len(dense) == 2 else dense[0]


@pytest.mark.parametrize("clip", [math.inf, 1e-4])
@pytest.mark.parametrize("decoupled", [False, True])
def test_three_steps_by_hand(clip, decoupled):
    """Undivided damping in factors is worked out here from the means of their eigenvalues."""
    model, twin = net(), net()
    lr, μ, λ, decay, wd = 0.1, 0.5, 0.02, 0.7, 0.03
    optimizer = KFAC(model.parameters(), lr, μ, λ, decay, wd, kl_clip=clip, inverses_every=2, quantity=EXACT,
                     decoupled_weight_decay=decoupled)  # fmt: skip
    shift = λ + (0 if decoupled else wd)
    average, inverse, m = {}, {}, {}
    for step in range(3):
        optimizer.step(lambda: loss(model, step))  # noqa: B023
        twin.zero_grad()
        with extend(twin, EXACT):
            loss(twin, step).backward()
        steps, total = {}, 0.0
        for p in twin.parameters():
            new = [f.clone() for f in p.kflr]
            average[p] = [decay * a + (1 - decay) * b for a, b in zip(average.get(p, new), new, strict=True)]
            if step != 1:
                means = [f.diagonal().mean() for f in average[p]]
                root = [mean * (shift / math.prod(means)) ** (1 / len(means)) for mean in means]
                damped = [f + s * torch.eye(len(f)) for f, s in zip(average[p], root, strict=True)]
                inverse[p] = kron(damped).inverse()
            g = p.grad + (0 if decoupled else wd) * p.detach()
            steps[p] = (inverse[p] @ g.flatten()).view_as(p)
            total += float((steps[p] * g).sum())
        ν = min(1.0, math.sqrt(clip / (lr**2 * total)))
        for p, u in steps.items():
            m[p] = μ * m.get(p, 0) + ν * u
            p.data = p.data * (1 - lr * wd if decoupled else 1) - lr * m[p]
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_columns_are_drawn_anew():
    """At every step and with every seed; the same again where both are."""
    seen = []
    for seed in (0, 1, 0):
        model = net()
        optimizer = KFAC(model.parameters(), lr=0.0, decay=0.0, seed=seed)
        for _ in range(3):
            optimizer.step(lambda: loss(model))  # noqa: B023
            seen.append(optimizer.state[model[3].weight]["factors"][0])
    assert all(not torch.equal(a, b) for k, a in enumerate(seen[:6]) for b in seen[:k])
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[6:], strict=True))


def test_ekfac_by_hand():
    """Second step: the eigenvectors of the first, the curvature along them averaged with the first eigenvalues."""
    model, twin = net(), net()
    quantity = curvext.KFAC(mc_samples=3)
    optimizer = KFAC(model.parameters(), 0.1, 0.0, 0.02, 0.7, kl_clip=math.inf, eigenbasis=True, quantity=quantity)
    optimizer.step(lambda: loss(model))
    twin.load_state_dict(model.state_dict())
    basis = {name: optimizer._basis(p) for name, p in model.named_parameters()}
    optimizer.step(lambda: loss(model, 1))
    with extend(twin, quantity, curvext.EKFAC(3, basis=basis), generator=numbers(0, 1)):
        loss(twin, 1).backward()
    for (name, p), after in zip(twin.named_parameters(), model.parameters(), strict=True):
        Q = torch.eye(1)
        for vectors in basis[name].vectors:
            Q = torch.kron(Q, vectors)
        λ = 0.7 * basis[name].values + 0.3 * p.ekfac.values
        assert not torch.allclose(λ, basis[name].values)
        u = Q @ ((Q.T @ p.grad.flatten()) / (λ.flatten() + 0.02))
        torch.testing.assert_close(after.detach(), p.detach() - 0.1 * u.view_as(p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"eigenbasis": True}, {"factors_every": 2, "inverses_every": 3}])
def test_resumes_and_copies_bit_by_bit(settings):
    model = net()
    optimizer = KFAC(model.parameters(), **settings)
    for k in range(4):
        optimizer.step(lambda: loss(model, k))  # noqa: B023
    buffer = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], buffer)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    other = net(1)
    resumed = KFAC(other.parameters(), **settings)
    buffer.seek(0)
    for x, state in zip((other, resumed), torch.load(buffer), strict=True):
        x.load_state_dict(state)
    for one, its in [(model, optimizer), (other, resumed), *pairs]:
        for k in range(4, 8):
            its.step(lambda: loss(one, k))  # noqa: B023
        assert equal(values(one), values(model))


def test_blocks_of_ones_own_and_closures_that_call_backward():
    a, b, c = net(), net(), net()
    settings = {"quantity": EXACT, "factors_every": 2}
    first, second, third = (KFAC(m.parameters(), **settings) for m in (a, b, c))

    def backward():
        third.zero_grad()
        found = loss(c, k)
        found.backward()
        return found

    for k in range(4):
        first.step(lambda: loss(a, k))  # noqa: B023
        second.zero_grad()
        with extend(b, EXACT) if k % 2 == 0 else torch.enable_grad():
            loss(b, k).backward()
        second.step()
        third.step(backward)
        assert equal(values(a), values(b)) and equal(values(a), values(c))
    assert not any(hasattr(p, "kflr") for p in a.parameters())


class Words(nn.Module):
    """An embedding, a convolution, a normalisation and a bare parameter."""

    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(7, 4), nn.Conv1d(4, 6, 3, groups=2)
        self.norm, self.scale, self.frozen = nn.LayerNorm(6), nn.Parameter(torch.ones(())), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, words):
        z = self.conv(self.table(words).mT).mean(-1)
        return self.scale * self.frozen(self.norm(z))


@pytest.mark.parametrize("eigenbasis", [False, True])
def test_all_kinds_of_parameters(eigenbasis):
    torch.manual_seed(0)
    model = Words()
    words, y = torch.randint(0, 6, (20, 5)), torch.randint(0, 6, (20,))
    optimizer = KFAC(model.parameters(), eigenbasis=eigenbasis, weight_decay=1e-4)
    frozen, before = values(model.frozen), values(model)
    losses = [float(optimizer.step(lambda: F.cross_entropy(model(words), y)).detach()) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert equal(frozen, values(model.frozen)) and bool((model.unused == 1).all())
    moved = [not torch.equal(a, b) for a, b in zip(before, values(model), strict=True)]
    assert sum(moved) == 6


def test_groups_schedulers_and_maximize():
    model, other = net(), net()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.0}]
    optimizer = KFAC(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 1 else 0.0)
    lower, upper = values(model[0]), values(model[3])
    optimizer.step(lambda: loss(model))
    scheduler.step()
    assert equal(upper, values(model[3])) and not equal(lower, values(model[0]))
    lower = values(model[0])
    optimizer.step(lambda: loss(model))
    assert equal(lower, values(model[0]))
    optimizer.add_param_group({"params": [*model[2].parameters()]})
    optimizer.step(lambda: loss(model, 1))
    up = KFAC(other.parameters(), maximize=True, quantity=EXACT, lr=0.1)
    assert up.step(lambda: loss(other)).detach() < loss(other).detach()


def test_groups_keep_to_their_own_settings():
    """The upper layer's factors are due at every other step, and serve as an eigenbasis."""
    model, apart = net(), [net(), net()]
    upper = {"factors_every": 2, "damping": 0.3, "eigenbasis": True, "kl_clip": 1e-2, "inverses_every": 3}
    every = {"quantity": curvext.KFAC(empirical=True)}
    optimizer = KFAC([{"params": model[:3].parameters()}, {"params": model[3].parameters(), **upper}], **every)
    alone = KFAC(apart[0][:3].parameters(), **every), KFAC(apart[1][3].parameters(), **every, **upper)
    for k in range(5):
        for one, its in [*zip(apart, alone, strict=True), (model, optimizer)]:
            one.load_state_dict(model.state_dict())
            its.step(lambda: loss(one, k))  # noqa: B023
        together = [optimizer.state[p] for p in model.parameters()]
        for a, b in zip(together, [*alone[0].state.values(), *alone[1].state.values()], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_what_joins_later_has_a_group_of_its_own():
    """Also after a group that is still empty."""
    model = net()
    model[3].requires_grad_(False)
    groups = [{"params": []}, {"params": model[:3].parameters()}], [{"params": []}, {"params": model.parameters()}]
    apart, together = (KFAC(group, factors_every=3) for group in groups)
    for optimizer in (apart, together):
        optimizer.step(lambda: loss(model))
    model[3].requires_grad_(True)
    with pytest.raises(CurvatureError, match=r"every 3 steps; .* a group of its own"):
        together.step(lambda: loss(model))
    apart.add_param_group({"params": model[3].parameters()})
    before = values(model)
    apart.step(lambda: loss(model))
    assert not any(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_refused():
    model = net()
    optimizer = KFAC(model.named_parameters())
    loss(model).backward()
    before = values(model)
    with pytest.raises(CurvatureError, match=r"'0.weight' has a gradient and no kfac"):
        optimizer.step()
    with pytest.raises(CurvatureError, match="unscaled the gradients and not the curvature"):
        optimizer.found_inf = torch.zeros(())
        optimizer.step()
    table = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(CurvatureError, match="sparse"):
        KFAC(table.parameters()).step(lambda: table(torch.tensor([1])).square().sum())
    assert equal(before, values(model))
    wrong = [{"lr": -1}, {"momentum": 1}, {"decay": -0.1}, {"damping": math.nan}, {"kl_clip": 0}, {"factors_every": 0},
             {"inverses_every": 1.5}]  # fmt: skip
    for settings in wrong:
        with pytest.raises(ValueError, match=next(iter(settings))):
            KFAC(model.parameters(), **settings)
    with pytest.raises(ValueError, match="eigenbasis"):
        KFAC(model.parameters(), eigenbasis=True, quantity=EXACT)


def test_factors_of_an_overflow_are_not_used_later():
    model = net()
    optimizer, scaler = KFAC(model.parameters(), inverses_every=1), torch.amp.GradScaler("cpu")
    factors, blocks = (1.0, math.inf, 1.0), [*(extend(model, curvext.KFAC()) for _ in range(2)), nullcontext()]
    for factor, block in zip(factors, blocks, strict=True):
        model.zero_grad()
        with block:
            scaler.scale(factor * loss(model)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(bool(v.isfinite().all()) for state in optimizer.state.values() for v in state["factors"])


@pytest.mark.parametrize("eigenbasis", [False, True])
def test_factors_that_are_not_finite(eigenbasis):
    model = net()
    optimizer = KFAC(model.named_parameters(), eigenbasis=eigenbasis)
    before = values(model)
    with pytest.raises(CurvatureError, match=r"KFAC: the factors of parameter '0.weight': (a|the) "):
        optimizer.step(lambda: math.nan * loss(model))
    assert equal(before, values(model))


def test_gradient_scaling():
    """Under GradScaler, gradients and factors of the scaled loss make the same step."""
    steps = []
    for scale in (None, 64.0):
        model = net()
        optimizer = KFAC(model.parameters(), quantity=EXACT, lr=0.1)
        if scale:
            optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(scale)
        with extend(model, EXACT):
            (loss(model) * (scale or 1)).backward()
        optimizer.step()
        steps.append(values(model))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"eigenbasis": True}], ids=["KFAC", "EKFAC"])
def test_digits(settings):
    """An epoch of batches of 64: Adam is at 0.92 after that with the best of four learning rates."""
    x, x_test, y, y_test = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = KFAC(model.parameters(), **settings)
    for part in torch.randperm(len(x)).split(64):
        optimizer.step(lambda: F.cross_entropy(model(x[part]), y[part]))  # noqa: B023
    assert float((model(x_test).argmax(1) == y_test).double().mean()) >= 0.92
