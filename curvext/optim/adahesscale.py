"""AdaHesScale: Adam with the squared gradient replaced by the squared Hessian diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CurvatureError
from ..extend import extend
from ..quantities import HesScale

Row = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]  # parameter, gradient, diagonal, state
IN_CACHE = 1 << 14  # entries: on a CPU, so many are updated faster together than one tensor after the other


class AdaHesScale(Optimizer):
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
        eps: added to the denominator; 1e-5 in the reinforcement learning experiments of the paper of 2024.
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

    _step_supports_amp_scaling = True  # GradScaler leaves the unscaling to step(), which unscales h too

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
        self._forget()
        defaults: dict[str, Any] = {
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
        _check(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Start the record of used diagonals: their versions, for as long as they live. No part of the state."""
        self._used = WeakIdKeyDictionary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(param_group)
            named(self)
        except Exception:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the diagonals: a block leaves new ones, it never adds to them."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            field = _diagonal(group).savefield
            for p in group["params"]:
                p.__dict__.pop(field, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update.

        Args:
            closure: returns the loss; gradients and diagonals are computed here, in a block of the optimizer's own.
                Without it, those that your own block has left on the parameters are used.

        Returns:
            What the closure returned.
        """
        loss = None if closure is None else self._evaluate(closure)
        if getattr(self, "found_inf", 0):  # set by GradScaler: gradients have overflowed
            return loss
        ready = [(group, self._rows(i, group)) for i, group in enumerate(self.param_groups)]
        for group, rows in ready:
            for together in _split(group["foreach"], rows):
                _update(group, together)
            field = _diagonal(group).savefield
            for p, *_ in rows:
                h = getattr(p, field)
                self._used[h] = h._version
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss of the closure, with gradients and diagonals left on the parameters."""
        self.zero_grad()
        return evaluate(self, closure, {_diagonal(group): None for group in self.param_groups})

    def _rows(self, i: int, group: Mapping[str, Any]) -> list[Row]:
        """Every parameter of group i with a gradient, with its gradient, diagonal and state."""
        rows, quantity = [], _diagonal(group)
        for k, p in enumerate(group["params"]):
            if p.grad is None or not p.requires_grad:
                continue
            h = getattr(p, quantity.savefield, None)
            wrong = unusable(p, h, quantity, self._used)
            if wrong or h is None:
                raise CurvatureError(f"AdaHesScale: parameter {_name(group, i, k)!r} {wrong}")
            rows.append((p, self._unscaled(p.grad), self._unscaled(h), self._state(p, group)))
        return rows

    def _unscaled(self, linear: Tensor) -> Tensor:
        """A gradient or diagonal of the loss itself, if GradScaler has scaled it: both are linear in the loss."""
        if not hasattr(self, "found_inf"):
            return linear
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            raise CurvatureError(
                "AdaHesScale: GradScaler.unscale_ has unscaled the gradients and not the diagonals. Leave it out; "
                "scaler.step(optimizer) unscales both."
            )
        return linear / scale

    def _state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Number of steps, average of g, average of h² or |h|."""
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state[_average(group)] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def evaluate(optimizer: Optimizer, closure: Callable[[], Any], quantities: Mapping[Any, None], **options: Any) -> Any:
    """The loss of a closure, with gradients and quantities left on an optimizer's parameters."""
    parameters = named(optimizer)
    block = extend(parameters, *quantities, **options)
    with torch.enable_grad(), block:
        loss = closure()
        if not block.backwards:
            _check_returned(optimizer, loss, parameters)
            loss.backward()
    return loss


def _check_returned(optimizer: Optimizer, loss: Any, parameters: Mapping[str, Tensor]) -> None:
    who = type(optimizer).__name__
    if not isinstance(loss, Tensor):
        raise TypeError(f"{who}: the closure must return the loss, a tensor, got {type(loss).__name__}")
    if any(p.grad is not None for p in parameters.values()):
        raise CurvatureError(
            f"{who}: the closure computed gradients without loss.backward() (torch.autograd.backward is not "
            "seen), so there is no diagonal. Let it return the loss and call no backward at all."
        )


def named(optimizer: Optimizer) -> dict[str, Tensor]:
    """All parameters of an optimizer, by their names or places."""
    found: dict[str, Tensor] = {}
    who = type(optimizer).__name__
    for i, group in enumerate(optimizer.param_groups):
        for k, p in enumerate(group["params"]):
            name = _name(group, i, k)
            if name in found:
                raise ValueError(f"{who}: params has two parameters named {name!r}")
            if p.is_complex():
                raise CurvatureError(f"{who}: parameter {name!r} is complex; use torch.view_as_complex")
            found[name] = p
    return found


def unusable(p: Tensor, h: Tensor | None, quantity: HesScale, used: Mapping[Tensor, int]) -> str | None:
    """Why a diagonal is not one of the parameter's last block; ``used``: versions of those that steps have used."""
    remedy = "in a block, with extend(model, {}): loss.backward(); or give step() a closure."
    if p.grad is not None and p.grad.layout is not torch.strided:
        return "has a sparse gradient; use dense ones (sparse=False in nn.Embedding)"
    if h is None:
        return f"has a gradient and no {quantity.savefield}. Compute both {remedy.format(quantity)}"
    if h.shape != p.shape:
        return f"has a {quantity.savefield} of shape {tuple(h.shape)}, not {tuple(p.shape)}"
    if used.get(h) == h._version:
        stale = f"has a stale {quantity.savefield}: an earlier step has used it."
        return f"{stale} Compute a new one {remedy.format(quantity)}"
    return None


def _diagonal(group: Mapping[str, Any]) -> HesScale:
    return HesScale(gauss_newton=group["gauss_newton"])


def _average(group: Mapping[str, Any]) -> str:
    """Name of v in the state."""
    return "exp_avg_sq" if group["variant"] == "adam" else "exp_avg_abs"


def _name(group: Mapping[str, Any], i: int, k: int) -> str:
    return group["param_names"][k] if "param_names" in group else f"params[{k}] of group {i}"


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


def _check(group: Mapping[str, Any]) -> None:
    """Hyperparameters in range; NaN is not."""
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"AdaHesScale: {name} must not be negative, got {group[name]}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"AdaHesScale: betas must be two numbers from [0, 1), got {betas}")
    if group["variant"] not in ("adam", "sqrt", "newton"):
        raise ValueError(f"AdaHesScale: variant must be 'adam', 'sqrt' or 'newton', got {group['variant']!r}")
