"""Pictures of spectra; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .spectra import Density
from .spectra import overlap as squared_cosines


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("curvext.plot needs matplotlib: pip install matplotlib") from error
    return plt.subplots(layout="constrained")[1]


def density(
    spectrum: Density,
    ax: Any = None,
    *,
    grid: Tensor | None = None,
    width: float | None = None,
    label: str | None = None,
) -> Any:
    """A spectral density on a logarithmic axis, with a band of one standard error; returns the axes."""
    ax = _axes(ax)
    grid = spectrum.grid(width=width) if grid is None else grid
    curve = spectrum(grid, width)
    floor = 1e-2 / spectrum.size / (spectrum.width if width is None else width)  # well below one eigenvalue's peak
    value, low, high = (
        t.clamp(min=floor).numpy() for t in (curve.value, curve.value - curve.error, curve.value + curve.error)
    )
    (line,) = ax.semilogy(grid.numpy(), value, label=label)
    ax.fill_between(grid.numpy(), low, high, color=line.get_color(), alpha=0.3, linewidth=0)
    ax.set(xlabel="eigenvalue", ylabel="density")
    return ax


def eigenvalues(steps: Sequence[float], values: Sequence[Tensor] | Tensor, ax: Any = None, **style: Any) -> Any:
    """Eigenvalues ``[k]`` at each of several training steps, a line for each rank; returns the axes."""
    ax = _axes(ax)
    rows = values if isinstance(values, Tensor) else torch.stack(list(values))
    ax.plot(steps, rows.detach().cpu().numpy(), **{"marker": ".", **style})
    ax.set(xlabel="step", ylabel="eigenvalue")
    return ax


def overlap(vectors: Sequence[Tensor], steps: Sequence[float] | None = None, ax: Any = None) -> Any:
    """How far the spaces of ``[P, k]`` eigenvectors at several times agree: mean squared cosines; returns the axes."""
    ax = _axes(ax)
    shared = torch.tensor([[float(squared_cosines(U, V).sum()) / U.shape[1] for V in vectors] for U in vectors])
    picture = ax.imshow(shared.numpy(), vmin=0, vmax=1, origin="lower")
    ax.figure.colorbar(picture, ax=ax, label="overlap of eigenspaces")
    names = range(len(vectors)) if steps is None else steps
    ax.set(xlabel="step", ylabel="step", xticks=range(len(vectors)), yticks=range(len(vectors)))
    ax.set(xticklabels=names, yticklabels=names)
    return ax
