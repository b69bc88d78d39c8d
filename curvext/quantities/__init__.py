"""What users ask for."""

from .base import Quantity as Quantity
from .base import WholeGraph as WholeGraph
from .diagonal import BL89 as BL89
from .diagonal import HesScale as HesScale
from .hessian import DiagHessian as DiagHessian
