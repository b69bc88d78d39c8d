"""What users ask for."""

from ..wave import Wave as Wave
from .base import Carried as Carried
from .base import Quantity as Quantity
from .base import Target as Target
from .base import WholeGraph as WholeGraph
from .diagonal import BL89 as BL89
from .diagonal import HesScale as HesScale
from .ggn import BatchDiagGGNExact as BatchDiagGGNExact
from .ggn import BatchDiagGGNMC as BatchDiagGGNMC
from .ggn import DiagGGNExact as DiagGGNExact
from .ggn import DiagGGNMC as DiagGGNMC
from .ggn import GGNBlock as GGNBlock
from .ggn import SqrtGGNExact as SqrtGGNExact
from .ggn import SqrtGGNMC as SqrtGGNMC
from .gradients import BatchDotGrad as BatchDotGrad
from .gradients import BatchGrad as BatchGrad
from .gradients import BatchL2Grad as BatchL2Grad
from .gradients import SumGradSquared as SumGradSquared
from .gradients import Variance as Variance
from .hessian import DiagHessian as DiagHessian
from .kfra import KFRA as KFRA
from .kronecker import EKFAC as EKFAC
from .kronecker import KFAC as KFAC
from .kronecker import KFLR as KFLR
