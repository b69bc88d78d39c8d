"""What AdaHesScale does about diagonals that it cannot use, and about scaled ones."""

import math
import weakref

import pytest
import torch
from torch import nn

from curvext import CurvatureError, extend
from curvext.optim import AdaHesScale

from .models import mlp
from .stepping import loss_of, parameters, same


class TestDiagonals:
    """Missing, used before, of another shape: the error names the parameter, and nothing is updated."""

    def ready(self, named=True):
        model = mlp()
        optimizer = AdaHesScale(model.named_parameters() if named else model.parameters(), lr=1e-3)
        with extend(model):
            loss_of(model)().backward()
        return model, optimizer

    def refused(self, model, optimizer, match):
        before = parameters(model)
        with pytest.raises(CurvatureError, match=match):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))

    def test_missing(self):
        model, optimizer = self.ready()
        del model[4].weight.hesscale
        self.refused(model, optimizer, r"parameter '4\.weight' has a gradient and no hesscale")

    def test_of_the_other_kind(self):
        model, _ = self.ready()
        optimizer = AdaHesScale(model.parameters(), gauss_newton=True)
        self.refused(model, optimizer, r"'params\[0\] of group 0' has a gradient and no hesscale_gn.*gauss_newton=True")

    def test_named_by_its_place(self):
        model = mlp()
        optimizer = AdaHesScale([{"params": model[0].parameters()}, {"params": model[2:].parameters()}])
        with extend(model):
            loss_of(model)().backward()
        del model[4].weight.hesscale
        self.refused(model, optimizer, r"'params\[2\] of group 1' has")

    @pytest.mark.parametrize("new_gradient", [False, True])
    def test_stale(self, new_gradient):
        model, optimizer = self.ready()
        optimizer.step()
        if new_gradient:
            loss_of(model)().backward()
        self.refused(model, optimizer, r"'0\.weight' has a stale hesscale: an earlier step has used it")

    def test_stale_without_zero_grad_after_gradients_were_dropped(self):
        model, optimizer = self.ready()
        optimizer.step()
        model.zero_grad()
        loss_of(model)().backward()
        self.refused(model, optimizer, "stale")

    def test_zero_grad_drops_it(self):
        for set_to_none in (True, False):
            model, optimizer = self.ready()
            optimizer.zero_grad(set_to_none)
            assert not any(hasattr(p, "hesscale") for p in model.parameters())
            loss_of(model)().backward()
            self.refused(model, optimizer, "no hesscale")

    def test_a_new_block_makes_a_new_one(self):
        model, optimizer = self.ready()
        optimizer.step()
        with extend(model):
            loss_of(model)().backward()
        optimizer.step()

    def test_changed_in_place_it_is_another(self):
        model, optimizer = self.ready()
        optimizer.step()
        for p in model.parameters():
            p.hesscale.mul_(2)
        optimizer.step()

    def test_used_by_another_optimizer_it_is_not_stale(self):
        model, optimizer = self.ready()
        optimizer.step()
        AdaHesScale(model.parameters()).step()

    def test_shape(self):
        model, optimizer = self.ready()
        model[0].bias.hesscale = torch.zeros(1)
        self.refused(model, optimizer, r"'0\.bias' has a hesscale of shape \(1,\), not \(5,\)")

    def test_used_diagonals_are_not_kept_alive(self):
        model, optimizer = self.ready()
        optimizer.step()
        used = [weakref.ref(p.hesscale) for p in model.parameters()]
        assert len(optimizer._used) == len(used)
        optimizer.zero_grad()
        assert all(ref() is None for ref in used) and len(optimizer._used) == 0

    def test_sparse_gradient(self):
        model = nn.Embedding(5, 3, sparse=True)
        optimizer = AdaHesScale(model.named_parameters())
        with pytest.raises(CurvatureError, match="'weight' has a sparse gradient"):
            optimizer.step(lambda: model(torch.tensor([1, 2])).square().sum())

    def test_complex(self):
        p = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(CurvatureError, match="'w' is complex"):
            AdaHesScale([("w", p)])

    def test_parameters_without_a_gradient_are_skipped(self):
        model = mlp()
        unused = nn.Parameter(torch.ones(2))
        model[0].requires_grad_(False)
        before = parameters(model[0])
        optimizer = AdaHesScale([*model.parameters(), unused], lr=1e-3)
        optimizer.step(loss_of(model))
        assert all(torch.equal(p, b) for p, b in zip(model[0].parameters(), before, strict=True))
        assert torch.equal(unused, torch.ones(2))
        assert len(optimizer.state) == 4

    def test_frozen_on_the_way(self):
        model, optimizer = self.ready()
        optimizer.step()
        model[0].requires_grad_(False)  # its last gradient is still there
        before = parameters(model[0])
        with extend(model):
            loss_of(model)().backward()
        optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip(model[0].parameters(), before, strict=True))


class TestGradScaler:
    def scaled(self, scale, steps=2, overflow=False, unscale=False):
        torch.manual_seed(0)
        model = mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = AdaHesScale(model.parameters(), lr=1e-3, eps=1e-3)
        for _ in range(steps):
            optimizer.zero_grad()
            with extend(model):
                scaler.scale(loss_of(model)()).backward()
            if overflow:
                model[0].weight.grad[0, 0] = math.inf
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return model

    def test_scale_makes_no_difference(self):
        torch.manual_seed(0)
        model = mlp()
        optimizer = AdaHesScale(model.parameters(), lr=1e-3, eps=1e-3)
        for _ in range(2):
            optimizer.step(loss_of(model))
        same(model, self.scaled(1024.0))  # a power of two

    def test_overflow_skips_the_step(self):
        torch.manual_seed(0)
        same(mlp(), self.scaled(1024.0, overflow=True))

    def test_unscale_is_refused(self):
        with pytest.raises(CurvatureError, match="unscaled the gradients and not the curvature"):
            self.scaled(1024.0, unscale=True)
