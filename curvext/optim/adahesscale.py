"""AdaHesScale: Adam with the squared gradient replaced by the squared Hessian diagonal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..quantities import HesScale
from .block import DiagonalOptimizer, Ready

Row = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]  # parameter, gradient, diagonal, state
IN_CACHE = 1 << 14  # entries: on a CPU, so many are updated faster together than one tensor after the other


class AdaHesScale(DiagonalOptimizer):
    """Adam with the squared gradient replaced by the square of HesScale's Hessian diagonal.

        m ← β₁ m + (1 - β₁) g
        v ← β₂ v + (1 - β₂) h²
        θ ← θ - lr · m / (1 - β₁ᵗ) / (√v / √(1 - β₂ᵗ) + eps)

    with the gradient g and the diagonal h of every parameter, entry by entry (nothing is averaged over a convolution's
    kernel). ``variant="sqrt"`` averages |h| in v and keeps the root; ``"newton"`` averages |h| and divides by
    v / (1 - β₂ᵗ) + eps, without a root. The optimizer can run the block itself, from a closure that returns the loss
    and calls no backward,

        optimizer = AdaHesScale(model.parameters(), lr=1e-3)
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    or take what your own block has left on the parameters:

        with extend(model):
            loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    A closure of PyTorch's convention, which zeroes the gradients and calls ``loss.backward()``, works too; its
    ``backward`` runs in the optimizer's block and is not run again. The step is the gradient over the curvature, so
    unlike Adam's it is not bounded by ``lr``, and it does not change when the loss is scaled (a sum instead of a mean)
    except through ``eps`` (with ``"sqrt"`` it grows with the root of that scale). Where h stays zero and g does not,
    as in a parameter that the loss is linear in, it is ``lr · g / eps``: raise ``eps`` there. Every diagonal is used
    once, and belongs to the last block: two blocks that accumulate gradients leave the diagonal of the second alone,
    so put their ``backward()`` calls into one.
    Under ``torch.amp.GradScaler``, ``scaler.step(optimizer)`` unscales the diagonal together with the gradient.

    Args:
        params: parameters, dicts of parameter groups, or ``(name, tensor)`` pairs; names appear in errors.
        lr: step size. The default is that of the released code; 1e-4 to 1e-2 are usual.
        betas: decay rates of the averages of g and of h².
        eps: added to the denominator; 1e-5 in the reinforcement learning experiments of the paper of 2024. Networks of
            ReLU were trained best with 3e-4 (docs/optimizers_compared.md).
        weight_decay: factor of the parameter that is added to the gradient (to h² nothing is added).
        gauss_newton: use ``p.hesscale_gn`` (AdaHesScaleGN) in place of ``p.hesscale``; needs a smaller ``lr``.
        decoupled_weight_decay: shrink the parameter by ``1 - lr · weight_decay`` instead, as AdamW does.
        foreach: update all parameters together, one call per operation, which takes a temporary copy of the size of
            the model; ``False``: one by one. By default all of them on a CUDA device, small ones elsewhere. The
            results are equal.
        maximize: ascend: g is negated.
        variant: ``"adam"`` as above, ``"sqrt"`` or ``"newton"``.

    Raises:
        ValueError: naming the argument that is out of range.
        CurvatureError: from ``step``, before anything is updated, naming the parameter: if it has a gradient and no
            diagonal, one of another shape, or one that an earlier step has used; if its gradient is sparse. Also if a
            parameter is complex, or the block has no correct curvature.

    Source: Elsayed & Mahmood 2022, https://arxiv.org/abs/2210.11639; Elsayed et al. 2024,
    https://arxiv.org/abs/2406.03276.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        gauss_newton: bool = False,
        decoupled_weight_decay: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        variant: str = "adam",
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "gauss_newton": gauss_newton,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "variant": variant,
        }
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        self._not_negative(group, "eps")
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdaHesScale: betas must be two numbers from [0, 1), got {betas}")
        if group["variant"] not in ("adam", "sqrt", "newton"):
            raise ValueError(f"AdaHesScale: variant must be 'adam', 'sqrt' or 'newton', got {group['variant']!r}")

    def _quantities(self) -> list[HesScale]:
        return list(dict.fromkeys(map(_diagonal, self.param_groups)))

    def _wrong(self, p: Tensor, group: dict[str, Any]) -> str | None:
        return self._unusable(p, _diagonal(group))

    def _update(self, ready: Ready) -> None:
        for group, parameters in ready:
            field = _diagonal(group).savefield
            rows: list[Row] = [(p, p.grad, getattr(p, field), self._state(p, group)) for p in parameters]  # type: ignore[misc]
            for together in _split(group["foreach"], rows):
                _update(group, together)
            for _, _, h, _ in rows:
                self._use(h)

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Number of steps, average of g, average of h² or |h|."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[_average(group)] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def _diagonal(group: Mapping[str, Any]) -> HesScale:
    return HesScale(gauss_newton=group["gauss_newton"])


def _average(group: Mapping[str, Any]) -> str:
    """Name of v in the state."""
    return "exp_avg_sq" if group["variant"] == "adam" else "exp_avg_abs"


def _split(foreach: bool | None, rows: list[Row]) -> Iterator[list[Row]]:
    """The parameters that are updated together."""
    if foreach is None:
        most = math.inf if all(p.is_cuda for p, *_ in rows) else IN_CACHE
    else:
        most = math.inf if foreach else 0
    together: list[Row] = []
    size = 0
    for row in rows:
        size += row[0].numel()
        if together and size > most:
            yield together
            together, size = [], row[0].numel()
        together.append(row)
    if together:
        yield together


def _update(group: Mapping[str, Any], rows: list[Row]) -> None:
    """The update of the class's docstring, of several parameters together."""
    columns: Any = zip(*rows, strict=True)
    p, g, h, states = columns
    steps, m, v = ([state[key] for state in states] for key in ("step", "exp_avg", _average(group)))
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    if group["maximize"]:
        g = torch._foreach_neg(g)
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        torch._foreach_mul_(p, 1 - lr * group["weight_decay"])
    elif group["weight_decay"]:
        g = torch._foreach_add(g, p, alpha=group["weight_decay"])
    torch._foreach_add_(steps, 1)
    t = [step.item() for step in steps]
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, g, alpha=1 - beta1)
    torch._foreach_mul_(v, beta2)
    if group["variant"] == "adam":
        torch._foreach_addcmul_(v, h, h, 1 - beta2)
    else:
        torch._foreach_add_(v, torch._foreach_abs(h), alpha=1 - beta2)
    correction = [1 - beta2**k for k in t]
    if group["variant"] == "newton":
        denominator = torch._foreach_div(v, correction)
    else:
        denominator = torch._foreach_sqrt(v)
        torch._foreach_div_(denominator, [math.sqrt(c) for c in correction])
    torch._foreach_add_(denominator, group["eps"])
    torch._foreach_addcdiv_(p, m, denominator, [-lr / (1 - beta1**k) for k in t])
