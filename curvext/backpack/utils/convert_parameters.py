"""Between vectors and lists of tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Pieces of ``vec`` as views in the shapes of the parameters: the inverse of ``parameters_to_vector``."""
    parameters = list(parameters)
    pieces = vec.split([p.numel() for p in parameters])
    return [piece.view(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
