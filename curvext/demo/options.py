"""How much the demo does."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Sizes of the demo's experiments."""

    seed: int = 0
    steps: int = 900
    tuning_steps: int = 300
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    seeds: int = 3
    batch_size: int = 32
    hidden: int = 64
    samples: int = 128
    checkpoints: int = 8
    draws: int = 50
    wide: int = 1024
    runs: int = 21

    @classmethod
    def of(cls, args: Namespace) -> Options:
        """From the command line."""
        if args.steps is not None and args.steps < 1:
            raise SystemExit(f"demo: --steps must be at least 1, got {args.steps}")
        if args.quick:
            steps = args.steps or 40
            rates = (1e-3, 1e-1)
            return cls(args.seed, steps, min(20, steps), rates, 1, 32, 16, 16, 3, 5, 32, 5)
        steps = args.steps or cls.steps
        return cls(args.seed, steps, min(cls.tuning_steps, steps))
