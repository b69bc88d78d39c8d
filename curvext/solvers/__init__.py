"""Iterative solvers, one algorithm a file: ``solve(operator, b, ...) -> Solution``; line searches and damping rules."""

from .block_lanczos import Eigenpairs as Eigenpairs
from .block_lanczos import block_lanczos as block_lanczos
from .cg import Martens as Martens
from .cg import cg as cg
from .damping import Constant as Constant
from .damping import LevenbergMarquardt as LevenbergMarquardt
from .damping import reduction_ratio as reduction_ratio
from .lanczos import Krylov as Krylov
from .lanczos import lanczos as lanczos
from .line_search import Armijo as Armijo
from .line_search import FullStep as FullStep
from .line_search import Step as Step
from .line_search import StrongWolfe as StrongWolfe
from .line_search import backtrack as backtrack
from .lsmr import lsmr as lsmr
from .minres import minres as minres
from .neumann import neumann as neumann
from .saddle_free import KrylovSolution as KrylovSolution
from .saddle_free import saddle_free as saddle_free
from .saddle_free_series import SeriesSolution as SeriesSolution
from .saddle_free_series import saddle_free_series as saddle_free_series
from .solution import Solution as Solution
