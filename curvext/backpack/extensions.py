"""BackPACK's extensions by name: curvext's quantities, which have its attributes, shapes and scaling."""

from dataclasses import dataclass

from .. import quantities
from ..quantities import KFAC as KFAC
from ..quantities import KFLR as KFLR
from ..quantities import KFRA as KFRA
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


@dataclass(frozen=True)
class GGNMP(quantities.GGNMP):
    """:class:`curvext.GGNMP`, saved under a name of one's own."""

    savefield: str = "ggnmp"  # type: ignore[misc]


@dataclass(frozen=True)
class HMP(quantities.HMP):
    """:class:`curvext.HMP`, saved under a name of one's own."""

    savefield: str = "hmp"  # type: ignore[misc]


@dataclass(frozen=True)
class PCHMP(quantities.PCHMP):
    """:class:`curvext.PCHMP`, saved under a name of one's own, so that both of its kinds fit into one block."""

    savefield: str = "pchmp"  # type: ignore[misc]
