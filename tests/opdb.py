"""PyTorch's own operator samples as cases: the graph that each operator records."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvext import registry
from curvext.graph import Operation, edge_of, operations
from curvext.sweep import Settings
from curvext.testing import EXACT

SAMPLES = 2  # of each operator, evenly chosen from the samples that are small enough
MOST_ENTRIES = 450  # larger samples would be slow to enumerate


@dataclass
class Recorded:
    """A sample: the function of its leaves, and the operations it recorded."""

    function: Callable[..., list[Tensor]]
    leaves: list[Tensor]
    operations: list[Operation]


def differentiable() -> list[Any]:
    """The entries of op_db that differentiate float64 samples."""
    return [op for op in op_db if op.supports_autograd and op.supports_dtype(torch.float64, "cpu")]


def label(op: Any) -> str:
    """Name and variant of an entry."""
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def recorded(op: Any) -> Iterator[Recorded]:
    """Some of the entry's samples, every floating input a leaf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the samples' own, about deprecated arguments
        torch.manual_seed(0)
        small = [
            s for s in op.sample_inputs("cpu", torch.float64, requires_grad=True) if 0 < _entries(s) < MOST_ENTRIES
        ]
        taken = 0
        for sample in small[:: max(1, len(small) // SAMPLES)]:
            found = _record(op, sample)
            if found is not None and taken < SAMPLES:
                taken += 1
                yield found


def _record(op: Any, sample: Any) -> Recorded | None:
    flat, spec = tree_flatten((sample.input, sample.args, sample.kwargs))
    where = [k for k, t in enumerate(flat) if _leaf(t)]

    def function(*leaves: Tensor) -> list[Tensor]:
        values = list(flat)
        for k, leaf in zip(where, leaves, strict=True):
            values[k] = leaf
        given, args, kwargs = tree_unflatten(values, spec)
        return [t for t in tree_flatten(op(given, *args, **kwargs))[0] if isinstance(t, Tensor) and t.requires_grad]

    leaves = [flat[k].detach().clone().requires_grad_() for k in where]
    ys = function(*leaves)
    targets = {edge_of(t): i for i, t in enumerate(leaves)}
    found = operations([edge_of(y)[0] for y in ys], targets, Settings(EXACT))
    large = any(
        meta.shape is None or torch.Size(meta.shape).numel() > MOST_ENTRIES for o in found for meta in o.outputs
    )
    return None if large or not found else Recorded(function, leaves, found)


def _entries(sample: Any) -> int:
    leaves = [t for t in tree_flatten((sample.input, sample.args, sample.kwargs))[0] if _leaf(t)]
    return max((t.numel() for t in leaves), default=0)


def _leaf(t: Any) -> bool:
    return isinstance(t, Tensor) and t.requires_grad and t.layout is torch.strided


def needs_default(op: Operation) -> bool:
    """Whether the default applies: no rule, or one tensor enters twice and the rule does not say it is right then."""
    return registry.find_diagonal(op) is None
