"""Branches of a computation, as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class SumModule(nn.Module):
    """The sum of its inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(inputs[1:], inputs[0])


class _Branches(nn.Sequential):
    """What each of its modules makes of one input."""

    def forward(self, input: Any) -> tuple[Any, ...]:
        return tuple(module(input) for module in self)


class Parallel(nn.Module):
    """One input goes through every branch, and their outputs are merged.

    Args:
        branches: modules, or an ``OrderedDict`` of them, as for ``nn.Sequential``.
        merge_module: called with all outputs; a :class:`SumModule` by default.
    """

    def __init__(self, *branches: Any, merge_module: nn.Module | None = None):
        super().__init__()
        self.branch, self.merge = _Branches(*branches), merge_module or SumModule()

    def forward(self, input: Any) -> Any:
        return self.merge(*self.branch(input))
