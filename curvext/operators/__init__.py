"""Matrix-free linear operators: ``Hessian(model, loss, data) @ v``, structured operators, and their algebra."""

from .base import Operator as Operator
from .space import Space as Space
from .structured import BlockDiagonal as BlockDiagonal
from .structured import Dense as Dense
from .structured import Diagonal as Diagonal
from .structured import Identity as Identity
from .structured import Kronecker as Kronecker
from .structured import LowRank as LowRank
