"""Quantities from outside the package, and the checker that their authors use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from curvext import BatchDiagGGNExact, BatchGrad, CurvatureError, DiagGGNExact, GGNBlock, HesScale, Variance, extend
from curvext.testing import check_quantity

from . import user_quantity
from .dense import near
from .models import MODELS, mlp
from .user_quantity import Alignment, SampleTrace

pytestmark = pytest.mark.usefixtures("float64")


def built(name):
    model, loss = MODELS[name]()
    return model.eval(), loss, {} if name in ("mlp", "cnn", "residual") else {"samples": 2}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_definition(name):
    model, loss, options = built(name)
    with extend(model, Alignment(), SampleTrace(), BatchGrad(), BatchDiagGGNExact(), **options):
        loss().backward()
    for p in model.parameters():
        g = p.grad_batch.flatten(1)
        near(p.alignment, F.cosine_similarity(g, g.sum(0, keepdim=True)))
        near(p.sample_trace, p.diag_ggn_exact_batch.flatten(1).sum(1))


@pytest.mark.parametrize("quantity", [Alignment(), SampleTrace(), Variance(), DiagGGNExact(), GGNBlock(), HesScale()],
                         ids=lambda q: q.savefield)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_passes_the_checker(name, quantity):
    model, loss, options = built(name)
    found = check_quantity(quantity, model, loss, **options)
    assert found.keys() == dict(model.named_parameters()).keys()


def test_several_passes():
    model, x, y = mlp(), torch.randn(6, 4), torch.randint(0, 3, (6,))
    with extend(model, SampleTrace()):
        for rows in (slice(0, 2), slice(2, 6)):
            F.cross_entropy(model(x[rows]), y[rows], reduction="sum").backward()
    got = [p.sample_trace for p in model.parameters()]
    with extend(model, SampleTrace()):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    torch.testing.assert_close(got, [p.sample_trace for p in model.parameters()])
    with pytest.raises(CurvatureError, match="use one in a block"), extend(model, Alignment()):
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("wrong", ["rules", "parts"])
def test_the_checker_finds_what_is_wrong(wrong):
    @dataclass(frozen=True)
    class Wrong(SampleTrace):
        def read(self, target, columns):
            """Depends on the form in which columns arrive."""
            found = super().read(target, columns)
            kinds = {type(value).__name__ for value in (columns or {}).values()}
            return 2 * found if wrong == "rules" and "Outer" in kinds else found

        def join(self, a, b):
            return a if wrong == "parts" else a + b

    model, loss, _ = built("mlp")
    with pytest.raises(AssertionError, match="Wrong.*weight" if wrong == "rules" else "Wrong.*one by one"):
        check_quantity(Wrong(), model, loss)


def test_is_short():
    assert len(Path(user_quantity.__file__).read_text(encoding="utf-8").splitlines()) <= 62
