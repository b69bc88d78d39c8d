"""What ``extend`` was given: tensors and their names, quantities, and which quantity is for which tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .errors import CurvatureError
from .quantities.base import Quantity, Saved, Selected, WholeGraph

Model = nn.Module | Mapping[str, Tensor] | Iterable[Tensor] | Tensor


def kept(model: Model) -> Any:
    """The model in a form that can be read again for every block."""
    if isinstance(model, (nn.Module, Mapping, Tensor)):
        return model
    if isinstance(model, Iterable):
        return list(model)
    raise TypeError(f"extend: expected a module, a mapping or an iterable of tensors, got {type(model).__name__}")


def named(model: Any) -> dict[str, Tensor]:
    """Every tensor of the model by name; a tensor with two names is listed under the first."""
    if isinstance(model, nn.Module):
        return dict(model.named_parameters())
    if isinstance(model, Tensor):
        return {"0": model}
    return dict(model) if isinstance(model, Mapping) else {str(i): tensor for i, tensor in enumerate(model)}


def trained(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the named tensors that require a gradient."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"extend: expected a tensor for {name!r}, got {type(tensor).__name__}")
        if tensor.is_complex() and tensor.requires_grad:
            raise CurvatureError(
                f"extend: parameter {name!r} is complex ({tensor.dtype}); its curvature is not one number an entry. "
                "Use a real parameter and torch.view_as_complex."
            )
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def checked(quantities: Sequence[Any], only: Any = None) -> list[Selected]:
    """The quantities, each with its selection; a field name may occur twice only where selections keep them apart."""
    found: list[Selected] = []
    for given in quantities:
        entry = given if isinstance(given, Selected) else Selected(given, ())
        quantity = entry.quantity
        if not isinstance(quantity, (Quantity, WholeGraph)):
            what = quantity.__name__ if isinstance(quantity, type) else repr(quantity)
            hint = f"; write {what}()" if isinstance(quantity, type) else ""
            raise TypeError(f"extend: expected quantities such as HesScale(), got {what}{hint}")
        for other in found:
            if other.quantity.savefield == quantity.savefield and not (other.where and entry.where):
                raise ValueError(f"extend: two quantities would be saved as {quantity.savefield!r}")
        found.append(entry)
    return found


def selector(model: Any, where: Any) -> Callable[[str, Tensor], bool]:
    """Whether a tensor is selected by any of ``where``: a glob over names, a module or a class of them, a predicate."""
    where = where if isinstance(where, (tuple, list)) else (where,)
    types = tuple(w for w in where if isinstance(w, type))
    modules = [w for w in where if isinstance(w, nn.Module)]
    globs = [w for w in where if isinstance(w, str)]
    tests = [w for w in where if not isinstance(w, (type, str, nn.Module))]
    if types:
        if not isinstance(model, nn.Module):
            raise TypeError("extend: selecting by module class needs a module to look for it in")
        modules += [m for m in model.modules() if isinstance(m, types)]
    inside = {id(p) for m in modules for p in m.parameters()}

    def selected(name: str, tensor: Tensor) -> bool:
        return id(tensor) in inside or any(matches(name, g) for g in globs) or any(t(name, tensor) for t in tests)

    return selected


def matches(name: str, glob: str) -> bool:
    """``"fc1"`` stands for all below it, as ``"fc1.*"``."""
    return fnmatchcase(name, glob) or fnmatchcase(name, glob + ".*")


def assigned(
    model: Any, entries: Sequence[Selected], tensors: Mapping[str, Tensor], only: Any = None
) -> dict[str, list[Saved]]:
    """The quantities of every selected tensor, by name.

    Raises:
        ValueError: if two quantities of the same field name select one tensor, or one selects nothing.
    """
    if only is None and not any([entry.where for entry in entries]):  # the usual case, at every step
        every: list[Saved] = [entry.quantity for entry in entries]
        return dict.fromkeys(tensors, every)
    everywhere = None if only is None else selector(model, only)
    chosen = [(entry.quantity, selector(model, entry.where) if entry.where else None) for entry in entries]
    found: dict[str, list[Saved]] = {}
    used: set[int] = set()
    for name, tensor in tensors.items():
        if everywhere is not None and not everywhere(name, tensor):
            continue
        mine = [k for k, (_, test) in enumerate(chosen) if test is None or test(name, tensor)]
        here = [chosen[k][0] for k in mine]
        fields = [quantity.savefield for quantity in here]
        if len(set(fields)) < len(fields):
            raise ValueError(f"extend: two quantities saved as {sorted(fields)} select {name!r}")
        if here:
            found[name] = here
        used.update(mine)
    idle = [type(quantity).__name__ for k, (quantity, _) in enumerate(chosen) if k not in used]
    if tensors and idle:
        raise ValueError(
            f"extend: the selection of {', '.join(idle)} matches none of the {len(tensors)} tensors, such as "
            f"{next(iter(tensors))!r}"
        )
    return found
