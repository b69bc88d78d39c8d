"""Every quantity of BackPACK's: curvext against BackPACK 1.7.1, in gradient steps (zero_grad, forward, backward).

The gradient step, curvext and BackPACK take turns in one run. Times are medians with quartiles of the ratio within a
round; peak memory is what torch's CPU allocator hands out during a step beyond what was there before, divided by the
gradient step's. GGNMP, HMP and PCHMP include one product with every block. Networks are in evaluation mode, as BackPACK
refuses batch normalisation otherwise; the ResNet goes through its converter.

A step whose time or memory would go beyond the limits, as extrapolated from two samples, is not run. Results are kept
after every network, and added to those in the file: parts may be measured one after the other.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import common
import torch
from common import kept, rewritten
from models import Task, all_cnn_c, classification, cnn_3c3d, mlp, resnet18
from peak import peak_bytes
from torch import nn

import curvext
from curvext.demo.report import heading, progress, table
from curvext.demo.timing import alternate, quartiles, ratios

BASE, OURS, THEIRS = "gradient step", "curvext", "BackPACK"
MODELS: dict[str, Callable[[int], Task]] = {
    "MLP": lambda n: classification(mlp(784, 512, 256, 10), n, 784),
    "3C3D": lambda n: classification(cnn_3c3d(), n, 3, 32, 32),
    "All-CNN-C": lambda n: classification(all_cnn_c(), n, 3, 32, 32, classes=100),
    "ResNet-18": lambda n: classification(resnet18(), n, 3, 32, 32),
}
NAMES = {"MLP": "MLP 784-512-256-10", "ResNet-18": "ResNet-18, width 32"}
PRODUCTS = ("GGNMP", "HMP", "PCHMP")
QUANTITIES = [
    "BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance", "DiagGGNMC", "DiagGGNExact", "BatchDiagGGNMC",
    "BatchDiagGGNExact", "SqrtGGNMC", "SqrtGGNExact", "DiagHessian", "BatchDiagHessian", "KFAC", "KFLR", "KFRA",
    *PRODUCTS,
]  # fmt: skip
PAGE = Path(__file__).parent.parent / "docs" / "backpack.md"
MARKS = "<!-- measured by benchmarks/backpack_cost.py -->\n", "<!-- end -->\n"
NOT_OFFERED = "not offered"


class Rivals:
    """One network for both libraries and a batch; BackPACK has a copy of its own, as it puts hooks on it."""

    def __init__(self, name: str, n: int):
        self.task = MODELS[name](n)
        self.task.model.eval()
        self.backpack = import_module("backpack")
        converted = name == "ResNet-18"
        self.theirs = self.backpack.extend(copy.deepcopy(self.task.model), use_converter=converted).eval()
        self.loss = self.backpack.extend(nn.CrossEntropyLoss())

    def gradient(self) -> None:
        self.task.model.zero_grad()
        self.task.loss().backward()

    def curvext(self, quantity: str) -> None:
        self.task.model.zero_grad()
        with curvext.extend(self.task.model, getattr(curvext, quantity)()):
            self.task.loss().backward()
        self._multiply(self.task.model, quantity)

    def peer(self, quantity: str) -> None:
        self.theirs.zero_grad()
        with self.backpack.backpack(getattr(self.backpack.extensions, quantity)()):
            self.loss(self.theirs(self.task.x), self.task.y).backward()
        self._multiply(self.theirs, quantity)

    def _multiply(self, model: nn.Module, quantity: str) -> None:
        if quantity in PRODUCTS:
            for p in model.parameters():
                getattr(p, quantity.lower())(torch.ones(1, *p.shape)).detach()

    def forget(self) -> None:
        """Leave nothing but the parameters."""
        for p in (*self.task.model.parameters(), *self.theirs.parameters()):
            p.grad = None
            p.__dict__.clear()

    def steps(self, quantity: str) -> dict[str, Callable[[], None]]:
        return {BASE: self.gradient, OURS: partial(self.curvext, quantity), THEIRS: partial(self.peer, quantity)}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError at the first line of Python that runs after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(step: Callable[[], None], seconds: float) -> str | None:
    """Why this library cannot do this step in that time, if it cannot."""
    try:
        with within(seconds):
            step()
    except Exception as error:  # whatever it is, the others are measured
        if TimeoutError in (type(error), type(error.__cause__)):
            return f"about {seconds:.0f} s for two samples"
        kind = NOT_OFFERED if isinstance(error, NotImplementedError) else type(error).__name__
        return f"{kind}: {error}".split("\n")[0][:200]
    return None


def widest(task: Task) -> int:
    """Entries of the largest tensor of one sample in the network: KFRA carries a matrix of that size squared."""
    sizes = [task.x[0].numel()]
    layers = [m for m in task.model.modules() if not any(True for _ in m.children())]
    handles = [m.register_forward_hook(lambda m, x, y: sizes.append(y[0].numel())) for m in layers]
    task.model(task.x)
    for handle in handles:
        handle.remove()
    return max(sizes)


def refusals(name: str, quantity: str, n: int, limits: tuple[float, float]) -> dict[str, str]:
    """Libraries that cannot do it, or not within the limits of seconds and bytes, as two samples predict."""
    small = Rivals(name, 2)
    matrix = 4 * widest(small.task) ** 2
    if quantity == "KFRA" and 3 * matrix > limits[1]:
        return dict.fromkeys((OURS, THEIRS), f"about {matrix / 2**30:.0f} GiB for one matrix")
    found = {}
    for library, step in small.steps(quantity).items():
        why = reason(step, limits[0])
        if why is None:
            start = time.perf_counter()
            step()
            seconds = n / 2 * (time.perf_counter() - start)
            size = n / 2 * peak_bytes(step, small.forget)
            if library != BASE and (seconds > limits[0] or size > limits[1]):
                why = f"about {seconds:.0f} s and {size / 2**30:.0f} GiB"
        if why is not None:
            found[library] = why
    return found


def measure(name: str, quantity: str, n: int, runs: int, limits: tuple[float, float]) -> dict[str, Any]:
    """Ratios to the gradient step and of the two libraries, quartiles; peaks of memory in bytes."""
    refused = refusals(name, quantity, n, limits)
    rivals = Rivals(name, n)
    steps = {library: step for library, step in rivals.steps(quantity).items() if library not in refused}
    times = alternate(steps, runs, warmup=2)
    rivals.forget()
    peaks = {}
    for library, step in steps.items():
        peaks[library] = peak_bytes(step, rivals.forget)
        rivals.forget()
    result: dict[str, Any] = {"ratio": ratios(times, BASE), "bytes": peaks, "refused": refused}
    if len(steps) == 3:
        result["to each other"] = ratios(times, THEIRS)[OURS]
    return {"milliseconds": 1e3 * quartiles(times[BASE])[1], **result}


def spread(values: Any) -> str:
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f}-{high:.2f})" if middle < 100 else f"{middle:.0f} ({low:.0f}-{high:.0f})"


def cells(quantity: str, entry: dict[str, Any]) -> list[str]:
    """A row: time of both, overhead of one by the other's, memory of both."""
    row = [quantity, *(spread(entry["ratio"][k]) if k in entry["ratio"] else _short(entry, k) for k in (OURS, THEIRS))]
    if "to each other" in entry:
        ours, theirs = (entry["ratio"][k][1] - 1 for k in (OURS, THEIRS))
        row.append(f"{ours / theirs:.2f}" if theirs > 0.05 else "-")
    else:
        row.append("-")
    return row + [
        f"{entry['bytes'][k] / entry['bytes'][BASE]:.2f}" if k in entry["bytes"] else "-" for k in (OURS, THEIRS)
    ]


def _short(entry: dict[str, Any], library: str) -> str:
    why = entry["refused"][library]
    return NOT_OFFERED if why.startswith(NOT_OFFERED) else "not run: " + why if why.startswith("about") else "fails"


HEADER = ["quantity", "time, curvext", "time, BackPACK", "overheads' ratio", "memory, curvext", "memory, BackPACK"]


def measured(results: dict[str, Any] | None) -> str:
    """The part of docs/backpack.md that says what was measured."""
    if results is None:
        return "Not measured yet: `python benchmarks/backpack_cost.py`.\n"
    where = results["environment"]
    parts = [
        f"Measured on {where['cpu']} with {where['cores']} thread(s), torch {where['torch']}, BackPACK "
        f"{results['BackPACK']}, {where['date'][:10]}. Time and peak memory in gradient steps, medians (quartiles) of "
        f"{results['runs']} alternating runs; overhead: time beyond the gradient step.\n"
    ]
    for name, sizes in results["models"].items():
        for n, quantities in sizes.items():
            parts.append(f"{NAMES.get(name, name)}, N = {n}:\n")
            parts.append("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
            known = [q for q in QUANTITIES if q in quantities]
            parts[-1] += "".join("\n| " + " | ".join(cells(q, quantities[q])) + " |" for q in known) + "\n"
    return "\n".join(parts)


def page(results: dict[str, Any] | None) -> str:
    """docs/backpack.md with the measured part replaced."""
    return rewritten(PAGE, MARKS, measured(results))


def options(argv: list[str] | None) -> Any:
    parser = common.parser("backpack", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="networks (all)")
    parser.add_argument("--quantities", nargs="+", choices=QUANTITIES, default=QUANTITIES, help="what to compute (all)")
    parser.add_argument("--n", type=int, nargs="+", default=[32, 128], help="batch sizes (32 128)")
    parser.add_argument("--runs", type=int, default=9, help="alternating runs (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads (%(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="longest step to run (%(default)s)")
    parser.add_argument("--memory", type=float, help="largest peak to allow, in GiB (half of what is free)")
    parser.add_argument("--docs", action="store_true", help="only write the table in docs/backpack.md")
    args = parser.parse_args(argv)
    if args.memory is None:
        args.memory = 0.5 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if args.quick:
        args.models, args.n, args.runs = args.models[:1], [4], 2
    return args


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    """Measure what is asked for, or write the table."""
    args = options(argv)
    if args.docs:
        PAGE.write_text(page(kept(args.output)), encoding="utf-8")
        return None
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # BackPACK's
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = kept(args.output) or {"models": {}}
    results |= {
        "environment": common.environment(),
        "runs": args.runs,
        "BackPACK": metadata.version("backpack-for-pytorch"),
    }
    limits = (args.seconds, args.memory * 2**30)
    with progress(len(args.models) * len(args.n) * len(args.quantities), "quantities") as bar:
        for name in args.models:
            for n in args.n:
                entries = results["models"].setdefault(name, {}).setdefault(str(n), {})
                for quantity in args.quantities:
                    entries[quantity] = measure(name, quantity, n, args.runs, limits)
                    bar.update()
                print(heading(f"{NAMES.get(name, name)}, N = {n}"))
                print(table(HEADER, [cells(q, entries[q]) for q in QUANTITIES if q in entries]))
                common.write(args.output, results)
    torch.set_num_threads(before)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
