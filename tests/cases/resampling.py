"""Interpolation and sampling on a grid."""

import torch
import torch.nn.functional as F

from . import Built, Draw, add_case, case

ELSEWHERE_RESAMPLING = {
    "CudnnAffineGridGeneratorBackward0": "cuDNN",
    "CudnnGridSamplerBackward0": "cuDNN",
    "GridSampler2DCpuFallbackBackward0": "recorded for quantized and very large images alone",
}


def _interpolate(mode, dims, **options):
    def build(d: Draw) -> Built:
        kwargs = dict(options)
        if mode not in ("nearest", "nearest-exact") and not kwargs:
            kwargs["align_corners"] = d.boolean()
        if d.boolean():
            kwargs["size"] = d.sizes(dims, 1, 6 if dims < 3 else 3)
        else:
            kwargs["scale_factor"] = d.choice(0.6, 1.7, 2.0)
            kwargs["recompute_scale_factor"] = d.choice(None, True)
        size = d.sizes(dims, 2, 5 if dims < 3 else 3)
        return lambda x: F.interpolate(x, mode=mode, **kwargs), [d.tensor(1, d.integer(1, 2), *size)]

    add_case(f"interpolate_{mode}_{dims}d{'_antialias' if options else ''}", build)


for _mode, _dims in {"linear": (1,), "bilinear": (2,), "bicubic": (2,), "trilinear": (3,)}.items():
    _interpolate(_mode, _dims[0])
for _dims in (1, 2, 3):
    for _mode in ("nearest", "nearest-exact"):
        _interpolate(_mode, _dims)
for _mode in ("bilinear", "bicubic"):
    _interpolate(_mode, 2, antialias=True)


@case(examples=2)
def interpolate_lanczos(d: Draw) -> Built:
    function = getattr(torch.ops.aten, "_upsample_lanczos2d_aa", torch.ops.aten._upsample_bicubic2d_aa)
    return lambda x: function(x, (3, 7), False), [d.tensor(1, 2, 5, 4)]


def _grid(dims):
    def build(d: Draw) -> Built:
        options = {
            "mode": d.choice("bilinear", "nearest", *(["bicubic"] if dims == 2 else [])),
            "padding_mode": d.choice("zeros", "border", "reflection"),
            "align_corners": d.boolean(),
        }
        size = (d.integer(1, 2), d.integer(1, 2), *d.sizes(dims, 1, 4 if dims == 2 else 3))
        grid = d.tensor(size[0], *d.sizes(dims, 1, 3), dims, low=-1.6, high=1.6)
        return lambda x, grid: F.grid_sample(x, grid, **options), [d.tensor(*size), grid]

    add_case(f"grid_sample_{dims}d", build, examples=20)


_grid(2)
_grid(3)


@case
def affine_grid(d: Draw) -> Built:
    n, align = d.choice(2, 3), d.boolean()
    size = (d.integer(1, 2), 2, *d.sizes(n, 1, 3))
    return lambda theta: F.affine_grid(theta, size, align_corners=align), [d.tensor(size[0], n, n + 1)]


@case(examples=2)
def spatial_transformer(d: Draw) -> Built:
    def function(x, theta):
        return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)

    return function, [d.tensor(2, 2, 3, 4), d.tensor(2, 2, 3)]
