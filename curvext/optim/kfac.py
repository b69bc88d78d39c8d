"""K-FAC and EKFAC: gradients preconditioned by running averages of Kronecker-factored curvature."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import CurvatureError
from ..kronecker import Eigenbasis, Kronecker
from ..quantities import EKFAC
from ..quantities import KFAC as Factors
from .adahesscale import _name, evaluate, named

Row = tuple[Tensor, Tensor]  # a parameter and its gradient


class KFAC(Optimizer):
    """Every parameter's gradient over its Kronecker-factored block of the Gauss-Newton matrix.

        A, B ← decay · A + (1 - decay) A_now, and so B          every ``factors_every`` steps
        u = (A ⊗ B + (damping + weight_decay) I)⁻¹ g            inverted every ``inverses_every`` steps
        m ← momentum · m + ν u,   ν = min(1, √(kl_clip / lr² Σ uᵀg))
        θ ← θ - lr m

    The optimizer can run the block itself, from a closure that returns the loss and calls no backward,

        optimizer = KFAC(model.parameters())
        loss = optimizer.step(lambda: loss_fn(model(x), y))

    or take what your own block has left on the parameters, whenever it has left it:

        with extend(model, curvext.KFAC()):
            loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    A closure that zeroes the gradients and calls ``loss.backward()`` works too. A step takes the factors that it has
    used off the parameters. Weights of linear maps, convolutions and embeddings have factors; all others (biases,
    normalisation, bare parameters) their own block, or its diagonal where they are large (:class:`curvext.KFAC`).

    ``eigenbasis=True`` is EKFAC: the factors give the eigenvectors alone, every ``inverses_every`` steps, and the
    eigenvalues are running averages of the curvature along them. It needs the closure.

    Args:
        params: parameters, dicts of parameter groups, or ``(name, tensor)`` pairs; names appear in errors.
        lr: step size.
        momentum: see above.
        damping: added to the block, which is in the loss's scaling; divided among the factors in proportion to their
            mean eigenvalues (exact with ``eigenbasis``). A change counts from the next inverse on.
        decay: of the running averages, which begin at the first value.
        weight_decay: its multiple of the parameter is added to the gradient, and it to the damping.
        kl_clip: bounds lr² Σ uᵀg of the group, about twice the divergence between the models before and after the step;
            ``inf`` for no bound.
        factors_every, inverses_every: see above.
        decoupled_weight_decay: shrink the parameter by ``1 - lr · weight_decay`` instead, as AdamW does.
        maximize: ascend: g is negated.
        eigenbasis: see above.
        quantity: which factors: ``curvext.KFAC(setting="reduce")``, ``curvext.KFLR()``, ... (with ``eigenbasis``, a
            ``curvext.KFAC``).
        seed: of the random columns, which depend on it and on the number of steps.

    Raises:
        ValueError: naming the argument that is out of range.
        CurvatureError: from ``step``, before anything is updated, naming the parameter: if it has a gradient and has
            never had factors, or if its gradient is sparse. Also if a parameter is complex, or the block has no
            correct curvature.

    Sources: Martens & Grosse 2015, https://arxiv.org/abs/1503.05671; Ba, Grosse & Martens 2017 (clipping);
    George et al. 2018 (EKFAC), https://arxiv.org/abs/1806.03884.
    """

    _step_supports_amp_scaling = True  # GradScaler leaves the unscaling to step(), which unscales factors too

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.03,
        momentum: float = 0.9,
        damping: float = 1e-2,
        decay: float = 0.95,
        weight_decay: float = 0.0,
        *,
        kl_clip: float = 1e-3,
        factors_every: int = 1,
        inverses_every: int = 10,
        decoupled_weight_decay: bool = False,
        maximize: bool = False,
        eigenbasis: bool = False,
        quantity: Any = Factors(),  # noqa: B008
        seed: int = 0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "damping": damping, "decay": decay, "weight_decay": weight_decay,
                    "kl_clip": kl_clip, "factors_every": factors_every, "inverses_every": inverses_every,
                    "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize, "steps": 0}  # fmt: skip
        _check(defaults)
        if eigenbasis and not isinstance(quantity, Factors):
            raise ValueError(f"KFAC: eigenbasis=True needs a quantity curvext.KFAC(...), got {quantity}")
        super().__init__(params, defaults)
        self.quantity, self.eigenbasis, self.seed = quantity, eigenbasis, seed

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{k: getattr(self, k) for k in ("quantity", "eigenbasis", "seed")}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
            named(self)
        except Exception:
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and drop the factors that no step has used."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                for field in (self.quantity.savefield, EKFAC.savefield):
                    p.__dict__.pop(field, None)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update.

        Args:
            closure: returns the loss; gradients and factors are computed here, in a block of the optimizer's own.
                Without it, those that your own block has left on the parameters are used.

        Returns:
            What the closure returned.
        """
        loss = None if closure is None else self._evaluate(closure)
        if getattr(self, "found_inf", 0):  # set by GradScaler: gradients have overflowed
            return loss
        scale = self._scale()
        ready = [(group, list(self._rows(i, group))) for i, group in enumerate(self.param_groups)]
        for group, rows in ready:
            for p, _ in rows:
                self._average(p, group, scale)
            self._update(group, [(p, g / scale if scale is not None else g) for p, g in rows])
            group["steps"] += 1
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        """The loss of the closure, with gradients and, when they are due, factors on the parameters."""
        self.zero_grad()
        if all(group["steps"] % group["factors_every"] for group in self.param_groups):
            return self._gradients(closure)
        seed = self.seed + (max(group["steps"] for group in self.param_groups) << 32)
        generator = torch.Generator(self.param_groups[0]["params"][0].device).manual_seed(seed)
        return evaluate(self, closure, dict.fromkeys(self._quantities()), generator=generator)

    def _gradients(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            loss = closure()
            if all(p.grad is None for p in named(self).values()):
                loss.backward()
        return loss

    def _quantities(self) -> list[Any]:
        """Factors; and eigenvalues, once there are eigenvectors."""
        parameters = named(self)
        if not self.eigenbasis or not any("inverse" in self.state[p] for p in parameters.values()):
            return [self.quantity]
        q = self.quantity
        known = {name: self._basis(p) for name, p in parameters.items() if "inverse" in self.state[p]}
        basis: Any = defaultdict(lambda: None, known)
        return [q, EKFAC(q.mc_samples, q.empirical, q.setting, q.dense_up_to, basis)]

    def _scale(self) -> Tensor | None:
        """GradScaler's, that gradients and factors have to be divided by: both are linear in the loss."""
        scale = getattr(self, "grad_scale", None)
        if scale is None and hasattr(self, "found_inf"):
            raise CurvatureError("KFAC: GradScaler.unscale_ has unscaled the gradients and not the factors. Leave it "
                                 "out; scaler.step(optimizer) unscales both.")  # fmt: skip
        return scale

    def _rows(self, i: int, group: dict[str, Any]) -> Iterator[Row]:
        """Every parameter of group i with a gradient."""
        for k, p in enumerate(group["params"]):
            if p.grad is None or not p.requires_grad:
                continue
            field = self.quantity.savefield
            if p.grad.layout is not torch.strided:
                wrong = "has a sparse gradient; use dense ones (sparse=False in nn.Embedding)"
            elif field not in p.__dict__ and "factors" not in self.state[p]:
                wrong = (f"has a gradient and no {field}. Compute both in a block, with extend(model, "
                         f"{self.quantity}): loss.backward(); or give step() a closure.")  # fmt: skip
            else:
                yield p, p.grad
                continue
            raise CurvatureError(f"KFAC: parameter {_name(group, i, k)!r} {wrong}")

    def _average(self, p: Tensor, group: dict[str, Any], scale: Tensor | None) -> None:
        """Bring averages and inverse up to date."""
        state, weight = self.state[p], 1 - group["decay"]
        new, along = (p.__dict__.pop(field, None) for field in (self.quantity.savefield, EKFAC.savefield))
        if new is not None:
            first = new[0] if scale is None else new[0] / scale
            found = Kronecker((first, *new[1:]))
            state["factors"] = list(
                self._factors(p).lerp(found, weight).factors if "factors" in state else found.factors
            )
        if self.eigenbasis and along is not None and "inverse" in state:
            values = along.values if scale is None else along.values / scale
            state["inverse"] = [*state["inverse"][:-1], torch.lerp(state["inverse"][-1], values, weight)]
        if "inverse" not in state or group["steps"] % group["inverses_every"] == 0:
            state["inverse"] = self._invert(p, group)

    def _invert(self, p: Tensor, group: dict[str, Any]) -> list[Tensor | None]:
        """Factors of the damped inverse; or eigenvectors, and as eigenvalues those of the factors for a start."""
        factors = self._factors(p)
        return list((factors.eigh() if self.eigenbasis else factors.inverse(_shift(group))).tensors)

    def _factors(self, p: Tensor, name: str = "factors") -> Kronecker:
        return Kronecker(tuple(self.state[p][name]))

    def _basis(self, p: Tensor) -> Eigenbasis:
        *vectors, values = self.state[p]["inverse"]
        return Eigenbasis(tuple(vectors), values, tuple(p.shape))

    def _solve(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        """u of a gradient."""
        if self.eigenbasis:
            return self._basis(p).solve(g.flatten(), _shift(group)).view_as(g)  # type: ignore[no-any-return]
        return (self._factors(p, "inverse") @ g.flatten()).view_as(g)  # type: ignore[no-any-return]

    def _update(self, group: dict[str, Any], rows: list[Row]) -> None:
        lr, decay = float(group["lr"]), group["weight_decay"]
        coupled = decay and not group["decoupled_weight_decay"]
        gradients = [-g if group["maximize"] else g for _, g in rows]
        gradients = [g + decay * p if coupled else g for (p, _), g in zip(rows, gradients, strict=True)]
        steps = [self._solve(p, g, group) for (p, _), g in zip(rows, gradients, strict=True)]
        ν = _clip(group["kl_clip"], lr, steps, gradients)
        for (p, _), u in zip(rows, steps, strict=True):
            m = self.state[p].setdefault("momentum", torch.zeros_like(p))
            m.mul_(group["momentum"]).add_(ν.to(m) * u)
            if decay and not coupled:
                p.mul_(1 - lr * decay)
            p.sub_(lr * m)


def _shift(group: dict[str, Any]) -> float:
    return float(group["damping"] + (0 if group["decoupled_weight_decay"] else group["weight_decay"]))


def _clip(bound: float, lr: float, steps: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """ν of the class's docstring."""
    if not steps:
        return torch.ones(())
    like = gradients[0].new_empty(0, dtype=torch.promote_types(gradients[0].dtype, torch.float32))
    total = torch.stack([(u * g).sum().to(like) for u, g in zip(steps, gradients, strict=True)]).sum()
    return (bound / (lr**2 * total).clamp(min=torch.finfo(total.dtype).tiny)).sqrt().clamp(max=1)


def _check(group: dict[str, Any]) -> None:
    """Hyperparameters in range; NaN is not."""
    for name in ("lr", "damping", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"KFAC: {name} must not be negative, got {group[name]}")
    for name in ("momentum", "decay"):
        if not 0 <= group[name] < 1:
            raise ValueError(f"KFAC: {name} must be from [0, 1), got {group[name]}")
    for name in ("factors_every", "inverses_every"):
        if not isinstance(group[name], int) or group[name] < 1:
            raise ValueError(f"KFAC: {name} must be a number of steps, got {group[name]}")
    if not group["kl_clip"] > 0:
        raise ValueError(f"KFAC: kl_clip must be positive, got {group['kl_clip']}")
