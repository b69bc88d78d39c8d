"""Products of two tensors."""

import torch
import torch.nn.functional as F

from . import Built, Draw, case


@case
def linear(d: Draw) -> Built:
    i, o = d.sizes(2)
    return F.linear, [d.tensor(*d.shape(1, 3), i), d.tensor(o, i), d.tensor(o)]


@case
def matmul(d: Draw) -> Built:
    b, n, k, m = d.sizes(4)
    return torch.matmul, [d.tensor(b, n, k), d.tensor(b, k, m)]
