"""Long work shows itself, and is not lost: progress bars, and files from which a run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from .errors import CurvatureError

T = TypeVar("T")


def shown(work: Iterable[T], show: bool, label: str, total: int | None = None, done: int = 0) -> Iterable[T]:
    """``work``, under a progress bar if ``show``."""
    if not show:
        return work
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(work, desc=label, total=total, initial=done)  # type: ignore[no-any-return]


class Checkpoint:
    """The file from which an interrupted run goes on; with ``path=None``, nothing.

    It is written after every ``every`` steps, when the run ends, and when it is broken off by whatever exception,
    Ctrl-C included: the same call again goes on where that one stopped. A state that is empty is not written, and the
    file left as it is: the run was broken off while it changed.

    Args:
        path: the file.
        every: steps between two writings.
        problem: what must be equal for the file to belong to the run; tensors are compared to rounding.
    """

    def __init__(self, path: str | os.PathLike[str] | None, every: int = 10, **problem: Any):
        self.path, self.every, self.problem = None if path is None else Path(path), every, problem
        self.steps = 0

    def load(self, device: torch.device | None = None) -> dict[str, Any]:
        """What was saved, or nothing."""
        if self.path is None or not self.path.exists():
            return {}
        saved = torch.load(self.path, map_location=device, weights_only=True)
        for name, value in self.problem.items():
            if not _same(saved["problem"].get(name), value):
                raise CurvatureError(
                    f"{self.path} holds a run with another {name}; give the same arguments to go on with it, "
                    "or another file (or remove this one) to start afresh"
                )
        return dict(saved["state"])

    @contextmanager
    def keeping(self, state: Callable[[], Mapping[str, Any]]) -> Iterator[Callable[[], None]]:
        """A block whose end, however it comes, saves ``state()``; so does every ``every``-th call of what it gives."""

        def step() -> None:
            self.steps += 1
            if self.steps % self.every == 0:
                self.save(state)

        try:
            yield step
        finally:
            self.save(state)

    def save(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Write beside the file, then rename: a run killed meanwhile leaves the old one whole."""
        if self.path is None or not (whole := state()):
            return
        beside = self.path.with_name(self.path.name + ".part")
        torch.save({"problem": self.problem, "state": dict(whole)}, beside)
        os.replace(beside, self.path)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-4)
    return bool(a == b)
