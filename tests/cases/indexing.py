"""Gathers, scatters, and operations in place on views."""

import warnings

import torch

from . import Built, Draw, add_case, case

aten = torch.ops.aten
I = torch.tensor  # noqa: E741

READ = {
    "index": lambda x: [x[I([1, 0, 1])], x[:, I([2, 2]), I([0, 3])], x[I([[0], [1]]), :, I([[0, 1]])]],
    "index_mask": lambda x: x[I([[True, False, True], [False, True, True]])],
    "unsafe_index": lambda x: aten._unsafe_index(x, [None, I([0, 2, 2])]),
    "unsafe_masked_index": lambda x: aten._unsafe_masked_index(x, I([True, False]), [None, None, I([0, 3])], 2.0),
    "index_select": lambda x: x.index_select(1, I([2, 0, 2])),
    "gather": lambda x: x.gather(2, I([[[0, 0], [1, 3]]])),
    "take": lambda x: x.take(I([[5, 5], [0, 23]])),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(2)[..., :2], 2),
    "masked_select": lambda x: x.masked_select(I([[True], [False], [True]])),
}  # fmt: skip
WRITTEN = {
    "index_put": lambda x, y: [x.index_put((I([1]),), y[:1]), x.index_put((I([0, 1]), I([2, 2])), y[0, 0, :1])],
    "index_put_accumulate": lambda x, y: x.index_put((I([1, 1]), I([0, 0])), y[0, :2], accumulate=True),
    "index_put_": lambda x, y: x.clone().index_put_((I([1]),), y[:1]),
    "index_put_self": lambda x, y: [x.index_put((I([1]),), x[:1]), (z := x * y).index_put((I([1, 0]),), z)],
    "index_put_self_accumulate": lambda x, y: (z := x * y).index_put((I([1, 1]),), z, accumulate=True),
    "unsafe_index_put": lambda x, y: aten._unsafe_index_put(x, [I([1, 1])], y, True),
    "index_put_impl": lambda x, y: aten._index_put_impl_(x.clone(), [I([0])], y[:1]),
    "unsafe_masked_index_put_accumulate": lambda x, y: aten._unsafe_masked_index_put_accumulate(
        x[0, 0], I([True, False, True]), [I([1, 0, 1])], y[0, :, 0]
    ),
    "index_add": lambda x, y: [x.index_add(0, I([1, 1]), y), x.index_add(2, I([3, 0]), y[..., :2], alpha=-0.7)],
    "index_add_self": lambda x, y: (z := x * y).index_add(0, I([1, 0]), z),
    "index_copy": lambda x, y: x.index_copy(1, I([2, 0]), y[:, :2]),
    "index_fill": lambda x, y: [x.index_fill(1, I([2, 0]), 3.0), x.index_fill(1, I([2, 0]), y[0, 0, 0])],
    "fill": lambda x, y: torch.fill(x, y[0, 0, 0]),
    "fill_": lambda x, y: x.clone().fill_(y[0, 0, 0]),
    "fill_constant": lambda x, y: [torch.fill(x, 3.0), x.clone().fill_(2.0), x.clone().zero_()],
    "put": lambda x, y: x.put(I([3, 0]), y[0, 0, :2]),
    "put_accumulate": lambda x, y: x.put(I([3, 3, 0]), y[0, 0, :3], accumulate=True),
    "masked_scatter": lambda x, y: x.masked_scatter(I([[True], [False], [True]]), y),
    "masked_scatter_backward": lambda x, y: aten.masked_scatter_backward(x, x.detach() > 0, (24,)),
    "scatter": lambda x, y: [x.scatter(2, I([[[0, 2], [1, 3]]]), y[:1, :2, :2]), x.scatter(2, I([[[0, 2]]]), 1.5)],
    "scatter_duplicates": lambda x, y: x.scatter(2, I([[[0, 0]]]), y[:1, :1, :2]),
    "scatter_add": lambda x, y: x.scatter_add(2, I([[[0, 2, 0], [1, 3, 3]]]), y[:1, :2, :3]),
    "scatter_add_self": lambda x, y: (z := x * y).scatter_add(2, I([0, 2, 0, 3]).expand(2, 3, 4), z),
    "select_scatter": lambda x, y: x.select_scatter(y[:, 0], 1, 2),
    "slice_scatter": lambda x, y: x.slice_scatter(y[:, :, :2], 2, 0, 4, 2),
    "diagonal_scatter": lambda x, y: x.diagonal_scatter(y[:, :, 0], 0, 1, 2),
    "as_strided_scatter": lambda x, y: x.as_strided_scatter(y[0, :2, :2], (2, 2), (4, 1), 2),
}


@case
def index_of_vector(d: Draw) -> Built:
    n = d.integer(1, 5)
    index = d.index(n, *d.shape(1, 2))
    return lambda x: x[index], [d.tensor(n, *d.shape(0, 1))]


for _name, _function in READ.items():
    add_case(f"indexing_{_name}", lambda d, f=_function: (f, [d.tensor(2, 3, 4)]), examples=1)
for _name, _function in WRITTEN.items():
    add_case(f"indexing_{_name}", lambda d, f=_function: (f, [d.tensor(2, 3, 4), d.tensor(2, 3, 4)]), examples=2)


def _reduce(name, reduce):
    def scatter(d: Draw) -> Built:
        index, included = d.index(3, 4, 2), d.boolean()
        return lambda x, y: x.scatter_reduce(0, index, y, reduce, include_self=included), [
            d.tensor(3, 2),
            d.tensor(4, 2),
        ]

    def index(d: Draw) -> Built:
        index, included = d.index(3, 4), d.boolean()

        def function(x, y):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # index_reduce is in beta
                return x.index_reduce(0, index, y, reduce, include_self=included)

        return function, [d.tensor(3, 2), d.tensor(4, 2)]

    def ties(d: Draw) -> Built:
        index = d.index(2, 4, 2)

        def function(x, y):
            return x.scatter_reduce(0, index, y.detach().round() + y - y.detach(), reduce)

        return function, [d.tensor(2, 2, low=-2, high=-1), d.tensor(4, 2)]

    add_case(f"scatter_reduce_{name}", scatter)
    add_case(f"scatter_reduce_ties_{name}", ties)
    if reduce != "sum":
        add_case(f"index_reduce_{name}", index)


for _reduction in ("sum", "mean", "prod", "amax", "amin"):
    _reduce(_reduction, _reduction)


def _written(*steps):
    """x.clone(), changed by each of the steps in place."""

    def function(x, y):
        x = x.clone()
        for step in steps:
            step(x, y)
        return x

    return function


IN_PLACE = {
    "assigned": [lambda x, y: x[0].copy_(y[1])],
    "assigned_broadcast": [lambda x, y: x[:, 1:].copy_(y[0, 0])],
    "assigned_scalar": [lambda x, y: x[0].fill_(y[0, 0, 0])],
    "assigned_constant": [lambda x, y: x[..., 0].zero_(), lambda x, y: x[..., 1].fill_(2.0)],
    "assigned_twice": [lambda x, y: x[0].copy_(y[0]), lambda x, y: x[:, 1].copy_(y[:, 2])],
    "assigned_index": [lambda x, y: x[0].index_put_((I([1, 2]),), y[1, 0])],
    "scaled": [lambda x, y: x[0].mul_(2.0), lambda x, y: x[:, 1].mul_(y[0, 0])],
    "added": [lambda x, y: x[0].add_(y[0], alpha=0.5)],
    "divided": [lambda x, y: x[1:].div_(2 + y[0, 0].square())],
    "squashed": [lambda x, y: x[:, ::2].tanh_()],
    "exponentiated": [lambda x, y: x[1].diagonal().exp_()],
    "powers": [lambda x, y: x[0].pow_(3)],
    "masked": [lambda x, y: x[0].masked_fill_(y[0].detach() > 0, 1.0)],
    "clamped": [lambda x, y: x[0].clamp_(-0.5, 0.5)],
    "accumulated": [lambda x, y: x[0].cumsum_(0)],
    "multiplied": [lambda x, y: x[0].cumprod_(1)],
    "matmul_added": [lambda x, y: x[0].addmm_(y[0, :, :2], y[1, :2])],
    "reduced_products": [lambda x, y: x[0].scatter_reduce_(0, torch.zeros(3, 4, dtype=torch.long), y[0], "prod")],
    "of_itself": [lambda x, y: x[0].mul_(x[1].clone())],
}
for _name, _steps in IN_PLACE.items():
    _function = _written(*_steps)
    add_case(f"on_view_{_name}", lambda d, f=_function: (f, [d.tensor(2, 3, 4), d.tensor(2, 3, 4)]), examples=2)


@case
def copied(d: Draw) -> Built:
    return lambda x: torch.empty_like(x).copy_(x), [d.tensor(*d.shape())]
