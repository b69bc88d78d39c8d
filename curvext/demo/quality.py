"""Part one: estimates of the Hessian diagonal against the exact one, at several moments of a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import BL89, DiagHessian, HesScale
from .data import Dataset
from .estimators import Batch, Estimate, by_block, distance, gauss_newton_mc, hutchinson, squared_gradient
from .options import Options
from .report import progress
from .report import table as aligned

Estimator = Callable[[Any], Estimate]


def estimators(draws: int, generator: torch.Generator) -> dict[str, Estimator]:
    """What is compared, by the names that the tables and figures use."""
    return {
        "HesScale": by_block(HesScale()),
        "HesScaleGN": by_block(HesScale(gauss_newton=True)),
        "BL89": by_block(BL89()),
        "GGN-MC, 1 draw": gauss_newton_mc(1, generator),
        f"GGN-MC, {draws} draws": gauss_newton_mc(draws, generator),
        "squared gradient (Adam)": squared_gradient,
        "Hutchinson, 1 draw": hutchinson(1, generator),
        f"Hutchinson, {draws} draws": hutchinson(draws, generator),
        "|Hv|, 1 draw (AdaHessian)": hutchinson(1, generator, absolute=True),
    }


def network(features: int, hidden: int, classes: int = 10) -> nn.Sequential:
    """Two hidden layers of tanh, so that the Hessian is not the Gauss-Newton matrix."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, classes)
    )


def checkpoints(steps: int, count: int) -> list[int]:
    """Step 0 and ``count - 1`` more up to ``steps``, evenly spaced in the logarithm."""
    spaced = torch.logspace(0.5, torch.log10(torch.tensor(float(steps))).item(), count - 1)
    return sorted({0, steps, *(round(s) for s in spaced.tolist() if s <= steps)})


def measure(data: Dataset, options: Options) -> dict[str, Any]:
    """Train with Adam; at every checkpoint, the relative L1 distance of each estimate on one fixed batch."""
    torch.manual_seed(options.seed)
    model = network(data.features, options.hidden)
    compared = estimators(options.draws, torch.Generator().manual_seed(options.seed))
    moments = checkpoints(options.steps, options.checkpoints)
    errors: dict[str, list[float]] = {name: [] for name in compared}
    losses = []
    x, y = (part[: options.samples] for part in data.train)
    problem = Batch(model, x, y)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = data.batches(options.batch_size, options.seed)
    with progress(options.steps, "quality") as bar:
        for step in range(options.steps + 1):
            if step in moments:
                exact = by_block(DiagHessian())(problem)
                losses.append(float(problem.loss().detach()))
                for name, estimate in compared.items():
                    errors[name].append(distance(estimate(problem), exact))
            inputs, labels = next(batches)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            bar.update(step > 0)
    parameters = sum(p.numel() for p in model.parameters())
    return {"steps": moments, "errors": errors, "losses": losses, "samples": len(x), "parameters": parameters}


def table(results: dict[str, Any]) -> str:
    """Estimates by checkpoints."""
    note = (
        f"sum |estimate - H| / sum |H| over {results['parameters']:,} parameters, mean cross entropy of "
        f"{results['samples']} images;\n1 is what an estimate of zero has. Network of two tanh layers, trained by Adam."
    )
    rows = [("loss on these images", *results["losses"]), *((k, *v) for k, v in results["errors"].items())]
    return note + "\n\n" + aligned(["after step", *map(str, results["steps"])], rows)
