"""Reductions over some, all or no dimensions, kept or not."""

import torch
import torch.nn.functional as F

from . import Built, Draw, add_case, case

SEVERAL = {  # over one or several dimensions; values of any size
    "sum": torch.sum,
    "mean": torch.mean,
    "nansum": torch.nansum,
    "nanmean": torch.nanmean,
    "logsumexp": torch.logsumexp,
    "amax": torch.amax,
    "amin": torch.amin,
}
ORDERED = {  # along one dimension; distinct values
    "max_along": lambda x, dim: x.max(dim).values,
    "min_along": lambda x, dim: x.min(dim, keepdim=True).values,
    "median_along": lambda x, dim: x.median(dim).values,
    "nanmedian_along": lambda x, dim: x.nanmedian(dim).values,
    "mode": lambda x, dim: x.mode(dim).values,
    "kthvalue": lambda x, dim: x.kthvalue(1, dim).values,
    "topk": lambda x, dim: x.topk(2 if x.dim() and x.shape[dim] > 1 else 1, dim).values,
    "sort": lambda x, dim: x.sort(dim, descending=True).values,
    "sort_stable": lambda x, dim: torch.sort(x, dim=dim, stable=True).values,
    "cummax": lambda x, dim: x.cummax(dim).values,
    "cummin": lambda x, dim: x.cummin(dim).values,
    "quantile": lambda x, dim: x.quantile(0.3, dim),
    "nanquantile": lambda x, dim: x.nanquantile(0.7, dim, keepdim=True),
    "aminmax_along": lambda x, dim: torch.aminmax(x, dim=dim),
}
ALONG = {  # along one dimension; values of any size
    "cumsum": torch.cumsum,
    "cumprod": torch.cumprod,
    "logcumsumexp": torch.logcumsumexp,
    "prod_along": torch.prod,
    "trapezoid": lambda x, dim: torch.trapezoid(x, dx=0.5, dim=dim),
    "cumulative_trapezoid": lambda x, dim: torch.cumulative_trapezoid(x, dim=dim),
    "diff": lambda x, dim: x.diff(dim=dim),
}
FULL = {  # of all entries; distinct values
    "sum_of_all": torch.sum,
    "mean_of_all": torch.mean,
    "max_of_all": torch.max,
    "min_of_all": torch.min,
    "median_of_all": torch.median,
    "nanmedian_of_all": torch.nanmedian,
    "msort": torch.msort,
    "aminmax_of_all": torch.aminmax,
    "norm_of_all": torch.norm,
}


def _dims(d: Draw, ndim: int):
    return d.choice(d.integer(-ndim, ndim - 1), list(range(ndim - d.integer(0, 1))) or [0])


def _add_several(name, function):
    def build(d: Draw) -> Built:
        x = d.tensor(*d.shape())
        dims, keepdim = _dims(d, x.dim()), d.boolean()
        return lambda x: function(x, dims, keepdim=keepdim), [x]

    add_case(name, build)


def _add_along(name, function, distinct):
    def build(d: Draw) -> Built:
        shape = d.shape(1, 3, 2)
        dim = d.integer(-len(shape), len(shape) - 1)
        return lambda x: function(x, dim), [d.distinct(*shape) if distinct else d.tensor(*shape)]

    add_case(name, build)


def _add_full(name, function):
    add_case(name, lambda d: (function, [d.distinct(*d.shape())]))


for _name, _function in SEVERAL.items():
    _add_several(_name, _function)
for _name, _function in (ORDERED | ALONG).items():
    _add_along(_name, _function, _name in ORDERED)
for _name, _function in FULL.items():
    _add_full(_name, _function)


@case
def prod_of_all(d: Draw) -> Built:
    return torch.prod, [d.tensor(*d.shape())]


@case
def reductions_of_numbers(d: Draw) -> Built:
    along = d.choice(torch.amax, torch.logsumexp, torch.prod, torch.cumprod, torch.cumsum, torch.logcumsumexp)
    function = d.choice(torch.sum, torch.mean, torch.linalg.vector_norm, torch.prod, lambda x: along(x, d_last))
    d_last = d.choice(0, -1)
    return function, [d.tensor()]


@case
def extrema_with_ties(d: Draw) -> Built:
    x = d.index(3, 3, 4).to(d.dtype).requires_grad_()
    return d.choice(lambda x: x.amax(1), lambda x: x.amin((0, 1)), torch.max, torch.min, torch.median), [x]


@case
def prod_with_zeros(d: Draw) -> Built:
    x = d.index(2, 2, 3).to(d.dtype).requires_grad_()
    return d.choice(torch.prod, lambda x: x.prod(1, keepdim=True), lambda x: x.cumprod(1)), [x]


def _moment(name, function):
    def build(d: Draw) -> Built:
        x = d.tensor(*d.shape(1, 3, 2))
        dims, keepdim = _dims(d, x.dim()), d.boolean()
        correction = d.choice(0, 1, 0.5)
        return lambda x: function(x, dims, correction=correction, keepdim=keepdim), [x]

    add_case(name, build)


for _name in ("var", "std", "var_mean", "std_mean"):
    _moment(_name, getattr(torch, _name))


@case
def std_of_equal_entries(d: Draw) -> Built:
    x = d.tensor(2, 3, grad=False)
    x[0] = 1
    return lambda x: x.std(1), [x.requires_grad_()]


@case(examples=12)
def vector_norm(d: Draw) -> Built:
    p = d.choice(0, 0.5, 1, 1.5, 2, 3, 4.5, torch.inf, -torch.inf, -1)
    x = d.tensor(*d.shape())
    dims, keepdim = d.choice(None, _dims(d, x.dim())), d.boolean()
    return lambda x: torch.linalg.vector_norm(x, p, dims, keepdim=keepdim), [_away_from_zero(x)]


def _away_from_zero(x):
    return (x + 0.3 * x.sign()).detach().requires_grad_()


@case
def norms_of_zeros(d: Draw) -> Built:
    p = d.choice(0, 1, 2, 3, torch.inf)
    x = torch.zeros(2, 3, dtype=d.dtype)
    x[0, 0] = 1.5
    return lambda x: torch.linalg.vector_norm(x, p, 1), [x.requires_grad_()]


@case
def norm_by_its_old_name(d: Draw) -> Built:
    p = d.choice(1, 2, 3)
    x = _away_from_zero(d.tensor(3, 4))
    norm = d.choice(lambda x: torch._VF.norm(x, p), lambda x: torch._VF.norm(x, p, [0], keepdim=True))
    return norm, [x]


@case
def foreach_norm(d: Draw) -> Built:
    p = d.choice(1, 2, torch.inf)
    return lambda *x: torch._foreach_norm(x, p), [_away_from_zero(d.tensor(*d.shape())) for _ in range(2)]


@case
def renorm(d: Draw) -> Built:
    p, dim = d.choice(1, 1.5, 2, 3, torch.inf), d.choice(0, -1)
    return lambda x: x.renorm(p, dim, 1.2), [_away_from_zero(d.tensor(3, 4))]


@case
def dist(d: Draw) -> Built:
    p = d.choice(1, 1.5, 2, 3, torch.inf)
    return lambda a, b: torch.dist(a, b, p), [d.tensor(2, 3), d.choice(d.tensor(2, 3), d.tensor(3))]


@case
def cdist_by_products(d: Draw) -> Built:
    n, m, k = d.sizes(3)
    product = {"compute_mode": "use_mm_for_euclid_dist"}
    return lambda a, b: torch.cdist(a, b, **product), [d.tensor(2, n, k), d.tensor(2, m, k)]


@case
def cosine_similarity(d: Draw) -> Built:
    return F.cosine_similarity, [d.tensor(3, 4), d.tensor(3, 4)]


@case
def trace_of_rectangle(d: Draw) -> Built:
    return torch.trace, [d.tensor(*d.sizes(2))]


# PyTorch cannot differentiate the node of segment_reduce twice; its twin goes segment by segment.
def _segments(how):
    def segment_reduce(d: Draw) -> Built:
        lengths = torch.tensor([2, 1, 3])
        return lambda x: torch.segment_reduce(x, how, lengths=lengths, unsafe=True), [d.distinct(6, 2)]

    each = getattr(torch, {"max": "amax", "min": "amin"}.get(how, how))
    twin = lambda x: torch.stack([each(x[:2], 0), each(x[2:3], 0), each(x[3:], 0)])  # noqa: E731
    add_case(f"segment_{how}", segment_reduce, twin=twin, examples=1)


for _how in ("sum", "mean", "max", "min", "prod"):
    _segments(_how)


# PyTorch cannot differentiate the nodes of distances twice; their twins are norms of differences.
def _distances(p):
    def cdist(d: Draw) -> Built:
        n, m, k = d.sizes(3)
        return lambda a, b: torch.cdist(a, b, p), [d.tensor(2, n, k), d.tensor(2, m, k)]

    def pdist(d: Draw) -> Built:
        return lambda x: F.pdist(x, p), [d.tensor(4, d.integer(1, 3))]

    def of_pairs(x):
        i, j = torch.triu_indices(4, 4, 1)
        return torch.linalg.vector_norm(x[i] - x[j], p, -1)

    of_all = lambda a, b: torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)  # noqa: E731
    add_case(f"cdist_{p}", cdist, twin=of_all, examples=2)
    add_case(f"pdist_{p}", pdist, twin=of_pairs, examples=2)


for _p in (0, 1, 1.5, 2, 3, torch.inf):
    _distances(_p)


@case
def cdist_of_itself(d: Draw) -> Built:
    p = d.choice(0, 1, 1.5, 2, 3, torch.inf)
    return lambda x: torch.cdist(x, x, p), [d.tensor(4, 2)]
