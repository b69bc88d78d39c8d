"""The default: equation (2) for any differentiable operation, from its autograd node alone.

Calling a node is its vector-Jacobian product; with grad mode on, the result can be differentiated once more with
respect to the node's inputs. Small operations are enumerated (exact), large ones probed with random signs
(unbiased: Bekas, Kokiopoulou & Saad 2007). This is the oracle every rule is tested against.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from ..errors import CurvatureError, SampledOperationWarning
from ..graph import Operation

Waves = list[Tensor | None]
Product = Callable[[Tensor], list[Tensor]]
CHUNK = 64  # rows of an enumeration that are computed together
UNBATCHED = {"CdistBackward0"}  # nodes whose vmap is wrong (in every row but the first, PyTorch 2.13)
MISTAKEN = {"WeightNormInterfaceBackward0"}  # nodes whose second derivative is wrong (the norm is fixed, PyTorch 2.13)


def default(op: Operation, g: Sequence[Tensor | None] | None, h: Sequence[Tensor | None] | None) -> Waves:
    """(J∘J)ᵀ h + diag(Σₖ gₖ ∂²yₖ/∂x²), enumerated or sampled; inputs that are one tensor count as one."""
    waves: Waves = [None] * len(op.edges)
    with _explained(op):
        if h is not None:
            for k, wave in enumerate(h):
                if wave is not None:
                    _accumulate(waves, _squares(op, k, wave))
        if g is not None and any(v is not None for v in g):
            _accumulate(waves, _residual(op, g))
    return waves


def _accumulate(total: Waves, more: Waves) -> None:
    for i, wave in enumerate(more):
        if wave is not None:
            total[i] = wave if total[i] is None else total[i] + wave  # type: ignore[operator]


@contextmanager
def _explained(op: Operation) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        if isinstance(error, CurvatureError):
            raise
        raise CurvatureError(
            f"{op.kind} has no curvature rule and its autograd node cannot be differentiated twice ({error}). "
            "Register a rule for it with curvext.rule (docs/rules.md), or, for a Python autograd.Function, write its "
            "backward with differentiable operations."
        ) from error


def _squares(op: Operation, k: int, h: Tensor) -> Waves:
    """(J∘J)ᵀ h for output k: Σ over rows of J, or the product of two random combinations of them."""
    pairs = h.is_complex()
    h = _as_real(h)

    def vjp(v: Tensor) -> list[Tensor]:
        v = torch.view_as_complex(v) if pairs else v
        rows = op.vjp(*(v if j == k else None for j in range(len(op.outputs))))
        return [_as_real(_merged(op, group, rows)) for group in op.groups]

    if _enumerable(op, h.numel()):
        return _spread(op, _enumerated(vjp, h, _looped if op.kind in UNBATCHED else _batched))
    root, draws = h.abs().sqrt(), op.settings.probes
    estimates = []
    for _ in range(draws):
        v = root * op.settings.signs(h)
        estimates.append([a * b for a, b in zip(vjp(v), vjp(v * h.sgn()), strict=True)])
    return _spread(op, [sum(e) / draws for e in zip(*estimates, strict=True)])


def _enumerated(vjp: Product, h: Tensor, products: Callable[[Product, Tensor], list[Tensor]]) -> list[Tensor]:
    total: list[Any] = []
    for basis, weights in _rows(h):
        squares = [torch.einsum("v,v...->...", weights.to(rows.dtype), rows**2) for rows in products(vjp, basis)]
        total = [a + b for a, b in zip(total, squares, strict=True)] if total else squares
    return total or vjp(h)


def _as_real(x: Tensor) -> Tensor:
    """A complex tensor is a pair of real ones; its wave is (h of the real part) + i (h of the imaginary part)."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _residual(op: Operation, g: Sequence[Tensor | None]) -> Waves:
    """diag(Σₖ gₖ ∂²yₖ/∂x²): the derivative of the node's own backward, everything but one input held fixed."""
    result: list[Tensor | None] = []
    if op.kind in MISTAKEN:
        raise RuntimeError("PyTorch's second derivative of it is wrong")
    with torch.enable_grad():
        outs = op.vjp(*(None if v is None else v.detach().requires_grad_(op.is_python) for v in g))
        for group in op.groups:
            check_differentiable(op, [outs[i] for i in group])
            # summed before differentiating, as one tensor may fill several inputs
            out = _merged(op, group, outs)
            bend = _diagonal(op, group[0], _as_real(out)) if out.requires_grad else None
            # a linear operation leaves no wave, so that the topmost nonlinear one can be told (Gauss-Newton)
            result.append(bend if bend is not None and bool(bend.any()) else None)
    return _spread(op, result)


def check_differentiable(op: Operation, outs: Sequence[Tensor | None]) -> None:
    """A Python backward is linear in g, which requires a gradient here; if what it gives does not, it cut the graph."""
    for out in outs if op.is_python else ():
        if out is not None and (not out.requires_grad or "Error" in _name(out)) and bool(out.any()):
            raise RuntimeError(
                "its backward is not made of differentiable operations, or is marked once_differentiable"
            )


def _name(out: Tensor) -> str:
    return "" if out.grad_fn is None else out.grad_fn.name()


def _diagonal(op: Operation, i: int, out: Tensor) -> Tensor | None:
    """diag ∂out/∂x for input i, of the same shape."""
    edge = GradientEdge(*op.edges[i])

    def product(v: Tensor) -> Tensor | None:
        found = torch.autograd.grad(out, edge, v, retain_graph=True, allow_unused=True)[0]
        return None if found is None else _as_real(found)

    with others_fixed(op, i):
        if not out.numel() or product(torch.zeros_like(out)) is None:
            return None
        if not _enumerable(op, out.numel()):
            draws = op.settings.probes
            signs = [op.settings.signs(out) for _ in range(draws)]
            return sum(v * _dense(product(v), v) for v in signs) / draws  # type: ignore[return-value]
        entries = []
        for basis, _ in _rows(out):
            (rows,) = _batched(lambda v: [_dense(product(v), v)], basis)
            entries.append((basis * rows).reshape(len(basis), -1).sum(1))
        return torch.cat(entries).view(out.shape)


def _dense(product: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if product is None else product


@contextmanager
def others_fixed(op: Operation, i: int) -> Iterator[None]:
    """Within, a derivative with respect to input i ignores paths through the operation's other inputs.

    In ``x * tanh(x)`` the saved ``tanh(x)`` leads back to ``x`` as well; equation (2) holds it fixed.
    """
    task = torch._C._current_graph_task_id()
    blocked: dict[Node, set[int]] = {}
    for node, number in op.edges:
        if node is not None and node.next_functions and (node, number) != op.edges[i]:
            blocked.setdefault(node, set()).add(number)

    def block(numbers: set[int]) -> Callable[..., Any]:
        def hook(grads: Sequence[Tensor | None]) -> Any:
            if torch._C._current_graph_task_id() == task:
                return None
            return tuple(torch.zeros_like(v) if v is not None and k in numbers else v for k, v in enumerate(grads))

        return hook

    handles = [node.register_prehook(block(numbers)) for node, numbers in blocked.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _merged(op: Operation, group: list[int], rows: Sequence[Tensor | None]) -> Tensor:
    """The sum of the products that belong to one tensor, in its shape."""
    present = [op.reduced(row, i) for i in group if (row := rows[i]) is not None]
    if not present:
        meta = op.inputs[group[0]]
        return torch.zeros(meta.shape, dtype=meta.dtype, device=meta.device)
    return sum(present[1:], start=present[0])


def _spread(op: Operation, per_group: Sequence[Tensor | None]) -> Waves:
    waves: Waves = [None] * len(op.edges)
    for group, wave in zip(op.groups, per_group, strict=True):
        pairs = wave is not None and op.inputs[group[0]].dtype.is_complex
        waves[group[0]] = torch.view_as_complex(wave.contiguous()) if pairs else wave  # type: ignore[union-attr]
    return waves


def _enumerable(op: Operation, size: int) -> bool:
    settings = op.settings
    if size <= settings.enumerate_up_to:
        return True
    if op.kind not in settings.sampled:
        settings.sampled.add(op.kind)
        warnings.warn(
            f"{op.kind} has no curvature rule and is too large to enumerate ({size} > enumerate_up_to="
            f"{settings.enumerate_up_to}): its curvature is estimated with {settings.probes} random probe(s). "
            "Register a rule with curvext.rule (docs/rules.md), or raise probes= or enumerate_up_to= in extend.",
            SampledOperationWarning,
            stacklevel=2,
        )
    return False


def _rows(like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The unit tensors of ``like``'s shape, in chunks, each with the matching entries of ``like``."""
    n, flat = like.numel(), like.detach().reshape(-1)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        basis = torch.zeros(stop - start, n, dtype=like.dtype, device=like.device)
        basis[torch.arange(stop - start), torch.arange(start, stop)] = 1
        yield basis.view(stop - start, *like.shape), flat[start:stop]


def _looped(vjp: Product, basis: Tensor) -> list[Tensor]:
    return [torch.stack(rows) for rows in zip(*(vjp(v) for v in basis), strict=True)]


def _batched(vjp: Product, basis: Tensor) -> list[Tensor]:
    """One product for every row; some nodes have no batching rule and are called row by row."""
    try:
        with quiet_vmap():
            return list(torch.vmap(vjp)(basis))
    except (RuntimeError, NotImplementedError, ValueError):
        return _looped(vjp, basis)


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Within, vmap does not warn of operations that it carries out row by row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield
