"""Cost of HesScale in gradient steps (zero_grad, forward, backward), beside what arithmetic predicts.

  models    four networks: HesScale, HesScaleGN, and Hutchinson's estimate with one draw (create_graph and a product)
  growth    HesScale with width, depth, outputs and batch
  compiled  the step as one compiled graph, and the gradient step of the compiled model
  memory    peak of memory, as a multiple of the gradient step's
  overhead  microseconds that curvext adds to a node of the graph

Prediction. A product costs 1 forward and 1 backward for each of its inputs that needs a gradient. HesScale adds the
same products again, of squares: the *limit* is 1 + backward / (forward + backward), in multiply-adds. *Counted* is what
the code really multiplies. Times are medians of alternating runs, ratios taken within a round, with their quartiles.
Peak memory is what torch's allocator hands out, as its profiler records it, plus the parameters and the batch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import common
import torch
from models import MODELS, Task, classification, mlp
from peak import peak_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from curvext import HesScale, extend
from curvext.compile import compile_step
from curvext.demo.report import heading, progress, table
from curvext.demo.timing import alternate, quartiles, ratios

aten = torch.ops.aten
BASE = "gradient step"


def gradient_step(task: Task) -> None:
    """What everything is compared with."""
    task.model.zero_grad()
    task.loss().backward()


def with_block(task: Task, gauss_newton: bool = False) -> None:
    """The gradient step inside a block."""
    task.model.zero_grad()
    with extend(task.model, HesScale(gauss_newton=gauss_newton)):
        task.loss().backward()


def hutchinson(task: Task) -> None:
    """The gradient, kept differentiable, and one Hessian-vector product."""
    parameters = list(task.model.parameters())
    signs = [2 * torch.randint_like(p.detach(), 0, 2) - 1 for p in parameters]
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        gradients = torch.autograd.grad(task.loss(), parameters, create_graph=True)
        products = torch.autograd.grad(gradients, parameters, signs)
    for p, g, v, hv in zip(parameters, gradients, signs, products, strict=True):
        p.grad, p.estimate = g.detach(), v * hv  # type: ignore[attr-defined]


STEPS: dict[str, Callable[[Task], None]] = {
    BASE: gradient_step,
    "HesScale": with_block,
    "HesScaleGN": partial(with_block, gauss_newton=True),
    "Hutchinson": hutchinson,
}


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Two products, scores and mixture."""
    *batch, rows, features = q
    return 2 * torch.Size(batch).numel() * rows * k[-2] * (features + v[-1])


ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda _, *qkv, **kw: 2 * _attention(*qkv, **kw),
}


def flops(call: Callable[[], object]) -> int:
    """Floating point operations of all products in ``call``."""
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def predict(task: Task) -> dict[str, float]:
    """The limit by arithmetic, and the products that the code really does, in gradient steps."""
    forward, step = flops(task.loss), flops(partial(gradient_step, task))
    counted = {name: flops(partial(run, task)) / step for name, run in STEPS.items() if name != BASE}
    return {"limit": 1 + (step - forward) / step, **{f"counted {name}": value for name, value in counted.items()}}


def timed(task: Task, runs: int, steps: Iterable[str] = STEPS) -> dict[str, Any]:
    """Quartiles of every step's time in gradient steps, and milliseconds of the gradient step."""
    return _timed({name: partial(STEPS[name], task) for name in steps}, runs)


def _timed(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, Any]:
    times = alternate(calls, runs)
    milliseconds = {name: [1e3 * t for t in quartiles(values)] for name, values in times.items()}
    return {"milliseconds": milliseconds, "ratio": ratios(times, BASE)}


def models(runs: int, quick: bool, tick: Callable[[], object]) -> dict[str, Any]:
    """Every network of :data:`MODELS`."""
    results = {}
    for name, make in MODELS.items():
        task = make(2 if quick else 64)
        parameters = sum(p.numel() for p in task.model.parameters())
        results[name] = {"parameters": parameters, **predict(task), **timed(task, runs)}
        tick()
    return results


def growth(runs: int, quick: bool, tick: Callable[[], object]) -> dict[str, Any]:
    """One size at a time."""
    sizes: dict[str, tuple[list[int], Callable[[int], Task]]] = {
        "width": ([64, 128, 256, 512, 1024, 2048], lambda w: classification(mlp(w, w, w, w, 10), 64, w)),
        "depth": ([1, 2, 4, 8, 16, 32], lambda d: classification(mlp(256, *[256] * d, 10), 64, 256)),
        "outputs": ([10, 100, 1000, 10000], lambda c: classification(mlp(256, 256, 256, c), 64, 256, classes=c)),
        "batch": ([1, 4, 16, 64, 256, 1024], lambda n: classification(mlp(784, 512, 256, 10), n, 784)),
    }
    results: dict[str, Any] = {}
    for name, (values, make) in sizes.items():
        results[name] = {}
        for value in values[:2] if quick else values:
            task = make(value)
            results[name][value] = {**predict(task), **timed(task, runs, (BASE, "HesScale", "HesScaleGN"))}
        tick()
    return results


def compiled(runs: int, quick: bool, tick: Callable[[], object]) -> dict[str, Any]:
    """The first two networks with ``torch.compile``."""
    results = {}
    options = {"backend": "eager" if quick else "inductor"}
    for name, make in list(MODELS.items())[:2]:
        task = make(2 if quick else 64)
        whole = compile_step(task.model, lambda model, x, y: Task(model, x, y).loss(), HesScale(), **options)
        alike = Task(torch.compile(task.model, **options), task.x, task.y)  # type: ignore[call-overload]
        calls = {
            BASE: partial(gradient_step, task),
            "gradient step, compiled": partial(gradient_step, alike),
            "HesScale": partial(with_block, task),
            "HesScale, compiled": partial(_whole_step, task, whole),
        }
        results[name] = _timed(calls, runs)
        tick()
    return results


def _whole_step(task: Task, whole: Callable[[Tensor, Tensor], Tensor]) -> None:
    task.model.zero_grad()
    whole(task.x, task.y)


def memory(_: int, quick: bool, tick: Callable[[], object]) -> dict[str, Any]:
    """Peaks of memory, in bytes and in gradient steps."""
    results = {}
    for name, make in MODELS.items():
        task = make(2 if quick else 64)
        resident = sum(t.nbytes for t in (*task.model.parameters(), *task.model.buffers(), task.x, task.y))
        peaks = {step: resident + peak_bytes(partial(run, task), partial(_forget, task)) for step, run in STEPS.items()}
        results[name] = {"bytes": peaks, "ratio": {step: peak / peaks[BASE] for step, peak in peaks.items()}}
        tick()
    return results


def _forget(task: Task) -> None:
    """Leave parameters alone."""
    for p in task.model.parameters():
        p.grad = None
        for field in ("hesscale", "hesscale_gn", "estimate"):
            p.__dict__.pop(field, None)


class Chain(nn.Module):
    """One tiny operation many times, after one parameter."""

    def __init__(self, operation: Callable[[Tensor], Tensor], length: int):
        super().__init__()
        self.operation, self.length = operation, length
        self.scale = nn.Parameter(torch.ones(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for _ in range(self.length):
            x = self.operation(x)
        return x


def overhead(runs: int, quick: bool, tick: Callable[[], object]) -> dict[str, Any]:
    """Microseconds a node: of the gradient step, and added by the block."""
    weight = torch.eye(2)
    operations = {"tanh": torch.tanh, "exp": torch.exp, "view": lambda x: x.view(1, 2), "matmul": lambda x: x @ weight}
    results = {}
    for name, operation in operations.items():
        lengths = (5, 10) if quick else (100, 300)
        tasks = [Task(Chain(operation, n), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)) for n in lengths]
        calls = {(n, s): partial(STEPS[s], t) for n, t in zip(lengths, tasks, strict=True) for s in (BASE, "HesScale")}
        times = {key: quartiles(values)[1] for key, values in alternate(calls, runs).items()}  # type: ignore[arg-type]
        nodes = lengths[1] - lengths[0]
        slope = {s: 1e6 * (times[lengths[1], s] - times[lengths[0], s]) / nodes for s in (BASE, "HesScale")}
        results[name] = {"gradient": slope[BASE], "added": slope["HesScale"] - slope[BASE]}
        tick()
    return results


def spread(low: float, middle: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _ratio_row(name: Any, entry: dict[str, Any]) -> list[Any]:
    ratio = entry["ratio"]
    cells = [spread(*ratio[step]) for step in STEPS if step in ratio and step != BASE]
    milliseconds = entry["milliseconds"][BASE][1]
    return [name, float(milliseconds), f"{entry['limit']:.2f}", f"{entry['counted HesScale']:.2f}", *cells]


def report(results: dict[str, Any]) -> str:
    """All tables of one thread count."""
    columns = ["ms/gradient", "limit", "counted", "HesScale", "HesScaleGN"]
    parts = []
    if "models" in results:
        rows = [_ratio_row(name, entry) for name, entry in results["models"].items()]
        parts.append(table(["model", *columns, "Hutchinson"], rows))
    for size, entries in results.get("growth", {}).items():
        parts.append(table([size, *columns], [_ratio_row(value, entry) for value, entry in entries.items()]))
    if "compiled" in results:
        entries = results["compiled"]
        names = list(next(iter(entries.values()))["ratio"])[1:]
        parts.append(
            table(["model", *names], [[n, *(spread(*e["ratio"][name]) for name in names)] for n, e in entries.items()])
        )
    if "memory" in results:
        rows = [[n, f"{e['bytes'][BASE] / 2**20:.1f}", *(f"{e['ratio'][s]:.2f}" for s in list(STEPS)[1:])]
                for n, e in results["memory"].items()]  # fmt: skip
        parts.append(table(["peak memory", "MiB/gradient", *list(STEPS)[1:]], rows))
    if "overhead" in results:
        rows = [[n, f"{e['gradient']:.1f}", f"{e['added']:.1f}"] for n, e in results["overhead"].items()]
        parts.append(table(["microseconds a node", "gradient step", "added by the block"], rows))
    return "\n\n".join(parts)


PARTS = {"models": models, "growth": growth, "compiled": compiled, "memory": memory, "overhead": overhead}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the parts asked for, once for each number of threads."""
    parser = common.parser("hesscale_cost", __doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads (1)")
    parser.add_argument("--runs", type=int, default=15, help="alternating runs (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (all)")
    args: argparse.Namespace = parser.parse_args(argv)
    args.runs = 2 if args.quick else args.runs
    before = torch.get_num_threads()
    results: dict[str, Any] = {"runs": args.runs, "threads": {}}
    for threads in args.threads:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        with progress(4 * len(args.parts), f"{threads} thread(s)") as bar:
            results["threads"][threads] = {name: PARTS[name](args.runs, args.quick, bar.update) for name in args.parts}
        print(heading(f"In gradient steps, {threads} thread(s), median (quartiles) of {args.runs} alternating runs"))
        print(report(results["threads"][threads]))
    torch.set_num_threads(before)
    common.write(args.output, results)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
