"""The algebra of Kronecker products and eigenbases against dense matrices, in float64."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curvext import CurvatureError, Eigenbasis, Kronecker

pytestmark = pytest.mark.usefixtures("float64")


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def factor(*shape):
    if len(shape) == 1:
        return torch.rand(shape) + 0.1
    x = torch.randn(*shape[:-1], shape[-1] + 2)
    return x @ x.mT / shape[-1]


def matrix(f):
    return torch.diag(f) if f.dim() == 1 else f


def dense(factors):
    """The definition: Kronecker products, one for each group along the diagonal."""
    groups = max((len(f) for f in factors if f.dim() == 3), default=1)
    return torch.block_diag(
        *[reduce(torch.kron, [f[g] if f.dim() == 3 else matrix(f) for f in factors]) for g in range(groups)]
    )


FORMS = {
    "linear": [(3, 3), (4, 4)],
    "single": [(5, 5)],
    "diagonal": [(6,)],
    "embedding": [(5,), (3, 3)],
    "grouped": [(2, 3, 3), (2, 4, 4)],
    "three": [(2, 2), (3,), (4, 4)],
}
form = pytest.mark.parametrize("shapes", FORMS.values(), ids=list(FORMS))


def made(shapes):
    factors = [factor(*shape) for shape in shapes]
    return Kronecker(factors), dense(factors)


@form
@pytest.mark.parametrize("basis", [False, True])
def test_as_a_matrix(shapes, basis):
    k, want = made(shapes)
    k = k.eigh() if basis else k
    p = len(want)
    assert k.shape == want.shape and k.dtype is torch.float64 and k.device == want.device
    near(k.dense(), want)
    near(k.trace(), want.trace())
    near(k.diag(), want.diagonal())
    near(k.logdet(0.3), torch.logdet(want + 0.3 * torch.eye(p)))
    near((2.5 * k).dense(), 2.5 * want)
    flat, columns, shaped = torch.randn(p), torch.randn(p, 3), torch.randn(k.like)
    near(k @ flat, want @ flat)
    near(k @ columns, want @ columns)
    near(k @ shaped, (want @ shaped.flatten()).view(k.like))
    copy = type(k).load_state_dict(k.state_dict())
    near(copy @ flat, k @ flat)
    assert copy.like == k.like
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        k @ torch.randn(p + 1)


@form
def test_exact_inverse_and_powers(shapes):
    k, want = made(shapes)
    damped = want + 0.2 * torch.eye(len(want))
    inverse = torch.linalg.inv(damped)
    near(k.inverse(0.2, pi=False).dense(), inverse)
    near(k.eigh().inverse(0.2).dense(), inverse)
    root = k.eigh().power(-0.5, 0.2).dense()
    near(root @ root, inverse)
    v = torch.randn(len(want))
    near(k.solve(v, 0.2, pi=False), inverse @ v)
    near(k.eigh().solve(v, 0.2), inverse @ v)
    near(k.inverse().dense(), torch.linalg.inv(want))


@form
def test_pi_damping(shapes):
    """Each factor gets λ's share in proportion to its mean eigenvalue; the shares' product is λ."""
    k, _ = made(shapes)
    damping, m = 0.2, len(k.factors)
    shifted = []
    for group in range(k.dims[0]):
        mine = [matrix(f[group] if f.dim() == 3 else f) for f in k.factors]
        means = torch.stack([f.trace() / len(f) for f in mine])
        shares = means * (damping / means.prod()) ** (1 / m)
        near(shares.prod(), torch.tensor(damping))
        if m == 2:  # as written by Martens & Grosse
            pi = (means[0] / means[1]).sqrt()
            near(shares, torch.stack([pi * damping**0.5, damping**0.5 / pi]))
        inverses = [torch.linalg.inv(f + s * torch.eye(len(f))) for f, s in zip(mine, shares, strict=True)]
        shifted.append(reduce(torch.kron, inverses))
    want = torch.block_diag(*shifted)
    near(k.inverse(damping).dense(), want)
    v = torch.randn(len(want), 2)
    near(k.solve(v, damping), want @ v)


def test_zero_factor_is_damped_evenly():
    k = Kronecker([torch.zeros(2, 2), torch.eye(3)])
    near(k.inverse(0.25).dense(), torch.eye(6) / (0.5 * 1.5))


def test_singular():
    k = Kronecker([torch.zeros(2, 2), torch.eye(3)])
    for inverse in (k.inverse, lambda: k.inverse(pi=False), Kronecker([torch.zeros(3)]).inverse):
        with pytest.raises(CurvatureError, match="needs more damping"):
            inverse()


@pytest.mark.parametrize("along", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_weight_and_bias_together(along, groups):
    """[W | b], or [W; b] where the input's features come first."""
    o, i = 3, 4
    sizes = (o, i + 1) if along == 2 else (i + 1, o)
    lead = (groups,) if groups > 1 else ()
    factors = [factor(*lead, n, n) for n in sizes]
    shape = (groups * o, i) if along == 2 else (i, groups * o)
    k, want = Kronecker(factors, shape, along), dense(factors)
    weight, bias = torch.randn(shape), torch.randn(groups * o)
    if along == 2:
        joined = torch.cat([weight.view(groups, o, i), bias.view(groups, o, 1)], 2)
    else:
        joined = torch.cat([weight.view(groups, i, o), bias.view(groups, 1, o)], 1)
    near(k.join(weight, bias), joined)
    for got, matrix in ((k, want), (k.inverse(0.1, pi=False), torch.linalg.inv(want + 0.1 * torch.eye(len(want))))):
        w, b = got @ (weight, bias)
        product = (matrix @ joined.flatten()).view(joined.shape)
        near(got.join(w, b), product)
        assert w.shape == weight.shape and b.shape == bias.shape
    with pytest.raises(ValueError, match="one tensor"):
        made(FORMS["linear"])[0] @ (weight, bias)


@form
def test_running_average(shapes):
    """Factor by factor."""
    a, b = made(shapes)[0], made(shapes)[0]
    got = a.lerp(b, 0.25)
    for f, x, y in zip(got.factors, a.factors, b.factors, strict=True):
        near(f, 0.75 * x + 0.25 * y)
    assert got.like == a.like


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_of_another_dtype(dtype):
    """Computed in the wider dtype, given back in the vector's."""
    k, want = made(FORMS["linear"])
    v = torch.randn(12).to(dtype)
    assert torch.equal(k @ v, (want @ v.double()).to(dtype))
    half = k.to(torch.float32)
    assert half.dtype is torch.float32 and (half @ v.double()).dtype is torch.float64
    assert half.eigh().to(torch.float64).dtype is torch.float64


def test_bad_factors():
    for factors in ([], [torch.eye(3)[:2]], [torch.ones(2, 3, 3), torch.ones(3, 2, 2)], [torch.tensor(1.0)]):
        with pytest.raises(ValueError, match="expected factors"):
            Kronecker(factors)


def test_states_of_other_kinds_and_versions():
    state = made(FORMS["linear"])[0].state_dict()
    with pytest.raises(ValueError, match="state of a Kronecker"):
        Eigenbasis.load_state_dict(state)
    with pytest.raises(ValueError, match="version 99"):
        Kronecker.load_state_dict(state | {"version": 99})


@given(st.integers(1, 4), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 3))
def test_any_sizes(groups, sizes, columns):
    k, want = made([(groups, n, n) if groups > 1 else (n, n) for n in sizes])
    v = torch.randn(len(want), columns)
    near(k @ v, want @ v)
    near(k.solve(v, 0.5, pi=False), torch.linalg.solve(want + 0.5 * torch.eye(len(want)), v))
