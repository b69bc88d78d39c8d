"""Curvature rides the autograd graph: ``with extend(model): loss.backward()``."""

from . import rules as rules
from .errors import CurvatureError as CurvatureError
from .errors import SampledOperationWarning as SampledOperationWarning
from .extend import Curvature as Curvature
from .extend import extend as extend
from .quantities import BL89 as BL89
from .quantities import DiagHessian as DiagHessian
from .quantities import HesScale as HesScale
from .registry import rule as rule
from .registry import unregister as unregister

__version__ = "0.1.0"
