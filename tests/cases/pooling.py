"""Pooling in every dimension: overlaps, edges, uneven bins."""

import torch.nn.functional as F

from . import Built, Draw, add_case, case


def image(d: Draw, k: int, least: int = 3) -> list[int]:
    """A shape with k spatial dimensions; one in two without samples."""
    return [*d.sizes(d.integer(1, 2), 1, 2), *d.sizes(k, least, 5 if k < 3 else 4)]


def _max(k):
    def build(d: Draw) -> Built:
        kernel, stride, padding = d.integer(2, 3), d.integer(1, 2), d.integer(0, 1)
        ceil, dilation = d.boolean(), d.choice(1, 1, 2) if padding else 1
        pool = getattr(F, f"max_pool{k}d")
        return lambda x: pool(x, kernel, stride, padding, dilation, ceil), [d.distinct(*image(d, k, 4))]

    return build


def _average(k):
    def build(d: Draw) -> Built:
        kernel, stride, padding = d.integer(2, 3), d.choice(None, 1, 2), d.integer(0, 1)
        options = {"ceil_mode": d.boolean(), "count_include_pad": d.boolean()}
        if k > 1:
            options["divisor_override"] = d.choice(None, None, 3)
        pool = getattr(F, f"avg_pool{k}d")
        return lambda x: pool(x, kernel, stride, padding, **options), [d.tensor(*image(d, k))]

    return build


def _adaptive(k, kind):
    def build(d: Draw) -> Built:
        size = d.integer(1, 4)
        pool = getattr(F, f"adaptive_{kind}_pool{k}d")
        return lambda x: pool(x, size), [d.distinct(*image(d, k))]

    return build


def _unpool(k):
    def build(d: Draw) -> Built:
        pool, unpool = getattr(F, f"max_pool{k}d"), getattr(F, f"max_unpool{k}d")

        def function(x):
            y, indices = pool(x, 2, return_indices=True)
            return unpool(y, indices, 2)

        return function, [d.distinct(*d.sizes(2, 1, 2), *[2 * n for n in d.sizes(k, 1, 2)])]

    return build


def _fractional(k):
    def build(d: Draw) -> Built:
        x = d.distinct(*d.sizes(d.integer(1, 2), 1, 2), *d.sizes(k, 5, 5 if k > 2 else 6))
        leading = x.shape[:-k] if x.dim() == k + 2 else (1, *x.shape[:-k])
        samples = d.tensor(*leading, k, low=0, high=1, grad=False)
        pool = getattr(F, f"fractional_max_pool{k}d")
        return lambda x: pool(x, 2, output_size=3, _random_samples=samples), [x]

    return build


def _lp(k):
    def build(d: Draw) -> Built:
        p = d.choice(1, 2, 3)
        pool = getattr(F, f"lp_pool{k}d")
        return lambda x: pool(x, p, 2), [d.tensor(*image(d, k), low=0.1, high=2)]

    return build


for _k in (1, 2, 3):
    add_case(f"max_pool{_k}d", _max(_k))
    add_case(f"avg_pool{_k}d", _average(_k))
    add_case(f"adaptive_max_pool{_k}d", _adaptive(_k, "max"))
    add_case(f"adaptive_avg_pool{_k}d", _adaptive(_k, "avg"))
    add_case(f"max_unpool{_k}d", _unpool(_k))
    add_case(f"lp_pool{_k}d", _lp(_k))
    if _k > 1:
        add_case(f"fractional_max_pool{_k}d", _fractional(_k))


@case
def avg_pool_global(d: Draw) -> Built:
    h, w = d.sizes(2)
    return lambda x: F.avg_pool2d(x, (h, w)), [d.tensor(2, 2, h, w)]
