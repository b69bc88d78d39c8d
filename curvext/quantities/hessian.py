"""Exact Hessian diagonals by products: the reference for small models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..graph import Graph
from ..rules.default import MISTAKEN, quiet_vmap
from .base import WholeGraph


@dataclass(frozen=True)
class DiagHessian(WholeGraph):
    """Exact diagonal of the Hessian of the loss, ``[eᵢᵀ H eᵢ]``, in the parameter's shape; saved as ``diag_h``.

    One Hessian-vector product per parameter entry, ``chunk`` of them at a time: for small models and for tests. The
    scaling is the loss's.

    Args:
        chunk: products that are computed together; more is faster and takes more memory.

    Raises:
        CurvatureError: if an operation of the graph cannot be differentiated twice, or PyTorch does so wrongly.
    """

    chunk: int = 64
    savefield = "diag_h"

    def compute(self, loss: Tensor, scale: Tensor | None, targets: Sequence[Tensor]) -> list[Tensor | None]:
        _refuse_mistaken(loss)
        try:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss, targets, scale, create_graph=True, allow_unused=True)
            return [None if g is None else self._diagonal(g, x) for g, x in zip(gradients, targets, strict=True)]
        except RuntimeError as error:
            raise CurvatureError(
                f"DiagHessian needs a graph that can be differentiated twice: {error}. For attention, run the forward "
                "pass within torch.nn.attention.sdpa_kernel(SDPBackend.MATH); HesScale needs no such thing."
            ) from error

    def _diagonal(self, gradient: Tensor, x: Tensor) -> Tensor:
        if not gradient.requires_grad or not x.numel():
            return torch.zeros_like(x, requires_grad=False)
        entries = [self._entries(gradient, x, start) for start in range(0, x.numel(), self.chunk)]
        return torch.cat(entries).view(x.shape)

    def _entries(self, gradient: Tensor, x: Tensor, start: int) -> Tensor:
        index = torch.arange(start, min(start + self.chunk, x.numel()), device=x.device)
        rows = torch.arange(len(index), device=x.device)
        basis = torch.zeros(len(index), x.numel(), dtype=gradient.dtype, device=x.device)
        basis[rows, index] = 1
        with quiet_vmap():
            (products,) = torch.autograd.grad(
                gradient, x, basis.view(-1, *x.shape), is_grads_batched=True, retain_graph=True, allow_unused=True
            )
        return torch.zeros_like(rows, dtype=x.dtype) if products is None else products.flatten(1)[rows, index].detach()


def _refuse_mistaken(loss: Tensor) -> None:
    for node, _ in Graph([loss.grad_fn] if loss.grad_fn is not None else []).order:
        if node.name() in MISTAKEN:
            raise CurvatureError(
                f"DiagHessian: PyTorch's second derivative of {node.name()} is wrong. For weight norm, write "
                "g * v / v.norm(...) with ordinary operations; HesScale has a rule of its own."
            )
