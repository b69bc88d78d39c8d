"""Eigenvalues are found where LAPACK fails in single precision."""

from __future__ import annotations

import math

import pytest
import torch

from curvext import CurvatureError, Kronecker
from curvext.linalg import eigh, eigvalsh


def compare_in_double(a):
    (values, vectors), want = eigh(a), torch.linalg.eigvalsh(a.double())
    assert values.dtype == vectors.dtype == a.dtype
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    torch.testing.assert_close(eigvalsh(a), values, rtol=1e-5, atol=1e-6 * float(want.abs().max()))
    near = 1e-5 * float(want.abs().max())
    torch.testing.assert_close((vectors * values.unsqueeze(-2)) @ vectors.mT, a, rtol=0, atol=near)


def test_where_single_precision_fails(monkeypatch):
    def fails(name):
        decompose = getattr(torch.linalg, name)

        def decomposed(a):
            found = decompose(a)
            if a.dtype == torch.float32:
                (found if name == "eigvalsh" else found[0])[..., 0] = math.nan
            return found

        monkeypatch.setattr(torch.linalg, name, decomposed)

    fails("eigh"), fails("eigvalsh")
    x = torch.randn(3, 5, 5)
    compare_in_double(x + x.mT)


def test_moments_of_inactive_units():
    """With MKL on some processors most of these fail in single precision, by an error or by NaN."""
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(128, 300, generator=generator).relu() * (torch.rand(300, generator=generator) > 0.5)
        compare_in_double(x.T @ x / 128)


def test_what_is_not_finite():
    a = torch.eye(3)
    a[1, 1] = math.nan
    with pytest.raises(CurvatureError, match="1 entries are not finite"):
        eigh(a)
    with pytest.raises(CurvatureError, match="not finite"):
        Kronecker((a, torch.eye(2))).eigh()


def test_what_fails_in_double_too(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (a[0] * math.nan, a))
    with pytest.raises(CurvatureError, match="do not converge in double"):
        eigh(torch.eye(3))
