"""Optimizers, each a ``torch.optim.Optimizer``."""

from .adahesscale import AdaHesScale as AdaHesScale
