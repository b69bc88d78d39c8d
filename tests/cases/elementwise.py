"""Functions of one entry."""

import torch

from . import Built, Draw, add_case

UNARY = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "exp": torch.exp}
POSITIVE = {"log": torch.log}


def _add(name, function, **bounds):
    def build(d: Draw) -> Built:
        return function, [d.tensor(*d.shape(), **bounds)]

    add_case(name, build)


for _name, _function in UNARY.items():
    _add(_name, _function)
for _name, _function in POSITIVE.items():
    _add(_name, _function, low=0.1, high=3)
