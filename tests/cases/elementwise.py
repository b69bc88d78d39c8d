"""Functions of one entry."""

import torch

from . import Built, Draw, add_case, case

# Each with the range of its inputs (None: normal entries).
UNARY = {
    "exp": (torch.exp, None),
    "exp2": (torch.exp2, None),
    "expm1": (torch.expm1, None),
    "log": (torch.log, (0.1, 3)),
    "log1p": (torch.log1p, (-0.9, 3)),
    "log2": (torch.log2, (0.1, 3)),
    "log10": (torch.log10, (0.1, 3)),
    "sqrt": (torch.sqrt, (0.1, 3)),
    "rsqrt": (torch.rsqrt, (0.1, 3)),
    "reciprocal": (torch.reciprocal, (0.2, 3)),
    "sin": (torch.sin, None),
    "cos": (torch.cos, None),
    "tan": (torch.tan, (-1, 1)),
    "sinh": (torch.sinh, None),
    "cosh": (torch.cosh, None),
    "tanh": (torch.tanh, None),
    "asin": (torch.asin, (-0.9, 0.9)),
    "acos": (torch.acos, (-0.9, 0.9)),
    "atan": (torch.atan, None),
    "asinh": (torch.asinh, None),
    "acosh": (torch.acosh, (1.1, 3)),
    "atanh": (torch.atanh, (-0.9, 0.9)),
    "sigmoid": (torch.sigmoid, None),
    "erf": (torch.erf, None),
    "erfc": (torch.erfc, None),
    "erfinv": (torch.erfinv, (-0.9, 0.9)),
    "lgamma": (torch.lgamma, (0.2, 3)),
    "digamma": (torch.digamma, (0.5, 3)),
    "abs": (torch.abs, None),
    "angle": (torch.angle, None),
    "sgn": (torch.sgn, None),
    "sign": (torch.sign, None),
    "frac": (torch.frac, None),
    "floor": (torch.floor, None),
    "ceil": (torch.ceil, None),
    "trunc": (torch.trunc, None),
    "round": (torch.round, None),
    "round_decimals": (lambda x: torch.round(x, decimals=1), None),
    "deg2rad": (torch.deg2rad, None),
    "rad2deg": (torch.rad2deg, None),
    "nan_to_num": (torch.nan_to_num, None),
    "sinc": (torch.sinc, None),
    "logit": (torch.logit, (0.1, 0.9)),
    "logit_eps": (lambda x: torch.logit(x, 0.3), (0.1, 0.9)),
    "i0": (torch.i0, (0.1, 2)),
    "i0e": (torch.special.i0e, (0.1, 2)),
    "i1": (torch.special.i1, (0.1, 2)),
    "i1e": (torch.special.i1e, (0.1, 2)),
    "entr": (torch.special.entr, (0.1, 2)),
    "erfcx": (torch.special.erfcx, None),
    "ndtr": (torch.special.ndtr, None),
    "log_ndtr": (torch.special.log_ndtr, (-3, 1)),
    "ndtri": (torch.special.ndtri, (0.1, 0.9)),
    "positive": (torch.positive, None),
    "square": (torch.square, None),
    "frexp": (lambda x: torch.frexp(x)[0], None),
    "conj": (lambda x: x.conj().resolve_conj() * 2, None),
}

IN_PLACE = ["exp", "sqrt", "tanh", "sigmoid", "reciprocal", "sin", "abs", "square", "nan_to_num"]


def _add(name, function, bounds):
    low, high = bounds or (None, None)

    def build(d: Draw) -> Built:
        return function, [d.tensor(*d.shape(0), low=low, high=high)]

    add_case(name, build)


for _name, (_function, _bounds) in UNARY.items():
    _add(_name, _function, _bounds)
for _name in IN_PLACE:
    _add(f"{_name}_", (lambda f: lambda x: f(x.clone()))(getattr(torch.Tensor, f"{_name}_")), UNARY[_name][1])


@case
def polygamma(d: Draw) -> Built:
    n, in_place = d.integer(0, 3), d.boolean()

    def function(x):
        return x.clone().polygamma_(n) if in_place else torch.polygamma(n, x)

    return function, [d.tensor(*d.shape(), low=0.8, high=3)]


@case
def polygamma_(d: Draw) -> Built:
    return lambda x: x.clone().polygamma_(1), [d.tensor(*d.shape(), low=0.8, high=3)]


@case
def mvlgamma(d: Draw) -> Built:
    p = d.integer(1, 3)
    return lambda x: torch.mvlgamma(x, p), [d.tensor(*d.shape(), low=1.5, high=4)]


@case
def at_their_kinks(d: Draw) -> Built:
    """Zero is a kink, or a zero of the slope: torch's own subgradient counts."""

    def function(x):
        return [torch.relu(x), x.abs(), torch.nn.functional.leaky_relu(x), x**3, x.clamp(0, 1), x.sgn(), x.square()]

    return function, [torch.zeros(d.shape(), dtype=d.dtype, requires_grad=True)]


@case
def without_derivative(d: Draw) -> Built:
    """Random fills and comparisons in place: the gradient is zero."""
    generator = torch.Generator().manual_seed(0)

    def function(x, y):
        fills = [
            lambda: torch.bernoulli(x.sigmoid(), generator=generator),
            lambda: x.clone().bernoulli_(y.detach().sigmoid(), generator=generator),
            lambda: x.clone().bernoulli_(0.5, generator=generator),
            lambda: x.clone().cauchy_(generator=generator),
            lambda: x.clone().exponential_(generator=generator),
            lambda: x.clone().geometric_(0.5, generator=generator),
            lambda: x.clone().log_normal_(generator=generator),
            lambda: x.clone().normal_(generator=generator),
            lambda: torch.normal(x, 1.0, generator=generator),
            lambda: torch.normal(0.0, x.exp(), generator=generator),
            lambda: torch.normal(x, y.exp(), generator=generator),
            lambda: torch.poisson(x.exp(), generator=generator),
            lambda: x.clone().random_(1, 5, generator=generator),
            lambda: x.clone().random_(5, generator=generator),
            lambda: x.clone().random_(generator=generator),
            lambda: x.clone().uniform_(generator=generator),
        ]
        compared = [
            f for name in ("eq", "ge", "gt", "le", "lt", "ne") for f in (_compare(name, x, 0), _compare(name, x, y))
        ]
        return [f() for f in fills + compared]

    shape = d.shape()
    return function, [d.tensor(*shape), d.tensor(*shape)]


def _compare(name, x, other):
    return lambda: getattr(x.clone(), f"{name}_")(other)


@case
def fake_quantize(d: Draw) -> Built:
    scale, zero = torch.tensor(0.1), torch.tensor(0, dtype=torch.int32)
    n = d.integer(1, 4)

    def function(x):
        return [
            torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
            torch.fake_quantize_per_tensor_affine(x, scale, zero, -8, 7),
            torch.fake_quantize_per_channel_affine(
                x, torch.full((n,), 0.1), torch.zeros(n, dtype=torch.int32), 0, -8, 7
            ),
        ]

    return function, [d.tensor(n, d.integer(1, 4))]


@case
def fused_fake_quantize(d: Draw) -> Built:
    n = d.integer(1, 4)

    def function(x):
        one, low, high = torch.ones(1), torch.full((1,), -1.0), torch.ones(1)
        scale, zero = torch.full((1,), 0.1), torch.zeros(1, dtype=torch.int32)
        return torch.fused_moving_avg_obs_fake_quant(
            x.float(),
            one.long(),
            one.long(),
            low,
            high,
            scale,
            zero,
            averaging_const=0.01,
            quant_min=-8,
            quant_max=7,
            ch_axis=0,
        )

    return function, [d.tensor(n, d.integer(1, 4))]
