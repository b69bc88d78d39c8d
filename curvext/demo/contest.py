"""Optimizers on one task under one budget: what ``python -m curvext train`` and the benchmark of optimizers share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from .. import optim
from ..errors import CurvatureError

Pair = tuple[Tensor, Tensor]
SEARCH = (0.25, 0.5, 1.0, 2.0, 4.0)  # factors of the step for those that search along a line
DAMPED = 3e-4  # eps of what is called so: as large as many a curvature of a mean loss

COUNTED = 5  # steps on batches whose arithmetic is counted
ONE_STEP: Any = {"max_iter": 1, "max_eval": 25, "line_search_fn": "strong_wolfe"}  # torch's LBFGS, an iteration a step


@dataclass(frozen=True)
class Task:
    """Something to learn: a model, its loss, and data to train and to test on.

    Attributes:
        make: a new model, from the global generator.
        loss: of outputs and targets, a mean over samples.
        score: of outputs and targets, higher is better; called ``measure`` in tables.
    """

    name: str
    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Pair
    test: Pair
    score: Callable[[Tensor, Tensor], Tensor]
    measure: str = "accuracy"

    def batches(self, size: int | None, seed: int) -> Iterator[Pair]:
        """Random batches without end, every epoch in a new order; ``None``: all the data."""
        x, y = self.train
        generator = torch.Generator().manual_seed(seed)
        while True:
            if size is None or size >= len(x):
                yield x, y
                continue
            order = torch.randperm(len(x), generator=generator)
            for rows in order[: len(x) // size * size].split(size):
                yield x[rows], y[rows]

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Loss on all training data, and score on the test data."""
        (x, y), (held_out, targets) = self.train, self.test
        loss = float(self.loss(model(x), y))
        return loss if math.isfinite(loss) else math.inf, float(self.score(model(held_out), targets))

    def gradient_flops(self) -> int:
        """Arithmetic of one gradient over all training data, as matrix products and convolutions count it."""
        model = self.make()
        with FlopCounterMode(display=False) as counted:
            self.loss(model(self.train[0]), self.train[1]).backward()
        return counted.get_total_flops()


@dataclass(frozen=True)
class Method:
    """An optimizer as it takes part: how it is made, its learning rate if none is given, and those worth a try."""

    make: Callable[..., Optimizer]
    lr: float = 1e-2
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    full_batch: bool = False


def methods() -> dict[str, Method]:
    """By name: those of torch, and all that ``curvext.optim`` has."""
    found = {
        "SGD": Method(partial(torch.optim.SGD, momentum=0.9), 0.1, (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
        "Adam": Method(torch.optim.Adam, 3e-3, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
        "torch.LBFGS": Method(partial(torch.optim.LBFGS, **ONE_STEP), 1.0, SEARCH, True),
    }
    for name, kind in vars(optim).items():
        if not (isinstance(kind, type) and issubclass(kind, Optimizer)):
            continue
        if kind in (optim.ClosureOptimizer, optim.ScaledStep):
            continue
        searches = issubclass(kind, optim.ClosureOptimizer)
        found[name] = Method(kind, 1.0, SEARCH, True) if searches else Method(kind)
    return found | _variants()


def _variants() -> dict[str, Method]:
    small = (3e-5, 1e-4, 5e-4, 2e-3, 1e-2)  # no bound on a step: networks of ReLU need the lowest
    return {
        "AdaHesScale": Method(optim.AdaHesScale, 3e-3, small),
        "AdaHesScale-damped": Method(partial(optim.AdaHesScale, eps=DAMPED), 2e-3, (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)),
        "AdaHesScaleGN": Method(partial(optim.AdaHesScale, gauss_newton=True), 1e-3, small),
        "AdaHesScale-sqrt": Method(partial(optim.AdaHesScale, variant="sqrt"), 3e-3, small),
        "AdaHesScale-newton": Method(partial(optim.AdaHesScale, variant="newton", eps=1e-4), 3e-3, small),
        "Adam-damped": Method(partial(torch.optim.Adam, eps=DAMPED), 3e-3, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
        "Adam-scaled": Method(_scaled_adam, 3e-3, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
        "AdaHesScale-scaled": Method(_scaled_adahesscale, 1e-3, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
        "EKFAC": Method(partial(optim.KFAC, eigenbasis=True, damping=3e-2)),  # not shared among factors: more of it
        "NewtonCG-GN": Method(partial(optim.NewtonCG, curvature="gauss_newton"), 1.0, SEARCH, True),
    }


def _scaled_adam(parameters: Iterable[Tensor], lr: float) -> Optimizer:
    return optim.ScaledStep(torch.optim.Adam(parameters, lr=lr))


def _scaled_adahesscale(parameters: Iterable[Tensor], lr: float) -> Optimizer:
    """With δ = lr²: the scaling makes the length of every step, in the norm of the curvature, about lr."""
    return optim.ScaledStep(optim.AdaHesScale(parameters, lr=1.0), delta=lr**2)


@dataclass
class Run:
    """One training: curves, read every so often, and why it ended early if it did."""

    steps: list[int] = field(default_factory=list)
    epochs: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    error: str | None = None

    def add(self, **values: float) -> None:
        """One point of every curve."""
        for name, value in values.items():
            getattr(self, name).append(value)


def step(task: Task, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> None:
    """One step on a batch, by the closure that the optimizer asks for."""

    def closure() -> Any:
        outputs = model(x)
        loss = task.loss(outputs, y)
        if isinstance(optimizer, optim.ClosureOptimizer):
            return loss, outputs
        if type(optimizer).__module__.startswith("torch."):
            optimizer.zero_grad()
            loss.backward()
        return loss

    optimizer.step(closure)


def train(
    task: Task,
    method: Method,
    lr: float,
    *,
    seed: int = 0,
    batch: int = 64,
    epochs: float = math.inf,
    iterations: float = math.inf,
    work: float = math.inf,
    limit: float = math.inf,
    goal: float = math.inf,
    readings: int = 40,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[Run, float], object] = lambda run, share: None,
) -> Run:
    """Train a new model until one of the limits is reached.

    Args:
        epochs, iterations: passes over the data, steps.
        work: arithmetic in units of a gradient over all training data. If it is finite, it is counted, and ``seconds``
            include the counting. Steps on batches are alike: after the first few, they count as the last of these.
        limit: seconds.
        goal: score; the training ends at the first reading that has it.
        readings: how often loss and score are read, at most; they take no part in ``seconds`` and ``work``.
        clock: what ``seconds`` are read from.
        tick: called after every step with the run and the share of the budget that is used.
    """
    unit = task.gradient_flops() if work < math.inf else 0  # before the seed, which its model draws from
    torch.manual_seed(seed)
    model = task.make()
    optimizer = method.make(model.parameters(), lr=lr)
    size = None if method.full_batch else batch
    run, spent, seconds, flops, counted = Run(), 0.0, 0.0, 0, 0
    for done, (x, y) in enumerate(task.batches(size, seed)):
        passes = done * len(x) / len(task.train[0])
        share = max(passes / epochs, done / iterations, (flops / unit if unit else 0.0) / work, seconds / limit)
        if share >= spent:
            loss, score = task.evaluate(model)
            run.add(steps=done, epochs=passes, work=flops / unit if unit else 0.0, seconds=seconds,
                    loss=loss, score=score)  # fmt: skip
            spent = math.floor(share * readings + 1) / readings
        tick(run, min(share, 1.0))
        if share >= 1 or not math.isfinite(run.loss[-1]) or run.score[-1] >= goal:
            return run
        try:
            count = bool(unit) and (method.full_batch or done < COUNTED)
            took, found = _timed(partial(step, task, model, optimizer, x, y), clock, count)
        except CurvatureError as error:
            run.error = f"step {done + 1}: {error}"
            return run
        counted = found if count else counted
        seconds, flops = seconds + took, flops + counted
    raise AssertionError("batches have no end")


def _timed(call: Callable[[], object], clock: Callable[[], float], count: bool) -> tuple[float, int]:
    """Seconds and arithmetic of a call."""
    start = clock()
    if not count:
        call()
        return clock() - start, 0
    with FlopCounterMode(display=False) as counted:
        call()
    return clock() - start, counted.get_total_flops()
