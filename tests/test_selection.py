"""Which quantities are computed for which tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import BatchGrad, BatchL2Grad, DiagGGNExact, DiagGGNMC, HesScale, SumGradSquared, extend

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.norm, self.fc10 = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.scale * self.fc10(torch.tanh(self.norm(self.fc1(x))))


ALL = ["scale", "fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc10.weight", "fc10.bias"]


@pytest.fixture
def net():
    return Net()


def step(net, *quantities, **options):
    x, y = torch.linspace(-1, 1, 24).view(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    net.zero_grad()
    with extend(net, *quantities, **options) as curvature:
        F.cross_entropy(net(x), y).backward()
    return curvature


WHERE = [
    ("fc1", ["fc1.weight", "fc1.bias"]),
    ("fc1.*", ["fc1.weight", "fc1.bias"]),
    ("fc*", ["fc1.weight", "fc1.bias", "fc10.weight", "fc10.bias"]),
    ("*.bias", ["fc1.bias", "norm.bias", "fc10.bias"]),
    ("fc?", ["fc1.weight", "fc1.bias"]),
    ("scale", ["scale"]),
    (nn.Linear, ["fc1.weight", "fc1.bias", "fc10.weight", "fc10.bias"]),
    (Net, ALL),
    (lambda name, p: p.dim() > 1, ["fc1.weight", "fc10.weight"]),
    (["scale", nn.LayerNorm], ["scale", "norm.weight", "norm.bias"]),
    ((lambda name, p: name == "scale", "fc1.weight"), ["scale", "fc1.weight"]),
]


@pytest.mark.parametrize(("where", "names"), WHERE, ids=range(len(WHERE)))
@pytest.mark.parametrize("how", ["block", "quantity"])
def test_where(net, where, names, how):
    if how == "block":
        curvature = step(net, BatchL2Grad(), only=where)
    else:
        curvature = step(net, BatchL2Grad().only(*(where if isinstance(where, (list, tuple)) else [where])))
    assert list(curvature.batch_l2) == names
    for name, p in net.named_parameters():
        assert hasattr(p, "batch_l2") == (name in names)
        assert p.grad is not None


def test_modules_stand_for_all_below_them(net):
    assert list(step(net, HesScale(), only=[net.fc1, net.norm]).hesscale) == ALL[1:5]
    assert list(step(net, HesScale().only(net.fc10)).hesscale) == ALL[5:]
    named = {"a": net.fc1.weight, "b": net.scale}
    with extend(named, HesScale(), only=net.fc1) as curvature:
        net(torch.ones(2, 4)).square().sum().backward()
    assert list(curvature.hesscale) == ["a"]


def test_results_do_not_depend_on_the_selection(net):
    every, some = step(net, BatchGrad(), DiagGGNExact()), step(net, BatchGrad(), DiagGGNExact(), only=["fc1", "scale"])
    for field, values in some.items():
        assert len(values) == 3
        for name, value in values.items():
            torch.testing.assert_close(value, every[field][name])


def test_different_quantities_for_different_layers(net):
    diagonal = DiagGGNExact().only(nn.LayerNorm, "fc10")
    curvature = step(net, BatchGrad().only("fc1"), diagonal, HesScale(), SumGradSquared().only("sc*"))
    assert list(curvature.grad_batch) == ["fc1.weight", "fc1.bias"]
    assert list(curvature.diag_ggn_exact) == ["norm.weight", "norm.bias", "fc10.weight", "fc10.bias"]
    assert list(curvature.hesscale) == ALL
    assert list(curvature.sum_grad_squared) == ["scale"]


def test_one_field_from_different_quantities(net):
    torch.manual_seed(0)
    curvature = step(net, DiagGGNMC(500).only("fc10"), DiagGGNMC(1).only("fc1"))
    want = step(net, DiagGGNExact())
    assert sorted(curvature.diag_ggn_mc) == ["fc1.bias", "fc1.weight", "fc10.bias", "fc10.weight"]
    error = [
        (curvature.diag_ggn_mc[name] / want.diag_ggn_exact[name] - 1).abs().mean().item()
        for name in ("fc10.weight", "fc1.weight")
    ]
    assert error[0] < 0.1 < error[1]


def test_both_selections_hold(net):
    assert list(step(net, BatchL2Grad().only("fc*"), only="*.bias").batch_l2) == ["fc1.bias", "fc10.bias"]


def test_a_selected_quantity_can_be_used_again(net):
    quantity = BatchL2Grad().only("fc1")
    for _ in range(2):
        assert list(step(net, quantity).batch_l2) == ["fc1.weight", "fc1.bias"]


def test_a_tied_weight_is_selected_by_either_module_but_one_name(net):
    net.fc10 = nn.Linear(5, 5, bias=False)
    net.fc1, net.scale = nn.Linear(4, 5), nn.Parameter(torch.ones(5))
    net.norm.inner = net.fc10
    assert list(step(net, BatchL2Grad(), only=nn.LayerNorm).batch_l2) == [
        "norm.weight",
        "norm.bias",
        "norm.inner.weight",
    ]
    assert list(step(net, BatchL2Grad(), only=nn.Linear).batch_l2) == ["fc1.weight", "fc1.bias", "norm.inner.weight"]


def test_names_of_tensors_without_a_module():
    w, b = torch.randn(4, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    with extend({"w": w, "b": b}, BatchL2Grad(), only="w") as curvature:
        (torch.ones(2, 4) @ w + b).square().sum().backward()
    assert list(curvature.batch_l2) == ["w"] and b.grad is not None
    with pytest.raises(TypeError, match="module class needs a module"):
        extend([w, b], BatchL2Grad(), only=nn.Linear)


@pytest.mark.parametrize(
    "where", ["fc2", nn.Conv2d, [], lambda name, p: False], ids=["name", "class", "empty", "predicate"]
)
def test_a_selection_of_nothing(net, where):
    with pytest.raises(ValueError, match=r"matches none of the 7 tensors, such as 'scale'"):
        extend(net, BatchL2Grad(), only=where)
    if where != []:
        with pytest.raises(ValueError, match="selection of BatchL2Grad matches none"):
            extend(net, HesScale(), BatchL2Grad().only(where))


def test_two_quantities_of_one_name(net):
    with pytest.raises(ValueError, match="two quantities would be saved as 'diag_ggn_mc'"):
        extend(net, DiagGGNMC(1), DiagGGNMC(2))
    with pytest.raises(ValueError, match="two quantities would be saved as 'diag_ggn_mc'"):
        extend(net, DiagGGNMC(1).only("fc1"), DiagGGNMC(2))
    with pytest.raises(ValueError, match=r"saved as \['diag_ggn_mc', 'diag_ggn_mc'\] select 'fc1.weight'"):
        extend(net, DiagGGNMC(1).only("fc1"), DiagGGNMC(2).only(nn.Linear))


def test_no_quantity(net):
    with pytest.raises(TypeError, match=r"write BatchGrad\(\)"):
        extend(net, BatchGrad)
    with pytest.raises(TypeError, match="expected quantities"):
        extend(net, "grad_batch")
