"""Where the samples of inputs are said to be, against the Jacobian, for the operations of PyTorch's operator samples.

An input said to hold the samples along an axis may only feed outputs of the same sample, entry by entry. An input said
to be shared (``None``) is always right.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from curvext import CurvatureError, registry
from curvext.axes import Axis, labels
from curvext.samples import probe

from .opdb import differentiable, label, recorded

# the samples warn about deprecated arguments
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

AMBIGUOUS = {"linalg.eig", "linalg.eigvals"}  # their backward refuses one output's gradient alone
MOST_SAMPLES, MOST_ENTRIES = 3, 40


def feeds(op, k):
    """By needed input: which of its entries change which entry of output k, ``[K, *shape]``."""
    meta, rows = op.outputs[k], {}
    if not (meta.dtype.is_floating_point or meta.dtype.is_complex):
        return {}
    for entry in torch.eye(torch.Size(meta.shape).numel()).to(meta.dtype):
        given = [entry.view(meta.shape) if j == k else None for j in range(len(op.outputs))]
        for i, row in enumerate(op.vjp(*given)):
            if op.needs[i] and row is not None:
                rows.setdefault(i, []).append(op.reduced(row, i).abs().nan_to_num(0))
    found = {i: torch.stack(of_input) for i, of_input in rows.items()}
    return {i: size > 1e-12 * size.amax(0, keepdim=True) for i, size in found.items() if size.numel()}


def axes(shape) -> Iterator[tuple[Axis, int]]:
    """Every way in which a tensor may hold two or more samples."""
    for dim, size in enumerate(shape):
        for n in range(2, min(size, MOST_SAMPLES) + 1):
            if size % n == 0:
                yield from ((Axis(dim, inner), n) for inner in range(1, size // n + 1) if size // n % inner == 0)


def said(op, out, n):
    rule = registry.find(op, "samples")
    try:
        return probe(op, out, n) if rule is None else rule.function(op, out, n)
    except CurvatureError:  # samples that meet here are refused
        return [None] * len(op.edges)


def check(op):
    """One output at a time holds the samples, then all that can."""
    shapes = [meta.shape for meta in op.outputs]
    fed = {k: feeds(op, k) for k in range(len(shapes)) if shapes[k]}
    for k, shape in enumerate(shapes):
        for axis, n in axes(shape):
            fits = [len(s) > axis.dim and s[axis.dim] == shape[axis.dim] for s in shapes]
            for held in ([j == k for j in range(len(shapes))], fits):
                states = said(op, [axis if h else None for h in held], n)
                for j in fed:
                    if held[j]:
                        right(op, fed[j], labels(shapes[j], axis, n).expand(shapes[j]), states, n, axis)


def right(op, fed, of_output, states, n, axis):
    for i, feeding in fed.items():
        if states[i] is not None:
            place = f"{op.name}, output {tuple(of_output.shape)} along {axis} of {n}, input {i} along {states[i]}"
            shape = op.inputs[i].shape
            assert shape[states[i].dim] % (n * states[i].inner) == 0, place
            other = labels(shape, states[i], n).expand(shape).unsqueeze(0) != of_output.reshape(-1, *[1] * len(shape))
            assert not (feeding & other).any(), place


@pytest.mark.parametrize("op", [pytest.param(op, id=label(op)) for op in differentiable()])
def test_operator(op):
    for sample in recorded(op):
        if label(op) in AMBIGUOUS:
            continue
        for operation in sample.operations:
            if all(torch.Size(meta.shape).numel() <= MOST_ENTRIES for meta in operation.outputs):
                check(operation)
