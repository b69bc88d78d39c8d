"""What all optimizers here share: settings that are checked, and copies."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


class CheckedOptimizer(Optimizer):
    """An optimizer that refuses groups with settings out of range. Public attributes survive copies and pickling."""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "step"}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """Raise if a setting of a new group is out of range; NaN is."""
        self._not_negative(group, "lr", "weight_decay")

    def _not_negative(self, group: dict[str, Any], *names: str) -> None:
        for name in names:
            if not group[name] >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {group[name]}")


def parts(found: Any) -> tuple[Any, Any]:
    """The loss and the outputs of what a closure has returned, which may be the loss alone."""
    return found if isinstance(found, tuple) and len(found) == 2 else (found, [])


def numbers(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers of a step. On a CPU the last 32 bits of a generator's seed are all that counts."""
    return torch.Generator(device).manual_seed((seed * 0x9E3779B1 + step) % 2**32)
