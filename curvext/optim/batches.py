"""Which samples the curvature comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checked import numbers


@dataclass(frozen=True)
class Subsample:
    """Some of the samples for the curvature, others at every step, for closures that take the rows to use.

        optimizer = GaussNewtonCG(model.parameters(), curvature_batch=Subsample(len(x), 0.05))

        def closure(rows=slice(None)):
            z = model(x[rows])
            return loss_fn(z, y[rows]), z

        optimizer.step(closure)

    The loss and its gradient are those of ``closure()``, the curvature that of ``closure(rows)``, with ``rows`` a
    tensor of indices on the CPU; the loss has to be a mean over samples. The indices depend on ``seed`` and on the
    number of steps, which is in the optimizer's ``state_dict()``.

    Args:
        samples: how many there are.
        size: of a batch: a number, or a fraction of the samples; Wang, Tan and Lin take 5 %.
        order: ``"cycle"``: all samples have their turn, in random order, before one is used again (in batches of one
            size, so the last of a turn is filled up with those of the first); ``"draw"``: drawn anew at every step.
        seed: see above.
    """

    samples: int
    size: int | float = 0.05
    order: str = "cycle"
    seed: int = 0

    def __post_init__(self) -> None:
        fits = 0 < self.size <= 1 if isinstance(self.size, float) else 1 <= self.size <= self.samples
        if self.samples < 1 or not fits or self.order not in ("cycle", "draw"):
            raise ValueError(f"{self}: samples >= 1, size a fraction or from 1 to samples, order 'cycle' or 'draw'")

    def rows(self, step: int) -> Tensor:
        """The indices of a step, without repetitions."""
        size = math.ceil(self.size * self.samples) if isinstance(self.size, float) else self.size
        turn, place = divmod(step, math.ceil(self.samples / size) if self.order == "cycle" else 1)
        order = torch.randperm(self.samples, generator=numbers(self.seed, turn))
        return order[torch.arange(place * size, (place + 1) * size) % self.samples]
