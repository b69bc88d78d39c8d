"""Part three: the cost of each estimate as a multiple of the gradient step."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .. import BL89, HesScale
from .data import Dataset
from .estimators import Batch, by_block, gauss_newton_mc_step, gradient, hutchinson, squared_gradient
from .options import Options
from .quality import network
from .report import progress
from .report import table as aligned
from .timing import alternate, ratios

BATCH = 64


def measure(data: Dataset, options: Options) -> dict[str, Any]:
    """Times of forward, backward and estimate in turn, for the demo's network and for a wide one."""
    generator = torch.Generator().manual_seed(options.seed)
    compared = {
        "gradient step": gradient,
        "squared gradient (Adam)": squared_gradient,
        "HesScale": by_block(HesScale()),
        "HesScaleGN": by_block(HesScale(gauss_newton=True)),
        "BL89": by_block(BL89()),
        "GGN-MC, 1 draw": partial(gauss_newton_mc_step, generator=generator),
        "Hutchinson, AdaHessian, 1 draw": hutchinson(1, generator),
    }
    x, y = (part[:BATCH] for part in data.train)
    results: dict[str, Any] = {"runs": options.runs, "batch": len(x), "networks": {}}
    with progress(2 * options.runs, "cost") as bar:
        for hidden in (options.hidden, options.wide):
            torch.manual_seed(options.seed)
            problem = Batch(network(data.features, hidden), x, y)
            calls = {name: _call(estimate, problem) for name, estimate in compared.items()}
            times = alternate(calls, options.runs, tick=bar.update)
            title = "-".join(map(str, (data.features, hidden, hidden, 10)))
            milliseconds = 1e3 * sorted(times["gradient step"])[options.runs // 2]
            results["networks"][title] = {"milliseconds": milliseconds, "ratios": ratios(times, "gradient step")}
    return results


def _call(estimate: Any, problem: Batch) -> Any:
    def call() -> None:
        for p in problem.parameters:
            p.grad = None
        estimate(problem)

    return call


def table(results: dict[str, Any]) -> str:
    """Medians, with the quartiles."""
    networks = results["networks"]
    names = next(iter(networks.values()))["ratios"]
    rows = [(name, *(_spread(*entry["ratios"][name]) for entry in networks.values())) for name in names]
    units = ["milliseconds of the gradient step", *(float(entry["milliseconds"]) for entry in networks.values())]
    note = (
        f"Time as a multiple of the gradient step (forward and backward), {results['batch']} images, median of "
        f"{results['runs']}\nalternating runs (quartiles). Small networks pay Python's overhead, wide ones arithmetic."
    )
    return note + "\n\n" + aligned(["", *networks], [*rows, units])


def _spread(low: float, middle: float, high: float) -> str:
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"
