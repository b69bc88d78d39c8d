"""Plain text: headings, tables, progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .data import optional


def heading(text: str) -> str:
    """A line underlined."""
    return f"\n{text}\n{'-' * len(text)}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns aligned: the first to the left, the others to the right; floats with three digits."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in cells]  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def cell(value: Any) -> str:
    """Text of a value: three digits of a float, a dash for nothing."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def progress(total: int, title: str) -> Any:
    """A progress bar on the terminal; silent where there is none."""
    return optional("tqdm", "tqdm").tqdm(total=total, desc=title, disable=None, leave=False, ncols=90)
