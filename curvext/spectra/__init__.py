"""What the spectrum of an operator looks like, from products alone."""

from ..solvers.block_lanczos import Eigenpairs as Eigenpairs
from .density import Density as Density
from .density import density as density
from .density import effective_dimension as effective_dimension
from .density import log_determinant as log_determinant
from .diagonal import diagonal as diagonal
from .diagonal import hutchinson_diagonal as hutchinson_diagonal
from .diagonal import xdiag as xdiag
from .eigenpairs import eigenpairs as eigenpairs
from .eigenpairs import overlap as overlap
from .estimate import Estimate as Estimate
from .estimate import probes as probes
from .frobenius import frobenius_norm as frobenius_norm
from .trace import Split as Split
from .trace import hutch_pp as hutch_pp
from .trace import hutchinson as hutchinson
from .trace import split_traces as split_traces
from .trace import trace as trace
from .trace import xtrace as xtrace
