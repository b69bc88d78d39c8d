"""What the benchmarks share: where they ran, and how results are kept.

Times are taken as in the demo: alternatives take turns, and ratios are read within a round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import curvext
from curvext.demo.report import cell

RESULTS = Path(__file__).parent / "results"


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    top = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="JSON to write (%(default)s)")
    top.add_argument("--quick", action="store_true", help="seconds, for tests; the numbers mean nothing")
    return top


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def environment() -> dict[str, Any]:
    """Where and when a benchmark ran."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "cpu": processor(),
        "cores": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "curvext": curvext.__version__,
    }


def write(path: Path, results: dict[str, Any]) -> None:
    """Keep results, with where they were measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
    print(f"\nWritten to {path}")


def kept(path: Path) -> Any:
    """Results of an earlier run; ``None`` if there was none."""
    return json.loads(path.read_text()) if path.exists() else None


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table of the docs."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(cell, line)) + " |\n" for line in lines)


def rewritten(page: Path, marks: tuple[str, str], text: str) -> str:
    """A page of the docs with what is between two marks replaced."""
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    return before + marks[0] + text + marks[1] + rest.split(marks[1])[1]
