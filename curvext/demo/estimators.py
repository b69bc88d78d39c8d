"""Estimates of the Hessian diagonal, each from its definition: what HesScale is compared with.

The loss is softmax cross entropy with labels. A *problem* says what one number of the result belongs to: the mean over
a batch (:class:`Batch`), or single samples (the benchmark of quality has such a problem).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import extend

Estimate = list[Tensor]


class Problem(Protocol):
    """A loss with the parameters that its Hessian belongs to."""

    parameters: list[Tensor]

    def logits(self) -> Tensor:
        """Outputs of the model, [N, C]."""

    def loss(self) -> Tensor:
        """The scalar whose Hessian is estimated."""

    def squared_gradients(self, labels: Tensor, weights: Tensor) -> Estimate:
        """Squares of every sample's gradient with other labels [N], weighted [N] and scaled like the loss."""


@dataclass
class Batch:
    """Mean cross entropy over a batch, of a model whose parameters are all in linear layers."""

    model: nn.Module
    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = list(self.model.parameters())
        self.layers = [module for module in self.model.modules() if isinstance(module, nn.Linear)]

    def logits(self) -> Tensor:
        return self.model(self.x)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits(), self.y)

    def squared_gradients(self, labels: Tensor, weights: Tensor) -> Estimate:
        return self.squares(*self.record(), labels, weights)

    def record(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Outputs of the model, inputs of its linear layers, and their outputs."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def keep(_: nn.Module, x: tuple[Tensor], a: Tensor) -> None:
            inputs.append(x[0].detach())
            outputs.append(a)

        handles = [layer.register_forward_hook(keep) for layer in self.layers]
        logits = self.logits()
        for handle in handles:
            handle.remove()
        return logits, inputs, outputs

    def squares(
        self, logits: Tensor, inputs: list[Tensor], outputs: list[Tensor], labels: Tensor, weights: Tensor
    ) -> Estimate:
        """A sample's gradient for W is the outer product g xᵀ, so the sum of squares is a product of squares."""
        gradients = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), outputs)
        squares = [g.square() * (weights / len(weights))[:, None] for g in gradients]
        return [result for x, s in zip(inputs, squares, strict=True) for result in (s.T @ x.square(), s.sum(0))]


def by_block(quantity: Any) -> Callable[[Problem], Estimate]:
    """A quantity of curvext, along with ``loss.backward()``."""

    def estimate(problem: Problem) -> Estimate:
        with extend(problem.parameters, quantity) as curvature:
            problem.loss().backward()
        return [curvature[quantity.savefield][str(i)] for i in range(len(problem.parameters))]

    return estimate


def gradient(problem: Problem) -> Estimate:
    """The gradient alone: the unit of cost."""
    for p in problem.parameters:
        p.grad = None
    problem.loss().backward()
    return [p.grad for p in problem.parameters if p.grad is not None]


def squared_gradient(problem: Problem) -> Estimate:
    """What Adam averages: the square of the loss's gradient."""
    return [g.square() for g in gradient(problem)]


def gauss_newton(problem: Problem) -> Estimate:
    """Exact diagonal of the Gauss-Newton matrix: squared gradients, averaged over the model's own labels."""
    return _over_classes(problem, problem.logits().detach().softmax(-1))


def gauss_newton_mc(draws: int, generator: torch.Generator) -> Callable[[Problem], Estimate]:
    """GGN-MC: the same average with labels drawn from the model, ``draws`` for every sample."""

    def estimate(problem: Problem) -> Estimate:
        p = problem.logits().detach().softmax(-1)
        labels = torch.multinomial(p, draws, replacement=True, generator=generator)
        return _over_classes(problem, F.one_hot(labels, p.shape[-1]).to(p.dtype).mean(1))

    return estimate


def gauss_newton_mc_step(problem: Batch, generator: torch.Generator) -> Estimate:
    """The gradient and GGN-MC with one draw from one forward pass: what a training step would do, for timing."""
    logits, inputs, outputs = problem.record()
    F.cross_entropy(logits, problem.y).backward(retain_graph=True)
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    return problem.squares(logits, inputs, outputs, labels, torch.ones_like(logits[:, 0].detach()))


def _over_classes(problem: Problem, weights: Tensor) -> Estimate:
    each = [
        problem.squared_gradients(torch.full_like(weights[:, c], c, dtype=torch.int64), weights[:, c])
        for c in range(weights.shape[-1])
    ]
    return [torch.stack(parts).sum(0) for parts in zip(*each, strict=True)]


def hutchinson(draws: int, generator: torch.Generator, absolute: bool = False) -> Callable[[Problem], Estimate]:
    """Mean of ``v * Hv`` over random signs v, unbiased; ``absolute``: of ``|Hv|``, as in AdaHessian."""

    def estimate(problem: Problem) -> Estimate:
        parameters = problem.parameters
        gradients = torch.autograd.grad(problem.loss(), parameters, create_graph=True)
        totals = [torch.zeros_like(p) for p in parameters]
        for _ in range(draws):
            signs = [2 * torch.randint_like(p, 0, 2, generator=generator) - 1 for p in map(torch.detach, parameters)]
            products = torch.autograd.grad(gradients, parameters, signs, retain_graph=True)
            for total, v, hv in zip(totals, signs, products, strict=True):
                total += hv.abs() if absolute else v * hv
        return [total / draws for total in totals]

    return estimate


def distance(estimate: Estimate, exact: Estimate) -> float:
    """Relative L1 distance ``sum |estimate - H| / sum |H|`` over all parameters: 1 for an estimate of zero."""
    difference = sum(float((e - h).abs().sum()) for e, h in zip(estimate, exact, strict=True))
    return difference / sum(float(h.abs().sum()) for h in exact)
