"""The checker of linear operators; see :mod:`curvext.testing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .operators import Operator
from .operators.base import Readable

Equal = Callable[[Tensor, Tensor, str], None]


def check_operator(operator: Operator, rtol: float = 1e-9, atol: float = 1e-10, seed: int = 0) -> Tensor:
    """Check that a linear operator is one, and keeps the promises of :class:`~curvext.operators.Operator`.

    Products with vectors, columns, one column and none; linearity; the adjoint; entries; the forms that its domain has;
    SciPy (if it is installed); another dtype; and that what does not fit is refused.

    Args:
        operator: small, in float64.
        rtol, atol: what counts as equal.
        seed: of the vectors.

    Returns:
        The operator's entries ``[m, n]``, to compare with what they should be.

    Raises:
        AssertionError: naming what differs.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(operator.device, operator.dtype)

    def equal(got: Tensor, want: Tensor, what: str) -> None:
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text: f"{operator}, {what}: {text}")

    dense, (m, n) = operator.to_dense(), operator.shape
    assert dense.shape == (m, n) and dense.dtype == operator.dtype and dense.device == operator.device, operator
    columns = draw(n, 11)
    _check_products(operator, dense, columns, equal)
    _check_adjoint(operator, dense, columns[:, 0], draw(m), equal)
    _check_forms(operator, columns, equal)
    _check_entries(operator, dense, equal)
    _check_scipy(operator, dense, columns, equal)
    _check_moves(operator, dense, columns[:, 0])
    for wrong in (draw(n + 1), draw(n, 1, 1), columns.to(torch.int64)):
        _check_refused(operator, wrong)
    return dense


def _check_products(operator: Operator, dense: Tensor, columns: Tensor, equal: Equal) -> None:
    x, y = columns[:, 0], columns[:, 1]
    equal(operator @ x, dense @ x, "a vector")
    equal(operator @ columns, dense @ columns, "columns")
    equal(operator @ columns[:, :1], dense @ columns[:, :1], "one column")
    equal(operator @ columns[:, :0], dense.new_zeros(len(dense), 0), "no column")
    equal(operator @ (2 * x - y), 2 * (operator @ x) - operator @ y, "linearity")


def _check_adjoint(operator: Operator, dense: Tensor, x: Tensor, y: Tensor, equal: Equal) -> None:
    equal((operator.T @ y) @ x, y @ (operator @ x), "the adjoint")
    equal(operator.T.to_dense(), dense.mT, "entries of the adjoint")
    equal(operator.T.T @ x, operator @ x, "the adjoint's adjoint")
    if operator.symmetric:
        equal(dense, dense.mT, "symmetry")


def _check_forms(operator: Operator, columns: Tensor, equal: Equal) -> None:
    domain, image = operator.domain, operator.image
    for v in (columns[:, 0], columns) if domain is not None else ():
        forms: tuple[Any, ...] = ({}, [], ())
        for form in forms:
            product = operator @ domain.like(form, v)  # type: ignore[union-attr]
            if image is not None:
                assert type(product) is type(form), f"{operator}: {type(product)} for {type(form)}"
                product = image.flatten(product)
            equal(product, operator @ v, f"a {type(form).__name__}")


def _check_entries(operator: Operator, dense: Tensor, equal: Equal) -> None:
    if not isinstance(operator, Readable):
        return
    m, n = operator.shape
    rows, columns = torch.arange(m, device=dense.device).flip(0)[::2], torch.arange(n, device=dense.device)[::3]
    equal(operator.entries(rows, columns), dense[rows][:, columns], "entries")
    equal(operator.entries(slice(1, 3), slice(0, n // 2)), dense[1:3, : n // 2], "a slice of entries")
    rows, columns = torch.stack([rows, rows.flip(0)]), torch.stack([columns, columns.flip(0)])
    blocks = torch.stack([dense[r][:, c] for r, c in zip(rows, columns, strict=True)])
    equal(operator.entries(rows, columns), blocks, "blocks of entries")
    v = torch.ones_like(blocks[:, 0]).cumsum(1).unsqueeze(2)
    equal(operator.block_times(rows, columns, v), blocks @ v, "products with blocks")


def _check_scipy(operator: Operator, dense: Tensor, columns: Tensor, equal: Equal) -> None:
    try:
        scipy = operator.to_scipy()
    except ImportError:
        return
    x = columns[:, 0].cpu().numpy()
    assert tuple(scipy.shape) == operator.shape, f"{operator}: {scipy.shape} in scipy"
    for got, want, what in (
        (scipy @ x, dense @ columns[:, 0], "a vector"),
        (scipy @ columns.cpu().numpy(), dense @ columns, "columns"),
        (scipy.H @ (scipy @ x), dense.mT @ (dense @ columns[:, 0]), "the adjoint"),
    ):
        equal(torch.as_tensor(got).to(dense), want, f"{what} through scipy")


def _check_moves(operator: Operator, dense: Tensor, x: Tensor) -> None:
    single = operator.to(dtype=torch.float32, device=operator.device)
    assert single.dtype == torch.float32 and single.shape == operator.shape, f"{operator}: {single} in float32"
    error = torch.linalg.vector_norm((single @ x.float()).to(dense) - dense @ x)
    bound = 1e-4 * (torch.linalg.matrix_norm(dense) if dense.numel() else 0) * torch.linalg.vector_norm(x)
    assert error <= bound, f"{operator}: off by {error} in float32"


def _check_refused(operator: Operator, wrong: Tensor) -> None:
    try:
        operator @ wrong
    except ValueError:
        return
    raise AssertionError(f"{operator} took a tensor of shape {tuple(wrong.shape)} in {wrong.dtype}")
