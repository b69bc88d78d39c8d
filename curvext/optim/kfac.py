"""K-FAC and EKFAC: gradients preconditioned by running averages of Kronecker-factored curvature."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..kronecker import Eigenbasis, Kronecker
from ..quantities import EKFAC
from ..quantities import KFAC as Factors
from .block import BlockOptimizer, Ready, missing
from .checked import numbers


class KFAC(BlockOptimizer):
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
    eigenvalues are running averages of the curvature along them. It needs the closure. All settings but ``quantity``
    and ``seed`` may differ between groups.

    Args:
        params: parameters, dicts of parameter groups, or ``(name, tensor)`` pairs; names appear in errors.
        lr: step size.
        momentum: see above.
        damping: added to the block, which is in the loss's scaling; divided among the factors in proportion to their
            mean eigenvalues (exact with ``eigenbasis``). A change counts from the next inverse on; with
            ``eigenbasis``, at once.
        decay: of the running averages, which begin at the first value.
        weight_decay: its multiple of the parameter is added to the gradient, and it to the damping.
        kl_clip: bounds lr² Σ uᵀg of the group, about twice the divergence between the models before and after the step;
            ``inf`` for no bound.
        factors_every, inverses_every: see above.
        decoupled_weight_decay: shrink the parameter by ``1 - lr · weight_decay`` instead, as AdamW does.
        maximize: ascend: g is negated. The factors are those of the loss, which has to be convex in the outputs all the
            same: rather than maximize a concave one, minimise its negative.
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
                    "decoupled_weight_decay": decoupled_weight_decay, "maximize": maximize, "eigenbasis": eigenbasis,
                    "steps": 0}  # fmt: skip
        self.quantity, self.seed = quantity, seed
        super().__init__(params, defaults)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        self._not_negative(group, "damping")
        for name in ("momentum", "decay"):
            if not 0 <= group[name] < 1:
                raise ValueError(f"KFAC: {name} must be from [0, 1), got {group[name]}")
        for name in ("factors_every", "inverses_every"):
            if not isinstance(group[name], int) or group[name] < 1:
                raise ValueError(f"KFAC: {name} must be a number of steps, got {group[name]}")
        if not group["kl_clip"] > 0:
            raise ValueError(f"KFAC: kl_clip must be positive, got {group['kl_clip']}")
        if group["eigenbasis"] and not isinstance(self.quantity, Factors):
            raise ValueError(f"KFAC: eigenbasis=True needs a quantity curvext.KFAC(...), got {self.quantity}")

    def _quantities(self) -> list[Any]:
        return [self.quantity, EKFAC()]

    def _due(self) -> list[Any]:
        """Factors where a group's turn has come; and eigenvalues, once there are eigenvectors."""
        names = {p: name for name, p in self._named().items()}
        due = [g for g in self.param_groups if g["steps"] % g["factors_every"] == 0]
        factors = {names[p] for g in due for p in g["params"] if p.requires_grad}
        basis = {names[p]: self._basis(p) for g in due if g["eigenbasis"] for p in g["params"]
                 if p.requires_grad and "inverse" in self.state[p]}  # fmt: skip
        q, found = self.quantity, [self.quantity.only(lambda name, p: name in factors)] if factors else []
        if basis:
            along = EKFAC(q.mc_samples, q.empirical, q.setting, q.dense_up_to, basis)
            found.append(along.only(lambda name, p: name in basis))
        return found

    def _generator(self) -> torch.Generator:
        step = max(group["steps"] for group in self.param_groups)
        return numbers(self.seed, step, next(iter(self._named().values())).device)

    def _wrong(self, p: Tensor, group: dict[str, Any]) -> str | None:
        if self.quantity.savefield in p.__dict__ or "factors" in self.state[p]:
            return None
        wrong, every = missing(self.quantity), group["factors_every"]
        if group["steps"] % every == 0:
            return wrong
        return (
            f"{wrong} Factors come every {every} steps; what joins in between: in a group of its own (add_param_group)."
        )

    def _update(self, ready: Ready) -> None:
        for group, parameters in ready:
            for p in parameters:
                self._average(p, group)
            self._move(parameters, group)
            group["steps"] += 1

    def _average(self, p: Tensor, group: dict[str, Any]) -> None:
        """Bring averages and inverse up to date."""
        state, weight = self.state[p], 1 - group["decay"]
        new, along = (p.__dict__.pop(quantity.savefield, None) for quantity in self._quantities())
        if new is not None:
            found = Kronecker(tuple(new))
            state["factors"] = list((self._factors(p).lerp(found, weight) if "factors" in state else found).factors)
        if group["eigenbasis"] and along is not None and "inverse" in state:
            *vectors, values = state["inverse"]
            state["inverse"] = [*vectors, torch.lerp(values, along.values, weight)]
        if "inverse" not in state or group["steps"] % group["inverses_every"] == 0:
            state["inverse"] = self._invert(p, group)

    def _invert(self, p: Tensor, group: dict[str, Any]) -> list[Tensor | None]:
        """Factors of the damped inverse; or eigenvectors, and as eigenvalues those of the factors for a start."""
        factors = self._factors(p)
        try:
            return list((factors.eigh() if group["eigenbasis"] else factors.inverse(_shift(group))).tensors)
        except CurvatureError as error:
            name = next(name for name, q in self._named().items() if q is p)
            raise CurvatureError(f"KFAC: the factors of parameter {name!r}: {error}") from None

    def _factors(self, p: Tensor, name: str = "factors") -> Kronecker:
        return Kronecker(tuple(self.state[p][name]))

    def _basis(self, p: Tensor) -> Eigenbasis:
        *vectors, values = self.state[p]["inverse"]
        return Eigenbasis(tuple(vectors), values, tuple(p.shape))

    def _solve(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        """u of a gradient."""
        if group["eigenbasis"]:
            return self._basis(p).solve(g.flatten(), _shift(group)).view_as(g)  # type: ignore[no-any-return]
        return (self._factors(p, "inverse") @ g.flatten()).view_as(g)  # type: ignore[no-any-return]

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        lr, decay = float(group["lr"]), group["weight_decay"]
        coupled = decay and not group["decoupled_weight_decay"]
        gradients: list[Tensor] = [-p.grad if group["maximize"] else p.grad for p in parameters]  # type: ignore
        gradients = [g + decay * p if coupled else g for p, g in zip(parameters, gradients, strict=True)]
        steps = [self._solve(p, g, group) for p, g in zip(parameters, gradients, strict=True)]
        ν = _clip(group["kl_clip"], lr, steps, gradients)
        for p, u in zip(parameters, steps, strict=True):
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
