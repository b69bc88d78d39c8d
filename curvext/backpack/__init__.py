"""BackPACK's verbs and names: moving over is ``from curvext.backpack import backpack, extend``.

    model, lossfunc = extend(model), extend(lossfunc)
    loss = lossfunc(model(x), y)
    with backpack(BatchGrad(), KFAC()):
        loss.backward()

:func:`extend` only remembers modules, so that the block knows whose parameters to serve; the model may be of any kind.
docs/backpack.md says what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import extend as block
from ..errors import CurvatureError
from ..graph import Graph
from . import extensions as extensions

__all__ = ["backpack", "disable", "extend", "extensions", "memory_cleanup"]

_extended: WeakKeyDictionary[nn.Module, None] = WeakKeyDictionary()  # in the order of extension


def extend(module: nn.Module, debug: bool = False, use_converter: bool = False) -> nn.Module:
    """Ask for the quantities of this module's parameters in every :class:`backpack` block; returns the module itself.

    Args:
        module: a model, a part of one, or a loss function; nothing is changed in it.
        debug: print what is extended.
        use_converter: not needed: any module is served as it is.

    Raises:
        TypeError: if it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"extend: expected a torch.nn.Module, got {type(module).__name__}")
    if debug:
        print("[DEBUG] Extending", module)
    _extended[module] = None
    return module


class backpack(TorchFunctionMode):
    """A block in which ``loss.backward()`` leaves quantities on the parameters of extended modules.

    Every backward pass starts afresh: results replace those of the one before.

    Args:
        extensions: what to compute, instances: those of :mod:`curvext.backpack.extensions` or any other quantity.
        extension_hook: called with every module that has parameters, as soon as the quantities of all of them are
            there; what it deletes from them is freed.
        debug: print what is computed.
        retain_graph: not needed; say it to ``backward()`` only.

    Raises:
        TypeError, ValueError: if an extension is of the wrong kind, or two would be saved under one name.
        CurvatureError: as :class:`curvext.extend`, if the loss reaches no parameter of an extended module, and of
            ``backward(create_graph=True)``: results cannot be differentiated.
    """

    def __init__(
        self,
        *extensions: Any,
        extension_hook: Callable[[nn.Module], object] | None = None,
        debug: bool = False,
        retain_graph: bool = False,
    ):
        super().__init__()
        self.extensions, self.hook, self.debug, self.seen = extensions, extension_hook, debug, False
        block(nn.ModuleList(), *extensions)  # says what is wrong with them

    def __enter__(self) -> None:  # type: ignore[override]
        self.seen = not self.extensions
        super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and not self.seen:
            raise CurvatureError(
                "backpack: no loss.backward() ran inside the block, so nothing was computed "
                "(torch.autograd.backward and torch.autograd.grad are not seen)"
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.backward and self.extensions:
            return self._backward(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        self.seen = True
        if create_graph:
            raise CurvatureError(
                "backpack: results cannot be differentiated, so create_graph=True is refused; in a block of "
                "curvext.extend(model, ...) the gradients alone can be"
            )
        modules, leaves = _reached(loss)
        hook = None if self.hook is None else _by_module(self.hook, modules, leaves, inputs)
        with block(
            modules[0] if len(modules) == 1 else nn.ModuleList(modules), *self.extensions, extension_hook=hook
        ) as curvature:
            loss.backward(gradient, retain_graph, inputs=inputs)
        if self.debug:
            print("[DEBUG] Computed", curvature)


class disable:
    """A block without effect: nothing is stored during the forward pass, so there is nothing to switch off."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    @staticmethod
    def should_store_io() -> bool:
        """Never."""
        return False


def memory_cleanup(module: nn.Module) -> None:
    """Without effect: forward passes leave nothing on modules."""


def _reached(loss: Tensor) -> tuple[list[nn.Module], set[int]]:
    """Extended modules with a parameter that the loss depends on, and the identities of all leaves it depends on."""
    leaves = set(Graph([loss.grad_fn]).leaves) if loss.grad_fn is not None else {id(loss)}
    modules = [module for module in list(_extended) if any(id(p) in leaves for p in module.parameters())]
    if not modules:
        raise CurvatureError(
            "backpack: the loss depends on no parameter of an extended module; call extend(model) on the model it was "
            "computed with (a copy of an extended model is not extended)"
        )
    return modules, leaves


def _by_module(
    hook: Callable[[nn.Module], object], modules: list[nn.Module], leaves: set[int], inputs: Any
) -> Callable[[Tensor], None]:
    """A hook for parameters that calls one for modules, each when the last of its own parameters is ready."""
    if inputs is not None:
        leaves = leaves & {id(t) for t in ([inputs] if isinstance(inputs, Tensor) else inputs)}
    every = {id(m): m for module in modules for m in module.modules()}.values()
    waiting = {m: {id(p) for p in m.parameters(recurse=False)} & leaves for m in every}

    def ready(parameter: Tensor) -> None:
        for module, left in waiting.items():
            if id(parameter) in left:
                left.remove(id(parameter))
                if not left:
                    hook(module)

    return ready
