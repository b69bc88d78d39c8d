"""Complex tensors inside real functions."""

import torch

from . import Built, Draw, add_case, case

aten, fft = torch.ops.aten, torch.fft


def _complex(x):
    """A complex tensor from a leaf with a last dimension of two."""
    return torch.view_as_complex(x)


def _real(y):
    return torch.view_as_real(y) if y.is_complex() else y


UNARY = {
    "abs": torch.abs, "acos": torch.acos, "acosh": torch.acosh, "angle": torch.angle, "asin": torch.asin,
    "asinh": torch.asinh, "atan": torch.atan, "atanh": torch.atanh, "cos": torch.cos, "cosh": torch.cosh,
    "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "log2": torch.log2, "log10": torch.log10,
    "neg": torch.neg, "reciprocal": torch.reciprocal, "rsqrt": torch.rsqrt, "sgn": torch.sgn,
    "sigmoid": torch.sigmoid, "sin": torch.sin, "sinh": torch.sinh,
    "sqrt": torch.sqrt, "square": torch.square, "tan": torch.tan, "tanh": torch.tanh,
    "conj": lambda z: z.conj() * 2, "conj_physical": torch.conj_physical, "resolved": lambda z: z.conj().resolve_conj(),
    "conj_physical_": lambda z: z.clone().conj_physical_(),
    "neg_view": lambda z: torch._neg_view(z) * 2,
    "imag_of_conj": lambda z: z.conj().imag * 2, "real": lambda z: z.real * 2, "sum": torch.sum,
    "mean": torch.mean, "mean_dim": lambda z: z.mean(0), "power": lambda z: z**3, "base": lambda z: 2**z,
    "own_power": lambda z: z**z, "own_product": lambda z: z * z, "shifted": lambda z: 1 - z + z * 2j,
    "rsub": lambda z: torch.rsub(z, 2j), "divided": lambda z: z / 2j + 3,
    "masked": lambda z: z.masked_fill(z.detach().real > 0, 0), "roll": lambda z: z.roll(1), "diagonal": torch.diagonal,
    "written": lambda z: torch.where(z.detach().real > 0, z, z * 2), "added_in_place": lambda z: (z * 1).add_(1j),
}  # fmt: skip
BINARY = {
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "add": lambda a, b: torch.add(a, b, alpha=2j),
    "sub": lambda a, b: torch.sub(a, b, alpha=0.5),
    "rsub": lambda a, b: torch.rsub(a, b),
    "pow": lambda a, b: a**b,
    "where": lambda a, b: torch.where(a.detach().real > 0, a, b),
    "matmul": lambda a, b: a @ b.mT,
    "bmm": lambda a, b: torch.bmm(a[None], b.mT[None]),
    "addmm": lambda a, b: torch.addmm(a[:, :2], a, b.mT, beta=2j, alpha=1 - 0.5j),
    "scalars": lambda a, b: aten.add.Scalar(aten.mul.Scalar(a, 2j), 1j) - aten.div.Scalar(b, 2j),
}
FFT = {
    "fft": lambda z: [fft.fft(z), fft.fft(z, dim=0, norm="ortho"), fft.ifft(z), fft.fft(z, n=7)],
    "fft2": lambda z: [fft.fft2(z), fft.ifft2(z, norm="ortho"), fft.fftn(z, dim=(0,), norm="forward")],
    "irfft": lambda z: [fft.irfft(z), fft.irfft(z, n=5), fft.irfft(z, n=4, dim=0, norm="ortho"), fft.irfft2(z)],
    "hfft": lambda z: [fft.hfft(z), fft.irfftn(z, s=(3, 5), norm="forward")],
}
REAL_FFT = {
    "rfft": lambda x: [fft.rfft(x), fft.rfft(x, dim=0, norm="ortho"), fft.rfft2(x), fft.rfftn(x, norm="forward")],
    "fft_of_real": lambda x: [fft.fft(x), fft.fft2(x).real, fft.ihfft(x).resolve_conj()],
}
for _name, _function in UNARY.items():
    add_case(
        f"complex_{_name}",
        lambda d, f=_function: (lambda x: _real(f(_complex(x))), [d.tensor(3, 3, 2)]),
        examples=2,
    )
for _name, _function in BINARY.items():
    add_case(
        f"complex_{_name}_",
        lambda d, f=_function: (
            lambda x, y: _real(f(_complex(x), _complex(y))),
            [d.tensor(2, 3, 2), d.tensor(2, 3, 2)],
        ),
        examples=2,
    )
for _name, _function in FFT.items():
    add_case(
        f"complex_{_name}",
        lambda d, f=_function: (lambda x: [_real(y) for y in f(_complex(x))], [d.tensor(*d.sizes(2, 2, 5), 2)]),
    )
for _name, _function in REAL_FFT.items():
    add_case(
        f"complex_{_name}",
        lambda d, f=_function: (lambda x: [_real(y) for y in f(x)], [d.tensor(*d.sizes(2, 2, 5))]),
    )


@case
def complex_from_parts(d: Draw) -> Built:
    size = d.shape(1, 2)
    return lambda a, b: _real(torch.complex(a, b)), [d.tensor(*size), d.tensor(*size)]


@case
def complex_polar(d: Draw) -> Built:
    size = d.shape(1, 2)
    return lambda a, b: _real(torch.polar(a, b)), [d.tensor(*size), d.tensor(*size)]


@case
def complex_rotary(d: Draw) -> Built:
    """Rotary embedding as Llama's own code has it."""
    angles = torch.polar(torch.ones(3, 2, dtype=d.dtype), d.tensor(3, 2, grad=False))
    return lambda x: _real(_complex(x.unflatten(-1, (-1, 2))) * angles).flatten(-2), [d.tensor(2, 3, 4)]


@case
def complex_copies(d: Draw) -> Built:
    return lambda x: [_complex(x).to(torch.complex128).abs(), torch.view_as_real_copy(_complex(x))], [d.tensor(3, 2)]
