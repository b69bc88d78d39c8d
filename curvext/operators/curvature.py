"""Curvature of a loss over data, by products: Hessian, Gauss-Newton, Fisher, and what the first two differ by."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import CurvatureError
from ..selection import kept, named, selector, trained
from .base import Operator
from .data import Batches, Closure, Objective, Term, batch_normalised, call, output_tensors, twice_differentiable
from .draws import loss_draws
from .linearised import Linearised, Tensors, room
from .space import Space


class OverData(Operator):
    """An operator that is a sum over batches, at the model's current parameters."""

    def _describe(
        self, model: Any, data: Any, parameters: Any, only: Any, keep: bool | None, memory: int | None, progress: bool
    ) -> None:
        self.model = model
        self.parameters = chosen(model if parameters is None else parameters, only)
        first = next(iter(self.parameters.values()))
        if len({(p.dtype, p.device) for p in self.parameters.values()}) > 1:
            raise CurvatureError("parameters of several dtypes or devices; choose some of them with only=")
        self.dtype, self.device, self.space = first.dtype, first.device, Space.of(self.parameters)
        self.domain = self.space
        self.memory = memory or room(self.device)
        self.batches = Batches(data, self.device, progress)
        self.keep = self.batches.single if keep is None else keep
        self._kept: list[Linearised] = []
        self._stamp: Any = None

    @abstractmethod
    def _term(self, batch: Any) -> Term:
        """What the batch adds."""

    def _linearised(self) -> Iterator[Linearised]:
        """Every batch's graph, made afresh, or kept as long as model and data are what they were."""
        if self.keep and self._kept and self._stamp == self._now():
            yield from self._kept
            return
        self._kept, fresh = [], []
        for index, batch in enumerate(self.batches):
            at = Linearised(self._term(batch), list(self.parameters.values()), index)
            fresh += [at] if self.keep else []
            yield at
        self._kept, self._stamp = fresh, self._now()

    def _now(self) -> Any:
        """Changes whenever parameters, buffers, modes or the one batch do (but not by ``p.data``)."""
        tensors, modes = list(self.parameters.values()), []
        if isinstance(self.model, nn.Module):
            tensors += [*self.model.parameters(), *self.model.buffers()]
            modes = [m.training for m in self.model.modules()]
        tensors += self.batches.tensors
        return modes, [(id(t), t.data_ptr(), t._version) for t in tensors]

    def refresh(self) -> None:
        """Forget kept graphs: needed only after parameters were changed through ``p.data``."""
        self._kept = []


class Curvature(OverData):
    """A symmetric operator of L = (1/W) Σ_b ℓ_b over batches b: see the module's text on ``reduction``.

    Args:
        model: an ``nn.Module``, or a callable with ``parameters``; called with a batch's input (``model(*input)`` for a
            tuple, ``model(**input)`` for a mapping).
        loss: ``loss(outputs, targets)``, a scalar. With a mapping as batch: ``loss(outputs, batch)``, or ``None`` for
            ``model(**batch).loss`` (Hugging Face).
        data: one batch ``(input, target)``, a mapping, or an iterable of batches that can be run through again, such
            as a ``DataLoader``. The operator is that of the loss over all data at once, however it is batched.
        parameters: what the operator is over: a module, a mapping of names to tensors, or an iterable of tensors; by
            default the model's. Those that require a gradient count, in the order of ``named_parameters``.
        only: restricts them: globs over names, modules or their classes, or predicates ``(name, parameter) -> bool``.
        reduction: ``"mean"`` or ``"sum"``: how the loss adds up samples, needed for several batches. PyTorch's losses,
            as modules or functions, say it themselves.
        count: ``count(batch)``: what a mean divides by, where it is not the number of samples (tokens, class weights).
            PyTorch's losses are known: cross entropy divides by the weights of the targets that are not ignored.
        keep: whether the batches' differentiated graphs are kept between products; by default if there is one batch.
            They are made again when parameters, buffers, modes or the batch change (not by ``p.data``: call
                ``refresh()``).
        memory: bytes that the columns of ``op @ V`` may take on their way; as many as fit are carried together. By
            default what a CPU's cache holds (beyond, one after the other is faster), and 1 GiB on other devices.
        progress: show a bar over batches (needs tqdm).
        check: compare two gradients of the first batch, and refuse models that are random or couple the samples.

    Raises:
        CurvatureError: if the loss is random (dropout), if batch normalisation would make the result depend on how the
            data is batched, if batches cannot be weighted, or if the loss's mean is not what it is taken for.
    """

    symmetric = True
    by_sample: ClassVar[bool] = False

    def __init__(
        self,
        model: Any,
        loss: Any,
        data: Any,
        *,
        parameters: Any = None,
        only: Any = None,
        reduction: str | None = None,
        count: Callable[[Any], Any] | None = None,
        keep: bool | None = None,
        memory: int | None = None,
        progress: bool = False,
        check: bool = True,
    ):
        self._describe(model, data, parameters, only, keep, memory, progress)
        self.image, self.shape = self.space, (self.space.size, self.space.size)
        summed = self.by_sample or not self.batches.single
        self.objective = loss if isinstance(loss, Closure) else Objective(model, loss, reduction, count, summed)
        if check:
            self._check()

    @classmethod
    def of(cls, closure: Callable[[], Any], parameters: Any, **options: Any) -> Curvature:
        """Of a closure that returns the loss, or ``(loss, outputs)`` where the operator splits at the model's outputs.

        The closure is called once, and again after the parameters have changed.
        """
        return cls(None, Closure(closure), (None, None), parameters=parameters, **options)

    def block(self, rows: str | Sequence[str], columns: str | Sequence[str] | None = None) -> Operator:
        """See :meth:`Operator.block`; a diagonal block costs what its own parameters cost."""
        if columns is not None and columns != rows:
            return super().block(rows, columns)
        part = copy.copy(self)
        part.space, _ = self.space.part(rows)
        part.parameters = {name: self.parameters[name] for name in part.space.shapes}
        part.domain = part.image = part.space
        part.shape, part._kept = (part.space.size, part.space.size), []
        return part

    def _check(self) -> None:
        """See ``check``."""
        if not self.batches.single and batch_normalised(self.model):
            raise CurvatureError(
                "batch normalisation in training mode (or without running statistics) couples the samples of a batch, "
                "so the curvature of the data would depend on its batches. Call model.eval(), or give one batch"
            )
        batch = next(iter(self.batches))
        first, second = (self._gradient(batch) for _ in range(2))
        off, size = _norm([a - b for a, b in zip(first, second, strict=True)]), _norm(first)
        if off > torch.finfo(self.dtype).eps ** 0.5 * size:
            raise CurvatureError(
                f"the loss is random: two gradients of the first batch differ by {float(off / size):.2g} of their "
                "norm. Dropout? Call model.eval(); or pass check=False to go on with what is drawn"
            )

    def _gradient(self, batch: Any) -> Tensors:
        found = torch.autograd.grad(self._term(batch).value, list(self.parameters.values()), allow_unused=True)
        return [g for g in found if g is not None]

    def _term(self, batch: Any) -> Term:
        return self.objective.term(batch)  # type: ignore[no-any-return]

    def _apply(self, v: Tensor) -> Tensor:
        total, weight = None, None
        for at in self._linearised():
            parts = [
                flat(self._term_product(at, vs, batched), batched)
                for vs, batched in split(self.space, v, at.together(v.shape[1], self.memory))
            ]
            part = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            total = part if total is None else total + part
            w = at.term.weight
            weight = w if weight is None or w is None else weight + w
        assert total is not None
        return total if weight is None else total / weight

    @abstractmethod
    def _term_product(self, at: Linearised, v: Tensors, batched: bool) -> Tensors:
        """One batch's product."""


class Hessian(Curvature):
    """H = ∂²L/∂θ². By differentiating the gradient, whose graph is kept (Pearlmutter 1994)."""

    def _term_product(self, at: Linearised, v: Tensors, batched: bool) -> Tensors:
        return at.hessian(v, batched)


class GaussNewton(Curvature):
    """G = Jᵀ B J: J the Jacobian of the model's outputs, B the Hessian of the loss in them.

    Of a closure, ``(loss, outputs)`` has to be returned. Where the outputs have ``.logits`` these are meant.
    Source: Schraudolph 2002.
    """

    def _term_product(self, at: Linearised, v: Tensors, batched: bool) -> Tensors:
        return at.vjp(at.loss_hessian(at.jvp(v, batched), batched), batched)


class Residual(Curvature):
    """S = H - G: what the curvature of the model itself adds to the Gauss-Newton matrix, by subtracted products."""

    def _term_product(self, at: Linearised, v: Tensors, batched: bool) -> Tensors:
        g = at.vjp(at.loss_hessian(at.jvp(v, batched), batched), batched)
        return [h - g for h, g in zip(at.hessian(v, batched), g, strict=True)]


class BySample(Curvature):
    """Σ_n J_nᵀ (Σᵥ S_nᵥ S_nᵥᵀ) J_n: samples n are the entries of the outputs' leading dimension."""

    by_sample = True

    @classmethod
    def of(cls, closure: Callable[[], Any], parameters: Any, **options: Any) -> Curvature:
        """Not possible: a closure does not say how its loss adds up samples."""
        raise CurvatureError(f"{cls.__name__} needs model, loss and data: a closure does not tell samples apart")

    @abstractmethod
    def _columns(self, at: Linearised) -> list[Tensor]:
        """S for every output tensor, ``[V, N, ...]``."""

    def _term_product(self, at: Linearised, v: Tensors, batched: bool) -> Tensors:
        s = at.remembered(self._columns)
        z = at.jvp(v, batched)
        dots = sum(
            torch.einsum("vnd,knd->kvn", c.flatten(2), t.reshape(-1, *c.shape[1:]).flatten(2))
            for c, t in zip(s, z, strict=True)
        )
        u = [torch.einsum("kvn,vnd->knd", dots, c.flatten(2)).view(t.shape) for c, t in zip(s, z, strict=True)]
        return at.vjp(u, batched)


class EmpiricalFisher(BySample):
    """E = (1/W) Σ_n ∇ℓ_n ∇ℓ_nᵀ, ℓ_n the n-th sample's term of the summed loss; W its mean's divisor, 1 for a sum.

    Samples are the entries of the outputs' leading dimension.
    """

    def _columns(self, at: Linearised) -> list[Tensor]:
        return [_by_sample(g.detach()).unsqueeze(0) for g in at.output_gradient]


class Fisher(BySample):
    """F = (1/W) Σ_n E[∇ℓ_n ∇ℓ_nᵀ] over targets drawn from the model's own distribution.

    That is Jᵀ B J where the loss is the negative logarithm of a likelihood whose natural parameters are the outputs
    (cross entropy, binary cross entropy of logits, squared error), and the exact Fisher is the Gauss-Newton matrix.

    Args:
        mc_samples: 0: exactly. M: B is replaced by M random outer products a sample, whose mean it is; they stay the
            same for all products of this operator, which needs the data in the same order each time.
        seed: of the draws.
        options: see :class:`Curvature`.
    """

    def __init__(self, model: Any, loss: Any, data: Any, *, mc_samples: int = 0, seed: int = 0, **options: Any):
        self.mc_samples, self.seed = mc_samples, seed
        self.by_sample = mc_samples > 0  # type: ignore[misc]
        super().__init__(model, loss, data, **options)
        if self.by_sample and self.batches.shuffled:
            raise CurvatureError("Fisher: the draws belong to samples, but the DataLoader shuffles; pass shuffle=False")

    def _term_product(self, at: Linearised, v: Tensors, batched: bool) -> Tensors:
        if self.by_sample:
            return super()._term_product(at, v, batched)
        return at.vjp(at.loss_hessian(at.jvp(v, batched), batched), batched)

    def _columns(self, at: Linearised) -> list[Tensor]:
        if len(at.term.outputs) != 1 or at.term.of_outputs is None:
            raise CurvatureError("Fisher(mc_samples=...): the loss must be a function of one output tensor")
        (z,) = at.term.outputs
        return [_by_sample(loss_draws(at.term.of_outputs, z, self.mc_samples, self.seed + at.index), 1)]


def _by_sample(t: Tensor, dim: int = 0) -> Tensor:
    """With a dimension of samples and one of entries at least."""
    return t if t.dim() > dim + 1 else t.unsqueeze(-1)


def chosen(model: Any, only: Any) -> dict[str, Tensor]:
    """The parameters that require a gradient, those selected by ``only``."""
    tensors = trained(named(kept(model)))
    if only is not None:
        selected = selector(model, only)
        tensors = {name: p for name, p in tensors.items() if selected(name, p)}
    if not tensors:
        raise ValueError("operator: no parameter that requires a gradient is selected")
    return tensors


def _norm(tensors: Tensors) -> Any:
    return sum(t.square().sum() for t in tensors) ** 0.5


def split(space: Space, v: Tensor, chunk: int) -> Iterator[tuple[Tensors, bool]]:
    """Columns ``[P, K]`` in the parameters' shapes, ``chunk`` at a time; without a dimension for one alone."""
    for part in v.split(chunk, 1):
        batched = part.shape[1] > 1
        yield space.split(part if batched else part[:, 0]), batched


def flat(tensors: Tensors, batched: bool) -> Tensor:
    """Tensors as one column ``[P, 1]``; ``[K, *shape]`` as columns ``[P, K]``."""
    if batched:
        return torch.cat([t.flatten(1) for t in tensors], 1).mT
    return torch.cat([t.reshape(-1) for t in tensors]).unsqueeze(1)


class Jacobian(OverData):
    """J = ∂z/∂θ ``[Z, P]``, z the model's outputs for all samples of the data, one after the other.

    Args:
        model, parameters, only, keep, memory, progress, check: see :class:`Curvature`.
        data: as there (targets are not used), or one input tensor; batches must come in the same order each time.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        *,
        parameters: Any = None,
        only: Any = None,
        keep: bool | None = None,
        memory: int | None = None,
        progress: bool = False,
        check: bool = True,
    ):
        self._describe(model, data, parameters, only, keep, memory, progress)
        if self.batches.shuffled:
            raise CurvatureError(
                "Jacobian: its rows belong to samples, but the DataLoader shuffles; pass shuffle=False"
            )
        if check and not self.batches.single and batch_normalised(model):
            raise CurvatureError("Jacobian: batch normalisation in training mode; call model.eval(), or give one batch")
        outputs = [self._outputs(batch) for batch in self.batches]
        if check:
            self._check(outputs[0])
        self.shape = (sum(t.numel() for batch in outputs for t in batch), self.space.size)

    def _check(self, first: list[Tensor]) -> None:
        again = self._outputs(next(iter(self.batches)))
        if not all(
            torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True) for a, b in zip(first, again, strict=True)
        ):
            raise CurvatureError("the model is random: two outputs of the first batch differ. Call model.eval()")

    def _outputs(self, batch: Any) -> list[Tensor]:
        with torch.enable_grad(), twice_differentiable(self.model):
            return output_tensors(call(self.model, batch))

    def _term(self, batch: Any) -> Term:
        outputs = self._outputs(batch)
        return Term(sum((z.sum() for z in outputs), start=torch.zeros((), device=self.device)), outputs)

    def _apply(self, v: Tensor) -> Tensor:
        rows = []
        for at in self._linearised():
            parts = [
                flat(at.jvp(vs, batched), batched)
                for vs, batched in split(self.space, v, at.together(v.shape[1], self.memory))
            ]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows)

    def _apply_adjoint(self, v: Tensor) -> Tensor:
        total, start = v.new_zeros(self.shape[1], v.shape[1]), 0
        for at in self._linearised():
            space = Space({str(i): z.shape for i, z in enumerate(at.term.outputs)})
            rows, start = v[start : start + space.size], start + space.size
            parts = [
                flat(at.vjp(us, batched), batched)
                for us, batched in split(space, rows, at.together(v.shape[1], self.memory))
            ]
            total += torch.cat(parts, 1)
        return total
