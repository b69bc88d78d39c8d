"""What curvature at a minimum says about the minimum."""

from .hess_trucks import HessTrucks as HessTrucks
from .sensitivity import Sensitivity as Sensitivity
from .swag import SWAG as SWAG
