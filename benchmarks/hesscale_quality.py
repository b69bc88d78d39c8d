"""Distance of HesScale and its alternatives to the exact Hessian diagonal, sample by sample.

  untrained   the experiment of Elsayed & Mahmood 2022, https://arxiv.org/abs/2210.11639: a tanh network 6-16-16-16-10
              as initialised, normal inputs, random labels; 40 seeds of 1,000 samples
  trained     the experiment of Elsayed et al. 2024, https://arxiv.org/abs/2406.03276, on scikit-learn's digits:
              64-64-64-10 with tanh and with ReLU, before and after 10,000 steps of Adam; 100 held-out images

Cross entropy at batch size 1, float64. Error: sum |estimate - H| over all parameters, averaged over samples; the tables
show it in units of HesScale's error (mean over seeds, and the least and greatest of the seeds). An estimate of zero has
sum |H|.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
import torch.nn.functional as F
from models import mlp
from torch import Tensor, nn

from curvext import BL89, HesScale
from curvext.demo.data import load
from curvext.demo.estimators import (
    Estimate,
    by_block,
    gauss_newton,
    gauss_newton_mc,
    hutchinson,
    squared_gradient,
)
from curvext.demo.report import heading, progress, table

HESSCALE = "HesScale"
# What an independent implementation measured: mean, and the range over seeds, in units of HesScale's error
EXPECTED = {
    "BL89": (7, 9.5),
    "GGN, exact": (15, 21),
    "HesScaleGN": (15, 21),
    "GGN-MC, 50 draws": (15, 24),
    "zero": (18, 29),
    "GGN-MC, 1 draw": (22, 32),
    "squared gradient (Adam)": (22, 32),
    "Hutchinson, 50 draws": (81, 138),
    "|Hv|, 1 draw (AdaHessian)": (596, 1010),
    "Hutchinson, 1 draw": (600, 1018),
}
SHARE = (0.035, 0.05)  # of HesScale's error in sum |H|: 4.2%


class Samples:
    """A network at many samples, each with a copy of the parameters: curvature of the sum is that of every sample."""

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor):
        self.activation = next((m for m in model if not isinstance(m, nn.Linear)), nn.Identity())
        self.x, self.y = x, y
        self.parameters: list[Tensor] = [  # biases as rows [N, 1, O], weights [N, O, I]
            p.detach().expand(len(x), *([1] if p.dim() == 1 else []), *p.shape).clone().requires_grad_()
            for p in model.parameters()
        ]
        self.inputs: list[Tensor] = []

    def logits(self) -> Tensor:
        a, self.inputs = self.x[:, None], []
        for i, (weight, bias) in enumerate(zip(self.parameters[::2], self.parameters[1::2], strict=True)):
            self.inputs.append(self.activation(a) if i else a)
            a = torch.baddbmm(bias, self.inputs[-1], weight.mT)
        return a[:, 0]

    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits(), self.y, reduction="sum")

    def squared_gradients(self, labels: Tensor, weights: Tensor) -> Estimate:
        loss = F.cross_entropy(self.logits(), labels, reduction="sum")
        return [g.square() * weights[:, None, None] for g in torch.autograd.grad(loss, self.parameters)]


def exact(samples: Samples) -> Estimate:
    """Hessian diagonals by products, one for every unit.

    Of one sample, W enters through a = W x + b alone: d²L/dW_oi² = x_i² d²L/da_o², and d²L/db² = d²L/da².
    """
    biases = samples.parameters[1::2]
    gradients = torch.autograd.grad(samples.loss(), biases, create_graph=True)
    results = []
    for x, bias, gradient in zip(samples.inputs, biases, gradients, strict=True):
        units = [
            torch.autograd.grad(gradient[..., o].sum(), bias, retain_graph=True)[0][..., o]
            for o in range(bias.shape[-1])
        ]
        h = torch.stack(units, -1)
        results += [h.mT * x.detach().square(), h]
    return results


def estimators(generator: torch.Generator) -> dict[str, Callable[[Any], Estimate]]:
    """What is compared."""
    return {
        HESSCALE: by_block(HesScale()),
        "BL89": by_block(BL89()),
        "GGN, exact": gauss_newton,
        "HesScaleGN": by_block(HesScale(gauss_newton=True)),
        "GGN-MC, 50 draws": gauss_newton_mc(50, generator),
        "zero": lambda samples: [torch.zeros_like(p) for p in samples.parameters],
        "GGN-MC, 1 draw": gauss_newton_mc(1, generator),
        "squared gradient (Adam)": squared_gradient,
        "Hutchinson, 50 draws": hutchinson(50, generator),
        "|Hv|, 1 draw (AdaHessian)": hutchinson(1, generator, absolute=True),
        "Hutchinson, 1 draw": hutchinson(1, generator),
    }


def errors(samples: Samples, seed: int) -> dict[str, float]:
    """Every estimate's error, averaged over the samples."""
    truth = exact(samples)
    compared = estimators(torch.Generator().manual_seed(seed))
    return {
        name: sum(float((e - h).abs().sum()) for e, h in zip(estimate(samples), truth, strict=True)) / len(samples.x)
        for name, estimate in compared.items()
    }


def summary(seeds: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds in units of HesScale's, with the range of the seeds."""
    unit = sum(seed[HESSCALE] for seed in seeds) / len(seeds)
    normalised = {name: [seed[name] / unit for seed in seeds] for name in seeds[0]}
    return {
        "hesscale": unit,
        "share": len(seeds) / sum(normalised["zero"]),
        "normalised": {name: sum(values) / len(values) for name, values in normalised.items()},
        "range": {name: (min(values), max(values)) for name, values in normalised.items()},
        "seeds": list(seeds),
    }


def untrained(seeds: int, samples: int, tick: Callable[[], object]) -> dict[str, Any]:
    """The experiment of 2022."""
    found = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = mlp(6, 16, 16, 16, 10, activation=nn.Tanh)
        found.append(errors(Samples(model, torch.randn(samples, 6), torch.randint(10, (samples,))), seed))
        tick()
    return summary(found)


def trained(seeds: int, steps: int, samples: int, tick: Callable[[], object]) -> dict[str, Any]:
    """The experiment of 2024 on small data."""
    results = {}
    for name, activation in (("tanh", nn.Tanh), ("ReLU", nn.ReLU)):
        found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
        for seed in range(seeds):
            data = load("digits", seed)
            torch.manual_seed(seed)
            model = mlp(data.features, 64, 64, 10, activation=activation)
            x, y = (part[:samples] for part in data.test)
            found["before"].append(errors(Samples(model, x.to(torch.float64), y), seed))
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
            batches = data.batches(32, seed)
            for _ in range(steps):
                inputs, labels = next(batches)
                optimizer.zero_grad()
                F.cross_entropy(model(inputs.to(torch.float64)), labels).backward()
                optimizer.step()
            found["after"].append(errors(Samples(model, x.to(torch.float64), y), seed))
            tick()
        results[name] = {when: summary(entries) for when, entries in found.items()}
    return results


def verdict(results: dict[str, Any]) -> dict[str, bool]:
    """Whether the means are where they are expected."""
    within = {name: low <= results["normalised"][name] <= high for name, (low, high) in EXPECTED.items()}
    return {"share of |H|": SHARE[0] <= results["share"] <= SHARE[1], **within}


def untrained_table(results: dict[str, Any]) -> str:
    """Mean, range and expectation."""
    within = verdict(results)
    rows = []
    for name, value in results["normalised"].items():
        low, high = results["range"][name]
        expected = "{:g}-{:g}".format(*EXPECTED[name]) if name in EXPECTED else ""
        cells = [f"{value * results['hesscale']:.3g}", f"{value:.3g}", f"{low:.3g}-{high:.3g}", expected]
        rows.append([name, *cells, {True: "yes", False: "NO"}.get(within.get(name), "")])  # type: ignore[arg-type]
    header = ["estimate", "mean error", "in HesScale's", "range of seeds", "expected mean", "within"]
    expected_share = "{:.1%} to {:.1%}".format(*SHARE)
    return f"HesScale's error is {results['share']:.1%} of sum |H| (expected {expected_share}).\n\n" + table(
        header, rows
    )


def trained_table(results: dict[str, Any]) -> str:
    """Four columns: network by moment."""
    columns = [(network, when) for network in results for when in results[network]]
    entries = [results[network][when] for network, when in columns]
    rows = [["HesScale's error / sum |H|", *(f"{e['share']:.1%}" for e in entries)]]
    rows += [[name, *(f"{e['normalised'][name]:.3g}" for e in entries)] for name in entries[0]["normalised"]]
    return table(["in HesScale's error", *(f"{network}, {when}" for network, when in columns)], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Both experiments."""
    parser = common.parser("hesscale_quality", __doc__)
    parser.add_argument("--seeds", type=int, default=40, help="seeds of the untrained network (%(default)s)")
    parser.add_argument("--samples", type=int, default=1000, help="samples a seed (%(default)s)")
    parser.add_argument("--trained-seeds", type=int, default=5, help="seeds of the trained networks (%(default)s)")
    parser.add_argument("--trained-samples", type=int, default=100, help="held-out images a seed (%(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of Adam (%(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.samples, args.trained_seeds, args.trained_samples, args.steps = 2, 50, 1, 5, 20
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with progress(args.seeds + 2 * args.trained_seeds, "quality") as bar:
            small = untrained(args.seeds, args.samples, bar.update)
            large = trained(args.trained_seeds, args.steps, args.trained_samples, bar.update)
    finally:
        torch.set_default_dtype(dtype)
    print(heading(f"Untrained tanh network 6-16-16-16-10, {args.seeds} seeds of {args.samples} samples, batch size 1"))
    print(untrained_table(small))
    print(heading(f"Digits, 64-64-64-10, before and after {args.steps:,} steps of Adam, {args.trained_seeds} seed(s)"))
    print(trained_table(large))
    results = {"options": vars(args) | {"output": None}, "untrained": small, "within": verdict(small), "trained": large}
    common.write(args.output, results)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
