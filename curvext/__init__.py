"""Curvature rides the autograd graph: ``with extend(model): loss.backward()``."""

from . import operators as operators
from . import rules as rules
from .errors import CurvatureError as CurvatureError
from .errors import SampledOperationWarning as SampledOperationWarning
from .extend import Curvature as Curvature
from .extend import extend as extend
from .kronecker import Eigenbasis as Eigenbasis
from .kronecker import Kronecker as Kronecker
from .output import output as output
from .quantities import BL89 as BL89
from .quantities import EKFAC as EKFAC
from .quantities import GGNMP as GGNMP
from .quantities import HMP as HMP
from .quantities import KFAC as KFAC
from .quantities import KFLR as KFLR
from .quantities import KFRA as KFRA
from .quantities import NTK as NTK
from .quantities import PCHMP as PCHMP
from .quantities import BatchDiagGGNExact as BatchDiagGGNExact
from .quantities import BatchDiagGGNMC as BatchDiagGGNMC
from .quantities import BatchDiagHessian as BatchDiagHessian
from .quantities import BatchDotGrad as BatchDotGrad
from .quantities import BatchGrad as BatchGrad
from .quantities import BatchL2Grad as BatchL2Grad
from .quantities import DiagGGNExact as DiagGGNExact
from .quantities import DiagGGNMC as DiagGGNMC
from .quantities import DiagHessian as DiagHessian
from .quantities import GGNBlock as GGNBlock
from .quantities import GGNFactor as GGNFactor
from .quantities import HesScale as HesScale
from .quantities import Jacobian as Jacobian
from .quantities import SqrtGGNExact as SqrtGGNExact
from .quantities import SqrtGGNMC as SqrtGGNMC
from .quantities import SumGradSquared as SumGradSquared
from .quantities import Variance as Variance
from .registry import rule as rule
from .registry import unregister as unregister

__version__ = "0.1.0"
