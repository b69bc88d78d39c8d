"""The whole step as one graph: forward, backward and curvature are traced together and given to torch.compile.

For small models, where launching operations takes longer than carrying them out, such a step with HesScale takes no
longer than an ordinary gradient step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .extend import extend
from .quantities import Quantity, WholeGraph


def compile_step(
    model: nn.Module,
    loss: Callable[..., Tensor],
    *quantities: Quantity | WholeGraph,
    backend: str = "inductor",
    **options: Any,
) -> Callable[..., Tensor]:
    """A function that does what ``with extend(model, ...): loss(model, x, y).backward()`` does, compiled.

        step = compile_step(model, lambda model, x, y: cross_entropy(model(x), y), HesScale())
        value = step(x, y)              # then p.grad and p.hesscale, as after a block

    The first call for inputs of new shapes or dtypes, for another training mode, and for other frozen parts traces
    and compiles, which takes seconds to a minute; control flow that depends on values is frozen as it was then.
    Gradients add up in ``p.grad`` as always; curvature is that of the last call.

    Args:
        model: the model.
        loss: called with the model and the step's arguments, returns a scalar.
        quantities: as for ``extend``.
        backend: of ``torch.compile``.
        options: as for ``extend``.

    Returns:
        The step: called with tensors, returns the loss, detached.
    """
    compiled: dict[Hashable, Callable[..., Any]] = {}
    root = _Loss(model, loss)

    def step(*inputs: Tensor) -> Tensor:
        tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        key = _key(root, tensors, inputs)
        with torch.no_grad():
            if key not in compiled:
                compiled[key] = torch.compile(_traced(root, tensors, inputs, quantities, options), backend=backend)
            value, gradients, results = compiled[key](list(tensors.values()), *inputs)
        for name, gradient in gradients.items():
            p = tensors[name]
            p.grad = gradient if p.grad is None else p.grad + gradient
        for field, of_names in results.items():
            for name, p in tensors.items():
                p.__dict__.pop(field, None)
                if name in of_names:
                    setattr(p, field, of_names[name])
        return value

    return step


class _Loss(nn.Module):
    """A loss as a module, so that the model's tensors can be replaced for one call."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.loss(self.model, *inputs)


def _key(root: nn.Module, tensors: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Hashable:
    every = [(t.shape, t.dtype, t.device, t.requires_grad) for t in (*tensors.values(), *inputs)]
    return (*every, *[module.training for module in root.modules()])


def _traced(
    root: nn.Module, tensors: dict[str, Tensor], inputs: tuple[Tensor, ...], quantities: Any, options: Any
) -> Any:
    names, trained = list(tensors), [t.requires_grad for t in tensors.values()]

    def whole(values: list[Tensor], *inputs: Tensor) -> Any:
        values = [v.detach().requires_grad_() if train else v for v, train in zip(values, trained, strict=True)]
        named = dict(zip(names, values, strict=True))
        with torch.enable_grad(), extend(named, *quantities, **options) as curvature:
            value = torch.func.functional_call(root, named, inputs)
            value.backward()
        gradients = {name: v.grad for name, v in named.items() if v.requires_grad and v.grad is not None}
        return value.detach(), gradients, {field: dict(curvature[field]) for field in curvature}

    # copies, as tracing carries the step out: running statistics must not move
    return make_fx(whole)([t.detach().clone() for t in tensors.values()], *inputs)
