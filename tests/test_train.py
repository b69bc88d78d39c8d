"""The command that compares optimizers: what it writes, what it refuses, and that its runs are what they say."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from curvext.__main__ import main
from curvext.demo import contest
from curvext.demo.train import choose, explained, network, problem, read_csv


def small(regression=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = x[:, :1] * x[:, 1:2] if regression else (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    loss = F.mse_loss if regression else F.cross_entropy
    score = explained if regression else (lambda z, y: (z.argmax(1) == y).float().mean())
    make = lambda: network("mlp:5", 4, 1 if regression else 3)  # noqa: E731
    return contest.Task("small", make, loss, (x[:40], y[:40]), (x[40:], y[40:]), score)


def test_two_optimizers_on_digits(tmp_path, capsys):
    written, plot = tmp_path / "results.json", tmp_path / "plot.png"
    options = ["--data", "digits", "--optimizer", "adam,NewtonCG-GN:0.5", "--model", "mlp:16", "--epochs", "3"]
    main(["train", *options, "--json", str(written), "--plot", str(plot)])
    runs = json.loads(written.read_text())["runs"]
    assert list(runs) == ["Adam", "NewtonCG-GN:0.5"] and runs["NewtonCG-GN:0.5"]["lr"] == 0.5
    assert runs["NewtonCG-GN:0.5"]["steps"] == [0, 1, 2, 3]
    assert runs["Adam"]["steps"][-1] == math.ceil(3 * 1438 / 64)
    for run in runs.values():
        assert run["error"] is None and run["loss"][-1] < run["loss"][0] / 2 and run["score"][-1] > 0.5
        assert run["seconds"] == sorted(run["seconds"]) and run["epochs"][-1] >= 3
    assert runs["Adam"]["loss"][0] == runs["NewtonCG-GN:0.5"]["loss"][0]  # one start for all
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in runs) and "1438 samples" in printed


@pytest.mark.parametrize("last, classes", [("red,green", 2), ("0,1,2", 3), ("0.5,1,2.25", None)])
def test_tables_of_your_own(tmp_path, last, classes):
    path, targets = tmp_path / "own.csv", last.split(",")
    lines = [f"{i / 7},{i % 3},{targets[i % len(targets)]}" for i in range(30)]
    path.write_text("\n".join(["a,b,target", *lines]))
    x, y = read_csv(path)
    assert x.shape == (30, 2) and x[7].tolist() == [1, 1]
    assert y.is_floating_point() == (classes is None)
    task = problem(["csv", str(path)], "linear", 0)
    assert task.make()(task.train[0]).shape == (24, classes or 1) and len(task.test[0]) == 6
    run = contest.train(task, contest.methods()["LBFGS"], 1.0, iterations=5)
    assert run.steps == [0, 1, 2, 3, 4, 5] and run.loss[-1] < run.loss[0]


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize("name", contest.methods())
def test_every_optimizer_trains(name, regression):
    task, method = small(regression), contest.methods()[name]
    run = contest.train(task, method, method.lr, batch=8, epochs=4)
    assert run.error is None and math.isfinite(run.loss[-1]) and run.loss[-1] < run.loss[0]
    assert run.steps[-1] == (4 if method.full_batch else 20)


def test_work_is_counted():
    task, method = small(), contest.methods()
    assert task.gradient_flops() == 2 * 40 * (2 * 4 * 5 + 3 * 5 * 3)  # forward, weights, inputs of the second layer
    plain = contest.train(task, method["SGD"], 0.1, batch=8, work=3)
    assert plain.work == pytest.approx([s / 5 for s in plain.steps]) and plain.steps[-1] == 15
    assert contest.train(task, method["NewtonCG"], 1.0, work=30).work[1] > 3


def test_runs_end_at_their_goal_or_limit():
    task, adam = small(), contest.methods()["Adam"]
    *before, last = contest.train(task, adam, 0.1, iterations=50, readings=50, goal=0.7).score
    assert last >= 0.7 > max(before)
    limited = contest.train(task, adam, 0.1, limit=5, clock=itertools.count().__next__)  # a step takes one
    assert limited.steps[-1] == 5 == limited.seconds[-1]


def test_runs_end_where_they_fail():
    task, methods = small(regression=True), contest.methods()
    assert contest.train(task, methods["SGD"], 1e20, iterations=50).loss[-1] == math.inf
    broken = contest.Task(
        "broken", task.make, lambda z, y: F.mse_loss(z, y) * torch.rand(()), *([task.train] * 2), explained
    )
    run = contest.train(broken, methods["NewtonCG"], 1.0, iterations=5)
    assert run.steps == [0] and run.error.startswith("step 1: the closure is not deterministic")


@pytest.mark.parametrize(
    "options, match",
    [
        (["--optimizer", "Adamm"], "no optimizer 'Adamm'; there are SGD, Adam"),
        (["--optimizer", "Adam:fast"], "learning rate of 'Adam:fast'"),
        (["--model", "mlp:0"], "--model must be"),
        (["--model", "tree"], "--model must be"),
        (["--data", "csv"], "--data must be"),
        (["--data", "csv", "/no/such.csv"], "No such file"),
        (["--epochs", "0"], "--epochs must be positive"),
    ],
    ids=str,
)
def test_refused(options, match):
    with pytest.raises(SystemExit, match=match):
        main(["train", *options])


@pytest.mark.parametrize("text", ["1,2\n" * 5, "1\n" * 20, "1,2,3\n" * 20 + "1,2\n", "1,2,3\n" * 20 + "x,2,3\n"])
def test_unusable_tables(tmp_path, text):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"bad\.csv"):
        read_csv(path)


def test_models():
    x = torch.randn(3, 64)
    for model in ("mlp:7-5", "linear", "cnn"):
        assert network(model, 64, 4)(x).shape == (3, 4)
    with pytest.raises(SystemExit, match="for 50 features"):
        network("cnn", 50, 4)
    assert choose("sgd:0.5, adam")["Adam"][1] == contest.methods()["Adam"].lr
