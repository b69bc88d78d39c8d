"""The softmax family."""

import torch
import torch.nn.functional as F
from torch import nn

from . import Built, Draw, add_case, case, of_module

LAST = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "softmin": F.softmin,
    "safe_softmax": torch._safe_softmax,
}


def _add(name, function):
    def build(d: Draw) -> Built:
        shape = d.shape(1, 3)
        dim = d.integer(-len(shape), len(shape) - 1)
        return lambda x: function(x, dim), [d.tensor(*shape)]

    add_case(name, build)


for _name, _function in LAST.items():
    _add(_name, _function)


@case
def softmax_with_empty_rows(d: Draw) -> Built:
    n, c = d.sizes(2, 2)
    mask = d.mask(n, c)
    mask[0] = True
    return lambda x: torch._safe_softmax(x.masked_fill(mask, -torch.inf), -1), [d.tensor(n, c)]


MASK = torch.tensor([[False, True, False, False], [False, False, True, True], [False, False, False, False]])


# PyTorch cannot differentiate the node of masked softmax twice.
@case(twin=lambda x: x.masked_fill(MASK, -torch.inf).softmax(-1))
def masked_softmax(d: Draw) -> Built:
    dim = d.choice(1, None)
    return lambda x: torch._masked_softmax(x, MASK, dim, 2), [d.tensor(3, 4)]


@case
def softmax_of_images(d: Draw) -> Built:
    return nn.Softmax2d(), [d.tensor(*d.sizes(4, high=3))]


@case
def gumbel_softmax(d: Draw) -> Built:
    noise, hard = d.tensor(3, 4, grad=False), d.boolean()

    def function(x):
        y = ((x + noise) / 0.7).softmax(-1)
        return torch.zeros_like(y).scatter(-1, y.argmax(-1, True), 1.0) - y.detach() + y if hard else y

    return function, [d.tensor(3, 4)]


@case
def adaptive_log_softmax(d: Draw) -> Built:
    module = nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=1)
    return of_module(d, _WithTarget(module, d.index(6, 3)), d.tensor(3, 4))


class _WithTarget(nn.Module):
    def __init__(self, module, target):
        super().__init__()
        self.module, self.target = module, target

    def forward(self, x):
        return self.module(x, self.target).loss
