"""Products of tensors."""

import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Built, Draw, case, of_module

# Nodes that only other devices and layouts record.
ELSEWHERE_AFFINE = {"LinearBackward0": "recorded by backends that have linear as one operation, such as MPS"}


@case
def linear(d: Draw) -> Built:
    i, o = d.sizes(2)
    bias = [d.tensor(o)] if d.boolean() else []
    return F.linear, [d.tensor(*d.shape(1, 3), i), d.tensor(o, i), *bias]


@case
def linear_of_one_sample(d: Draw) -> Built:
    i, o = d.sizes(2)
    return of_module(d, nn.Linear(i, o, bias=d.boolean()), d.tensor(i))


@case
def linear_of_a_transpose(d: Draw) -> Built:
    i, o, n, t = d.sizes(4)
    bias = [d.tensor(o)] if d.boolean() else []
    return lambda x, *w: F.linear(x.movedim(0, -1), *w), [d.tensor(i, n, t), d.tensor(o, i), *bias]


def _two(d: Draw, left: list[int], right: list[int]) -> Built:
    return torch.matmul, [d.tensor(*left), d.tensor(*right)]


@case(examples=20)
def matmul(d: Draw) -> Built:
    b, c, n, k, m = d.sizes(5)
    batches = [[], [b], [1, b], [c, b], [c, 1]]
    left = d.choice([k], *([*batch, n, k] for batch in batches))
    right = d.choice([k], *([*batch, k, m] for batch in batches))
    return _two(d, left, right)


@case
def mm(d: Draw) -> Built:
    n, k, m = d.sizes(3)
    return _two(d, [n, k], [k, m])


@case
def bmm(d: Draw) -> Built:
    b, n, k, m = d.sizes(4)
    return torch.bmm, [d.tensor(b, n, k), d.tensor(b, k, m)]


@case
def mv(d: Draw) -> Built:
    n, k = d.sizes(2)
    return torch.mv, [d.tensor(n, k), d.tensor(k)]


@case
def dot(d: Draw) -> Built:
    n = d.integer(1, 5)
    return d.choice(torch.dot, torch.vdot, torch.inner), [d.tensor(n), d.tensor(n)]


@case
def vdot(d: Draw) -> Built:
    return torch.vdot, [d.tensor(3), d.tensor(3)]


@case
def matrix_square(d: Draw) -> Built:
    n = d.integer(1, 4)
    return lambda x: x @ x, [d.tensor(n, n)]


@case
def matrix_square_batched(d: Draw) -> Built:
    b, n = d.sizes(2)
    return lambda x: torch.bmm(x, x), [d.tensor(b, n, n)]


@case
def matrix_power(d: Draw) -> Built:
    n = d.integer(1, 3)
    return lambda x: torch.matrix_power(x, 5), [d.tensor(n, n)]


@case
def squared_norm(d: Draw) -> Built:
    function = d.choice(torch.dot, torch.vdot)
    return lambda x: function(x, x), [d.tensor(d.integer(1, 5))]


@case
def outer_of_itself(d: Draw) -> Built:
    return lambda x: torch.outer(x, x), [d.tensor(d.integer(1, 4))]


def _factors(d: Draw) -> dict[str, float]:
    return d.choice({}, {"alpha": -0.7}, {"beta": 0.3}, {"alpha": 2, "beta": 0.3}, {"beta": 0})


def _added(d: Draw, function, *shapes: list[int]) -> Built:
    options = _factors(d)
    return lambda *args: function(*args, **options), [d.tensor(*shape) for shape in shapes]


@case
def addmm(d: Draw) -> Built:
    n, k, m = d.sizes(3)
    return _added(d, torch.addmm, d.choice([n, m], [m], [n, 1], [1, m]), [n, k], [k, m])


@case
def addmm_of_itself(d: Draw) -> Built:
    n = d.integer(1, 3)
    options = _factors(d)
    return lambda c, x: torch.addmm(c, x, x, **options), [d.tensor(n, n), d.tensor(n, n)]


@case
def baddbmm(d: Draw) -> Built:
    b, n, k, m = d.sizes(4)
    return _added(d, torch.baddbmm, d.choice([b, n, m], [n, 1], [m]), [b, n, k], [b, k, m])


@case
def addbmm(d: Draw) -> Built:
    b, n, k, m = d.sizes(4)
    return _added(d, torch.addbmm, d.choice([n, m], [1, m]), [b, n, k], [b, k, m])


@case
def addmv(d: Draw) -> Built:
    n, k = d.sizes(2)
    return _added(d, torch.addmv, d.choice([n], [1]), [n, k], [k])


@case
def addr(d: Draw) -> Built:
    n, m = d.sizes(2)
    return _added(d, torch.addr, d.choice([n, m], [m], [n, 1]), [n], [m])


@case
def outer(d: Draw) -> Built:
    n, m = d.sizes(2)
    return d.choice(torch.outer, torch.kron), [d.tensor(n), d.tensor(m)]


@case
def kron(d: Draw) -> Built:
    a, b, c, e = d.sizes(4, high=3)
    return torch.kron, [d.tensor(a, b), d.tensor(c, e)]


@case(examples=10)
def einsum(d: Draw) -> Built:
    b, i, j, k = d.sizes(4, high=3)
    sizes = {"b": b, "i": i, "j": j, "k": k, "h": 2}
    equation = d.choice(
        "bi,bij,bj->b", "bihj,bkhj->bhik", "ij,jk", "ii,ij->j", "bi,jk->bijk", "bij,bjk,bk->bi", "i,i->", "bi,i->b"
    )
    operands = [d.tensor(*(sizes[x] for x in term)) for term in equation.split("->")[0].split(",")]
    return lambda *args: torch.einsum(equation, *args), operands


@case
def einsum_of_itself(d: Draw) -> Built:
    n, t, c = d.sizes(3)
    return lambda x: torch.einsum("ntc,nsc->nts", x, x), [d.tensor(n, t, c)]


@case
def tensordot(d: Draw) -> Built:
    a, b, c, e = d.sizes(4, high=3)
    return lambda x, y: torch.tensordot(x, y, dims=2), [d.tensor(a, b, c), d.tensor(b, c, e)]


@case
def multi_dot(d: Draw) -> Built:
    a, b, c, e = d.sizes(4)
    first, last = d.choice([a, b], [b]), d.choice([c, e], [c])
    return lambda *args: torch.linalg.multi_dot(args), [d.tensor(*first), d.tensor(b, c), d.tensor(*last)]


@case
def vecdot(d: Draw) -> Built:
    n, k = d.sizes(2)
    return d.choice(torch.linalg.vecdot, torch.inner), [d.tensor(n, k), d.tensor(n, k)]


@case
def cross(d: Draw) -> Built:
    n, dim = d.integer(1, 3), d.choice(0, 1, -1)
    left, right = d.choice(([n, 3], [n, 3]), ([1, 3], [n, 3]), ([n, 3], [1, 3]))
    if dim == 0:
        left, right = left[::-1], right[::-1]
    return lambda a, b: torch.linalg.cross(a, b, dim=dim), [d.tensor(*left), d.tensor(*right)]


@case
def bilinear(d: Draw) -> Built:
    n, o, i, j = d.sizes(4)
    batch = d.choice([n], [n, 2], [])
    return of_module(d, nn.Bilinear(i, j, o, bias=d.boolean()), d.tensor(*batch, i), d.tensor(*batch, j))


@case
def bilinear_form(d: Draw) -> Built:
    n, i = d.sizes(2)
    return lambda x, w: F.bilinear(x, x, w), [d.tensor(n, i), d.tensor(2, i, i)]


@case(examples=12)
def trilinear(d: Draw) -> Built:
    """The operation in general: every factor lacks some dimensions (torch's own backward fails for more sums)."""
    sizes = d.sizes(3, high=3)
    expands = d.choice(([1], [0], [0, 2]), ([], [0], [0, 1]), ([1, 2], [0, 2], []), ([2], [], [1]))
    summed = d.choice([], [1]) if expands != ([2], [], [1]) else d.choice([0], [0, 2], [0, 1, 2])
    factors = [d.tensor(*(s for k, s in enumerate(sizes) if k not in expand)) for expand in expands]
    return lambda a, b, c: torch._trilinear(a, b, c, *expands, summed), factors


@case
def foreach_mm(d: Draw) -> Built:
    n, k, m = d.sizes(3)

    def function(*args):
        return torch._foreach_mm(list(args[:2]), list(args[2:]))

    return function, [d.tensor(n, k), d.tensor(m, 2), d.tensor(k, m), d.tensor(2, n)]


@case
def grouped_mm(d: Draw) -> Built:
    d.dtype = torch.float32  # it has no float64
    offsets = torch.tensor([4, 8], dtype=torch.int32)
    left, right = d.choice(([8, 4], [2, 4, 8]), ([2, 4, 4], [4, 8]), ([4, 8], [8, 4]), ([2, 4, 8], [2, 8, 4]))
    offs = None if len(left) == len(right) == 3 else offsets
    return lambda a, b: F.grouped_mm(a, b, offs=offs), [d.tensor(*left), d.tensor(*right)]


@case
def sparse_times_dense(d: Draw) -> Built:
    """A constant sparse matrix, as in graph networks."""
    n, k = d.sizes(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compressed layouts call themselves beta, once
        sparse = d.tensor(n, n, grad=False).relu().to_sparse(layout=d.choice(torch.sparse_coo, torch.sparse_csr))
    function = d.choice(torch.mm, torch.sparse.mm)
    return lambda x: function(sparse, x), [d.tensor(n, k).requires_grad_()]


@case
def sparse_addmm(d: Draw) -> Built:
    n, k = d.sizes(2)
    sparse = d.tensor(n, n, grad=False).relu().to_sparse()
    return lambda c, x: torch.sparse.addmm(c, sparse, x, beta=0.5, alpha=-2), [d.tensor(n, k), d.tensor(n, k)]


@case
def complex_products(d: Draw) -> Built:
    """Not by these rules; see rules/complex.py, and the default."""
    n, k, m = d.sizes(3, high=2)
    function, *shapes = d.choice(
        (torch.mv, [n, k], [k]),
        (torch.dot, [k], [k]),
        (torch.vdot, [k], [k]),
        (torch.linalg.cross, [n, 3], [n, 3]),
        (torch.addbmm, [n, m], [2, n, k], [2, k, m]),
    )

    def of_parts(*args):
        return torch.view_as_real(function(*(torch.view_as_complex(x) for x in args)))

    return of_parts, [d.tensor(*shape, 2) for shape in shapes]
