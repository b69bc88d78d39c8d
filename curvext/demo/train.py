"""Compare optimizers on a real data set.

    python -m curvext train --data digits --optimizer Adam,AdaHesScale:0.001,NewtonCG --model mlp:64-32 --epochs 20
    python -m curvext train --data csv measurements.csv --optimizer SGD,LBFGS --json results.json --plot results.png

Every optimizer trains the same model from the same start. Those with a line search take one step on all training data
an epoch, the others one on every batch. A learning rate is written after a colon. Names:

  {names}
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import figures
from .contest import Method, Run, Task, methods, train
from .data import DATA, load
from .report import progress
from .report import table as aligned

__doc__ = (__doc__ or "").format(names=", ".join(methods()))
COLOURS = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.RED, figures.PURPLE, figures.SKY, figures.GREY)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    names = ", ".join(DATA)
    parser.add_argument(
        "--data", nargs="+", default=["digits"], metavar=("NAME", "FILE"), help=f"{names}, or csv FILE: a table of "
        "numbers, the target last (text or few whole numbers: classes; else: regression)",
    )  # fmt: skip
    parser.add_argument("--optimizer", default="Adam,AdaHesScale,NewtonCG-GN", metavar="NAME[:LR],...")
    parser.add_argument("--model", default="mlp:64-32", help="mlp:WIDTH-WIDTH..., linear, or cnn (%(default)s)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help="passes over the training data (10)")
    budget.add_argument("--iterations", type=int, help="steps of every optimizer instead")
    parser.add_argument("--batch", type=int, default=64, help="samples a batch, where batches are used (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; these networks are small (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all curves there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the loss against epochs and seconds")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command."""
    chosen = choose(args.optimizer)
    for name in ("epochs", "iterations", "batch", "threads"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise SystemExit(f"train: --{name} must be positive, got {getattr(args, name)}")
    pyplot = figures.pyplot() if args.plot else None
    task = problem(args.data, args.model, args.seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        runs = {label: (lr, _one(task, label, method, lr, args)) for label, (method, lr) in chosen.items()}
    finally:
        torch.set_num_threads(threads)
    print(table(task, runs))
    results = {"task": task.name, "model": args.model, "seed": args.seed, "batch": args.batch,
               "runs": {label: {"lr": lr, **asdict(run)} for label, (lr, run) in runs.items()}}  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if pyplot:
        draw(pyplot, task, {label: run for label, (_, run) in runs.items()}).savefig(args.plot, dpi=150)
        pyplot.close("all")
    return results


def _one(task: Task, label: str, method: Method, lr: float, args: argparse.Namespace) -> Run:
    """One training, with its progress on the terminal."""
    epochs = math.inf if args.iterations else args.epochs or 10.0
    with progress(1000, label) as bar:

        def tick(run: Run, share: float) -> None:
            bar.update(round(1000 * share) - bar.n)
            bar.set_postfix_str(f"loss {run.loss[-1]:.3g}, {task.measure} {run.score[-1]:.3g}")

        return train(task, method, lr, seed=args.seed, batch=args.batch, epochs=epochs,
                     iterations=args.iterations or math.inf, tick=tick)  # fmt: skip


def choose(text: str) -> dict[str, tuple[Method, float]]:
    """Methods and learning rates from ``NAME[:LR],...``; upper and lower case are the same."""
    known = {name.lower(): (name, method) for name, method in methods().items()}
    chosen = {}
    for part in text.split(","):
        wanted, _, lr = part.strip().partition(":")
        if wanted.lower() not in known:
            names = ", ".join(name for name, _ in known.values())
            raise SystemExit(f"train: there is no optimizer {wanted!r}; there are {names}")
        name, method = known[wanted.lower()]
        try:
            chosen[f"{name}:{lr}" if lr else name] = method, float(lr or method.lr)
        except ValueError:
            raise SystemExit(f"train: the learning rate of {part.strip()!r} is not a number") from None
    return chosen


def problem(data: list[str], model: str, seed: int) -> Task:
    """The task that ``--data`` and ``--model`` name."""
    if data[0] == "csv" and len(data) == 2:
        x, y = read_csv(Path(data[1]))
        test, rest = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tensor_split([len(x) // 5])
        mean, std = x[rest].mean(0), x[rest].std(0).clamp(min=1e-12)
        if y.is_floating_point():
            y = (y - y[rest].mean(0)) / y[rest].std(0).clamp(min=1e-12)
        x = (x - mean) / std
        train_pair, test_pair = (x[rest], y[rest]), (x[test], y[test])
    elif data[0] in DATA and len(data) == 1:
        loaded = load(data[0], seed)
        train_pair, test_pair = loaded.train, loaded.test
    else:
        raise SystemExit(f"train: --data must be {', '.join(DATA)} or csv FILE, got {' '.join(data)}")
    return task(Path(data[-1]).stem, model, train_pair, test_pair)


def task(name: str, model: str, train_pair: tuple[Tensor, Tensor], test_pair: tuple[Tensor, Tensor]) -> Task:
    """Regression if targets are floating-point, classification if they are whole numbers."""
    (x, y), regression = train_pair, train_pair[1].is_floating_point()
    outputs = y.shape[1] if regression else 1 + max(int(y.max()), int(test_pair[1].max()))
    make = partial(network, model, x.shape[1], outputs)
    make()  # refuses what cannot be built, before anything is trained
    if regression:
        return Task(name, make, F.mse_loss, train_pair, test_pair, explained, "R²")
    return Task(name, make, F.cross_entropy, train_pair, test_pair, accuracy)


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose label has the greatest output."""
    return (outputs.argmax(1) == labels).float().mean()


def explained(outputs: Tensor, targets: Tensor) -> Tensor:
    """R²: one less the error as a share of the targets' variance."""
    return 1 - (outputs - targets).square().sum() / (targets - targets.mean(0)).square().sum()


def network(model: str, features: int, outputs: int) -> nn.Sequential:
    """``mlp:64-32`` (tanh between linear layers), ``linear`` or ``cnn`` (of square images)."""
    kind, _, widths = model.partition(":")
    side = math.isqrt(features)
    if kind == "cnn" and side**2 == features and side >= 4 and not widths:
        layers = [nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Conv2d(8, 16, 3, padding=1), nn.Tanh(), nn.Flatten(),
                             nn.Linear(16 * (side // 2) ** 2, outputs))  # fmt: skip
    if kind == "linear" and not widths:
        return nn.Sequential(nn.Linear(features, outputs))
    if kind == "mlp" and all(width.isdigit() and int(width) for width in widths.split("-")):
        sizes = [features, *map(int, widths.split("-")), outputs]
        return nn.Sequential(*[m for a, b in pairwise(sizes) for m in (nn.Tanh(), nn.Linear(a, b))][1:])
    raise SystemExit(f"train: --model must be mlp:WIDTH-WIDTH..., linear, or cnn (of square images of 4x4 and more); "
                     f"got {model!r} for {features} features")  # fmt: skip


def read_csv(path: Path) -> tuple[Tensor, Tensor]:
    """Columns of numbers and the last column as target; a first line that is no data is a header."""
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise SystemExit(f"train: {error}") from None
    if rows and not all(map(_number, rows[0][:-1])):
        del rows[0]
    if len(rows) < 10 or len(rows[0]) < 2:
        raise SystemExit(f"train: {path} must have at least ten lines of data and two columns")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or not all(map(_number, row[:-1])):
            raise SystemExit(
                f"train: line {i + 1} of {path}'s data is not {len(rows[0]) - 1} finite numbers and a target"
            )
    return torch.tensor([[float(v) for v in row[:-1]] for row in rows]), _targets([row[-1].strip() for row in rows])


def _targets(last: list[str]) -> Tensor:
    """Classes by number for text or at most 20 different whole numbers, else one column of numbers."""
    kinds = sorted(set(last))
    if all(map(_number, last)) and not (len(kinds) <= 20 and all(float(v).is_integer() for v in kinds)):
        return torch.tensor([[float(v)] for v in last])
    return torch.tensor([kinds.index(v) for v in last])


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def table(task: Task, runs: dict[str, tuple[float, Run]]) -> str:
    """One line an optimizer."""
    (x, _), (held_out, _) = task.train, task.test
    note = f"{task.name}: {len(x)} samples of {x.shape[1]} features to train on, {len(held_out)} to test on."
    header = ["optimizer", "lr", "steps", "seconds", "train loss", f"test {task.measure}"]
    rows = [(label, f"{lr:g}", r.steps[-1], r.seconds[-1], r.loss[-1], r.score[-1]) for label, (lr, r) in runs.items()]
    failed = [f"{label} ended early, {run.error}" for label, (_, run) in runs.items() if run.error]
    return "\n".join([note, "", aligned(header, rows), *failed])


def draw(plt: Any, task: Task, runs: dict[str, Run]) -> Any:
    """Loss against epochs, and against seconds."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.4), sharey=True, layout="constrained")
    for axes, key in zip(panels, ("epochs", "seconds"), strict=True):
        for i, (label, run) in enumerate(runs.items()):
            line = "--" if i >= len(COLOURS) else "-"
            axes.plot(getattr(run, key), run.loss, line, label=label, color=COLOURS[i % len(COLOURS)], linewidth=1.6)
        axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set(xlabel=key, title=f"Loss against {key}")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(f"loss on all training data, {task.name}")
    panels[0].legend(frameon=False, fontsize=9)
    return figure
