"""Lanczos and block Lanczos against dense eigenvalues, and going on where they were stopped."""

from __future__ import annotations

import math

import pytest
import torch

from curvext import CurvatureError
from curvext.solvers import block_lanczos, lanczos
from curvext.solvers.lanczos import replay

from .matrices import Counting, symmetric

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("how", ["full", "selective"])
def test_lanczos_of_n_steps_is_eigh(how):
    A, b = symmetric(torch.randn(60)), torch.randn(60)
    krylov = lanczos(A, b, steps=60, reorthogonalize=how)
    values, vectors = torch.linalg.eigh(A)
    torch.testing.assert_close(krylov.values, values)
    torch.testing.assert_close((krylov.vectors().T @ vectors).abs(), torch.eye(60), rtol=0, atol=1e-6)
    torch.testing.assert_close(krylov.weights, (vectors.T @ b / b.norm()) ** 2)


@pytest.mark.parametrize("how", ["full", "selective", "none"])
def test_lanczos_relation_and_residuals(how):
    A, b = symmetric(torch.randn(80)), torch.randn(80)
    k = lanczos(A, b, steps=12, reorthogonalize=how)
    T = k.basis.T @ A @ k.basis
    torch.testing.assert_close(T.diagonal(), k.alpha)
    torch.testing.assert_close(T.diagonal(1), k.beta[:-1])
    vectors = k.vectors()
    torch.testing.assert_close((A @ vectors - vectors * k.values).norm(dim=0), k.residuals)
    torch.testing.assert_close(k.basis[:, 0], b / b.norm())


def outlying(n=300):
    return symmetric(torch.cat([torch.tensor([30.0, 20.0, -15.0]), torch.linspace(0, 1, n - 3)]))


@pytest.mark.parametrize("how, copies", [("full", 1), ("selective", 1), ("none", 2)])
def test_ghosts(how, copies):
    krylov = lanczos(outlying(), torch.randn(300), steps=120, reorthogonalize=how)
    assert (krylov.values > 29).sum() >= copies and (copies > 1 or (krylov.values > 29).sum() == 1)
    away = (krylov.basis.T @ krylov.basis - torch.eye(120)).abs().max()
    assert away < {"full": 1e-13, "selective": 1e-6, "none": math.inf}[how]
    accepted = krylov.values[krylov.residuals < 1e-8]  # ghosts or not, what is accepted is an eigenvalue
    eigenvalues = torch.linalg.eigvalsh(outlying())
    assert (accepted[:, None] - eigenvalues).abs().min(1).values.max() < 1e-7


def test_lanczos_functions_are_exact_for_polynomials():
    A, b = symmetric(torch.randn(40)), torch.randn(40)
    k = lanczos(A, b, steps=5)
    torch.testing.assert_close(k.function(lambda t: t**4 - 2 * t + 1), A @ A @ A @ A @ b - 2 * A @ b + b)
    moment = b @ torch.linalg.matrix_power(A, 9) @ b
    torch.testing.assert_close(torch.tensor(k.quadratic(lambda t: t**9)), moment)


def test_lanczos_ends_where_the_space_is_exhausted():
    A = symmetric(torch.tensor([1.0] * 10 + [2.0] * 10 + [-3.0] * 10))
    krylov = lanczos(A, torch.randn(30), steps=20)
    assert krylov.invariant and krylov.products == 3
    torch.testing.assert_close(krylov.values, torch.tensor([-3.0, 1.0, 2.0]))
    assert lanczos(torch.zeros(4, 4), torch.ones(4), steps=3).values.tolist() == [0.0]


def test_replay_gives_the_basis_again():
    A, b = symmetric(torch.randn(50)), torch.randn(50)
    k = lanczos(A, b, steps=8, reorthogonalize="none")
    torch.testing.assert_close(torch.stack(list(replay(A, b, k)), 1), k.basis)


def test_lanczos_refuses():
    A = symmetric([1.0, 2.0])
    with pytest.raises(CurvatureError, match="not zero"):
        lanczos(A, torch.zeros(2), steps=2)
    with pytest.raises(CurvatureError, match="'full'"):
        lanczos(A, torch.ones(2), steps=2, keep=False)
    with pytest.raises(CurvatureError, match="did not keep"):
        lanczos(A, torch.ones(2), steps=2, keep=False, reorthogonalize="none").vectors()
    with pytest.raises(CurvatureError, match="not finite"):
        lanczos(A * math.inf, torch.ones(2), steps=2)


# block Lanczos


def wanted(w, which, k):
    w = w.sort(descending=True).values
    if which == "magnitude":
        return w[w.abs().argsort(descending=True)][:k]
    return {"largest": w[:k], "smallest": w.flip(0)[:k], "both": torch.cat([w[:k], w[-k:]])}[which]


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("which", ["largest", "smallest", "both", "magnitude"])
@pytest.mark.parametrize("basis", [None, 20], ids=["roomy", "restarted"])
def test_block_lanczos_ends(which, block, basis):
    w = torch.randn(150)
    A = Counting(symmetric(w))
    found = block_lanczos(A, torch.randn(150, block), 4, which=which, tolerance=1e-9, basis=basis)
    torch.testing.assert_close(found.values, wanted(w, which, 4))
    residuals = (A.matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-3, atol=1e-12)
    assert found.converged and found.reason == "tolerance" and found.products == A.products
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(len(found.values)))


def test_block_lanczos_with_all_pairs_is_eigh_despite_multiplicity():
    w = torch.cat([torch.full((6,), 5.0), torch.randn(20)])
    A = symmetric(w)
    for block in (1, 4, 7):
        found = block_lanczos(A, torch.randn(26, block), 26)
        assert found.reason == "exact" and found.converged
        torch.testing.assert_close(found.values, w.sort(descending=True).values)
        torch.testing.assert_close(A @ found.vectors, found.vectors * found.values)


def test_block_lanczos_finds_as_many_copies_as_columns():
    A = symmetric(torch.cat([torch.full((3,), 5.0), torch.linspace(-1, 1, 197)]))
    found = block_lanczos(A, torch.randn(200, 3), 4, tolerance=1e-8)
    torch.testing.assert_close(found.values, torch.tensor([5.0, 5.0, 5.0, 1.0]))


def test_block_lanczos_says_what_has_not_converged():
    A = symmetric(torch.cat([torch.tensor([50.0]), torch.linspace(0, 1, 299)]))
    found = block_lanczos(A, torch.randn(300), 5, tolerance=1e-7, products=14)
    assert found.reason == "products" and not found.converged and found.products == 14
    assert bool(found.accepted[0]) and not bool(found.accepted[4])


def test_block_lanczos_in_small_spaces_and_of_zero():
    assert block_lanczos(torch.eye(1), torch.ones(1), 1).values.tolist() == [1.0]
    assert block_lanczos(torch.zeros(6, 6), torch.randn(6, 2), 3).values.tolist() == [0.0] * 3
    for argument in ({"k": 0}, {"k": 7}, {"k": 2, "which": "middle"}, {"k": 2, "basis": 3}):
        with pytest.raises(CurvatureError):
            block_lanczos(torch.eye(6), torch.randn(6), **argument)
    with pytest.raises(CurvatureError, match="not finite"):
        block_lanczos(torch.eye(6) * math.nan, torch.randn(6), 1)


# going on after an interruption


@pytest.mark.parametrize("keep", [True, False])
def test_lanczos_goes_on_where_it_stopped(tmp_path, keep):
    A, b, file = symmetric(torch.randn(90)), torch.randn(90), tmp_path / "run.pt"
    how = "selective" if keep else "none"
    options = {"reorthogonalize": how, "keep": keep, "checkpoint": file}
    with pytest.raises(KeyboardInterrupt):
        lanczos(Counting(A, stop_at=24), b, steps=40, **options)
    again = Counting(A)
    found = lanczos(again, b, steps=40, **options)
    assert again.products == 40 - 23 + 1 and found.products == 41
    whole = lanczos(A, b, steps=40, reorthogonalize=how, keep=keep)
    torch.testing.assert_close(found.values, whole.values)
    more = lanczos(again, b, steps=50, **options)
    assert len(more.alpha) == 50 and again.products == 18 + 11
    with pytest.raises(CurvatureError, match="another operator"):
        lanczos(A + 1e-3 * torch.eye(90), b, steps=50, **options)
    with pytest.raises(CurvatureError, match="another b"):
        lanczos(A, -b, steps=50, **options)


@pytest.mark.parametrize("stop_at", [7, 30, 61, 80])
def test_block_lanczos_goes_on_where_it_stopped(tmp_path, stop_at):
    A, start, file = symmetric(torch.linspace(-1, 1, 200) ** 3), torch.randn(200, 2), tmp_path / "run.pt"
    options = {"which": "both", "basis": 24, "tolerance": 1e-8}
    whole = block_lanczos(A, start, 3, **options)
    with pytest.raises(KeyboardInterrupt):
        block_lanczos(Counting(A, stop_at=stop_at), start, 3, checkpoint=file, **options)
    found = block_lanczos(A, start, 3, checkpoint=file, **options)
    torch.testing.assert_close(found.values, whole.values)
    assert found.converged and found.products == whole.products + 1
    assert block_lanczos(A, start, 3, checkpoint=file, **options).products == whole.products + 2  # all done
    with pytest.raises(CurvatureError, match="another operator"):
        block_lanczos(2 * A, start, 3, checkpoint=file, **options)
    with pytest.raises(CurvatureError, match="another k"):
        block_lanczos(A, start, 2, checkpoint=file, **options)


def test_what_is_half_done_is_not_saved(tmp_path, monkeypatch):
    """Broken off while the state changes, the file stays as it was ten steps before."""
    A, start, file = symmetric(torch.linspace(-1, 1, 200) ** 3), torch.randn(200), tmp_path / "run.pt"
    whole, svd, calls = block_lanczos(A, start, 3), torch.linalg.svd, []

    def interrupted(x):
        calls.append(x)
        if len(calls) == 27:
            raise KeyboardInterrupt
        return svd(x)

    monkeypatch.setattr(torch.linalg, "svd", interrupted)
    with pytest.raises(KeyboardInterrupt):
        block_lanczos(A, start, 3, checkpoint=file)
    found = block_lanczos(A, start, 3, checkpoint=file)
    torch.testing.assert_close(found.values, whole.values)
    assert len(calls) == whole.products + 7  # 20 of 27 were saved


def test_progress_is_shown(capsys):
    pytest.importorskip("tqdm")
    lanczos(symmetric(torch.randn(9)), torch.randn(9), steps=4, progress=True)
    assert "Lanczos: 100%" in capsys.readouterr().err
