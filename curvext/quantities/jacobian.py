"""The Jacobian of the model's output, and its Gram matrix, the neural tangent kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..axes import Axis
from ..errors import CurvatureError
from ..graph import Edge, Operation
from ..hessians import one_by_one
from ..sources import loss_hessian
from ..wave import Wave
from .base import Quantity, Target
from .readings import ColumnsBySample, arrived
from .waves import Factor, Part, Waves


@dataclass(frozen=True)
class _Identity:
    """The columns of an identity matrix at the output itself; of an output that has two users there are no more."""

    within: Part | None

    def __add__(self, other: _Identity) -> _Identity:
        return self

    def columns(self, ones: Tensor, axis: Axis, n: int) -> Tensor:
        """``[V, *shape]``, in the shape of ``ones``."""
        if self.within is None:
            return one_by_one(ones, axis, n)
        self.within.count(ones.numel() // n)
        return one_by_one(ones, axis, n, self.within.place)


@dataclass(frozen=True)
class OutputColumns(Factor):
    """Columns that start as an identity at the inputs of the topmost nonlinear operation, or at marked tensors.

    Raises:
        CurvatureError: in :meth:`step`, if the loss is nonlinear in a tensor that holds no samples.
    """

    def step(self, op: Operation, g: Sequence[Tensor | None], wave: Waves) -> Waves:
        opened = [values and _written(values, partial(_at_output, op, k)) for k, values in enumerate(wave)]
        return super().step(op, g, opened)

    def _start(self, op: Operation, g: Sequence[Tensor | None]) -> dict[int, Any]:
        return dict.fromkeys(loss_hessian(op, g), _Identity(self.within))

    def seeds(self, output: Any) -> dict[Edge, Any]:
        return {(op.node, 0): {(op.node, 0): _Identity(self.within)} for op in output.marks}

    def reduced(self, op: Operation, wave: Any, i: int) -> Any:
        return {op.edges[i] if isinstance(value, _Identity) else source: value for source, value in wave.items()}


def _written(values: dict[Any, Any], write: Callable[[_Identity], Tensor]) -> dict[Any, Any]:
    """With identities written out, but for parts that are empty."""
    found = {source: write(value) if isinstance(value, _Identity) else value for source, value in values.items()}
    return {source: value for source, value in found.items() if not isinstance(value, Tensor) or len(value)}


def _at_output(op: Operation, k: int, identity: _Identity) -> Tensor:
    meta, axis = op.outputs[k], op.axes_out[k]
    if axis is None:
        raise CurvatureError(
            "the loss is nonlinear in a tensor that belongs to no sample (a mean over the batch, a function of weights "
            "alone), so that it is not clear what the model's output is. Mark it: z = curvext.output(model(x))"
        )
    return identity.columns(torch.ones(meta.shape, dtype=meta.dtype, device=meta.device), axis, op.n_samples)


def _at_target(target: Target, identity: _Identity) -> Tensor:
    if target.axis is None:  # a term in the parameter alone is no output
        return target.tensor.new_empty(0)
    return identity.columns(torch.ones_like(target.tensor), target.axis, target.n or 1)


@dataclass(frozen=True)
class Jacobian(ColumnsBySample):
    """Derivatives of every sample's outputs, ``[C, N, *P]``: ``jacobian[c, n]`` = ∂z_nc/∂p.

    C counts all outputs of a sample, classes times positions, in the order of the flattened output. The output z is
    the input of the topmost nonlinear operation under the loss (logits under cross entropy, the prediction under
    squared error), or what :func:`curvext.output` marks; several outputs follow one another along C. The values of the
    loss do not matter. Several backward passes in one block are joined along N.

    Raises:
        CurvatureError: in ``backward()``, if the loss is nonlinear in a tensor that holds no samples, or samples depend
            on each other.
    """

    savefield = "jacobian"

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (OutputColumns(),)

    def read(self, target: Target, *waves: Any) -> Any:
        return super().read(target, _written(waves[0] or {}, partial(_at_target, target)))


@dataclass(frozen=True)
class NTK(Quantity):
    """One parameter's part of the neural tangent kernel, ``[N, C, N, C]``: ⟨∂z_nc/∂p, ∂z_md/∂p⟩.

    The kernel is the sum over parameters, ``sum(p.ntk for p in model.parameters())``. For the weight of a linear layer
    it is the product of two Gram matrices, and the Jacobian is not formed. Outputs as for :class:`Jacobian`; of one
    backward pass. A parameter that no output depends on has ``[N, 1, N, 1]`` zeros, which broadcast in the sum.

    Source: Jacot, Gabriel & Hongler, Neural tangent kernel, 2018, https://arxiv.org/abs/1806.07572.
    """

    savefield = "ntk"
    per_sample = True

    @property
    def waves(self) -> tuple[Wave, ...]:
        return (OutputColumns(),)

    def read(self, target: Target, *waves: Any) -> Tensor | None:
        columns = arrived(_written(waves[0] or {}, partial(_at_target, target)), target).owned("NTK")
        return None if columns is None else columns.gram().permute(1, 0, 3, 2)

    def undivided(self) -> str:
        return "it is made of products of every column with every other; a Jacobian can be had in parts"

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        raise CurvatureError("NTK: products between the samples of two backward passes are not kept; use one")

    def zero(self, target: Target) -> Tensor:
        return target.tensor.new_zeros(target.n or 0, 1, target.n or 0, 1)
