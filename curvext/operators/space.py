"""Names and shapes of the parameters that a flat vector runs over, and the forms such a vector may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..selection import matches


@dataclass(frozen=True)
class Space:
    """Parameters in order: a flat vector ``[P]`` holds their entries one after the other."""

    shapes: dict[str, torch.Size]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Space:
        """The space of some tensors."""
        return cls({name: tensor.shape for name, tensor in tensors.items()})

    @property
    def size(self) -> int:
        """The number P of entries."""
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """The number of entries of every parameter."""
        return [shape.numel() for shape in self.shapes.values()]

    def split(self, v: Tensor) -> list[Tensor]:
        """``[P]`` in the parameters' shapes; columns ``[P, K]`` as ``[K, *shape]``."""
        pieces = v.split(self.sizes) if v.dim() == 1 else v.mT.split(self.sizes, 1)
        return [p.reshape((*v.shape[1:], *shape)) for p, shape in zip(pieces, self.shapes.values(), strict=True)]

    def flatten(self, value: Any) -> Tensor:
        """A mapping by name, or a sequence, of ``[*shape]`` as ``[P]``, of ``[*shape, K]`` as ``[P, K]``."""
        tensors = self._ordered(value)
        columns = {t.shape[len(shape) :] for t, shape in zip(tensors, self.shapes.values(), strict=True)}
        wrong = [
            f"{name}: {tuple(t.shape)} for {tuple(shape)}"
            for t, (name, shape) in zip(tensors, self.shapes.items(), strict=True)
            if t.shape[: len(shape)] != shape
        ]
        if wrong or len(columns) > 1 or any(len(c) > 1 for c in columns):
            raise ValueError(f"expected tensors shaped like the parameters; {wrong or [tuple(c) for c in columns]}")
        return torch.cat([t.flatten(0, len(s) - 1) if s else t.unsqueeze(0)
                          for t, s in zip(tensors, self.shapes.values(), strict=True)])  # fmt: skip

    def _ordered(self, value: Any) -> list[Tensor]:
        if isinstance(value, Mapping):
            if value.keys() != self.shapes.keys():
                raise ValueError(f"expected tensors for {list(self.shapes)}, got {list(value)}")
            return [value[name] for name in self.shapes]
        if not isinstance(value, Sequence) or len(value) != len(self.shapes):
            raise ValueError(f"expected a tensor for each of {list(self.shapes)}, got {type(value).__name__}")
        return list(value)

    def like(self, form: Any, v: Tensor) -> Any:
        """``[P]`` or ``[P, K]`` in the form that a mapping, list or tuple has."""
        parts = zip(v.split(self.sizes), self.shapes.values(), strict=True)
        pieces = [part.reshape((*shape, *v.shape[1:])) for part, shape in parts]
        if isinstance(form, Mapping):
            return dict(zip(self.shapes, pieces, strict=True))
        return tuple(pieces) if isinstance(form, tuple) else pieces

    def part(self, globs: str | Sequence[str]) -> tuple[Space, Tensor]:
        """The parameters whose names match any of ``globs``, and where their entries are."""
        globs = [globs] if isinstance(globs, str) else list(globs)
        ends = torch.tensor([0, *self.sizes]).cumsum(0).tolist()
        chosen = {name: i for i, name in enumerate(self.shapes) if any(matches(name, glob) for glob in globs)}
        if not chosen:
            raise ValueError(f"no parameter matches {globs}; there are {list(self.shapes)}")
        places = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in chosen.values()])
        return Space({name: self.shapes[name] for name in chosen}), places
