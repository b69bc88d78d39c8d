"""Functions of two or three tensors, entry by entry, with broadcasting."""

import torch

from . import Built, Draw, add_case, case

aten = torch.ops.aten


def shapes(d: Draw, n: int) -> list[list[int]]:
    """n shapes that broadcast to one: some sizes are 1, some leading dimensions missing."""
    full = d.shape(0, 3)
    return [[d.choice(k, k, 1) for k in full[d.integer(0, len(full)) :]] for _ in range(n)]


def _add(name, function, *bounds):
    """A case of len(bounds) tensors (None: normal entries), which broadcast; sometimes all of them are one tensor."""

    def build(d: Draw) -> Built:
        leaves = [
            d.tensor(*s, low=b and b[0], high=b and b[1]) for s, b in zip(shapes(d, len(bounds)), bounds, strict=True)
        ]
        return function, leaves

    add_case(name, build)


BINARY = {
    "add": (torch.add, None, None),
    "add_alpha": (lambda a, b: torch.add(a, b, alpha=-2), None, None),
    "sub": (torch.sub, None, None),
    "sub_alpha": (lambda a, b: torch.sub(a, b, alpha=3), None, None),
    "rsub": (lambda a, b: torch.rsub(a, b, alpha=2), None, None),
    "mul": (torch.mul, None, None),
    "div": (torch.div, None, (0.3, 2)),
    "div_mode_none": (lambda a, b: torch.div(a, b, rounding_mode=None), None, (0.3, 2)),
    "div_trunc": (lambda a, b: torch.div(a, b, rounding_mode="trunc"), None, (0.3, 2)),
    "div_floor": (lambda a, b: torch.div(a, b, rounding_mode="floor"), None, (0.3, 2)),
    "true_divide": (torch.true_divide, None, (-2, -0.3)),
    "pow_tensor": (torch.pow, (0.2, 2), None),
    "float_power": (torch.float_power, (0.2, 2), None),
    "atan2": (torch.atan2, None, None),
    "hypot": (torch.hypot, None, None),
    "ldexp": (torch.ldexp, None, None),
    "logaddexp": (torch.logaddexp, None, None),
    "logaddexp2": (torch.logaddexp2, None, None),
    "xlogy": (torch.xlogy, None, (0.2, 2)),
    "xlog1py": (torch.special.xlog1py, None, (-0.5, 2)),
    "copysign": (torch.copysign, None, None),
    "fmod": (torch.fmod, None, (0.3, 2)),
    "remainder": (torch.remainder, None, (0.3, 2)),
    "nextafter": (torch.nextafter, None, None),
    "heaviside": (lambda a, b: a * torch.heaviside(a.detach(), b.detach()), None, None),
    "maximum": (torch.maximum, None, None),
    "minimum": (torch.minimum, None, None),
    "fmax": (torch.fmax, None, None),
    "fmin": (torch.fmin, None, None),
    "clamp_min_tensor": (torch.clamp_min, None, None),
    "clamp_max_tensor": (torch.clamp_max, None, None),
    "clamp_tensor_one_bound": (lambda a, b: torch.clamp(a, min=b), None, None),
    "lerp_number": (lambda a, b: torch.lerp(a, b, 0.3), None, None),
    "addcmul_one": (lambda a, b: torch.addcmul(a, b, b, value=2), None, None),
    "addcdiv_one": (lambda a, b: torch.addcdiv(a, b * b, b, value=2), None, (0.3, 2)),
}
TERNARY = {
    "lerp": (torch.lerp, None, None, None),
    "addcmul": (torch.addcmul, None, None, None),
    "addcmul_value": (lambda a, b, c: torch.addcmul(a, b, c, value=-2), None, None, None),
    "addcdiv": (torch.addcdiv, None, None, (0.3, 2)),
    "addcdiv_value": (lambda a, b, c: torch.addcdiv(a, b, c, value=-2), None, None, (-2, -0.3)),
}
UNARY = {
    "add_number": (lambda x: torch.add(x, 2.5, alpha=3), None),
    "sub_number": (lambda x: x - 2.5, None),
    "rsub_number": (lambda x: 2.5 - x, None),
    "rsub_number_alpha": (lambda x: torch.rsub(x, 2.5, alpha=3), None),
    "mul_number": (lambda x: x * 2.5, None),
    "div_number": (lambda x: x / 2.5, None),
    "number_div": (lambda x: 2.5 / x, (0.3, 2)),
    "div_number_trunc": (lambda x: torch.div(x, 2.5, rounding_mode="trunc"), None),
    "add_scalar": (lambda x: aten.add.Scalar(x, 2.5, 3), None),
    "sub_scalar": (lambda x: aten.sub.Scalar(x, 2.5, 3), None),
    "mul_scalar": (lambda x: aten.mul.Scalar(x, 2.5), None),
    "div_scalar": (lambda x: aten.div.Scalar(x, 2.5), None),
    "div_scalar_none": (lambda x: aten.div.Scalar_mode(x, 2.5, rounding_mode=None), None),
    "div_scalar_floor": (lambda x: aten.div.Scalar_mode(x, 2.5, rounding_mode="floor"), None),
    "neg": (torch.neg, None),
    "neg_view": (lambda x: torch._neg_view(x), None),
    "number_pow": (lambda x: 2.5**x, None),
    "fmod_number": (lambda x: torch.fmod(x, 0.7), None),
    "remainder_number": (lambda x: torch.remainder(x, 0.7), None),
    "copysign_number": (lambda x: torch.copysign(x, -1.0), None),
    "xlogy_number": (lambda x: torch.xlogy(x, 2.5), None),
    "number_xlogy": (lambda x: torch.xlogy(2.5, x), (0.2, 2)),
    "xlog1py_number": (lambda x: torch.special.xlog1py(x, 2.5), None),
    "number_xlog1py": (lambda x: torch.special.xlog1py(2.5, x), (-0.5, 2)),
    "number_zeta": (lambda x: torch.special.zeta(2.5, x), (1, 3)),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), None),
    "clamp_one_bound": (lambda x: x.clamp(max=0.5), None),
    "clamp_min": (lambda x: torch.clamp_min(x, -0.2), None),
    "clamp_max": (lambda x: torch.clamp_max(x, 0.2), None),
    "square_as_product": (lambda x: x * x, None),
    "sum_with_itself": (lambda x: torch.add(x, x, alpha=2), None),
    "difference_with_itself": (lambda x: x - x, None),
    "rsub_with_itself": (lambda x: torch.rsub(x, x, alpha=2), None),
    "quotient_with_itself": (lambda x: x / x, (0.3, 2)),
    "lerp_with_itself": (lambda x: torch.lerp(x, x, x), None),
    "lerp_number_with_itself": (lambda x: torch.lerp(x, x, 0.3), None),
    "pow_with_itself": (lambda x: x**x, (0.3, 2)),
    "addcmul_with_itself": (lambda x: torch.addcmul(x, x, x, value=2), None),
    "addcdiv_with_itself": (lambda x: torch.addcdiv(x, x, x.exp(), value=2), None),
    "atan2_with_itself": (lambda x: torch.atan2(x, x), (0.3, 2)),
    "where_with_itself": (lambda x: torch.where(x.detach() > 0, x, x), None),
    "maximum_with_itself": (lambda x: torch.maximum(x, x), None),
    "fmax_with_itself": (lambda x: torch.fmax(x, x), None),
    "clamp_with_itself": (lambda x: torch.clamp(x, x, x), None),
    "remainder_with_itself": (lambda x: torch.remainder(x, x), (0.3, 2)),
}

for _name, (_function, *_bounds) in {**BINARY, **TERNARY, **UNARY}.items():
    _add(_name, _function, *_bounds)


@case(examples=12)
def pow_number(d: Draw) -> Built:
    n = d.choice(0, 1, 2, 3, -1, -2, 0.5, -0.5, 1.5, 2.5, 4)
    return lambda x: x**n, [d.tensor(*d.shape(0), low=0.2, high=2)]


@case
def pow_of_any_sign(d: Draw) -> Built:
    n = d.choice(0, 1, 2, 3, -1, -2, 4)
    return lambda x: x**n, [d.tensor(*d.shape())]


@case
def pow_zero_exponents(d: Draw) -> Built:
    exponents = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=d.dtype)
    return torch.pow, [d.tensor(*d.shape(), 4), exponents]


@case
def zeta(d: Draw) -> Built:
    return torch.special.zeta, [d.tensor(3, low=2, high=4, grad=False), d.tensor(2, 3, low=1, high=3)]


@case
def igamma(d: Draw) -> Built:
    return torch.igamma, [d.tensor(3, low=1, high=4, grad=False), d.tensor(2, 3, low=1, high=3)]


@case
def igammac(d: Draw) -> Built:
    return torch.igammac, [d.tensor(3, low=1, high=4, grad=False), d.tensor(2, 3, low=1, high=3)]


@case
def ties(d: Draw) -> Built:
    """Where both are equal, torch's own subgradient counts."""

    def function(x, y):
        pairs = [torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.clamp_min, torch.clamp_max]
        return [f(x, y) for f in pairs] + [torch.clamp(x, y, y)]

    shape = d.shape()
    x = d.tensor(*shape).detach().requires_grad_()
    return function, [x, torch.where(d.mask(*shape), x.detach(), 0).requires_grad_()]


@case
def clamp_tensor(d: Draw) -> Built:
    n, m = d.sizes(2)
    low, high = d.choice([n, m], [m], []), d.choice([n, m], [1, m], [])
    return torch.clamp, [d.tensor(n, m), d.tensor(*low, low=-2, high=0), d.tensor(*high, low=-0.5, high=2)]


@case
def where(d: Draw) -> Built:
    a, b, c = shapes(d, 3)
    mask = d.mask(*a)
    return lambda x, y: torch.where(mask, x, y), [d.tensor(*b), d.tensor(*c)]


@case
def where_number(d: Draw) -> Built:
    mask = d.mask(*d.shape())
    return lambda x: torch.where(mask, x, 2.5), [d.tensor(*mask.shape)]


@case
def masked_fill(d: Draw) -> Built:
    shape = d.shape()
    mask = d.mask(*shape)
    return lambda x: x.masked_fill(mask, 2.5), [d.tensor(*shape)]


@case
def masked_fill_tensor(d: Draw) -> Built:
    shape = d.shape()
    mask = d.mask(*shape)
    return lambda x, value: x.masked_fill(mask, value), [d.tensor(*shape), d.tensor()]


@case
def in_place(d: Draw) -> Built:
    """The same nodes, recorded by methods that overwrite their input."""

    def function(x, y):
        z = x.clone().add_(y).mul_(y).sub_(y, alpha=2).div_(y + 3).pow_(2).add_(1.5).mul_(0.5).neg_()
        return z.addcmul_(x, y).clamp_(-3, 3).lerp_(y, 0.2)

    shape = d.shape()
    return function, [d.tensor(*shape), d.tensor(*shape, low=-1, high=1)]


@case
def mixed_dtypes(d: Draw) -> Built:
    """Integers and half precision beside floating point."""
    n = torch.tensor([1, 2, 3])

    def function(x):
        return [x * n, x + n, n / (x.square() + 1), x**n, x / n, torch.where(n > 1, x, n)]

    return function, [d.tensor(2, 3)]
