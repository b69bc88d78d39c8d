"""The one list of cases: every registered rule must occur in the graph of one of them.

A case is a function of a :class:`Draw`, which chooses shapes, options and values; it returns ``(function, inputs)``.
To cover a new rule, add a case to the file of its family; see docs/rules.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

Built = tuple[Callable[..., Any], Sequence[Any]]


class Draw:
    """Choices of a case, made by hypothesis (``data.draw``) or by a seeded generator."""

    def __init__(self, seed: int = 0, data: Any = None, dtype: torch.dtype = torch.float64, freeze: bool = False):
        self.random, self.data, self.dtype, self.freeze = random.Random(seed), data, dtype, freeze
        self.generator = torch.Generator().manual_seed(self.integer(0, 2**31) if data is not None else seed)

    def integer(self, low: int, high: int) -> int:
        """An integer between low and high, both included."""
        if self.data is not None:
            from hypothesis import strategies as st

            return self.data.draw(st.integers(low, high))
        return self.random.randint(low, high)

    def choice(self, *options: Any) -> Any:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def boolean(self) -> bool:
        return self.choice(False, True)

    def sizes(self, n: int, low: int = 1, high: int = 4) -> list[int]:
        """n small sizes."""
        return [self.integer(low, high) for _ in range(n)]

    def shape(self, least: int = 1, most: int = 3, low: int = 1, high: int = 4) -> list[int]:
        """A small shape of ``least`` to ``most`` dimensions."""
        return self.sizes(self.integer(least, most), low, high)

    def tensor(self, *shape: int, low: float | None = None, high: float | None = None, grad: bool = True) -> Tensor:
        """A leaf of normal entries, or uniform ones between low and high; it requires a gradient unless frozen."""
        if low is None or high is None:
            value = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        else:
            value = low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=self.generator)
        return value.to(self.dtype).requires_grad_(grad and not (self.freeze and self.boolean()))

    def distinct(self, *shape: int) -> Tensor:
        """A leaf whose entries are far apart: for maxima, sorting, and functions with kinks at integers."""
        n = int(torch.tensor(shape).prod())
        value = (torch.randperm(n, generator=self.generator) - n / 2 + 0.3) / 2
        return value.to(self.dtype).view(shape).requires_grad_()

    def index(self, high: int, *shape: int) -> Tensor:
        """Integers from 0 to high - 1."""
        return torch.randint(0, high, shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.5

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module with normal random parameters, in the case's dtype."""
        module = module.to(self.dtype)
        for p in module.parameters():
            p.data = torch.randn(p.shape, dtype=torch.float64, generator=self.generator).to(self.dtype)
        return module


@dataclass(frozen=True)
class Case:
    """A named case.

    ``float32``: whether it also runs in float32. ``twin``: the same function in steps that PyTorch can differentiate
    twice, for a single operation that it cannot.
    """

    name: str
    build: Callable[[Draw], Built]
    float32: bool = True
    examples: int = 6
    slow: bool = False
    twin: Callable[..., Any] | None = None

    def __str__(self) -> str:
        return self.name


CASES: list[Case] = []
OLDER = TorchVersion(torch.__version__) < "2.13"
# What older versions cannot differentiate, or not twice.
NEW = {
    "aminmax_along",
    "aminmax_of_all",
    "foreach_mm",
    "grid_sample_2d",
    "grid_sample_3d",
    "nextafter",
    "shape_narrow_copy",
}


def case(build: Callable[[Draw], Built] | None = None, **options: Any) -> Any:
    """Add the decorated function to the list, under its name."""

    def add(build: Callable[[Draw], Built]) -> Callable[[Draw], Built]:
        add_case(build.__name__, build, **options)
        return build

    return add(build) if build is not None else add


def add_case(name: str, build: Callable[[Draw], Built], **options: Any) -> None:
    """Add a case under a name that is not taken yet."""
    assert all(name != other.name for other in CASES), f"two cases are named {name}"
    if not (OLDER and name in NEW):
        CASES.append(Case(name, build, **options))


def of_module(draw: Draw, module: torch.nn.Module, *inputs: Any) -> Built:
    """A module as a function of its parameters and its inputs."""
    module = draw.module(module)
    names = [name for name, _ in module.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in module.parameters()]

    def function(*args: Any) -> Any:
        parameters = dict(zip(names, args, strict=False))
        return torch.func.functional_call(module, parameters, args[len(names) :])

    return function, [*values, *inputs]


# Nodes that this machine cannot record (another device's kernels, or another version of torch), with the reason.
ELSEWHERE: dict[str, str] = {}

for _info in iter_modules(__path__):
    _module = import_module(f"{__name__}.{_info.name}")
    ELSEWHERE.update(getattr(_module, f"ELSEWHERE_{_info.name.upper()}", {}))
