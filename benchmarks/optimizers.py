"""Optimizers on real data: loss against work and against seconds, every one tuned by the same small budget.

The data sets and models are in ``tasks.py``. Work is the arithmetic of matrix products and convolutions, in units of a
gradient over all training data: an epoch of SGD is one. Products with the curvature, trials of a line search and second
passes all count; factorisations and elementwise arithmetic do not, and are in the seconds, which are of one processor's
time. A step that goes beyond the budget is finished.

Tuning: five values of lr for every optimizer, listed in ``curvext.demo.contest`` and around its usual value, one run
each of a fifth of the work on a seed of its own; the least training loss wins. Optimizers with a line search, and
torch's LBFGS, use all data at every step, the others batches of 64. Then further seeds train by the full work, and the
first is timed. The goal of the tables is the loss that Adam has half way. Data that is not there is left out.

Then, how soon the stochastic ones have a test accuracy of 0.93 on mnist, read every tenth of an epoch: the best of five
values of lr on a seed of its own, then further seeds. ``--docs`` writes the page of the docs and its figures.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from models import mlp
from tasks import TASKS, mnist
from torch import nn

from curvext.demo import figures
from curvext.demo.contest import Method, Run, Task, methods, train
from curvext.demo.report import heading, progress, table
from curvext.demo.train import COLOURS
from curvext.optim import AdaHesScale

PAGE = Path(__file__).parents[1] / "docs" / "optimizers_compared.md"
MARKS = "<!-- measured by benchmarks/optimizers.py -->\n", "<!-- end -->\n"
BASE = "Adam"
ACCURACY, MOST = 0.93, 10.0  # of --epochs: the goal, and after how many epochs a run ends without it
STOCHASTIC = ("Adam", "Adam-damped", "AdaHesScale", "AdaHesScale-damped", "AdaHesScale-scaled", "KFAC", "EKFAC")
SOON = {  # activation, size of batches, least pixel; AdaHesScaleGN is AdaHesScale where nothing bends
    "ReLU, batches of 128": (nn.ReLU, 128, -1.0, STOCHASTIC),
    "ReLU, batches of 128, pixels from 0 to 1": (nn.ReLU, 128, 0.0, STOCHASTIC),
    "tanh, batches of 128, pixels from 0 to 1": (nn.Tanh, 128, 0.0, (*STOCHASTIC, "AdaHesScaleGN")),
}
Results = dict[str, Any]

timed = partial(train, clock=time.process_time)


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


def compared() -> dict[str, Method]:
    """All that take part."""
    return methods() | {"AdaHessian": Method(AdaHessian, 0.1, (1e-2, 3e-2, 1e-1, 3e-1, 1.0))}


def contest(task: Callable[[int], Task], method: Method, work: float, args: Any) -> Results:
    """Tuning, then counted runs and a timed one."""
    run = partial(timed, limit=args.limit, readings=16)
    rates = method.rates[1:4:2] if args.quick else method.rates
    trials = {lr: run(task(1000), method, lr, seed=1000, work=work / 5, readings=1) for lr in rates}
    best = min(trials, key=lambda lr: trials[lr].loss[-1] if trials[lr].error is None else math.inf)
    counted = [run(task(seed), method, best, seed=seed, work=work) for seed in range(args.seeds)]
    again = run(task(0), method, best, seed=0, iterations=max(counted[0].steps[-1], 1))
    return {"lr": best, "tuning": {lr: run.loss[-1] for lr, run in trials.items()}, "counted": counted, "timed": again}


def goal(contests: dict[str, Results]) -> float | None:
    """The loss that Adam has half way, mean over seeds."""
    if BASE not in contests:
        return None
    return statistics.mean(run.loss[len(run.loss) // 2] for run in contests[BASE]["counted"])


def reached(runs: list[Run], key: str, loss: float | None) -> float | None:
    """Where runs first have a loss, mean over seeds; nothing unless all do."""
    firsts = [next((at for at, each in zip(getattr(run, key), run.loss, strict=True) if loss and each <= loss), None)
              for run in runs]  # fmt: skip
    return None if None in firsts else statistics.mean(v for v in firsts if v is not None)


def summary(found: Results, target: float | None) -> Results:
    """What is kept of a contest: means over seeds, the range of the loss, and the first seed's curves."""
    runs, again = found["counted"], found["timed"]
    last = {key: [getattr(run, key)[-1] for run in runs] for key in ("loss", "score", "steps", "work")}
    curve = {"work": runs[0].work, "loss": runs[0].loss, "seconds": again.seconds, "timed loss": again.loss}
    return {
        "lr": found["lr"],
        "tuning": {f"{lr:g}": _round(loss) for lr, loss in found["tuning"].items()},
        **{key: _round(statistics.mean(values)) for key, values in last.items()},
        "losses": list(map(_round, sorted(last["loss"]))),
        "seconds": _round(again.seconds[-1]),
        "work to goal": _round(reached(runs, "work", target)),
        "seconds to goal": _round(reached([again], "seconds", target)),
        "errors": [run.error for run in runs if run.error],
        "curve": {key: list(map(_round, values)) for key, values in curve.items()},
    }


def _round(value: float | None) -> float | None:
    """Four digits; JSON has no infinity."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def lines(task: Results) -> tuple[list[str], list[list[Any]]]:
    """Header, and one line an optimizer, the least loss first."""
    keys = ("loss", "score", "steps", "work", "seconds", "work to goal", "seconds to goal")
    found = sorted(task["optimizers"].items(), key=lambda item: item[1]["loss"] or math.inf)
    header = ["optimizer", "lr", "train loss", f"test {task['measure']}", *keys[2:]]
    return header, [[name, f"{each['lr']:g}", *(each[key] for key in keys)] for name, each in found]


def compare(name: str, args: Any) -> Results | None:
    """One task's contests, printed; ``None`` if its data is not there."""
    make, work = TASKS[name]
    work *= args.share
    try:
        first = make(0)
    except SystemExit as missing:
        print(f"\n{name} is left out: {missing}")
        return None
    chosen, contests = compared(), {}
    with progress(len(args.optimizers), name) as bar:
        for label in args.optimizers:
            contests[label] = contest(make, chosen[label], work, args)
            bar.update()
    target = goal(contests)
    results = {"samples": len(first.train[0]), "seeds": args.seeds, "limit": args.limit, "budget": work,
               "goal": _round(target), "measure": first.measure,
               "optimizers": {label: summary(found, target) for label, found in contests.items()}}  # fmt: skip
    print(heading(f"{name}: {results['samples']} samples, {args.seeds} seed(s) of {work:g} units of work"))
    print(table(*lines(results)), flush=True)
    return results


class Tested(Task):
    """A task that is read on its test data alone, which is most of the time where it is read often."""

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        outputs, targets = model(self.test[0]), self.test[1]
        return float(self.loss(outputs, targets).nan_to_num(math.inf)), float(self.score(outputs, targets))


def soon(activation: type[nn.Module], batch: int, low: float, method: Method, args: Any) -> Results:
    """Epochs and seconds until the goal, of every seed, at the rate that got there first on another."""
    make = partial(mlp, 784, 512, 256, 10, activation=activation)

    def run(lr: float, seed: int) -> Run:
        task, most = Tested(**{**vars(mnist(seed, low)), "make": make}), 0.1 if args.quick else MOST
        return timed(task, method, lr, seed=seed, batch=batch, epochs=most, readings=round(10 * most), goal=ACCURACY)

    trials = {lr: run(lr, 1000) for lr in method.rates[: 2 if args.quick else None]}
    best = min(trials, key=lambda lr: (_at(trials[lr], "epochs") or math.inf, -trials[lr].score[-1]))
    runs = [run(best, seed) for seed in range(args.seeds)]
    return {
        "lr": best,
        "tuning": {f"{lr:g}": [_at(trial, "epochs"), _round(max(trial.score))] for lr, trial in trials.items()},
        "epochs": [_at(run, "epochs") for run in runs],
        "seconds": [_at(run, "seconds") for run in runs],
        "score": [_round(max(run.score)) for run in runs],
    }


def _at(run: Run, key: str) -> float | None:
    """Where a run that ends at the goal has ended."""
    return _round(getattr(run, key)[-1]) if run.score[-1] >= ACCURACY else None


def epochs(setting: str, args: Any) -> Results:
    """One network and batch size, printed."""
    (*network, names), known = SOON[setting], methods()
    found = {name: soon(*network, known[name], args) for name in names if name in args.optimizers}
    print(heading(setting), table(*soonest(found)), sep="\n", flush=True)
    return found


def soonest(found: dict[str, Results]) -> tuple[list[str], list[list[Any]]]:
    """Header, and one line an optimizer: means and ranges over the seeds, where all have reached the goal."""

    def spread(values: list[float | None]) -> str | None:
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return None
        return f"{statistics.mean(known):.2f} ({min(known):.2f}-{max(known):.2f})"

    header = ["optimizer", "lr", "seeds that reach it", "epochs", "seconds"]
    return header, [[name, f"{each['lr']:g}", f"{sum(v is not None for v in each['epochs'])} of {len(each['epochs'])}",
                     spread(each["epochs"]), spread(each["seconds"])] for name, each in found.items()]  # fmt: skip


def draw(plt: Any, name: str, optimizers: dict[str, Results]) -> Any:
    """Loss against work and against seconds, of the first seed."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
    for axes, x, y in zip(panels, ("work", "seconds"), ("loss", "timed loss"), strict=True):
        for i, (label, found) in enumerate(optimizers.items()):
            line, colour = ("-", "--", ":")[i // len(COLOURS) % 3], COLOURS[i % len(COLOURS)]
            loss = [math.nan if v is None else v for v in found["curve"][y]]
            axes.plot(found["curve"][x], loss, line, color=colour, label=label, linewidth=1.2)
        start = optimizers[BASE]["curve"]["loss"] if BASE in optimizers else loss
        axes.set(xlabel="work, gradients over all data" if x == "work" else x, yscale="log", title=name)
        axes.set_ylim(top=2 * start[0])  # where some diverge
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("loss on all training data")
    panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def measured(results: Results) -> str:
    """The part of the page that says what was measured."""
    where = results["environment"]
    parts = [f"Measured on {where['cpu']}, torch {where['torch']}, {where['date'][:10]}.\n"]
    for setting, found in results["epochs"].items():
        parts += [f"## Epochs to an accuracy of {ACCURACY} on mnist: {setting}\n",
                  f"Means (least-greatest), of at most {MOST:g}.\n", common.markdown(*soonest(found))]  # fmt: skip
    for name, task in results["tasks"].items():
        parts += [f"## {name}\n", f"{task['samples']} samples, {task['seeds']} seeds of {task['budget']:g} units of "
                  f"work and at most {task['limit']:g} seconds. The goal is a loss of {task['goal']}.\n",
                  common.markdown(*lines(task)), f"![{name}](figures/{name}.svg)\n"]  # fmt: skip
    return "\n".join(parts)


def page(results: Results) -> str:
    """The page with its measured part replaced."""
    return common.rewritten(PAGE, MARKS, measured(results))


def write_docs(results: Results) -> None:
    """The page and its figures."""
    PAGE.write_text(page(results), encoding="utf-8")
    plt = figures.pyplot()
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "curvext"})  # small, and the same every time
    (PAGE.parent / "figures").mkdir(exist_ok=True)
    for name, task in results["tasks"].items():
        draw(plt, name, task["optimizers"]).savefig(PAGE.parent / "figures" / f"{name}.svg", metadata={"Date": None})
    plt.close("all")


def options(argv: list[str] | None) -> Any:
    parser = common.parser("optimizers", __doc__)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--optimizers", nargs="+", choices=compared(), default=list(compared()), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="after tuning (%(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of every task's work (%(default)s)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds of a run of a task at most (%(default)s)")
    parser.add_argument("--epochs", nargs="*", choices=SOON, default=list(SOON), metavar="SETTING")
    parser.add_argument("--docs", action="store_true", help="only write the page and its figures")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.share, args.epochs = 1, 0.02 * args.share, args.epochs[:1]
    return args


def main(argv: list[str] | None = None) -> Results:
    """Measure what is asked for, and add it to what has been measured; or write the docs."""
    args = options(argv)
    results = common.kept(args.output) or {"epochs": {}, "tasks": {}}
    if args.docs:
        write_docs(results)
        return results
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results |= {"environment": common.environment()}
    for name in args.tasks:
        if (found := compare(name, args)) is not None:
            results["tasks"][name] = found
            common.write(args.output, results)
    for setting in args.epochs:
        results["epochs"].setdefault(setting, {}).update(epochs(setting, args))
        common.write(args.output, results)
    torch.set_num_threads(threads)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
