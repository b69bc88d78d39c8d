"""Every rule that the factor wave uses, against the nodes themselves."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import BatchGrad, DiagGGNExact, extend
from curvext.graph import Graph, Operation, edge_of
from curvext.registry import find, registered
from curvext.sweep import Settings
from curvext.testing import check_columns, check_quantity
from curvext.testing_factor import products

from . import models
from .cases import CASES, ELSEWHERE, OLDER, Case, Draw

# Recorded here by stand-ins of another device's kernels (tests/stand_ins.py), which have no backward pass.
UNCALLED = {f"ScaledDotProduct{kind}AttentionBackward0" for kind in ("Cudnn", "Efficient", "Flash")}
WAVES = ("samples", "factor", "shared", "tangent")


class Wide(Draw):
    """Sizes for several samples in any dimension, and losses that are not summed up."""

    def choice(self, *options: Any) -> Any:
        return "none" if "none" in options else super().choice(*options)

    def sizes(self, n: int, low: int = 1, high: int = 4) -> list[int]:
        return super().sizes(n, min(max(low, 2), high), high)

    def shape(self, least: int = 1, most: int = 3, low: int = 1, high: int = 4) -> list[int]:
        return self.sizes(self.integer(min(max(least, 2), most), most), low, high)


def draws(case: Case) -> list[Draw]:
    return [Wide(seed=seed) for seed in range(min(case.examples, 12) // 3)] + [Draw(seed=1)]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_rules_equal_the_node(case):
    for draw in draws(case):
        function, inputs = case.build(draw)
        check_columns(function, *inputs)


def recorded(case: Case, draw: Draw) -> list[Operation]:
    """The operations whose output may hold samples."""
    function, inputs = case.build(draw)
    outputs = function(*inputs)
    outputs = [outputs] if not isinstance(outputs, (list, tuple)) else outputs
    roots = [edge_of(y)[0] for y in outputs if getattr(y, "requires_grad", False)]
    targets = {edge_of(x) for x in inputs if getattr(x, "requires_grad", False)}
    return [op for op in Graph(roots).operations(targets, Settings()) if any(size > 1 for size in op.outputs[0].shape)]


def seen(case: Case, draw: Draw) -> set[tuple[Any, str]]:
    ops = recorded(case, draw)
    return {(kind, wave) for op in ops for wave in WAVES if find(op, wave) for kind in (op.kind, op.name)}


@pytest.mark.skipif(OLDER, reason="rules of operations that this PyTorch has not")
def test_every_rule_has_a_case():
    covered = {rule for case in CASES for draw in draws(case) for rule in seen(case, draw)}
    known = {(operation, wave) for wave in WAVES for operation, _ in registered(wave)}
    absent = {*ELSEWHERE, *UNCALLED}
    missing = sorted(f"{operation} ({wave})" for operation, wave in known - covered if operation not in absent)
    assert not missing, f"rules without a case in tests/cases: {missing}"


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("shape_")], ids=str)
def test_copies_are_of_one_entry(case):
    """A column of one entry stays one: diagonal matrices stay diagonal."""
    for op in recorded(case, Draw(seed=2)):
        rule, (meta, *_) = find(op, "diagonal"), op.outputs
        if rule is not None and rule.layout == "copies" and prod(meta.shape):
            every = torch.eye(prod(meta.shape), dtype=meta.dtype).unflatten(1, meta.shape)
            rows = [row.flatten(1) for row in products(op, every) if row is not None]
            assert ((torch.cat(rows, 1) != 0).sum(1) <= 1).all(), op


@pytest.mark.parametrize("name", ["GELU", "SiLU", "Softplus", "ELU", "Hardswish", "LogSigmoid", "Mish", "GLU", "PReLU"])
def test_single_precision_has_kernels_of_its_own(name):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), getattr(torch.nn, name)(), torch.nn.Flatten()).float()
    x, found = torch.randn(20, 4, dtype=torch.float64), []
    for dtype in (torch.float32, torch.float64):
        with extend(model.to(dtype), DiagGGNExact()):
            model(x.to(dtype)).square().mean().backward()
        found.append([p.diag_ggn_exact.double() for p in model.parameters()])
        model.zero_grad()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantity", [BatchGrad(), DiagGGNExact()], ids=lambda q: q.savefield)
@pytest.mark.parametrize("model", ["mlp", "cnn", "normalised", "attention", "tied"])
@pytest.mark.usefixtures("float64")
def test_quantities_need_no_rule(quantity, model):
    """Without any rule, the wave passes by products with the nodes, and finds the samples by asking them."""
    built = {**models.MODELS, "normalised": _normalised}[model]
    check_quantity(quantity, *built())


def _normalised() -> models.Built:
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2)]
    model = nn.Sequential(*layers, nn.ConvTranspose2d(4, 2, 2), nn.BatchNorm2d(2).eval(), nn.Flatten(), nn.Linear(8, 3))
    x, y = torch.randn(3, 2, 4, 4), torch.tensor([0, 2, 1])
    return model, lambda: F.cross_entropy(model(x), y)
