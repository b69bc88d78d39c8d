"""The benchmarks in their quick modes, and the measuring itself where there is a right answer."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts import each other as files of one folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def cost():
    return importlib.import_module("hesscale_cost")


@pytest.fixture
def quality():
    return importlib.import_module("hesscale_quality")


@pytest.fixture
def models():
    return importlib.import_module("models")


def test_cost(cost, tmp_path, capsys):
    output = tmp_path / "cost.json"
    cost.main(["--quick", "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["environment"]["torch"] == torch.__version__
    parts = results["threads"]["1"]
    assert set(parts) == {"models", "growth", "compiled", "memory", "overhead"}
    for name, entry in parts["models"].items():
        assert 1.5 < entry["limit"] < 1.7, name
        assert entry["counted HesScale"] <= entry["limit"] + 0.1, name
    printed = capsys.readouterr().out
    assert all(name in printed for name in cost.MODELS)


def test_prediction_of_a_multilayer_perceptron(cost, models):
    prediction = cost.predict(models.MODELS["MLP 784-512-256-10"](4))
    layers = 784 * 512 + 512 * 256 + 256 * 10
    backward = 2 * layers - 784 * 512
    assert prediction["limit"] == pytest.approx(1 + backward / (layers + backward))
    assert prediction["counted HesScale"] == pytest.approx(prediction["limit"], rel=1e-3)
    assert prediction["counted HesScaleGN"] <= prediction["counted HesScale"]


def test_prediction_knows_attention(cost):
    q = torch.randn(2, 3, 5, 4, requires_grad=True)
    forward = cost.flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert forward == 2 * 2 * (2 * 3 * 5 * 5 * 4)


def test_peak_of_memory():
    peak = importlib.import_module("peak")
    kib = 256  # floats

    def call():
        a = torch.ones(100 * kib)
        b = a + 1
        del a
        return b * 2

    assert 200 * 1024 <= peak.peak_bytes(call, lambda: None) <= 201 * 1024


def test_resnet_and_transformer_have_their_layers(models):
    assert sum(isinstance(m, torch.nn.Conv2d) for m in models.resnet18(4).modules()) == 20
    assert models.MODELS["transformer, 2 blocks of 128"](3).loss().isfinite()


def test_quality(quality, tmp_path, capsys):
    output = tmp_path / "quality.json"
    quality.main(["--quick", "--output", str(output)])
    results = json.loads(output.read_text())
    assert all(results["within"].values()), results["within"]
    relu = results["trained"]["ReLU"]["before"]["normalised"]
    assert relu["GGN, exact"] < 1e-10 and relu["HesScaleGN"] == 1
    assert "NO" not in capsys.readouterr().out.split()
    assert torch.get_default_dtype() is torch.float32


def test_exact_diagonals_of_samples(quality, models, float64):
    model = models.mlp(2, 3, 3, activation=torch.nn.Tanh)
    samples = quality.Samples(model, torch.randn(4, 2), torch.randint(3, (4,)))
    for n, (x, y) in enumerate(zip(samples.x, samples.y, strict=True)):

        def loss(*parameters, x=x, y=y):
            named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
            return torch.nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

        hessian = torch.autograd.functional.hessian(loss, tuple(p.detach() for p in model.parameters()))
        for i, h in enumerate(quality.exact(samples)):
            p = samples.parameters[i][n]
            torch.testing.assert_close(h[n].flatten(), hessian[i][i].reshape(p.numel(), p.numel()).diagonal())


def test_samples_are_single_losses(quality, models, float64):
    """Curvature of a stack is what one block for each sample gives."""
    model = models.mlp(2, 3, 3, activation=torch.nn.Tanh)
    samples = quality.Samples(model, torch.randn(4, 2), torch.randint(3, (4,)))
    for name in ("HesScale", "BL89", "GGN, exact"):
        estimate = quality.estimators(torch.Generator())[name]
        stacked = estimate(samples)
        for n in range(4):
            single = quality.Samples(model, samples.x[n : n + 1], samples.y[n : n + 1])
            for a, b in zip(stacked, estimate(single), strict=True):
                torch.testing.assert_close(a[n], b[0])


class TestBackpack:
    @pytest.fixture
    def script(self):
        pytest.importorskip("backpack", reason="BackPACK is not installed")
        return importlib.import_module("backpack_cost")

    def test_quick(self, script, tmp_path, capsys):
        output = tmp_path / "backpack.json"
        script.main(["--quick", "--quantities", "BatchL2Grad", "KFRA", "HMP", "--output", str(output)])
        results = json.loads(output.read_text())
        for quantity, entry in results["models"]["MLP"]["4"].items():
            assert not entry["refused"], quantity
            assert set(entry["ratio"]) == set(entry["bytes"]) == {"gradient step", "curvext", "BackPACK"}
        assert "HMP" in capsys.readouterr().out
        assert "| BatchL2Grad | " in script.measured(results)

    def test_parts_are_added(self, script, tmp_path):
        output = tmp_path / "backpack.json"
        for quantity in ("BatchL2Grad", "Variance"):
            script.main(["--quick", "--quantities", quantity, "--output", str(output)])
        assert set(json.loads(output.read_text())["models"]["MLP"]["4"]) == {"BatchL2Grad", "Variance"}

    def test_what_is_too_large_is_not_run(self, script, tmp_path):
        options = ["--quick", "--quantities", "BatchGrad", "KFRA", "--memory", "1e-6"]
        results = script.main([*options, "--output", str(tmp_path / "backpack.json")])
        for entry in results["models"]["MLP"]["4"].values():
            assert all(why.startswith("about") for why in entry["refused"].values())
        assert "not run" in script.measured(results)

    def test_the_table_in_the_docs_is_generated(self, script):
        kept = script.kept(script.common.RESULTS / "backpack.json")
        assert script.PAGE.read_text(encoding="utf-8") == script.page(kept), "run benchmarks/backpack_cost.py --docs"


def test_operators(tmp_path, capsys, monkeypatch):
    operators = importlib.import_module("operators")
    monkeypatch.setattr(operators, "curvlinops", dict)  # whether it is installed or not
    name = "MLP 784-512-256-10"
    results = operators.main(["--quick", "--models", name, "--output", str(tmp_path / "operators.json")])
    assert json.loads((tmp_path / "operators.json").read_text())["models"].keys() == {name}
    assert set(results["models"][name]) == {"products", "twenty", "columns", "memory"}
    assert results["density"]["none"]["products"] == 2
    assert "GaussNewton" in capsys.readouterr().out


@pytest.fixture
def optimizers():
    return importlib.import_module("optimizers")


def test_optimizers(optimizers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimizers, "PAGE", tmp_path / "page.md")
    optimizers.PAGE.write_text("Before\n" + "\n".join(optimizers.MARKS))
    output, names = tmp_path / "optimizers.json", ["Adam", "NewtonCG-GN", "AdaHessian"]
    for parts in (["--tasks", "diabetes", "--epochs"], ["--tasks", "digits"]):  # one is added to the other
        optimizers.main(["--quick", "--output", str(output), "--optimizers", *names, *parts])
    results = json.loads(output.read_text())
    assert results["environment"]["torch"] == torch.__version__ and list(results["tasks"]) == ["diabetes", "digits"]
    for task in results["tasks"].values():
        assert list(task["optimizers"]) == names
        for found in task["optimizers"].values():
            curve = found["curve"]
            assert found["work"] >= task["budget"] and len(found["tuning"]) == 2  # a finished step may go beyond
            assert found["loss"] == curve["loss"][-1] == curve["timed loss"][-1]
            assert found["seconds"] == curve["seconds"][-1] > 0
    (sooner,) = results["epochs"].values()
    assert list(sooner) == ["Adam"] and len(sooner["Adam"]["tuning"]) == 2
    optimizers.main(["--docs", "--output", str(output)])
    texts = capsys.readouterr().out, optimizers.PAGE.read_text()
    assert all(name in text for name in names for text in texts)
    assert all((tmp_path / "figures" / f"{name}.svg").read_text().count("AdaHessian") for name in results["tasks"])


def test_the_comparison_in_the_docs_is_generated(optimizers):
    results = optimizers.common.kept(optimizers.common.RESULTS / "optimizers.json")
    assert optimizers.PAGE.read_text(encoding="utf-8") == optimizers.page(results), (
        "run benchmarks/optimizers.py --docs"
    )


def test_characters_follow_their_context():
    task = importlib.import_module("tasks").characters(0, most=50)
    model, (x, y) = task.make(), task.train
    assert x.shape == (40, 8) and model(x).shape == (40, int(torch.cat([y, task.test[1]]).max()) + 1)
    rows = torch.cat([x, task.test[0]]).tolist()
    targets = torch.cat([y, task.test[1]]).tolist()
    following = {tuple(row): target for row, target in zip(rows, targets, strict=True)}
    assert sum(tuple([*row[1:], following[tuple(row)]]) in following for row in rows) == 49  # all but the last


def test_optimizers_leave_missing_data_out(optimizers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.import_module("tasks"), "DEMO", tmp_path)
    output = str(tmp_path / "none.json")
    results = optimizers.main(["--quick", "--tasks", "mnist-demo", "--epochs", "--output", output])
    assert results["tasks"] == {} and "mnist-demo is left out" in capsys.readouterr().out


def test_optimizers_reach_a_goal(optimizers):
    runs = [optimizers.Run(work=[0, 1, 2], loss=loss) for loss in ([3, 2, 1], [3, 1.5, 1])]
    assert optimizers.reached(runs, "work", 1.5) == 1.5
    assert optimizers.reached(runs, "work", 0.5) is None


def test_epochs_to_a_goal_are_of_every_seed_or_none(optimizers):
    reached = {"a": [1.0, 2.0], "b": [1.0, None]}
    found = {name: {"lr": 0.1, "epochs": each, "seconds": [3.0, 5.0]} for name, each in reached.items()}
    _, (a, b) = optimizers.soonest(found)
    assert a == ["a", "0.1", "2 of 2", "1.50 (1.00-2.00)", "4.00 (3.00-5.00)"] and b[2:4] == ["1 of 2", None]


def test_adahessian_is_its_rule(optimizers):
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    kernel = torch.nn.Parameter(torch.rand(1, 1, 2, 2))
    optimizer = optimizers.AdaHessian([p, kernel], lr=0.5, betas=(0.0, 0.0), eps=0)
    optimizer.step(lambda: (p**2 * torch.tensor([1.0, -2.0, 3.0])).sum() + (kernel**4).sum())
    torch.testing.assert_close(p.detach(), torch.tensor([0.5, 3.0, 1.5]))  # g / |h| is p but for its sign
    assert kernel.hesscale.unique().numel() == 1
