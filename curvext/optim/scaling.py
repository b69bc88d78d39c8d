"""Step-size scaling: the steps of any optimizer, shortened where the curvature says that they go too far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CurvatureError
from ..quantities import HesScale
from .adahesscale import AdaHesScale, _diagonal, _name, evaluate, named, unusable

QUANTITIES = {"hesscale": HesScale(), "hesscale_gn": HesScale(gauss_newton=True)}


class ScaledStep(Optimizer):
    """Scales the steps u of another optimizer so that ½ Σ c u², the second-order change of the loss, stays below δ.

        v ← β v + (1 - β) h²,  c = √v                 (average="absolute": v ← β v + (1 - β) |h|, c = v)
        θ ← θ + min(max_scale, √(2 δ / Σ c u²)) u     the sum over all parameters

    with h the Hessian diagonal of HesScale. There is no bias correction, so the first steps are bounded less; where
    Σ c u² = 0 the factor is ``max_scale``. u is all that the optimizer does, decoupled weight decay included.

        optimizer = ScaledStep(torch.optim.Adam(model.parameters(), lr=1e-2))
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    Closures and blocks of your own are as for :class:`~curvext.optim.AdaHesScale`, whose diagonal, where it is the
    optimizer that is scaled, is computed along. Groups are those of the optimizer: schedulers may be given either one.
    Not for optimizers that evaluate the closure several times, such as LBFGS.

    Args:
        optimizer: the optimizer; step this object and not that one.
        delta: δ; 1e-8 in the paper's experiments.
        max_scale: greatest factor.
        beta: decay rate of the average of h.
        curvature: ``"hesscale"``, ``"hesscale_gn"``, or ``"gradient"`` for g in place of h, which needs no block.
        average: ``"square"`` or ``"absolute"``.

    Attributes:
        scale: factor of the last step, a scalar tensor on the parameters' device.

    Raises:
        ValueError: naming the argument that is out of range.
        CurvatureError: from ``step``, before anything is updated, naming a parameter that has a gradient and no
            diagonal, or one that an earlier step has used.

    Source: Elsayed et al. 2024, https://arxiv.org/abs/2406.03276, and its released code.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves the unscaling to step(), which unscales h too

    def __init__(
        self,
        optimizer: Optimizer,
        delta: float = 1e-4,
        *,
        max_scale: float = 1.0,
        beta: float = 0.999,
        curvature: str = "hesscale",
        average: str = "square",
    ):
        if not (0 < delta < math.inf and 0 < max_scale < math.inf and 0 <= beta < 1):
            raise ValueError(f"ScaledStep: delta={delta} > 0, max_scale={max_scale} > 0, 0 <= beta={beta} < 1 needed")
        if curvature not in (*QUANTITIES, "gradient") or average not in ("square", "absolute"):
            raise ValueError(f"ScaledStep: curvature={curvature!r} must be 'hesscale', 'hesscale_gn' or 'gradient', "
                             f"average={average!r} 'square' or 'absolute'")  # fmt: skip
        if isinstance(optimizer, torch.optim.LBFGS) or hasattr(optimizer, "report"):
            raise ValueError(f"ScaledStep: {type(optimizer).__name__} evaluates the closure itself; it has a search")
        super().__init__(optimizer.param_groups, {})
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.delta, self.max_scale, self.beta = delta, max_scale, beta
        self.curvature, self.average, self.scale = curvature, average, torch.tensor(max_scale)
        self._used = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        own = ("optimizer", "delta", "max_scale", "beta", "curvature", "average", "scale")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._used = WeakIdKeyDictionary()

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the state of the optimizer that is scaled."""
        return {**super().state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the other left off."""
        self.optimizer.load_state_dict(state_dict["optimizer"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "optimizer"})
        self.param_groups = self.optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "optimizer"):
            self.optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the diagonals."""
        self.optimizer.zero_grad(set_to_none)
        for quantity in self._quantities():
            for p in named(self).values():
                p.__dict__.pop(quantity.savefield, None)

    def _quantities(self) -> dict[HesScale, None]:
        """Those that this step and the optimizer's read."""
        own = [QUANTITIES[self.curvature]] if self.curvature in QUANTITIES else []
        theirs = map(_diagonal, self.param_groups) if isinstance(self.optimizer, AdaHesScale) else ()
        return dict.fromkeys([*own, *theirs])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One scaled step of the optimizer; closure and result as in :meth:`AdaHesScale.step`."""
        loss = None
        if closure is not None:
            self.zero_grad()
            loss = evaluate(self, closure, self._quantities())
        if getattr(self, "found_inf", 0):  # set by GradScaler: gradients have overflowed
            return loss
        rows = self._rows()
        self._unscale([p for p, _ in rows])
        before = [p.clone() for p, _ in rows]
        self.optimizer.step()
        self._shorten([(p, start, h) for (p, h), start in zip(rows, before, strict=True)])
        return loss

    def _rows(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter that has a gradient, with what stands for h."""
        rows, quantity = [], QUANTITIES.get(self.curvature)
        for i, group in enumerate(self.param_groups):
            for k, p in enumerate(group["params"]):
                if p.grad is None or not p.requires_grad:
                    continue
                h = p.grad if quantity is None else getattr(p, quantity.savefield, None)
                wrong = unusable(p, h, quantity or QUANTITIES["hesscale"], {} if quantity is None else self._used)
                if wrong or h is None:
                    raise CurvatureError(f"ScaledStep: parameter {_name(group, i, k)!r} {wrong}")
                rows.append((p, h))
        return rows

    def _unscale(self, parameters: list[Tensor]) -> None:
        """Gradients and diagonals of the loss itself, if GradScaler has scaled it: both are linear in the loss."""
        scale = getattr(self, "grad_scale", None)
        if scale is None and not (hasattr(self, "found_inf") and self._quantities()):
            return
        if scale is None:
            raise CurvatureError("ScaledStep: leave GradScaler.unscale_ out, which leaves diagonals as they are; "
                                 "scaler.step(optimizer) unscales both")  # fmt: skip
        for p in parameters:
            for linear in (p.grad, *(getattr(p, q.savefield) for q in self._quantities())):
                linear.div_(scale)

    def _shorten(self, rows: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """The rule of the class's docstring, where parameters have moved from ``start``."""
        if not rows:
            return
        device = rows[0][0].device
        parts = [(self._average(p, h) * (p - start).square()).sum().to(device) for p, start, h in rows]
        self.scale = (2 * self.delta / torch.stack(parts).sum()).sqrt().clamp(max=self.max_scale)
        for p, start, h in rows:
            p.copy_(torch.lerp(start, p, self.scale.to(p)))  # exactly p where the scale is 1
            self._used[h] = h._version

    def _average(self, p: Tensor, h: Tensor) -> Tensor:
        """c of a parameter, from its average brought up to date."""
        if "curvature" not in self.state[p]:
            self.state[p]["curvature"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        v: Tensor = self.state[p]["curvature"].mul_(self.beta)
        if self.average == "absolute":
            return v.add_(h.abs(), alpha=1 - self.beta)
        return v.addcmul_(h, h, value=1 - self.beta).sqrt()
