"""Batches, and the loss over all of them as one sum: L = (1/W) Σ_b ℓ_b, W = Σ_b w_b.

ℓ_b is the batch's loss with ``reduction="sum"`` and w_b what its mean divides by, so that the loss over any split of
the data into batches is the loss over all of it at once. For cross entropy of class indices w_b is the sum of the class
weights of the targets that are not ignored; for every other loss of PyTorch the number of its terms.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import CurvatureError
from ..progress import shown
from .convolution import Convolutions

CLASSIFICATION = (F.cross_entropy, F.nll_loss)


@dataclass(frozen=True)
class Term:
    """What one batch adds.

    Attributes:
        value: ℓ_b.
        outputs: the model's output tensors.
        weight: w_b; ``None``: W = 1.
        of_outputs: ℓ_b as a function of the one output tensor, where it can be evaluated again.
    """

    value: Tensor
    outputs: list[Tensor]
    weight: Tensor | float | None = None
    of_outputs: Callable[[Tensor], Tensor] | None = None


def is_batch(data: Any) -> bool:
    """Whether ``data`` is one batch: a mapping, or ``(input, target)`` with a tensor (or None) as one of them."""
    if isinstance(data, (Mapping, Tensor)):
        return True
    pair = isinstance(data, (tuple, list)) and len(data) == 2
    return pair and (isinstance(data[0], Tensor) or isinstance(data[1], Tensor) or data[1] is None)


class Batches:
    """One batch, or a re-iterable of batches, moved to the model's device."""

    def __init__(self, data: Any, device: torch.device, progress: bool = False):
        self.single = is_batch(data)
        if not self.single and not isinstance(data, Iterable):
            raise TypeError(f"data: expected a batch (input, target) or an iterable of batches, got {type(data)}")
        if not self.single and iter(data) is data:
            raise TypeError("data: an iterator is used up after one pass; pass a list or a DataLoader")
        self.data, self.device, self.progress = data, device, progress

    def __iter__(self) -> Iterator[Any]:
        empty = True
        for batch in [self.data] if self.single else shown(self.data, self.progress, "batches"):
            empty = False
            yield tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, batch)
        if empty:
            raise CurvatureError("data: there are no batches in it")

    @property
    def tensors(self) -> list[Tensor]:
        """Those of the one batch."""
        return [t for t in tree_leaves(self.data) if isinstance(t, Tensor)] if self.single else []

    @property
    def shuffled(self) -> bool:
        """Whether the order of samples differs between passes."""
        return isinstance(getattr(self.data, "sampler", None), torch.utils.data.RandomSampler)


@contextmanager
def twice_differentiable(model: Any) -> Iterator[None]:
    """Within, kernels that PyTorch cannot differentiate twice (fused attention, cuDNN's recurrence) are not used, and
    convolutions are those of :mod:`curvext.operators.convolution`.
    """
    recurrent = isinstance(model, nn.Module) and any(isinstance(m, nn.RNNBase) for m in model.modules())
    slower = torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext()
    with sdpa_kernel(SDPBackend.MATH), slower, Convolutions():
        yield


def batch_normalised(model: Any) -> list[_BatchNorm]:
    """The modules whose output for a sample depends on the other samples of its batch."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [m for m in modules if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)]


def call(model: Any, batch: Any) -> Any:
    """The model's output for a batch; running statistics are left as they are."""
    inputs = batch if isinstance(batch, Mapping) else batch[0] if isinstance(batch, (tuple, list)) else batch
    args, kwargs = (inputs if isinstance(inputs, (tuple, list)) else (inputs,)), {}
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    moving = {id(buffer) for m in batch_normalised(model) for buffer in m.buffers()}
    if not moving:
        return model(*args, **kwargs)
    copies = {name: b.clone() for name, b in model.named_buffers() if id(b) in moving}
    return torch.func.functional_call(model, copies, tuple(args), kwargs)


def output_tensors(outputs: Any) -> list[Tensor]:
    """The tensors in which the Gauss-Newton matrix splits: the logits where there are some, else all outputs."""
    logits = getattr(outputs, "logits", None)
    outputs = outputs if logits is None else logits
    return [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]


class Objective:
    """The loss of a model on batches, as terms.

    Args:
        model: called with the batch's input (``model(*input)``, ``model(**input)`` for tuples and mappings).
        loss: ``loss(outputs, targets)``, or ``None``: ``model(**batch).loss``. A mapping is its own target.
        reduction: for losses that do not say it themselves: ``"mean"`` or ``"sum"`` over samples.
        count: ``count(batch)``: what the mean divides by; by default the loss's own terms, or the number of samples.
        summed: whether it matters how samples add up: with several batches, and for quantities of samples. If not,
            the loss is taken as it is.
    """

    def __init__(self, model: Any, loss: Any, reduction: str | None, count: Callable[[Any], Any] | None, summed: bool):
        if reduction not in (None, "mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        self.model, self.loss, self.count = model, loss, count
        own = own_reduction(loss) if summed else None
        if own is not None and reduction not in (None, own):
            raise ValueError(f"reduction={reduction!r} was given, but the loss has reduction={own!r}")
        self.own = own is not None and not (count is not None and own == "mean")
        self.reduction = (own or reduction) if summed else None
        if self.reduction is None and summed:
            raise CurvatureError(
                "the loss does not say how it adds up samples, so batches cannot be weighted. Pass reduction='mean' or "
                "'sum'; for a mean over something else than samples (class weights, ignored targets, tokens) also "
                "count=, a function of the batch that gives what the mean divides by"
            )
        if loss is None and self.reduction == "mean" and count is None and summed:
            raise CurvatureError(
                "the model computes its own mean loss, over what is not known. Pass count=, a function of the batch; "
                "for next-token losses: count=lambda batch: (batch['labels'][:, 1:] != -100).sum()"
            )
        if self.own:
            self.summed = reduced(loss, "sum")
            kind = type(loss) if isinstance(loss, nn.Module) else described(loss)[0]
            self.known = kind.__module__.startswith("torch.nn.")

    def term(self, batch: Any) -> Term:
        """One batch's part of the loss."""
        with torch.enable_grad(), twice_differentiable(self.model):
            outputs = call(self.model, batch)
            weight = self._weight(outputs, batch)
            value = self._value(outputs, batch, weight)
        if self.own and not self.known:
            self._verify(outputs, batch, value, weight)
        tensors = output_tensors(outputs)
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError("loss: expected a scalar tensor; losses with reduction='none' are not")
        again = None if self.loss is None else lambda z: self._value(z, batch, weight)
        return Term(value, tensors, weight, again)

    def _value(self, outputs: Any, batch: Any, weight: Any) -> Tensor:
        if self.own:
            return self._loss(self.summed, outputs, batch)
        if weight is not None and not weight:  # the mean over nothing is not a number
            return sum(((0 * z).square().sum() for z in output_tensors(outputs)), start=torch.zeros(()))
        value = outputs.loss if self.loss is None else self._loss(self.loss, outputs, batch)
        return value if weight is None else weight * value  # type: ignore[no-any-return]

    def _weight(self, outputs: Any, batch: Any) -> Any:
        if self.own:
            return self._normaliser(outputs, batch)
        if self.reduction != "mean":
            return None
        return samples(batch) if self.count is None else self.count(batch)

    @staticmethod
    def _loss(loss: Any, outputs: Any, batch: Any) -> Tensor:
        return loss(outputs, batch if isinstance(batch, Mapping) else batch[1])  # type: ignore[no-any-return]

    def _normaliser(self, outputs: Any, batch: Any) -> Any:
        if self.reduction == "sum":
            return None
        if self.reduction == "batchmean":
            return samples(batch)
        function, options = described(self.loss)
        target = None if isinstance(batch, Mapping) else batch[1]
        if function in CLASSIFICATION and isinstance(target, Tensor) and not target.is_floating_point():
            return counted_classes(target, options.get("weight"), options.get("ignore_index", -100))
        with torch.no_grad():
            return self._loss(reduced(self.loss, "none"), outputs, batch).numel()

    def _verify(self, outputs: Any, batch: Any, total: Tensor, weight: Any) -> None:
        """Check that the mean of somebody's loss is its sum over the normaliser."""
        if weight is not None and not weight:
            return
        with torch.no_grad():
            mean = self._loss(self.loss, outputs, batch) * (1 if weight is None else weight)
        if not torch.allclose(total, mean, rtol=torch.finfo(total.dtype).eps ** 0.5, equal_nan=True):
            raise CurvatureError(
                f"{self.loss}: its mean is not its sum divided by the number of its terms, {weight}. Pass count=, a "
                "function of the batch: what the mean divides by"
            )


class Closure:
    """An objective of one term, from a closure that returns the loss, or the loss and the model's outputs."""

    model = None

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def term(self, batch: Any) -> Term:
        """The loss."""
        with torch.enable_grad(), twice_differentiable(None):
            value = self.function()
        value, outputs = value if isinstance(value, (tuple, list)) else (value, ())
        if not isinstance(value, Tensor) or value.dim():
            raise ValueError("closure: expected a scalar tensor, or one and the model's outputs")
        return Term(value, output_tensors(outputs))


def described(loss: Any) -> tuple[Any, dict[str, Any]]:
    """The function of ``torch.nn.functional`` that a loss is, and its options."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return F.cross_entropy, {"weight": loss.weight, "ignore_index": loss.ignore_index}
    if isinstance(loss, nn.NLLLoss):
        return F.nll_loss, {"weight": loss.weight, "ignore_index": loss.ignore_index}
    return (loss.func, loss.keywords) if isinstance(loss, functools.partial) else (loss, {})


def own_reduction(loss: Any) -> str | None:
    """The reduction that a loss carries itself: a module's attribute, or a function's argument."""
    if isinstance(loss, nn.Module):
        own = getattr(loss, "reduction", None)
    else:
        function, options = described(loss)
        try:
            argument = inspect.signature(function).parameters.get("reduction")
        except (TypeError, ValueError):
            return None
        own = None if argument is None else options.get("reduction", argument.default)
    if own is not None and own not in ("mean", "sum", "batchmean"):
        raise ValueError(f"loss: its reduction is {own!r}; curvature needs 'mean' or 'sum'")
    return own


def reduced(loss: Any, reduction: str) -> Any:
    """The loss with another reduction; what was given stays as it is."""
    if not isinstance(loss, nn.Module):
        return functools.partial(loss, reduction=reduction)
    loss = copy.copy(loss)
    loss.reduction = reduction
    return loss


def counted_classes(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    """Σ of the weights of the targets that are not ignored."""
    kept = target[target != ignored]
    return torch.tensor(kept.numel()) if weight is None else weight[kept].sum()


def samples(batch: Any) -> int:
    """The number of samples: of targets if these are a tensor, else of the first tensor."""
    if not isinstance(batch, Mapping) and isinstance(batch, (tuple, list)) and isinstance(batch[1], Tensor):
        return len(batch[1])
    return len(next(t for t in tree_leaves(batch) if isinstance(t, Tensor)))
