"""AdaHesScale against its definition entry by entry, and against what torch.optim promises."""

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import CurvatureError, HesScale, extend
from curvext.optim import AdaHesScale, adahesscale

from .models import mlp
from .stepping import STEPS, X, Y, block_step, loss_of, parameters, same

OPTIONS = {
    "defaults": {},
    "no momentum": {"betas": (0.0, 0.9)},
    "large eps": {"eps": 0.3},
    "weight decay": {"weight_decay": 0.1},
    "decoupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "maximize with weight decay": {"maximize": True, "weight_decay": 0.1},
    "gauss_newton": {"gauss_newton": True},
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "sqrt": {"variant": "sqrt"},
    "newton": {"variant": "newton", "eps": 0.3},
    "foreach with everything": {"foreach": True, "weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.6)},
}
with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def entry(theta, gs, hs, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, variant):
    """One entry after ``len(gs)`` steps, in Python numbers; ``gs`` and ``hs`` do not depend on it."""
    m = v = 0.0
    for t, (g, h) in enumerate(zip(gs, hs, strict=True), 1):
        if maximize:
            g = -g
        if weight_decay and decoupled_weight_decay:
            theta -= lr * weight_decay * theta
        elif weight_decay:
            g += weight_decay * theta
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * (h**2 if variant == "adam" else abs(h))
        unbiased = v / (1 - betas[1] ** t)
        theta -= lr * (m / (1 - betas[0] ** t)) / ((unbiased if variant == "newton" else math.sqrt(unbiased)) + eps)
    return theta


def set_both(p, g, h, field="hesscale"):
    p.grad = g.clone()
    setattr(p, field, h.clone())


class TestUpdate:
    def test_defaults_are_the_reference_s(self):
        defaults = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        optimizer = AdaHesScale([nn.Parameter(torch.zeros(1))])
        assert {name: optimizer.defaults[name] for name in defaults} == defaults
        assert set(inspect.signature(AdaHesScale).parameters) - {"params"} <= set(optimizer.defaults)

    @with_options
    def test_equals_the_definition_entry_by_entry(self, float64, options):
        start = [torch.randn(3, 2), torch.randn(()), torch.randn(5)]
        ps = [nn.Parameter(p.clone()) for p in start]
        optimizer = AdaHesScale(ps, lr=0.02, **options)
        field = "hesscale_gn" if options.get("gauss_newton") else "hesscale"
        gs, hs = [[[torch.randn_like(p) for _ in range(6)] for p in ps] for _ in range(2)]
        for t in range(6):
            for p, g, h in zip(ps, gs, hs, strict=True):
                set_both(p, g[t], h[t], field)
            optimizer.step()
        names = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize", "variant")
        given = {name: optimizer.defaults[name] for name in names}
        for p, before, g, h in zip(ps, start, gs, hs, strict=True):
            g, h = (torch.stack(steps).reshape(6, -1).T.tolist() for steps in (g, h))
            want = [entry(theta, *both, **given) for theta, *both in zip(before.flatten().tolist(), g, h, strict=True)]
            torch.testing.assert_close(p.detach().flatten(), torch.tensor(want), rtol=1e-12, atol=1e-14)

    @with_options
    @pytest.mark.parametrize("foreach", [None, True])
    def test_foreach_equals_the_loop(self, options, foreach):
        model = mlp()
        model.append(nn.Linear(3, 3, bias=False))
        other = copy.deepcopy(model)
        for each, how in ((model, False), (other, foreach)):
            optimizer = AdaHesScale(each.parameters(), lr=1e-3, **{**options, "foreach": how})
            for _ in range(4):
                optimizer.step(loss_of(each))
        same(model, other)

    def test_parameters_are_split_by_size(self, monkeypatch):
        sizes = []
        monkeypatch.setattr(adahesscale, "_update", lambda group, rows: sizes.append([p.numel() for p, *_ in rows]))
        ps = [nn.Parameter(torch.randn(n)) for n in (10, 20, 1 << 15, 30, 1 << 14, 40)]
        for foreach in (None, True, False):
            for p in ps:
                set_both(p, torch.randn_like(p), torch.randn_like(p))
            AdaHesScale(ps, foreach=foreach).step()
        assert sizes[:5] == [[10, 20], [1 << 15], [30], [1 << 14], [40]]
        assert [len(size) for size in sizes[5:]] == [6] + [1] * 6

    def test_the_sign_of_the_diagonal_does_not_matter(self):
        p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        g, h = torch.randn(4), torch.randn(4)
        set_both(p, g, h)
        set_both(q, g, -h)
        AdaHesScale([p, q], lr=0.1).step()
        assert torch.equal(p, q)

    def test_scaling_the_loss_changes_nothing_but_eps(self, float64):
        model = mlp()
        other = copy.deepcopy(model)
        for each, scale in ((model, 1.0), (other, 7.0)):
            optimizer = AdaHesScale(each.parameters(), lr=1e-3, eps=0)
            for _ in range(3):
                optimizer.step(lambda each=each, scale=scale: scale * loss_of(each)())
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

    def test_first_step_is_the_gradient_over_the_curvature(self, float64):
        model = mlp()
        before = parameters(model)
        optimizer = AdaHesScale(model.parameters(), lr=0.1)
        optimizer.step(loss_of(model))
        for p, b in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), b - 0.1 * p.grad / (p.hesscale.abs() + 1e-8), rtol=1e-10, atol=1e-12)


class TestBlock:
    """Who runs the block, and with which closure, makes no difference."""

    @pytest.mark.parametrize("gauss_newton", [False, True])
    @pytest.mark.parametrize("how", STEPS, ids=STEPS.keys())
    def test_all_ways_are_one(self, how, gauss_newton):
        model = mlp()
        other = copy.deepcopy(model)
        losses = []
        for each, step in ((model, block_step), (other, STEPS[how])):
            optimizer = AdaHesScale(each.parameters(), lr=1e-3, gauss_newton=gauss_newton)
            losses.append([step(each, optimizer).item() for _ in range(4)])
        same(model, other)
        assert losses[0] == losses[1]

    def test_the_diagonal_is_the_quantity_s(self, float64):
        model = mlp()
        with extend(model, HesScale(), HesScale(gauss_newton=True)) as want:
            loss_of(model)().backward()
        for gauss_newton in (False, True):
            fields = ("hesscale_gn", "hesscale") if gauss_newton else ("hesscale", "hesscale_gn")
            AdaHesScale(model.parameters(), lr=0.0, gauss_newton=gauss_newton).step(loss_of(model))
            for name, p in model.named_parameters():
                assert torch.equal(getattr(p, fields[0]), want[fields[0]][name])

    def test_groups_of_both_kinds(self):
        model = mlp()
        groups = [{"params": model[0].parameters(), "gauss_newton": True}, {"params": model[2:].parameters()}]
        optimizer = AdaHesScale(groups, lr=1e-3)
        optimizer.step(loss_of(model))
        for p, h in ((model[0].weight, model[0].weight.hesscale_gn), (model[2].weight, model[2].weight.hesscale)):
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], (1 - 0.999) * h**2)

    def test_several_backwards_in_a_closure_accumulate(self, float64):
        model = mlp()
        other = copy.deepcopy(model)
        x = X.double()

        def parts():
            for rows in (slice(0, 4), slice(4, 7)):
                F.cross_entropy(other(x[rows]), Y[rows], reduction="sum").backward()

        AdaHesScale(model.parameters(), lr=1e-3).step(lambda: F.cross_entropy(model(x), Y, reduction="sum"))
        AdaHesScale(other.parameters(), lr=1e-3).step(parts)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_gradients_of_before_do_not_count(self):
        model = mlp()
        other = copy.deepcopy(model)
        loss_of(other)().backward()
        for each in (model, other):
            AdaHesScale(each.parameters(), lr=1e-3).step(loss_of(each))
        same(model, other)

    def test_under_no_grad(self):
        model = mlp()
        with torch.no_grad():
            AdaHesScale(model.parameters()).step(loss_of(model))
        assert all(p.grad is not None for p in model.parameters())

    def test_closure_that_returns_no_loss(self):
        model = mlp()
        with pytest.raises(TypeError, match="must return the loss, a tensor, got NoneType"):
            AdaHesScale(model.parameters()).step(lambda: None)

    def test_closure_with_a_backward_that_is_not_seen(self):
        model = mlp()

        def closure():
            loss = loss_of(model)()
            torch.autograd.backward(loss)
            return loss

        with pytest.raises(CurvatureError, match=r"torch\.autograd\.backward is not seen"):
            AdaHesScale(model.parameters()).step(closure)

    def test_error_in_the_closure_leaves_everything(self):
        model = mlp()
        before, optimizer = parameters(model), AdaHesScale(model.parameters(), lr=1e-3)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        optimizer.step(loss_of(model))

    def test_curvature_error_updates_nothing(self):
        """A loss that is not below the parameters."""
        model = mlp()
        before = parameters(model)
        with pytest.raises(CurvatureError, match="does not depend on any"):
            AdaHesScale(model.parameters(), lr=1e-3).step(loss_of(mlp()))
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


class TestOptimizer:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"lr": -1}, "lr must not be negative, got -1"),
            ({"lr": math.nan}, "lr must not be negative, got nan"),
            ({"eps": -1e-8}, "eps must not"),
            ({"weight_decay": -0.1}, "weight_decay must not"),
            ({"betas": (1.0, 0.9)}, r"betas must be two numbers from \[0, 1\), got \(1\.0, 0\.9\)"),
            ({"betas": (0.9, -0.1)}, "betas must"),
            ({"betas": (0.9,)}, "betas must"),
            ({"betas": 0.9}, "betas must"),
            ({"variant": "adagrad"}, "variant must be .adam., .sqrt. or .newton."),
        ],
        ids=str,
    )
    def test_bad_arguments(self, options, match):
        p = nn.Parameter(torch.zeros(1))
        with pytest.raises(ValueError, match=match):
            AdaHesScale([p], **options)
        with pytest.raises(ValueError, match=match):
            AdaHesScale([{"params": [p], **options}])
        optimizer = AdaHesScale([p])
        with pytest.raises(ValueError, match=match):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], **options})
        assert len(optimizer.param_groups) == 1

    def test_two_parameters_of_one_name(self):
        p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        with pytest.raises(ValueError, match="two parameters named 'w'"):
            AdaHesScale([("w", p), ("w", q)])

    def test_no_parameters(self):
        with pytest.raises(ValueError, match="empty parameter list"):
            AdaHesScale([])

    def test_groups_have_options_of_their_own(self):
        model = mlp()
        other = copy.deepcopy(model)
        last = {"lr": 1e-2, "betas": (0.5, 0.9), "weight_decay": 0.1}
        together = AdaHesScale([{"params": model[:4].parameters()}, {"params": model[4].parameters(), **last}], lr=1e-3)
        apart = [AdaHesScale(other[:4].parameters(), lr=1e-3), AdaHesScale(other[4].parameters(), **last)]
        for _ in range(3):
            block_step(model, together)
            with extend(other):
                loss_of(other)().backward()
            for optimizer in apart:
                optimizer.step()
                optimizer.zero_grad()
        same(model, other)

    def test_add_param_group(self):
        model = mlp()
        optimizer = AdaHesScale(model[:4].parameters(), lr=1e-3)
        optimizer.step(loss_of(model))
        optimizer.add_param_group({"params": model[4].parameters(), "lr": 0.5})
        optimizer.step(loss_of(model))
        assert optimizer.state[model[0].weight]["step"] == 2 and optimizer.state[model[4].weight]["step"] == 1
        assert optimizer.param_groups[1]["eps"] == 1e-8

    @pytest.mark.parametrize("tensor", [False, True])
    def test_schedulers(self, tensor):
        model = mlp()
        other = copy.deepcopy(model)
        optimizer = AdaHesScale(model.parameters(), lr=torch.tensor(0.25) if tensor else 0.25)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        by_hand = AdaHesScale(other.parameters())
        for t in range(3):
            optimizer.step(loss_of(model))
            scheduler.step()
            by_hand.param_groups[0]["lr"] = 0.25 * 0.5**t
            by_hand.step(loss_of(other))
        same(model, other)

    @pytest.mark.parametrize("how", ["state_dict", "torch.save", "pickle", "deepcopy"])
    @pytest.mark.parametrize("foreach", [False, True])
    def test_resumed_equals_uninterrupted(self, how, foreach):
        model = mlp()
        optimizer = AdaHesScale(model.parameters(), lr=1e-3, foreach=foreach, weight_decay=0.01)
        for _ in range(3):
            optimizer.step(loss_of(model))
        resumed, continued = _copied(how, model, optimizer)
        for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
            for key in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(optimizer.state[p][key], continued.state[q][key])
        for _ in range(3):
            optimizer.step(loss_of(model))
            continued.step(loss_of(resumed))
        same(model, resumed)

    def test_state_dict_holds_no_diagonals(self):
        model = mlp()
        optimizer = AdaHesScale(model.parameters())
        optimizer.step(loss_of(model))
        state = optimizer.state_dict()["state"]
        assert all(set(entries) == {"step", "exp_avg", "exp_avg_sq"} for entries in state.values())

    def test_hooks(self):
        model, seen = mlp(), []
        optimizer = AdaHesScale(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        optimizer.step(lambda: (seen.append("closure"), loss_of(model)())[1])
        assert seen == ["before", "closure", "after"]

    def test_keeps_the_layout_and_type_of_parameters(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)).to(torch.bfloat16)
        model = model.to(memory_format=torch.channels_last)
        optimizer = AdaHesScale(model.parameters(), lr=1e-3)
        x = torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)
        optimizer.step(lambda: model(x).square().sum())
        state = optimizer.state[model[0].weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        assert state["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        assert all(p.isfinite().all() for p in model.parameters())

    def test_prints(self):
        assert "gauss_newton: True" in repr(AdaHesScale([nn.Parameter(torch.zeros(1))], gauss_newton=True))


def _copied(how, model, optimizer):
    if how == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    if how == "deepcopy":
        return copy.deepcopy((model, optimizer))
    resumed = copy.deepcopy(model)
    state = copy.deepcopy(optimizer.state_dict())
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    continued = AdaHesScale(resumed.parameters())
    continued.load_state_dict(state)
    return resumed, continued


class TestTraining:
    """The small run of the reference: digits, 64-64-64-10 tanh, batches of 32."""

    def train(self, seed, epochs=20, **options):
        digits = pytest.importorskip("sklearn.datasets").load_digits()
        x = torch.tensor(digits.data, dtype=torch.float32) / 16
        y = torch.tensor(digits.target)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator)
        train, test = order[:1437], order[1437:]
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
        optimizer = AdaHesScale(model.parameters(), **options)
        for _ in range(epochs):
            for rows in train[torch.randperm(len(train), generator=generator)].split(32):
                optimizer.step(lambda rows=rows: F.cross_entropy(model(x[rows]), y[rows]))
        with torch.no_grad():
            accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
            return F.cross_entropy(model(x[train]), y[train]).item(), accuracy

    @pytest.mark.parametrize(("gauss_newton", "lr"), [(False, 1e-2), (True, 1e-3)])
    @pytest.mark.parametrize("seed", range(3))
    def test_the_small_run_of_the_reference(self, seed, gauss_newton, lr):
        loss, accuracy = self.train(seed, lr=lr, gauss_newton=gauss_newton)
        assert loss < 0.01 and accuracy > 0.96
