"""The contract of optimizers that look at the loss several times a step: a closure, a state, a report."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from .batches import Subsample
from .checked import CheckedOptimizer
from .objective import Closure, Objective
from .search import Report

Damping = Callable[..., float]  # LevenbergMarquardt, Constant, or your own


class ClosureOptimizer(CheckedOptimizer):
    """An optimizer whose ``step(closure)`` evaluates the closure several times.

    The closure returns the loss, or ``(loss, outputs)`` where the Gauss-Newton matrix is split at the model's outputs,
    and calls no ``backward``. It must give the same loss each time it is called at the same parameters. The objective
    of a step is the loss plus ``½ weight_decay ‖p‖²`` of every group; ``maximize`` negates the loss. ``lr`` scales what
    a group's parameters are moved by. After a step, :attr:`report` says what it did. A step that finds nothing lower
    leaves the parameters as they were, bit by bit, and so does one that raises.

    ``curvature_batch=Subsample(...)`` takes the curvature from some of the data at a time: then the closure takes the
    rows to use, ``closure(rows=slice(None))``.

    ``lr`` and ``weight_decay`` belong to groups. What an optimizer has to remember is in its ``state_dict()``; how it
    is set up (line search, damping rule, number of products) is not, as it comes from the constructor.

    Subclasses give ``_step(objective)``, which moves the parameters and returns a :class:`Report`. Numbers that are
    carried from step to step belong into ``self.carried``, tensors shaped like parameters into ``self.state[p]`` (see
    :meth:`recall` and :meth:`remember`): both survive ``state_dict()``. Public attributes survive copies and pickling.
    """

    second_order = True  # whether the optimizer takes a curvature_closure
    damping: Any = None  # a rule, where there is one

    def __init__(self, params: Any, defaults: dict[str, Any], curvature_batch: Subsample | None = None):
        defaults = {"lr": 1.0, "weight_decay": 0.0, "maximize": False, **defaults}
        super().__init__(params, defaults)
        self.curvature_batch = curvature_batch
        self.report: Report | None = None

    @property
    def carried(self) -> dict[str, Any]:
        """Numbers that belong to all groups, kept in the first."""
        return self.param_groups[0].setdefault("carried", {})  # type: ignore[no-any-return]

    @property
    def _strength(self) -> float:
        """The damping of this step: what the last one has left, or where the rule begins; none without a rule."""
        if self.damping is None:
            return 0.0
        return self.carried.get("damping", getattr(self.damping, "first", 0.0))  # type: ignore[no-any-return]

    @torch.no_grad()
    def step(self, closure: Closure | None = None, curvature_closure: Closure | None = None) -> Any:  # type: ignore[override]
        """One step; returns the loss before it.

        Args:
            closure: gives the loss that is made smaller.
            curvature_closure: gives the loss whose curvature is used, on other (fewer, or more) data.

        Raises:
            CurvatureError: if there is no closure, it is not deterministic or calls ``backward``, or its loss or
                gradient is not finite.
        """
        if closure is None:
            raise CurvatureError(f"{type(self).__name__}.step needs a closure that returns the loss")
        if curvature_closure is not None and not self.second_order:
            raise TypeError(f"{type(self).__name__} uses no curvature, and so no curvature_closure")
        self.param_groups[0]["carried"] = dict(self.carried)  # an earlier state_dict() keeps its own
        if self.curvature_batch is not None:
            curvature_closure = self._of_rows(self.curvature_batch, closure, curvature_closure)
        objective = Objective(self, closure, curvature_closure)
        try:
            if not self.carried.get("checked"):
                objective.check()
                self.carried["checked"] = True
            self.report = self._step(objective)
        except BaseException:
            objective.move(None)
            raise
        return objective.loss

    def _of_rows(self, batch: Subsample, closure: Callable[..., Any], other: Closure | None) -> Closure:
        """The closure on this step's samples."""
        if other is not None:
            raise TypeError(f"{type(self).__name__} has a curvature_batch, and so takes no curvature_closure")
        step = self.carried["batches"] = self.carried.get("batches", -1) + 1
        rows = batch.rows(step)
        try:
            signature(closure).bind(rows)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}: curvature_batch needs a closure that takes the rows to use, as "
                "closure(rows=slice(None)) does"
            ) from error
        return partial(closure, rows)

    def _step(self, objective: Objective) -> Report:
        raise NotImplementedError

    def recall(self, name: str, objective: Objective) -> Tensor | None:
        """A flat vector ``[P]``, or rows ``[..., P]``, remembered under a name; ``None`` if a parameter has none."""
        rows: list[Tensor] = []
        for p in objective.parameters:
            v = self.state[p].get(name)
            if v is None or (rows and v.shape[: v.dim() - p.dim()] != rows[0].shape[:-1]):
                return None
            rows.append(v.reshape(*v.shape[: v.dim() - p.dim()], p.numel()))
        return torch.cat(rows, -1)

    def remember(self, name: str, value: Tensor, objective: Objective) -> None:
        """Keep a flat vector or rows, in the parameters' states; those that are frozen by now lose theirs."""
        self.forget(name)
        for p, piece in zip(objective.parameters, objective.split(value), strict=True):
            self.state[p] = {**self.state[p], name: piece.clone()}

    def forget(self, name: str) -> None:
        """Drop what was remembered under a name."""
        for p, state in self.state.items():
            self.state[p] = {k: v for k, v in state.items() if k != name}
