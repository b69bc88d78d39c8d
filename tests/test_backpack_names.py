"""curvext.backpack has BackPACK's public names, and those that example scripts import do what they do there."""

from __future__ import annotations

import importlib
import sys
import types
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import CurvatureError
from curvext.backpack import backpack, extend, memory_cleanup
from curvext.backpack.context import CTX
from curvext.backpack.core.derivatives.convnd import weight_jac_t_save_memory
from curvext.backpack.custom_module.branching import Parallel, SumModule
from curvext.backpack.custom_module.graph_utils import BackpackTracer, convert_module_to_backpack
from curvext.backpack.custom_module.pad import Pad
from curvext.backpack.custom_module.permute import Permute
from curvext.backpack.custom_module.reduce_tuple import ReduceTuple
from curvext.backpack.custom_module.scale_module import ScaleModule
from curvext.backpack.custom_module.slicing import Slicing
from curvext.backpack.extensions import GGNMP, HMP, PCHMP, BatchGrad, DiagGGNExact
from curvext.backpack.utils.examples import (
    autograd_diag_ggn_exact,
    get_mnist_dataloader,
    load_mnist_dataset,
    load_one_batch_mnist,
)

from .models import mlp
from .reference import gauss_newton

MODULES = ["", "context", "extensions", "hessianfree.ggnvp", "hessianfree.hvp", "hessianfree.lop", "hessianfree.rop",
           "utils.convert_parameters", "utils.examples", "utils.kroneckers", "custom_module.branching",
           "custom_module.graph_utils", "custom_module.pad", "custom_module.permute", "custom_module.reduce_tuple",
           "custom_module.scale_module", "custom_module.slicing"]  # fmt: skip
ABSENT = {
    "HBP",  # the base of KFAC, KFLR and KFRA
    "hook_run_extensions", "hook_store_io",  # of modules; curvext hooks no modules
    "all_tensors_of_order", "get_letters", "is_matrix", "is_tensor_of_order", "is_vector",
    "kfac_mat_prod_einsum_equation",  # what utils.kroneckers is written with
}  # fmt: skip


class Digits(torch.utils.data.Dataset):
    """Stands in for torchvision's MNIST."""

    def __init__(self, root, train, transform, download):
        self.transform = transform

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return self.transform(torch.full((1, 28, 28), float(i))), i


@pytest.fixture
def torchvision(monkeypatch):
    """As much of torchvision as is used; what is installed may not fit this torch."""
    transforms = types.ModuleType("torchvision.transforms")
    transforms.Compose = lambda steps: lambda x: steps[1](steps[0](x))
    transforms.ToTensor = lambda: lambda x: x
    transforms.Normalize = lambda mean, deviation: lambda x: (x - mean[0]) / deviation[0]
    datasets = types.ModuleType("torchvision.datasets")
    datasets.MNIST = Digits
    package = types.ModuleType("torchvision")
    package.transforms, package.datasets = transforms, datasets
    for module in (package, transforms, datasets):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_there(name, torchvision):
    """BackPACK's own names in one of its modules; what it imports from elsewhere does not count."""
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    theirs, ours = (importlib.import_module(f"{root}.{name}".rstrip(".")) for root in ("backpack", "curvext.backpack"))
    public = getattr(theirs, "__all__", None) or [
        key for key, value in vars(theirs).items() if getattr(value, "__module__", "") == theirs.__name__
    ]
    names = {key for key in public if not key.startswith("_")} - ABSENT
    assert names and not [key for key in sorted(names) if not hasattr(ours, key)]


@pytest.mark.parametrize(
    "name, arguments, x",
    [
        ("pad.Pad", ([1, 2], "constant", 3.0), torch.randn(2, 3)),
        ("permute.Permute", (0, 2, 1), torch.randn(2, 3, 4)),
        ("reduce_tuple.ReduceTuple", (1,), (torch.randn(2), torch.randn(3))),
        ("scale_module.ScaleModule", (0.5,), torch.randn(2, 3)),
        ("slicing.Slicing", ((slice(None), slice(1, 3)),), torch.randn(2, 4)),
        ("branching.Parallel", (nn.Tanh(), nn.Linear(3, 3)), torch.randn(2, 3)),
        ("branching.Parallel", (OrderedDict(a=nn.Tanh(), b=nn.Linear(3, 3)),), torch.randn(2, 3)),
    ],
)
def test_modules_do_what_they_do_there(name, arguments, x):
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    module, kind = name.split(".")
    theirs, ours = (
        getattr(importlib.import_module(f"{root}.custom_module.{module}"), kind)(*arguments)
        for root in ("backpack", "curvext.backpack")
    )
    torch.testing.assert_close(ours(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_transposition_and_merging():
    x = torch.randn(2, 3, 4)
    assert Permute(1, 2, init_transpose=True)(x).shape == (2, 4, 3)
    torch.testing.assert_close(Parallel(nn.Identity(), ScaleModule(2.0))(x), 3 * x)
    torch.testing.assert_close(Parallel(nn.Identity(), nn.Identity(), merge_module=Product())(x), x * x)


class Product(nn.Module):
    def forward(self, a, b):
        return a * b


@pytest.mark.usefixtures("float64")
def test_a_model_written_for_backpack():
    """Embedding, LSTM, branches: the Gauss-Newton diagonal, by curvext and by products of autograd."""
    model = nn.Sequential(
        nn.Embedding(5, 3), nn.LSTM(3, 3, batch_first=True), ReduceTuple(), Permute(0, 2, 1), Pad([0, 1]),
        Parallel(nn.Identity(), nn.Linear(4, 4), merge_module=SumModule()), Slicing((slice(None), slice(0, 2))),
        nn.Flatten(), nn.Linear(8, 2),
    )  # fmt: skip
    x, y = torch.randint(0, 5, (6, 3)), torch.randint(0, 2, (6,))
    model = extend(convert_module_to_backpack(model))
    assert len(BackpackTracer().trace(model).nodes) > 9
    with weight_jac_t_save_memory(), backpack(DiagGGNExact()):
        F.cross_entropy(model(x), y).backward()
    CTX.remove_hooks()
    memory_cleanup(model)
    got = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters()])
    torch.testing.assert_close(got, autograd_diag_ggn_exact(x, y, model, F.cross_entropy))


@pytest.mark.usefixtures("float64")
def test_entries_of_a_diagonal():
    model, x, y = mlp(), torch.randn(5, 4), torch.randn(5, 3)
    model[0].weight.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = gauss_newton(lambda: model(x), lambda z: F.mse_loss(z, y), parameters).diagonal()
    torch.testing.assert_close(autograd_diag_ggn_exact(x, y, model, nn.MSELoss()), want)
    some = torch.linspace(0, len(want) - 1, 4, dtype=torch.int32)
    torch.testing.assert_close(autograd_diag_ggn_exact(x, y, model, nn.MSELoss(), idx=some), want[some])


def test_batches_of_mnist(torchvision):
    x, y = load_one_batch_mnist(batch_size=4, shuffle=False)
    assert x.shape == (4, 1, 28, 28) and y.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(x[3], torch.full((1, 28, 28), (3 - 0.1307) / 0.3081))
    assert load_one_batch_mnist(4, flat=True)[0].shape == (4, 784)
    assert len(get_mnist_dataloader(batch_size=3)) == 4


def test_mnist_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_mnist_dataset()


def test_products_under_names_of_ones_own():
    model, x, y = extend(mlp()), torch.randn(5, 4), torch.randint(0, 3, (5,))
    with backpack(PCHMP(savefield="clipped", modify="clip"), PCHMP(savefield="absolute", modify="abs"),
                  GGNMP(savefield="ggn"), HMP(savefield="hessian"), PCHMP(), GGNMP(), HMP()):  # fmt: skip
        F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        v = torch.randn(2, *p.shape)
        for name, other in (("clipped", "pchmp"), ("ggn", "ggnmp"), ("hessian", "hmp")):
            torch.testing.assert_close(getattr(p, name)(v), getattr(p, other)(v))
    assert not torch.allclose(model[0].weight.clipped(v0 := torch.randn(1, 5, 4)), model[0].weight.absolute(v0))


@pytest.mark.parametrize("by_position", [False, True])
def test_results_that_could_be_differentiated_are_refused(by_position):
    """There, `create_graph=True` gives results with a graph; without one, what is built on them would be constant."""
    model, x, y = extend(mlp()), torch.randn(5, 4), torch.randint(0, 3, (5,))
    arguments = (None, None, True) if by_position else ()
    options = {} if by_position else {"create_graph": True}
    with pytest.raises(CurvatureError, match="cannot be differentiated"), backpack(BatchGrad()):
        F.cross_entropy(model(x), y).backward(*arguments, **options)
