"""The table of rules: the one list from which dispatch, tests, error texts and docs/support.md derive.

A rule passes a wave from an operation's outputs to its inputs. For the diagonal wave it is called as
``rule(op, g, h)`` with ``g = ∂L/∂y`` and ``h ≈ diag ∂²L/∂y²`` at the output, and returns

    h_x = (J∘J)ᵀ h + diag(Σₖ gₖ ∂²yₖ/∂x²)                                   (2)

for every input (``None`` where it is zero or not needed; a bare tensor stands for the first input only).
``h is None`` means a zero wave; ``g is None`` means that the second term is to be left out. With
``outputs="all"`` both are tuples over the outputs; otherwise they belong to output 0.
Entries of a broadcast input may be left unsummed: the sweep sums them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .graph import Operation

F = TypeVar("F", bound=Callable[..., Any])

#: What an operation does with entries. Of rules of the wave "samples": ``"aligned"``, an entry of y depends on one of
#: each input, with broadcasting; ``"reshaped"``, entries keep their order; ``"moved"``, dimensions change places.
#: Of diagonal rules: ``"copies"``, an entry of y is a copy of at most one of x.
Layout = Literal["aligned", "reshaped", "moved", "copies", ""]


@dataclass(frozen=True)
class Rule:
    """A rule with what the registry knows about it."""

    function: Callable[..., Any]
    how: str  # closed form | structure | decomposed | refused
    outputs: str = "first"  # or "all"
    coincident: bool = False  # right also when one tensor enters the operation twice
    linear: bool | Callable[[Operation], bool] = False  # in each of the inputs, unless one tensor enters twice
    additive: bool | Callable[[Operation], bool] = False  # in all inputs together: J is piecewise constant
    separable: bool = False  # each entry of y depends on one entry of x, so that the Hessian of ⟨g, y⟩ is diagonal
    layout: Layout = ""
    doc: str = ""
    family: str = ""  # the file that registered it

    def __call__(self, op: Operation, g: Any, h: Any) -> Any:
        return self.function(op, g, h)

    def is_linear(self, op: Operation) -> bool:
        """Whether it is linear in each of its inputs."""
        return self.linear(op) if callable(self.linear) else self.linear

    def is_additive(self, op: Operation) -> bool:
        """Whether it is linear in all of its inputs together."""
        return self.additive(op) if callable(self.additive) else self.additive


RULES: dict[tuple[Any, str], Rule] = {}


def rule(
    *operations: Any,
    wave: str = "diagonal",
    how: str = "closed form",
    outputs: str = "first",
    coincident: bool = False,
    linear: bool | Callable[[Operation], bool] = False,
    additive: bool | Callable[[Operation], bool] = False,
    separable: bool = False,
    layout: Layout = "",
) -> Callable[[F], F]:
    """Register the decorated function for autograd nodes, by name, or for ``autograd.Function`` classes.

    Args:
        operations: names of autograd nodes (``"TanhBackward0"``) or subclasses of ``torch.autograd.Function``.
        wave: what the rule passes on, ``"diagonal"`` or a variant of it such as ``"bl89"``; ``"complex"`` is the
            diagonal wave of operations with complex inputs or outputs, which no other rule is asked for; ``"any"``
            refuses them all, before the backward pass.
        how: ``"closed form"``, ``"structure"`` (exact from the node's own derivatives, because of a declared
            structure), ``"decomposed"`` (a fused kernel: equation (2) is applied to each of its steps), or
            ``"refused"`` (the function raises).
        outputs: ``"first"`` or ``"all"``.
        coincident: whether the rule is right when one tensor enters twice; else the default is used there.
        linear: promise that y is linear in each of the inputs (piecewise, and unless one tensor enters twice), or a
            function that tells when it is; ``g`` is not used then, and the operation needs no hook.
        additive: promise that J is piecewise constant in all inputs together, not only in each of them, or a function
            that tells when it is.
        separable: promise that, of one input alone, the Hessian of ⟨g, y⟩ is diagonal, hence the second term of (2).
        layout: promise of what becomes of entries; see :data:`Layout`.

    Raises:
        ValueError: if one of the operations has a rule already.
    """

    family = _caller()

    def register(function: F) -> F:
        doc = (function.__doc__ or "").strip().split("\n")[0]
        for operation in operations:
            if (operation, wave) in RULES:
                raise ValueError(f"{operation} already has a rule for the {wave} wave; use curvext.unregister first")
            RULES[operation, wave] = Rule(
                function, how, outputs, coincident, linear, additive, separable, layout, doc, family
            )
        return function

    return register


def _caller() -> str:
    """The module whose row registers a rule, looking past the constructors of rules/structure.py."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals["__name__"].endswith((".structure", ".registry")):
        frame = frame.f_back
    return str(frame.f_globals["__name__"]).rsplit(".", 1)[-1]


def unregister(operation: Any, wave: str = "diagonal") -> Rule:
    """Remove a rule and return it; the default takes its place."""
    return RULES.pop((operation, wave))


def find(op: Operation, *waves: str) -> Rule | None:
    """The rule of the first of ``waves`` that has one for this operation."""
    for wave in waves:  # the class of a Python function, or its name: torch.compile makes a class for every graph
        found = RULES.get((op.kind, wave))
        if found is None and op.is_python:
            found = RULES.get((op.name, wave))
        if found is not None:
            return found
    return None


def laid_out(op: Operation, *layouts: Layout) -> bool:
    """Whether the operation's entries are ``"aligned"``, ``"reshaped"`` or ``"moved"``, where samples are followed."""
    found = find(op, "samples")
    return found is not None and found.layout in layouts


def find_diagonal(op: Operation, *variants: str) -> Rule | None:
    """The rule by which the diagonal wave, or one of ``variants`` of it, passes this operation."""
    found = find(op, "complex") if op.is_complex else find(op, *variants, "diagonal")
    return None if found is None or (op.coincident and not found.coincident) else found


def registered(wave: str = "diagonal") -> Iterator[tuple[Any, Rule]]:
    """All operations with a rule, in order of registration."""
    return ((operation, entry) for (operation, kind), entry in RULES.items() if kind == wave)
