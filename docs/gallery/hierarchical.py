"""Where do hierarchical blocks pay? A small classifier and a field of spatially local parameters.

The field's Gauss-Newton matrix is of rank two off the diagonal, at every level, and HODLR finds it exactly; low rank
across the whole has to resolve every wave of the field. The classifier's top eigenvectors run across all layers, and
there it is the other way round. `auto` finds out. With the inverse exact, the field is fitted by direct Gauss-Newton
steps, and its standard deviations are read off; for the classifier they are refused, but solves remain exact.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from curvext import CurvatureError
from curvext.operators import Dense, GaussNewton, HierarchicalOperator
from curvext.posterior import Sensitivity
from curvext.solvers import cg

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from problems import classifier, field

FORMATS = {"lowrank": "low rank + diagonal", "hodlr": "HODLR", "nested": "nested", "auto": "auto"}
FLOATS = (16, 32, 64)  # a row
build = HierarchicalOperator.from_operator


def compared(a: torch.Tensor) -> dict:
    """Errors and iterations of conjugate gradients at a damping of λ_max / 1000, by format, for every memory."""
    damping, b = 1e-3 * float(torch.linalg.eigvalsh(a)[-1]), torch.randn(len(a), dtype=a.dtype)
    found: dict = {"none": cg(a, b, damping=damping, tolerance=1e-6).steps}
    for name in FORMATS:
        found[name] = errors, steps = [], []
        options = {"format": name, "max_products": 10 * len(a)} | ({"shift": damping} if name == "auto" else {})
        for floats in FLOATS:
            near = build(a, max_bytes=8 * floats * len(a), **options)
            errors.append(float((near.to_dense() - a).norm() / a.norm()))
            inverse = near.factor(damping, compensate=True)
            steps.append(cg(a, b, damping=damping, preconditioner=inverse, tolerance=1e-6).steps)
    return found


torch.manual_seed(0)
problems = {"classifier": classifier(6), "field": field(512)}
operators = {name: GaussNewton(p.model, p.loss, p.data) for name, p in problems.items()}
problems["classifier"].train(300)
found = {name: compared(g.to_dense()) for name, g in operators.items()}
for name, results in found.items():
    for label, (errors, steps) in ((FORMATS[k], v) for k, v in results.items() if k != "none"):
        print(f"{name:10} {label:19} error {errors[0]:.1e} -> {errors[-1]:.1e}, {steps[0]} -> {steps[-1]} iterations")
    print(f"{name:10} {'none':19} {results['none']} iterations")

at32 = {name: {k: results[k][0][1] for k in FORMATS} for name, results in found.items()}
assert at32["field"]["hodlr"] < 1e-10 < at32["field"]["lowrank"] and found["field"]["auto"][1][1] <= 3
assert at32["classifier"]["lowrank"] < at32["classifier"]["hodlr"]

# The field by half Gauss-Newton steps with the factored approximation; Gaussian noise and prior
problem, noise, width = problems["field"], 0.01, 0.5
theta, count = problem.model.field, len(problem.data[1])
damping = 2 * noise**2 / (count * width**2)  # the prior's precision, for the Hessian of a mean of squares
for _ in range(12):
    gradient = torch.autograd.grad(problem.value(), theta)[0] + damping * theta.detach()
    near = build(operators["field"], 1e-8)
    with torch.no_grad():
        theta -= 0.5 * near.factor(damping).solve(gradient)
near = build(operators["field"], 1e-8)
deviations = (2 * noise**2 / count) ** 0.5 * Sensitivity(operators["field"], damping, near).standard_deviations()
exact = Dense(operators["field"].to_dense(), symmetric=True).inverse(damping).to_dense().diagonal()
torch.testing.assert_close(deviations, (2 * noise**2 / count * exact).sqrt(), rtol=1e-6, atol=0)

# The classifier's approximation is too rough for that, and says so; with it as preconditioner solves are exact
g = operators["classifier"]
near = build(g, max_bytes=8 * 32 * g.shape[0], format="auto", max_products=10**4)
rough, b = Sensitivity(g, 1e-3, near), torch.randn(g.shape[0], dtype=torch.float64)
assert (g @ (x := rough.solve(b)) + 1e-3 * x - b).norm() < 1e-7 * b.norm()
try:
    rough.standard_deviations()
except CurvatureError as error:
    print(f"classifier: {error}")

figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
for column, (name, results) in zip(axes.T, found.items(), strict=True):
    for key, label in FORMATS.items():
        for ax, values in zip(column, results[key], strict=True):
            ax.plot(FLOATS, values, marker="o", label=label)
    column[0].set(title=f"{name}, n = {operators[name].shape[0]}", ylabel="relative error", yscale="log")
    column[1].axhline(results["none"], color="grey", linestyle=":", label="without")
    column[1].set(xlabel="floats a row", ylabel="CG iterations")
axes[1, 0].legend()
figure.savefig("hierarchical.png", dpi=120)

figure, ax = plt.subplots(figsize=(10, 3), layout="constrained")
places, estimate = torch.arange(len(theta)), theta.detach()
ax.fill_between(
    places, estimate - 2 * deviations, estimate + 2 * deviations, alpha=0.3, label="two standard deviations"
)
ax.plot(places, estimate, label="field")
ax.plot(problem.data[0], torch.full((count,), float(estimate.min()) - 1), "|", color="grey", label="measured here")
ax.legend(ncols=3)
figure.savefig("field.png", dpi=120)
