"""What optimizers share that step along one gradient, with curvature that a block has left beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CurvatureError
from ..extend import extend
from .checked import CheckedOptimizer, parts

Ready = list[tuple[dict[str, Any], list[Tensor]]]  # groups, and their parameters that have a gradient


class BlockOptimizer(CheckedOptimizer):
    """An optimizer that reads a gradient and quantities from parameters, once a step.

    ``step(closure)`` runs the block itself, with a closure that returns the loss, or ``(loss, outputs)``, and calls no
    ``backward``; or with one of PyTorch's convention, which zeroes the gradients and calls ``loss.backward()``.
    ``step()`` takes what your own block has left. All is checked before anything is updated. Under
    ``torch.amp.GradScaler``, ``scaler.step(optimizer)`` unscales the quantities together with the gradients, as both
    are linear in the loss.

    Subclasses give ``_quantities()``, ``_wrong(p, group)`` and ``_update(ready)``.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves the unscaling to step()

    def _quantities(self) -> Sequence[Any]:
        """Those that steps read."""
        raise NotImplementedError

    def _wrong(self, p: Tensor, group: dict[str, Any]) -> str | None:
        """Why what a parameter has cannot be used."""
        raise NotImplementedError

    def _update(self, ready: Ready) -> None:
        raise NotImplementedError

    def _due(self) -> Sequence[Any]:
        """Those that a block of the optimizer's own computes in this step."""
        return self._quantities()

    def _generator(self) -> torch.Generator | None:
        """Of that block's random numbers."""
        return None

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        self._named()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the quantities: a block leaves new ones, it never adds to them."""
        super().zero_grad(set_to_none)
        self._drop()

    def _drop(self) -> None:
        for field in self._fields:
            for group in self.param_groups:
                for p in group["params"]:
                    p.__dict__.pop(field, None)

    @property
    def _fields(self) -> set[str]:
        return {quantity.savefield for quantity in self._quantities()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update.

        Args:
            closure: returns the loss; gradients and quantities are computed here, in a block of the optimizer's own.
                Without it, those that your own block has left on the parameters are used.

        Returns:
            The loss that the closure returned.
        """
        loss = None if closure is None else self._evaluate(closure)
        if getattr(self, "found_inf", 0):  # set by GradScaler: gradients have overflowed
            self._drop()  # so no later step takes these
            return loss
        scale = self._scale()
        ready = [(group, self._ready(i, group)) for i, group in enumerate(self.param_groups)]
        if scale is not None:
            self._unscale([p for _, parameters in ready for p in parameters], scale)
        self._update(ready)
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss of the closure, with gradients and quantities left on the parameters."""
        self.zero_grad()
        with torch.enable_grad():
            if not (quantities := self._due()):
                return self._backward(closure, None)
            with (block := extend(self._named(), *quantities, generator=self._generator())):
                return self._backward(closure, block)

    def _backward(self, closure: Callable[[], Any], block: extend | None) -> Any:
        (loss, _), who = parts(closure()), type(self).__name__
        if block is not None and block.backwards:
            return loss
        has_gradients = any(p.grad is not None for group in self.param_groups for p in group["params"])
        if block is None and has_gradients:
            return loss
        if not isinstance(loss, Tensor):
            raise TypeError(f"{who}: the closure must return the loss, a tensor, got {type(loss).__name__}")
        if has_gradients:
            raise CurvatureError(
                f"{who}: the closure computed gradients without loss.backward() (torch.autograd.backward is not "
                "seen), so there is no curvature. Let it return the loss and call no backward at all."
            )
        loss.backward()
        return loss

    def _ready(self, i: int, group: dict[str, Any]) -> list[Tensor]:
        """The parameters of group i that have a gradient."""
        ready = [(k, p) for k, p in enumerate(group["params"]) if p.grad is not None and p.requires_grad]
        for k, p in ready:
            sparse = p.grad.layout is not torch.strided
            wrong = "has a sparse gradient; use dense ones (sparse=False in nn.Embedding)" if sparse else None
            wrong = wrong or self._wrong(p, group)
            if wrong:
                raise CurvatureError(f"{type(self).__name__}: parameter {_name(group, i, k)!r} {wrong}")
        return [p for _, p in ready]

    def _scale(self) -> Tensor | None:
        """By which GradScaler has multiplied the loss."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None and hasattr(self, "found_inf") and self._quantities():
            raise CurvatureError(
                f"{type(self).__name__}: GradScaler.unscale_ has unscaled the gradients and not the curvature. Leave "
                "it out; scaler.step(optimizer) unscales both."
            )
        return scale

    def _unscale(self, parameters: list[Tensor], scale: Tensor) -> None:
        fields = self._fields
        for p in parameters:
            assert p.grad is not None
            p.grad.div_(scale)
            for field in fields & p.__dict__.keys():
                value = getattr(p, field)
                factors = isinstance(value, list)  # one of them stands for the scale of their product
                setattr(p, field, [value[0] / scale, *value[1:]] if factors else value * (1 / scale))

    def _named(self) -> dict[str, Tensor]:
        """All parameters, by their names or places."""
        found: dict[str, Tensor] = {}
        for i, group in enumerate(self.param_groups):
            for k, p in enumerate(group["params"]):
                name = _name(group, i, k)
                if name in found:
                    raise ValueError(f"{type(self).__name__}: params has two parameters named {name!r}")
                if p.is_complex():
                    raise CurvatureError(
                        f"{type(self).__name__}: parameter {name!r} is complex; use torch.view_as_complex"
                    )
                found[name] = p
        return found


class DiagonalOptimizer(BlockOptimizer):
    """One whose quantities are tensors of the parameters' shapes, each good for one step."""

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._used = WeakIdKeyDictionary()  # the versions of tensors that steps have used, for as long as they live
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._used = WeakIdKeyDictionary()

    def _use(self, h: Tensor) -> None:
        self._used[h] = h._version

    def _unusable(self, p: Tensor, quantity: Any) -> str | None:
        """Why the quantity on a parameter is not one of its last block."""
        h = getattr(p, quantity.savefield, None)
        if h is None:
            return missing(quantity)
        if h.shape != p.shape:
            return f"has a {quantity.savefield} of shape {tuple(h.shape)}, not {tuple(p.shape)}"
        if self._used.get(h) == h._version:
            stale = f"has a stale {quantity.savefield}: an earlier step has used it."
            return f"{stale} Compute a new one {_REMEDY.format(quantity)}"
        return None


_REMEDY = "in a block, with extend(model, {}): loss.backward(); or give step() a closure."


def missing(quantity: Any) -> str:
    """What is said of a parameter that has no such quantity."""
    return f"has a gradient and no {quantity.savefield}. Compute both {_REMEDY.format(quantity)}"


def _name(group: dict[str, Any], i: int, k: int) -> str:
    return group["param_names"][k] if "param_names" in group else f"params[{k}] of group {i}"
