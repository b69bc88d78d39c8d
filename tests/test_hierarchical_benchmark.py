"""The benchmark of hierarchical approximations: it runs, its sums are right, and the docs say what it measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from curvext.operators import GaussNewton

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("hierarchical")


def test_quick(benchmark, tmp_path, capsys):
    output = tmp_path / "hierarchical.json"
    control = "HODLR, random order"
    for formats in (["low rank + diagonal", "HODLR", control], ["Kronecker sum", "auto"]):  # the second is added
        benchmark.main(["--quick", "--formats", *formats, "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert {g["iterations"] for g in results["growth"]} == {1} and all(g["error"] < 1e-6 for g in results["growth"])
    for name, found in benchmark.flattened(results["problems"], "G"):
        low_rank, hodlr, control, kronecker, auto = (memories["32"] for memories in found["formats"].values())
        assert all(entry["floats"] <= 32 for entry in (low_rank, hodlr, control, auto))
        assert auto["error"] <= 1.1 * min(low_rank["error"], hodlr["error"]) + benchmark.EXACT
        if name.startswith("field"):
            assert hodlr["error"] < benchmark.EXACT < low_rank["error"] < control["error"]
            assert hodlr["iterations"]["1e-05"] <= 3 < low_rank["iterations"]["1e-05"]
            assert "room" in kronecker["refused"]
            assert control["iterations"]["1e-05"] < found["unpreconditioned"]["1e-05"]
    printed = capsys.readouterr().out
    assert all(f"λ = {damping:g}" in printed for damping in benchmark.DAMPINGS)
    assert "| **exact** |" in benchmark.measured(results)


def test_what_is_refused_is_left_open(benchmark):
    matrix = benchmark.Stored.__new__(benchmark.Stored)
    matrix.matrix, matrix.shape = torch.eye(100, dtype=torch.float64), (100, 100)
    matrix.dtype, matrix.device = torch.float64, torch.device("cpu")
    case = benchmark.Case(None, "H", matrix)
    assert "refused" in benchmark.approximate(case, "HODLR", 1, None)


def test_iterations(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", 20)
    assert benchmark.solve(torch.eye(50, dtype=torch.float64), 1.0) == 1
    hard = torch.diag(torch.logspace(0, -7, 100, dtype=torch.float64))
    assert benchmark.solve(hard, 1e-5) == 21


def test_exponents(benchmark):
    growth = [{"n": n, "build": 3 * n**1.5} for n in (10, 100, 1000)]
    assert benchmark.exponent(growth, "build") == pytest.approx(1.5)


def test_the_best_are_bold(benchmark):
    columns = [[0.5, 3e-16], [0.46, 1e-16], [None, 2.0]]
    assert benchmark.best([[7], [7]], str, most=6) == ["7", "7"]
    assert benchmark.best(columns, str, 1e-12) == ["**0.5** / **3e-16**", "**0.46** / **1e-16**", "- / 2.0"]


def test_results_of_the_same_place_are_replaced(benchmark):
    assert benchmark.added({"a": {"b": 1, "c": 2}}, {"a": {"c": {"d": 3}}, "e": 4}) == {
        "a": {"b": 1, "c": {"d": 3}},
        "e": 4,
    }


def test_the_field_is_local(benchmark):
    """G = (2/m) D Kᵀ K D over what is seen, with K entry by entry."""
    n, length = 60, 20.0
    problem = benchmark.field(n)
    theta, seen = problem.model.field.detach(), problem.data[0]
    d = (torch.arange(n)[:, None] - torch.arange(n)).abs().double()
    k = (torch.exp(-d / length) / (2 * length))[seen] * (1 - torch.tanh(theta) ** 2)
    g = GaussNewton(problem.model, problem.loss, problem.data).to_dense()
    torch.testing.assert_close(g, 2 / len(seen) * k.T @ k)


@pytest.mark.parametrize("name", ["classifier", "regression", "autoencoder", "CNN", "transformer", "field"])
def test_problems_learn(benchmark, name):
    torch.manual_seed(0)
    problem = benchmark.PROBLEMS[name]()
    before = float(problem.value().detach())
    assert problem.train(5) < before and sum(p.numel() for p in problem.model.parameters()) < 2500


def test_the_tables_in_the_docs_are_generated(benchmark):
    kept = benchmark.common.kept(benchmark.common.RESULTS / "hierarchical.json")
    page = benchmark.PAGE.read_text(encoding="utf-8")
    again = benchmark.common.rewritten(benchmark.PAGE, benchmark.MARKS, benchmark.measured(kept))
    assert page == again, "run benchmarks/hierarchical.py --docs"
