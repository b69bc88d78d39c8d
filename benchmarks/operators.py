"""Cost of matrix-free products in gradient steps (zero_grad, forward, backward), beside other ways to have them.

  products  one product with a vector on one batch, the operator made before
  twenty    an operator made, its check of determinism included, and 20 products: as a share of curvlinops's time
  columns   eight vectors at once, a column
  memory    peak of memory of making an operator and one product, as a multiple of the gradient step's
  density   the Hessian's spectral density for a model of ten million parameters: seconds, products, and the peak of
            memory as a multiple of the parameters', with all Lanczos vectors kept and with few

*Plain autograd* runs the model and differentiates its gradient for every product; *kept by hand* keeps the gradient's
graph, as PyHessian does. curvlinops is measured where it is installed (``pip install --no-deps curvlinops-for-pytorch``
and what its import asks for). Times are medians of alternating runs, ratios taken within a round, with quartiles.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import common
import torch
from models import MODELS, Task, classification, mlp
from peak import peak_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvext.demo.report import heading, progress, table
from curvext.demo.timing import alternate, ratios
from curvext.operators import EmpiricalFisher, Fisher, GaussNewton, Hessian, Jacobian, Operator, Residual

BASE = "gradient step"
Calls = dict[str, Callable[[], object]]


class Flat(nn.Module):
    """Outputs with one row a label, as PyTorch's cross entropy and curvlinops take them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).flatten(0, -2)


def prepared(make: Callable[[int], Task], n: int) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """Model, loss and batch; batch normalisation evaluates, as operators over data need."""
    task = make(n)
    return Flat(task.model.eval()), nn.CrossEntropyLoss(), (task.x, task.y.flatten())


def gradient_step(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """What everything is compared with."""
    model.zero_grad()
    loss(model(data[0]), data[1]).backward()


def graph_of_gradient(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
    """The differentiable gradient; fused attention has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters()), create_graph=True)


@cache
def curvlinops() -> Mapping[str, Any]:
    """Its operators, if it can be imported."""
    try:
        import curvlinops
    except ImportError as error:
        print(f"curvlinops is left out: {error}")
        return {}
    return {"Hessian": curvlinops.HessianLinearOperator, "GaussNewton": curvlinops.GGNLinearOperator}


def theirs(kind: str, model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], check: bool = False) -> Any:
    """curvlinops's operator on one batch."""
    return curvlinops()[kind](model, loss, list(model.parameters()), [data], check_deterministic=check)


OURS: dict[str, Callable[..., Operator]] = {
    "Hessian": Hessian,
    "GaussNewton": GaussNewton,
    "Residual": Residual,
    "Fisher, 1 draw": partial(Fisher, mc_samples=1),
    "EmpiricalFisher": EmpiricalFisher,
}


def products(setting: Any, runs: int) -> dict[str, Any]:
    """One product of everything."""
    model, _, data = setting
    operators: dict[str, Any] = {name: kind(*setting, check=False) for name, kind in OURS.items()}
    operators["Jacobian"] = Jacobian(model, data, check=False)
    calls: Calls = {BASE: partial(gradient_step, *setting)}
    v = torch.randn(operators["Hessian"].shape[0])
    for kind in curvlinops():
        with sdpa_kernel(SDPBackend.MATH):
            operators[f"curvlinops {kind}"] = theirs(kind, *setting)
    calls |= {name: partial(_times, operator, v) for name, operator in operators.items()}
    parameters, split = list(model.parameters()), operators["Hessian"].domain.split(v)
    kept = graph_of_gradient(*setting)
    calls["Hessian, kept by hand"] = lambda: torch.autograd.grad(kept, parameters, split, retain_graph=True)
    calls["Hessian, plain autograd"] = lambda: torch.autograd.grad(graph_of_gradient(*setting), parameters, split)
    return ratios(alternate(calls, runs), BASE)


def _times(operator: Any, v: Tensor) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return operator @ v


def twenty(setting: Any, runs: int, count: int = 20) -> dict[str, Any]:
    """From nothing to ``count`` products."""
    v = torch.randn(sum(p.numel() for p in setting[0].parameters()))

    def ours(kind: str) -> None:
        operator = OURS[kind](*setting)
        for _ in range(count):
            operator @ v

    def other(kind: str) -> None:
        with sdpa_kernel(SDPBackend.MATH):
            operator = theirs(kind, *setting, check=True)
            for _ in range(count):
                operator @ v

    results = {}
    for kind in curvlinops():
        times = alternate({"curvext": partial(ours, kind), "curvlinops": partial(other, kind)}, max(2, runs // 3), 1)
        results[kind] = ratios(times, "curvlinops")["curvext"]
    return results


def columns(setting: Any, runs: int, count: int = 8) -> dict[str, Any]:
    """Time of a column among eight."""
    operators: dict[str, Any] = {name: OURS[name](*setting, check=False) for name in ("Hessian", "GaussNewton")}
    for kind in curvlinops():
        operators[f"curvlinops {kind}"] = theirs(kind, *setting)
    v = torch.randn(operators["Hessian"].shape[0], count)
    calls: Calls = {BASE: partial(gradient_step, *setting)}
    calls |= {name: partial(_times, operator, v) for name, operator in operators.items()}
    times = alternate(calls, max(2, runs // 3), 1)
    return {name: [r / count for r in ratio] for name, ratio in ratios(times, BASE).items() if name != BASE}


def memory(setting: Any, runs: int) -> dict[str, Any]:
    """Peaks, with the parameters and the batch."""
    model, _, data = setting
    resident = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *data))
    calls: Calls = {BASE: partial(gradient_step, *setting)}
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    calls |= {name: lambda kind=kind: kind(*setting) @ v for name, kind in OURS.items()}  # type: ignore[misc]
    calls |= {f"curvlinops {kind}": lambda kind=kind: theirs(kind, *setting) @ v for kind in curvlinops()}  # type: ignore[misc]
    with sdpa_kernel(SDPBackend.MATH):
        peaks = {name: resident + peak_bytes(call, model.zero_grad) for name, call in calls.items()}
    return {name: peak / peaks[BASE] for name, peak in peaks.items()} | {"bytes": peaks}


def ten_million(quick: bool) -> dict[str, Any]:
    """One probe, 20 Lanczos steps."""
    from curvext.spectra import density

    task = classification(mlp(784, 2048, 2048, 2048, 10) if not quick else mlp(8, 4, 10), 64, 8 if quick else 784)
    operator = Hessian(task.model, nn.CrossEntropyLoss(), (task.x, task.y))
    own = operator.shape[0] * 4
    results: dict[str, Any] = {"parameters": operator.shape[0]}
    for kept in ("full", "none"):
        call = partial(density, operator, probes=1, steps=2 if quick else 20, reorthogonalize=kept)
        start = time.perf_counter()
        products = call().products
        seconds = time.perf_counter() - start
        peak = (own + peak_bytes(call, operator.refresh)) / own
        results[kept] = {"seconds": seconds, "products": products, "peak": peak}
    return results


PARTS = {"products": products, "twenty": twenty, "columns": columns, "memory": memory}


def cell(value: Any) -> str:
    """Median with quartiles, or a number."""
    if isinstance(value, float):
        return f"{value:.2f}"
    low, middle, high = value
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each part: rows are operators, columns models."""
    tables = []
    for part in PARTS:
        found = {model: parts[part] for model, parts in results.items() if part in parts}
        rows = {row: None for values in found.values() for row in values if row not in (BASE, "bytes")}
        body = [[row, *(cell(v[row]) if row in v else None for v in found.values())] for row in rows]
        if body:
            tables.append(table([part, *found], body))
    return "\n\n".join(tables)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Every part for every model."""
    parser = common.parser("operators", __doc__)
    parser.add_argument("--runs", type=int, default=15, help="alternating runs (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="samples (%(default)s)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS)[:2], help="(%(default)s)")
    every = [*PARTS, "density"]
    parser.add_argument("--parts", nargs="+", choices=every, default=every, help="what to measure (all)")
    args = parser.parse_args(argv)
    runs, n = (2, 2) if args.quick else (args.runs, args.batch)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with progress(len(args.models) * len(args.parts), "operators") as bar:
        for name in args.models:
            setting, results[name] = prepared(MODELS[name], n), {}
            for part in args.parts:
                if part in PARTS:
                    results[name][part] = PARTS[part](setting, runs)
                bar.update()
    large = ten_million(args.quick) if "density" in args.parts else {}
    torch.set_num_threads(before)
    print(heading(f"In gradient steps, one thread, median (quartiles) of {runs} alternating runs"))
    print(report(results))
    if large:
        rows = [[f"{kept} reorthogonalisation", *large[kept].values()] for kept in ("full", "none")]
        print("\n" + table([f"density of {large['parameters']} parameters", *large["full"]], rows))
    everything = {"runs": runs, "batch": n, "models": results, "density": large}
    common.write(args.output, everything)
    return everything


if __name__ == "__main__":
    main(sys.argv[1:])
