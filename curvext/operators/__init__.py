"""Matrix-free linear operators: ``Hessian(model, loss, data) @ v``, structured operators, and their algebra."""

from .. import rules as rules  # first: what operators use needs the rules
from ..hierarchical.hodlr import HierarchicalOperator as HierarchicalOperator
from .base import Operator as Operator
from .base import Readable as Readable
from .curvature import EmpiricalFisher as EmpiricalFisher
from .curvature import Fisher as Fisher
from .curvature import GaussNewton as GaussNewton
from .curvature import Hessian as Hessian
from .curvature import Jacobian as Jacobian
from .curvature import Residual as Residual
from .factored import FactoredGaussNewton as FactoredGaussNewton
from .kronecker_sum import KroneckerSum as KroneckerSum
from .space import Space as Space
from .structured import BlockDiagonal as BlockDiagonal
from .structured import Dense as Dense
from .structured import Diagonal as Diagonal
from .structured import Identity as Identity
from .structured import Kronecker as Kronecker
from .structured import KroneckerBlock as KroneckerBlock
from .structured import LowRank as LowRank
