"""Complex tensors: pairs of real ones, for every rule and for the default."""

from __future__ import annotations

import pytest
import torch

from curvext.graph import Graph, edge_of
from curvext.registry import registered
from curvext.rules.default import default
from curvext.sweep import Settings
from curvext.testing import EXACT, check_rule

from .cases import CASES, Draw
from .reference import equation_2

SELECTIONS = [case for case in CASES if case.name.startswith(("shape_", "indexing_"))]
REAL_ONLY = {"shape_to_float", "shape_real_of_real", "indexing_take_along_dim", "indexing_masked_scatter_backward"}
FUNCTIONS = {
    "mul": torch.mul,
    "div": torch.div,
    "abs": lambda a, b: a.abs(),
    "angle": lambda a, b: a.angle(),
    "exp": lambda a, b: a.exp(),
    "fft": lambda a, b: torch.fft.fft(a),
    "mm": torch.mm,
    "mul_real": torch.mul,
}


def test_every_complex_rule_has_a_case():
    covered = set()
    for case in CASES:
        if case.name.startswith("complex_"):
            for seed in range(2):
                function, inputs = case.build(Draw(seed=seed))
                covered |= check_rule(function, *inputs)
    own = {(name, "complex") for name, rule in registered("complex") if rule.family == "complex"}
    assert len(own) > 40
    assert not own - covered


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in SELECTIONS if c.name not in REAL_ONLY])
def test_selections_of_complex_tensors(case):
    function, inputs = case.build(Draw(dtype=torch.complex128))
    try:
        checked = check_rule(function, *inputs)
    except RuntimeError as error:
        if "complex" not in str(error):
            raise
        pytest.skip("PyTorch does not differentiate this operation for complex tensors")
    assert all(kind[1] == "complex" for kind in checked)


def _pair(x):
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", ["enumerated", "sampled"])
def test_default_on_complex_tensors(name, way):
    """The one operation of a function against equation (2) of the same function of pairs of real numbers."""
    function, draw = FUNCTIONS[name], Draw(seed=3)
    inputs = [draw.tensor(3, 3, 2), draw.tensor(3, 3, *([] if name == "mul_real" else [2]))]

    def number(pair):
        return torch.view_as_complex(pair) if pair.dim() == 3 else pair

    def of_pairs(*pairs):
        return _pair(function(*map(number, pairs)))

    leaves = [number(x.detach()).requires_grad_() for x in inputs]
    y = function(*leaves)
    targets = {edge_of(leaf): i for i, leaf in enumerate(leaves)}
    options = {"enumerate_up_to": EXACT} if way == "enumerated" else {"enumerate_up_to": 0, "probes": 1500}
    (op,) = Graph([edge_of(y)[0]]).operations(targets, Settings(**options))
    op.settings.sampled.add(op.kind)  # no warning
    g, h = torch.randn_like(y), torch.randn_like(y)
    waves = default(op, [g], [h])
    for k, edge in enumerate(op.edges):
        want = equation_2(of_pairs, inputs, targets[edge], _pair(g), _pair(h))
        tolerance = 1e-9 if way == "enumerated" else 0.2 * (1 + float(want.abs().max()))
        torch.testing.assert_close(_pair(op.reduced(waves[k], k)), want, rtol=0, atol=tolerance)
