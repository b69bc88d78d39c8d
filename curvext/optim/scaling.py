"""Step-size scaling: the steps of any optimizer, shortened where the curvature says that they go too far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..quantities import HesScale
from .block import BlockOptimizer, DiagonalOptimizer, Ready

QUANTITIES = {"hesscale": HesScale(), "hesscale_gn": HesScale(gauss_newton=True)}


class ScaledStep(DiagonalOptimizer):
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
        self.optimizer, self.param_groups, self.defaults = optimizer, optimizer.param_groups, optimizer.defaults
        self.delta, self.max_scale, self.beta = delta, max_scale, beta
        self.curvature, self.average, self.scale = curvature, average, torch.tensor(max_scale)

    def _check(self, group: dict[str, Any]) -> None:
        """Groups are the optimizer's, which has checked them."""

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

    def _quantities(self) -> list[Any]:
        """Those that this step and the optimizer's read."""
        return self._and(self.optimizer._quantities() if isinstance(self.optimizer, BlockOptimizer) else [])

    def _due(self) -> list[Any]:
        return self._and(self.optimizer._due() if isinstance(self.optimizer, BlockOptimizer) else [])

    def _and(self, theirs: Sequence[Any]) -> list[Any]:
        own = [QUANTITIES[self.curvature]] if self.curvature in QUANTITIES else []
        return list(dict.fromkeys([*own, *theirs]))

    def _generator(self) -> torch.Generator | None:
        return self.optimizer._generator() if isinstance(self.optimizer, BlockOptimizer) else None

    def _wrong(self, p: Tensor, group: dict[str, Any]) -> str | None:
        return self._unusable(p, QUANTITIES[self.curvature]) if self.curvature in QUANTITIES else None

    def _update(self, ready: Ready) -> None:
        rows = [(p, p.clone(), self._curvature(p)) for _, parameters in ready for p in parameters]
        self.optimizer.step()
        if rows:
            self._shorten(rows)

    def _curvature(self, p: Tensor) -> Tensor:
        """What stands for h."""
        return getattr(p, "grad" if self.curvature == "gradient" else self.curvature)  # type: ignore[no-any-return]

    def _shorten(self, rows: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """The rule of the class's docstring, where parameters have moved from ``start``."""
        device = rows[0][0].device
        parts = [(self._average(p, h) * (p - start).square()).sum().to(device) for p, start, h in rows]
        self.scale = (2 * self.delta / torch.stack(parts).sum()).sqrt().clamp(max=self.max_scale)
        for p, start, h in rows:
            p.copy_(torch.lerp(start, p, self.scale.to(p)))  # exactly p where the scale is 1
            self._use(h)

    def _average(self, p: Tensor, h: Tensor) -> Tensor:
        """c of a parameter, from its average brought up to date."""
        if "curvature" not in self.state[p]:
            self.state[p]["curvature"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        v: Tensor = self.state[p]["curvature"].mul_(self.beta)
        if self.average == "absolute":
            return v.add_(h.abs(), alpha=1 - self.beta)
        return v.addcmul_(h, h, value=1 - self.beta).sqrt()
