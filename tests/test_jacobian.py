"""Jacobians and neural tangent kernels against torch.func, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import curvext
from curvext import NTK, BatchGrad, CurvatureError, Jacobian, extend
from curvext.persample import Outer

from .models import Attention, Residual, cnn, mlp
from .reference import close

pytestmark = pytest.mark.usefixtures("float64")

N = 4


def definition(model, x):
    """``[C, N, *P]`` by name: derivatives of every sample's flattened output."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.jacrev(lambda ps: torch.func.functional_call(model, ps, (x,)).flatten(1))(parameters)
    return {name: j.transpose(0, 1) for name, j in found.items()}


class Reused(nn.Module):
    """One layer twice, and a bare scale."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x))) * self.scale


MODELS = {
    "mlp": (mlp, lambda: torch.randn(N, 4)),
    "cnn": (cnn, lambda: torch.randn(N, 2, 6, 6)),
    "residual": (lambda: Residual().eval(), lambda: torch.randn(N, 2, 3, 3)),
    "reused": (Reused, lambda: torch.randn(N, 4)),
    "map": (lambda: nn.Conv2d(2, 2, 2), lambda: torch.randn(N, 2, 3, 3)),
    "tokens": (Attention, lambda: torch.randint(0, 5, (N, 3))),
    "tied": (lambda: Attention(tied=True), lambda: torch.randint(0, 5, (N, 3))),
}
LOSSES = {
    "cross entropy": lambda z: F.cross_entropy(z, torch.zeros_like(z[:, 0], dtype=torch.long)),
    "squared error": lambda z: F.mse_loss(z, torch.ones_like(z)),
    "not convex": lambda z: z.sin().sum(),
    "two terms": lambda z: F.mse_loss(z, torch.ones_like(z)) + F.smooth_l1_loss(z, torch.zeros_like(z)) + z.exp().sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_jacobian_and_kernel(name, loss):
    model, x = MODELS[name][0](), MODELS[name][1]()
    with extend(model, Jacobian(), NTK(), samples=N):
        LOSSES[loss](model(x)).backward()
    kernel = 0
    for name, j in definition(model, x).items():
        p = model.get_parameter(name)
        close(p.jacobian, j)
        close(p.ntk, torch.einsum("cnp,dmp->ncmd", j.flatten(2), j.flatten(2)))
        kernel = kernel + p.ntk
    assert kernel.shape[0] == kernel.shape[2] == N


def test_kernel_of_a_layer_needs_no_jacobian(monkeypatch):
    model, x = mlp(), torch.randn(N, 4)
    want = definition(model, x)
    monkeypatch.setattr(Outer, "dense", None)
    with extend(model, NTK(), only="*.weight"):
        F.mse_loss(model(x), torch.zeros(N, 3)).backward()
    for name in ("0.weight", "2.weight", "4.weight"):
        j = want[name].flatten(2)
        close(model.get_parameter(name).ntk, torch.einsum("cnp,dmp->ncmd", j, j))


def test_marked_output():
    model, x = mlp(), torch.randn(N, 4)
    with extend(model, Jacobian()):
        (curvext.output(model(x)) - 1).cosh().log().mean().backward()
    for name, j in definition(model, x).items():
        close(model.get_parameter(name).jacobian, j)


def test_several_outputs_follow_one_another():
    trunk, heads, x = nn.Linear(4, 3), nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 1)]), torch.randn(N, 4)
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    features = torch.tanh(trunk(x))
    with extend(model, Jacobian()):
        (F.mse_loss(heads[0](features), torch.ones(N, 2)) + F.mse_loss(heads[1](features), torch.ones(N, 1))).backward()
    rows = torch.func.jacrev(
        lambda w: torch.cat([h(torch.tanh(F.linear(x, w, trunk.bias))) for h in heads], 1)
    )(trunk.weight.detach()).transpose(0, 1)  # fmt: skip
    got = trunk.weight.jacobian
    close(got.sort(0).values, rows.sort(0).values)  # whichever comes first


def test_a_penalty_is_no_output():
    model, x = mlp(), torch.randn(N, 4)
    with extend(model, Jacobian(), NTK()):
        (F.mse_loss(model(x), torch.ones(N, 3)) + sum(p.square().sum() for p in model.parameters())).backward()
    for name, j in definition(model, x).items():
        close(model.get_parameter(name).jacobian, j)


def test_batches_are_joined():
    model, x = mlp(), torch.randn(2 * N, 4)
    with extend(model, Jacobian()):
        for half in x.split(N):
            F.mse_loss(model(half), torch.ones(N, 3)).backward()
    close(model[0].weight.jacobian, definition(model, x)["0.weight"])
    with extend(model, NTK()), pytest.raises(RuntimeError, match="use one"):
        for half in x.split(N):
            F.mse_loss(model(half), torch.ones(N, 3)).backward()


def test_a_parameter_without_influence():
    w, v = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    x = torch.randn(N, 3)
    with extend({"w": w, "v": v}, Jacobian(), NTK()):
        ((x @ w).square().sum() + v.sum()).backward()
    assert v.jacobian.shape == (0, N, 3) and not v.ntk.any()
    close(w.ntk + v.ntk, (x @ x.T).view(N, 1, N, 1))


def test_refused_where_no_output_can_be_told():
    model, x = mlp(), torch.randn(N, 4)
    with extend(model, Jacobian()), pytest.raises(CurvatureError, match=r"curvext\.output"):
        model(x).mean().square().backward()


@pytest.mark.parametrize("quantity", [Jacobian(), NTK(), BatchGrad()], ids=lambda q: q.savefield)
def test_refused_where_the_number_of_samples_is_in_doubt(quantity):
    layer, x = nn.Linear(4, 3), torch.randn(2 * N, 4)
    with extend(layer, quantity), pytest.raises(CurvatureError, match=r"dimensions are 4 and 8.*pass samples="):
        (layer(x).square().sum() + layer(x[:N]).cosh().sum()).backward()


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 3, 4), (2, 1, 3, 4), (1, 2, 20, 30), (1, 9, 3, 2), (3, 2, 15, 20), (2, 4, 2, 3)]
)
@pytest.mark.parametrize("v, n", [(1, 4), (3, 2), (0, 2), (2, 0)])
def test_inner_products_of_samples_form_no_sample(v, n, sizes, block, monkeypatch):
    """By positions or by features, a few at a time; both are less memory than every sample's gradient."""
    groups, t, o, i = sizes
    outer = Outer(torch.randn(v, n, groups, t, o), torch.randn(n, groups, t, i), (groups * o, i))
    rows = outer.dense().flatten(2)
    monkeypatch.setattr("curvext.persample.BLOCK", block)
    monkeypatch.delattr(Outer, "dense")
    close(outer.gram(), torch.einsum("unp,vmp->unvm", rows, rows))
