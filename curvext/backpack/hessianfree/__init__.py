"""Products with Jacobians, Hessians and Gauss-Newton matrices, by autograd alone."""
