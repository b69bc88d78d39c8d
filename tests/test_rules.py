"""Every registered rule against the default, the default against torch.autograd.functional."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvext
from curvext.diagonal import pass_diagonal
from curvext.graph import Graph, edge_of
from curvext.registry import find, registered
from curvext.rules.default import default
from curvext.sweep import Settings
from curvext.testing import EXACT, check_rule, rounding

from .cases import CASES, ELSEWHERE, OLDER, Draw
from .reference import equation_2

each_case = pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CASES]
)


@each_case
def test_rules_equal_the_default(case):
    @settings(max_examples=case.examples)
    @given(data=st.data())
    def run(data):
        function, inputs = case.build(Draw(data=data, freeze=True))
        check_rule(function, *inputs)

    run()


@each_case
def test_rules_in_float32(case):
    if not case.float32:
        pytest.skip("this case needs float64")
    function, inputs = case.build(Draw(seed=1, dtype=torch.float32))
    check_rule(function, *inputs, rtol=1e-2, atol=1e-2)


@each_case
def test_one_operation_equals_autograd_functional(case):
    """Equation (2) from Jacobian and Hessian, for cases that are one operation of one output."""
    function, inputs = case.build(Draw(seed=2))
    y = function(*inputs)
    if not isinstance(y, torch.Tensor) or not y.dtype.is_floating_point:
        pytest.skip("several outputs, or complex ones")
    targets = {edge_of(x): i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.requires_grad}
    ops = Graph([edge_of(y)[0]]).operations(targets, Settings(enumerate_up_to=EXACT))
    if len(ops) != 1 or ops[0].coincident:
        pytest.skip("several operations")
    rule = find(ops[0], "diagonal")
    if rule is not None and rule.how == "decomposed":
        pytest.skip("a fused kernel is several operations")
    g, h = torch.randn_like(y), torch.randn_like(y)
    rest = [None] * (len(ops[0].outputs) - 1)
    for way in (pass_diagonal, default) if case.twin is None else (pass_diagonal,):
        waves = way(ops[0], [g, *rest], [h, *rest])
        for i, edge in enumerate(ops[0].edges):
            if ops[0].needs[i]:
                k = targets[edge]
                want = equation_2(case.twin or function, inputs, k, g, h)
                got = torch.zeros(()) if i >= len(waves) or waves[i] is None else ops[0].reduced(waves[i], i)
                least = max(1e-9, rounding(want.dtype))
                torch.testing.assert_close(got.expand(want.shape), want, rtol=least, atol=least, check_dtype=False)


@pytest.mark.skipif(OLDER, reason="rules of operations that this PyTorch has not")
def test_every_rule_has_a_case():
    covered = set()
    for case in CASES:
        for seed in range(3):
            function, inputs = case.build(Draw(seed=seed))
            checked = check_rule(function, *inputs)
            covered |= checked if case.twin is None else {kind[0] if "first term" in kind else kind for kind in checked}
    known = {operation for operation, rule in registered() if rule.how != "refused"}
    missing = sorted(str(operation) for operation in known - covered - set(ELSEWHERE))
    assert not missing, f"rules without a case in tests/cases: {missing}"


def test_a_rule_is_registered_once():
    with pytest.raises(ValueError, match="TanhBackward0 already has a rule"):
        curvext.rule("TanhBackward0")(lambda op, g, h: None)
