"""Every parameter of published architectures gets its curvature, and nothing has to be sampled."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from curvext import extend
from curvext.graph import Graph, edge_of
from curvext.sweep import Settings
from curvext.testing import EXACT, check_operation

from .architectures import TRANSFORMERS, VISION, transformer, vision_model


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For models this small, threads cost more than they bring, above all where several tests run at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(model, loss):
    """All operations have a rule (else sampling would warn, which is an error), and all parameters a finite result."""
    with extend(model, enumerate_up_to=0) as curvature:
        loss().backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) > 10
    for name, p in trained.items():
        assert p.hesscale.shape == p.shape, name
        assert p.hesscale.isfinite().all(), name
    assert curvature.hesscale.keys() == trained.keys()
    assert sum(bool(p.hesscale.any()) for p in trained.values()) > 0.5 * len(trained)


@needs("transformers")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    torch.manual_seed(0)
    check(*transformer(name))


@needs("torchvision")
@pytest.mark.parametrize("name", VISION)
def test_torchvision(name):
    torch.manual_seed(0)
    check(*vision_model(name))


@needs("transformers")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rules_on_operations_as_transformers_record_them(float64):
    """One operation of each kind, with its own options, strides and shared inputs, against the default."""
    seen, generator = set(), torch.Generator().manual_seed(0)
    for name in TRANSFORMERS:
        model, loss = transformer(name)
        targets = {edge_of(p): k for k, p in model.named_parameters()}
        ops = Graph([loss().grad_fn]).operations(targets, Settings(enumerate_up_to=EXACT))
        for op in ops:
            kind = op.kind, op.needs, len(op.outputs[0].shape), op.coincident
            size = sum(math.prod(meta.shape) for meta in (*op.outputs, *op.inputs) if meta is not None)
            if kind not in seen and size <= 6000:
                seen.add(kind)
                rough = op.outputs[0].dtype is not torch.float64
                check_operation(op, generator, rtol=2e-2 if rough else 1e-7, atol=1e-2 if rough else 1e-8)
    assert len({kind for kind, *_ in seen}) > 50
