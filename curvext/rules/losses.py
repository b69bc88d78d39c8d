"""Losses that autograd records as one node."""

from __future__ import annotations

from .structure import scaling

scaling("NllLossBackward0", "NllLoss2DBackward0")
