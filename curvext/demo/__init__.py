"""Train a small network on images of digits, and measure three things on the way:

  quality     estimates of the Hessian diagonal against the exact one, during training
  optimizers  AdaHesScale and its Gauss-Newton form against Adam and SGD, by steps and by seconds
  cost        each estimate as a multiple of the gradient step

Prints a table for each and writes one figure for each, and results.json, to the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import cost, figures, optimizers, quality
from .data import DATA, load
from .options import Options
from .report import heading

Part = tuple[Callable[..., Any], Callable[..., str], Callable[..., Any]]
PARTS: dict[str, Part] = {
    "quality": (quality.measure, quality.table, figures.quality),
    "optimizers": (optimizers.measure, optimizers.table, figures.optimizers),
    "cost": (cost.measure, cost.table, figures.cost),
}
TITLES = {
    "quality": "How far is each estimate from the exact Hessian diagonal?",
    "optimizers": "Does curvature help to train?",
    "cost": "What does each cost?",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--data", choices=DATA, default="digits", help="; ".join(f"{k}: {v}" for k, v in DATA.items()))
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for figures (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each run (900; with --quick 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; these networks are small (%(default)s)")
    parts = ", ".join(PARTS)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {parts} (all)"
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute, for a first look and tests")


def main(args: argparse.Namespace) -> None:
    """Run the demo."""
    start = time.perf_counter()
    options = Options.of(args)
    pyplot = figures.pyplot()
    data = load(args.data, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        print(f"{data} torch {torch.__version__}, {args.threads} thread(s), seed {args.seed}.")
        results = {part: _run(part, data, options, pyplot, args.output) for part in args.parts}
    finally:
        torch.set_num_threads(threads)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nFigures and results.json are in {args.output}/ ({time.perf_counter() - start:.0f} s).")


def _run(part: str, data: Any, options: Options, pyplot: Any, output: Path) -> Any:
    measure, table, draw = PARTS[part]
    results = measure(data, options)
    print(heading(TITLES[part]), table(results), sep="\n")
    figure = draw(pyplot, results)
    path = output / f"{part}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    print(f"\nFigure: {path}")
    return results
