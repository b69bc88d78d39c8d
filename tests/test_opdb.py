"""Rules in the graphs of PyTorch's own operator samples, and how many operators have one throughout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from curvext import registry
from curvext.diagonal import pass_diagonal
from curvext.graph import edge_of
from curvext.testing import check_operation

from .opdb import NO_REFERENCE, coverage, differentiable, label, needs_default, page, recorded, release
from .reference import equation_2

pytestmark = pytest.mark.filterwarnings("ignore")  # the samples warn about deprecated arguments

# Operators that PyTorch cannot differentiate twice; their cases have twins that it can.
ONCE = {
    "nn.functional.hardsigmoid",
    "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss",
    "nn.functional.pdist",
    "_segment_reduce.lengths",
    "_segment_reduce.offsets",
}
if TorchVersion(torch.__version__) < "2.13":
    ONCE.add("grid_sampler_3d")


@pytest.mark.parametrize("op", [pytest.param(op, id=label(op)) for op in differentiable()])
def test_operator(op):
    if label(op) in NO_REFERENCE:
        pytest.skip(NO_REFERENCE[label(op)])
    generator = torch.Generator().manual_seed(0)
    unruled = set()
    for sample in recorded(op):
        for operation in sample.operations:
            if needs_default(operation):
                unruled.add(operation.kind)
            elif registry.find_diagonal(operation).how != "refused":
                check_operation(operation, generator, rtol=1e-7, atol=1e-8)
        if label(op) not in ONCE:
            one_step_equals_autograd_functional(sample, generator)
    if unruled:
        pytest.skip(f"by the default: {sorted(map(str, unruled))}")


def one_step_equals_autograd_functional(sample, generator):
    """Equation (2) from Jacobian and Hessian, for samples that are one operation with one output."""
    (op, *more), ys = sample.operations, sample.function(*sample.leaves)
    if (
        not all(t.numel() for t in (*sample.leaves, ys[0]))
        or more
        or len(op.outputs) > 1
        or op.coincident
        or needs_default(op)
        or ys[0].numel() > 40
        or not _real(op, ys[0])
    ):
        return
    g, h = (torch.randn(ys[0].shape, dtype=ys[0].dtype, generator=generator) for _ in range(2))
    waves = pass_diagonal(op, [g], [h])
    position = {edge_of(leaf): k for k, leaf in enumerate(sample.leaves)}
    for i, wave in enumerate(waves):
        if wave is not None and op.needs[i]:
            k = position[op.edges[i]]
            want = equation_2(lambda *leaves: sample.function(*leaves)[0], sample.leaves, k, g, h)
            torch.testing.assert_close(op.reduced(wave, i), want, rtol=1e-7, atol=1e-8, equal_nan=True)


def _real(op, y):
    return y.dtype is torch.float64 and all(
        op.inputs[i].dtype is torch.float64 for i in range(len(op.edges)) if op.needs[i]
    )


def test_how_many_operators_have_rules_throughout(capsys):
    found = coverage()
    ruled = [name for name, by_default in found.items() if by_default == set()]
    with capsys.disabled():
        print(f"\nop_db: {len(ruled)} of {len(found)} differentiable operators by rules throughout")
    assert len(ruled) >= 300


def test_the_page_of_operators_is_generated():
    path = Path(__file__).parent.parent / "docs" / "operators.md"
    text = path.read_text(encoding="utf-8")
    if f"torch {release()};" not in text:
        pytest.skip("the page was made with another version of torch")
    assert text == page(), "run `make docs`"
