"""Part two: AdaHesScale and its Gauss-Newton form against Adam and SGD."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..optim import AdaHesScale
from .data import Dataset
from .options import Options
from .quality import network
from .report import progress
from .report import table as aligned

Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "AdaHesScale": lambda p, lr: AdaHesScale(p, lr=lr),
    "AdaHesScaleGN": lambda p, lr: AdaHesScale(p, lr=lr, gauss_newton=True),
}


def train(
    data: Dataset, options: Options, name: str, lr: float, seed: int, steps: int, every: int, tick: Callable[[], object]
) -> dict[str, list[float]]:
    """One run: loss on all training images and test accuracy every so many steps, and the seconds spent in steps."""
    torch.manual_seed(seed)
    model = network(data.features, options.hidden)
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    batches = data.batches(options.batch_size, seed)
    curves: dict[str, list[float]] = {"steps": [], "seconds": [], "loss": [], "accuracy": []}
    seconds = 0.0
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            loss, accuracy = _evaluate(model, data)
            for key, value in zip(curves, (step, seconds, loss, accuracy), strict=True):
                curves[key].append(value)
        if step < steps:
            x, y = next(batches)
            start = time.perf_counter()
            _step(model, optimizer, x, y)
            seconds += time.perf_counter() - start
            tick()
    return curves


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    optimizer.step(closure)  # AdaHesScale evaluates it in a block of its own


@torch.no_grad()
def _evaluate(model: nn.Module, data: Dataset) -> tuple[float, float]:
    (x, y), (held_out, labels) = data.train, data.test
    loss = float(F.cross_entropy(model(x), y))
    accuracy = float((model(held_out).argmax(1) == labels).float().mean())
    return loss if math.isfinite(loss) else math.inf, accuracy


def measure(data: Dataset, options: Options) -> dict[str, Any]:
    """Choose each learning rate by the loss after a short run, then train from fresh seeds."""
    results: dict[str, Any] = {"grid": options.learning_rates, "tuning_steps": options.tuning_steps, "runs": {}}
    tuning = len(options.learning_rates) * options.tuning_steps
    with progress(len(OPTIMIZERS) * (tuning + options.seeds * options.steps), "optimizers") as bar:
        for name in OPTIMIZERS:
            final = {
                lr: train(
                    data, options, name, lr, options.seed + 1000, options.tuning_steps, options.tuning_steps, bar.update
                )["loss"][-1]
                for lr in options.learning_rates
            }
            best = min(final, key=lambda lr: final[lr])
            every = max(1, options.steps // 45)
            curves = [
                train(data, options, name, best, options.seed + seed, options.steps, every, bar.update)
                for seed in range(options.seeds)
            ]
            results["runs"][name] = {"lr": best, "tuning": list(final.values()), "curves": curves}
    results["goal"] = _goal(results["runs"])
    return results


def _goal(runs: dict[str, Any]) -> float:
    """The loss that Adam reaches in half its steps: what "steps to" and "seconds to" are read for."""
    losses = [curves["loss"] for curves in runs["Adam"]["curves"]]
    return sum(loss[len(loss) // 2] for loss in losses) / len(losses)


def _first(curves: dict[str, list[float]], key: str, goal: float) -> float | None:
    """Where a curve first reaches the goal."""
    reached = [at for at, loss in zip(curves[key], curves["loss"], strict=True) if loss <= goal]
    return reached[0] if reached else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if None in known else sum(v for v in known if v is not None) / len(known)


def table(results: dict[str, Any]) -> str:
    """One line an optimizer, means over seeds."""
    rows = []
    for name, run in results["runs"].items():
        curves = run["curves"]
        last = [_mean(c[key][-1] for c in curves) for key in ("loss", "accuracy")]
        speed = _mean(1e3 * c["seconds"][-1] / c["steps"][-1] for c in curves)
        reached = [_mean(_first(c, key, results["goal"]) for c in curves) for key in ("steps", "seconds")]
        rows.append((name, f"{run['lr']:g}", *last, speed, *reached))
    grid = ", ".join(f"{lr:g}" for lr in results["grid"])
    note = (
        f"Learning rate: the best of {grid}\nafter {results['tuning_steps']} steps on a seed of its own, "
        f"for every optimizer alike. Means over {len(curves)} further seed(s).\n"
        f"The goal is the loss that Adam has half way, {results['goal']:.3g}."
    )
    header = ["optimizer", "lr", "train loss", "test accuracy", "ms a step", "steps to goal", "seconds to goal"]
    return note + "\n\n" + aligned(header, rows)
