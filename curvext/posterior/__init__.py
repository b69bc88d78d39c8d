"""What curvature at a minimum says about the minimum."""

from .sensitivity import Sensitivity as Sensitivity
