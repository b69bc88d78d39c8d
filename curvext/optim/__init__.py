"""Optimizers, each a ``torch.optim.Optimizer``."""

from .adahesscale import AdaHesScale as AdaHesScale
from .base import ClosureOptimizer as ClosureOptimizer
from .batches import Subsample as Subsample
from .curveball import CurveBall as CurveBall
from .diag_gauss_newton import DiagGaussNewton as DiagGaussNewton
from .gauss_newton_cg import GaussNewtonCG as GaussNewtonCG
from .gradient_descent import GradientDescent as GradientDescent
from .hessian_free import HessianFree as HessianFree
from .kfac import KFAC as KFAC
from .lagged import Lagged as Lagged
from .lbfgs import LBFGS as LBFGS
from .newton_cg import NewtonCG as NewtonCG
from .precondition import DiagonalPreconditioner as DiagonalPreconditioner
from .precondition import FisherPreconditioner as FisherPreconditioner
from .precondition import HierarchicalPreconditioner as HierarchicalPreconditioner
from .precondition import KroneckerPreconditioner as KroneckerPreconditioner
from .saddle_free import SaddleFreeNewton as SaddleFreeNewton
from .scaling import ScaledStep as ScaledStep
from .search import Report as Report
