"""Normalisations, in each mode and by each of their nodes."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Built, Draw, add_case, case, of_module

aten = torch.ops.aten

# Nodes of other devices or versions, with the reason; their rules are those of nodes that are recorded here.
ELSEWHERE_NORMALIZATION = {
    "CudnnBatchNormBackward0": "CUDA with cuDNN; saves what NativeBatchNormBackward0 saves",
    "MiopenBatchNormBackward0": "ROCm; saves what NativeBatchNormBackward0 saves",
    "FusedRmsNormBackward0": "CUDA and MPS; tests/test_normalization.py calls its rule",
}


def statistics(d: Draw, c: int) -> list[torch.Tensor]:
    return [d.tensor(c, grad=False), d.tensor(c, low=0.5, high=2, grad=False)]


def batch(d: Draw) -> list[torch.Tensor]:
    """Input, weight and bias; at least two entries a channel."""
    c = d.integer(1, 3)
    shape = [d.integer(2, 4), c, *d.sizes(d.integer(0, 2), 2, 3)]
    return [d.tensor(*shape), *d.choice([d.tensor(c), d.tensor(c)], [None, None])]


@case
def batch_norm(d: Draw) -> Built:
    x, w, b = batch(d)
    running = statistics(d, x.shape[1])
    training, eps = d.boolean(), d.choice(1e-5, 0.1)
    kept = running if not training or d.boolean() else [None, None]

    def function(x, w, b):
        mean, var = (None if t is None else t.clone() for t in kept)
        return F.batch_norm(x, mean, var, w, b, training, 0.1, eps)

    return function, [x, w, b]


def _add_batch_norm(name, function):
    def build(d: Draw) -> Built:
        x, w, b = batch(d)
        if w is None:
            w, b = d.tensor(x.shape[1]), d.tensor(x.shape[1])
        mean, var = statistics(d, x.shape[1])
        return lambda x, w, b: function(x, w, b, mean.clone(), var.clone())[0], [x, w, b]

    add_case(name, build)


_add_batch_norm("batch_norm_legit", lambda x, w, b, m, v: aten._native_batch_norm_legit(x, w, b, m, v, True, 0.1, 1e-5))
_add_batch_norm("batch_norm_no_stats", lambda x, w, b, m, v: aten._native_batch_norm_legit(x, w, b, True, 0.1, 1e-5))
_add_batch_norm(
    "batch_norm_no_training", lambda x, w, b, m, v: aten._native_batch_norm_legit_no_training(x, w, b, m, v, 0.1, 1e-5)
)
_add_batch_norm("batch_norm_update", lambda x, w, b, m, v: aten._batch_norm_with_update(x, w, b, m, v, 0.1, 1e-5))
_add_batch_norm("batch_norm_no_update", lambda x, w, b, m, v: aten._batch_norm_no_update(x, w, b, m, v, 0.1, 1e-5))


@case
def instance_norm(d: Draw) -> Built:
    n, c, t = d.integer(1, 3), d.integer(1, 3), d.integer(2, 4)
    w, b = d.choice((d.tensor(c), d.tensor(c)), (None, None))
    return lambda x, w, b: F.instance_norm(x, weight=w, bias=b), [d.tensor(n, c, t), w, b]


@case
def layer_norm(d: Draw) -> Built:
    normalized = d.sizes(d.integer(1, 2), 2, 4)
    eps = d.choice(1e-5, 0.1)
    w, b = (d.choice(d.tensor(*normalized), None) for _ in range(2))
    inputs = [d.tensor(*d.shape(0, 2), *normalized), w, b]
    return lambda x, w, b: F.layer_norm(x, normalized, w, b, eps), inputs


@case
def group_norm(d: Draw) -> Built:
    groups, per_group = d.sizes(2, 1, 3)
    c = groups * per_group
    w, b = d.choice((d.tensor(c), d.tensor(c)), (None, None))
    inputs = [d.tensor(d.integer(1, 3), c, *d.sizes(d.integer(1, 2), 2, 3)), w, b]
    return lambda x, w, b: F.group_norm(x, groups, w, b, 0.1), inputs


@case
def rms_norm_in_steps(d: Draw) -> Built:
    return of_module(d, nn.RMSNorm(3), d.tensor(*d.shape(1, 2), 3))


@case
def local_response_norm(d: Draw) -> Built:
    size = d.integer(1, 4)
    return lambda x: F.local_response_norm(x, size, 0.5), [d.tensor(2, *d.shape(2, 3))]


# PyTorch's second derivative of this node is wrong: it holds the norm fixed.
@case(twin=lambda v, g: v * (g / v.norm(dim=(1, 2), keepdim=True)))
def weight_norm_first(d: Draw) -> Built:
    o, i, k = d.sizes(3)
    return lambda v, g: torch._weight_norm_interface(v, g, 0)[0], [d.tensor(o, i, k), d.tensor(o, 1, 1)]


@case(twin=lambda v, g: v * (g / v.norm(dim=0, keepdim=True)))
def weight_norm_last(d: Draw) -> Built:
    o, i = d.sizes(2)
    return lambda v, g: torch._weight_norm_interface(v, g, 1)[0], [d.tensor(o, i), d.tensor(1, i)]


@case
def weight_norm(d: Draw) -> Built:
    module = nn.utils.parametrizations.weight_norm(nn.Linear(*d.sizes(2, 2)), dim=d.choice(0, 1, -1, None))
    return of_module(d, module, d.tensor(2, module.in_features))


@case
def weight_norm_conv(d: Draw) -> Built:
    module = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2), dim=d.choice(0, 1, 2))
    return of_module(d, module, d.tensor(2, 2, 4))


@case
def spectral_norm(d: Draw) -> Built:
    module = nn.utils.parametrizations.spectral_norm(nn.Linear(*d.sizes(2, 2))).eval()
    return of_module(d, module, d.tensor(2, module.in_features))
