"""BackPACK's extensions by name: curvext's quantities, which have its attributes, shapes and scaling."""

from ..quantities import GGNMP as GGNMP
from ..quantities import HMP as HMP
from ..quantities import KFAC as KFAC
from ..quantities import KFLR as KFLR
from ..quantities import KFRA as KFRA
from ..quantities import PCHMP as PCHMP
from ..quantities import BatchDiagGGNExact as BatchDiagGGNExact
from ..quantities import BatchDiagGGNMC as BatchDiagGGNMC
from ..quantities import BatchDiagHessian as BatchDiagHessian
from ..quantities import BatchGrad as BatchGrad
from ..quantities import BatchL2Grad as BatchL2Grad
from ..quantities import DiagGGNExact as DiagGGNExact
from ..quantities import DiagGGNMC as DiagGGNMC
from ..quantities import DiagHessian as DiagHessian
from ..quantities import SqrtGGNExact as SqrtGGNExact
from ..quantities import SqrtGGNMC as SqrtGGNMC
from ..quantities import SumGradSquared as SumGradSquared
from ..quantities import Variance as Variance
