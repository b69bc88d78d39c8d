"""The spectrum of a network in training: H = F + S, matrix-free.

F is the Gauss-Newton matrix (the Fisher matrix for cross entropy) and S = H - F what the network's own curvature adds.
With squared error the largest eigenvalue of F grows after a first dip; with cross entropy it peaks and then collapses,
since the loss's Hessian in the outputs vanishes as the fit becomes exact. After training with squared error, S is the
smaller beside F the wider the network is.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from curvext import plot
from curvext.operators import GaussNewton, Hessian, Residual
from curvext.spectra import density, eigenpairs, frobenius_norm, split_traces

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images[:250], dtype=torch.float32) / 16, torch.tensor(labels[:250])
LOSSES = {"MSE": lambda z, y: mse_loss(z, one_hot(y, 10).to(z)), "CE": cross_entropy}
STEPS = (0, 10, 30, 100, 300)


def trained(width: int, loss: str) -> dict:
    """Curvature on the way, and the model at the end."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    found: dict = {"model": model, "largest": [], "vectors": [], "S/F": [], "tr S": []}
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            H, F, S = (operator(model, LOSSES[loss], (x, y)) for operator in (Hessian, GaussNewton, Residual))
            top = eigenpairs(F, 5, tolerance=1e-3)
            found["largest"].append(top.values)
            found["vectors"].append(top.vectors)
            found["S/F"].append(float(frobenius_norm(S, products=45)) / float(frobenius_norm(F, products=45)))
            found["tr S"].append(split_traces(H, F, products=30).S)
        optimizer.zero_grad()
        LOSSES[loss](model(x), y).backward()
        optimizer.step()
    return found


runs = {(loss, width): trained(width, loss) for loss in LOSSES for width in (4, 12, 32)}
for (loss, width), run in runs.items():
    sizes = " -> ".join(f"{float(values[0]):.3g}" for values in run["largest"])
    traces = " -> ".join(f"{float(t):.2g}±{float(t.error):.1g}" for t in run["tr S"])
    print(
        f"{loss:3} {width:2}: largest of F {sizes}, |S|/|F| {run['S/F'][0]:.2f} -> {run['S/F'][-1]:.3f}, tr S {traces}"
    )

for width in (4, 12, 32):
    mse, ce = (torch.stack(runs[loss, width]["largest"])[:, 0] for loss in LOSSES)
    assert mse[-1] > 1.2 * mse[0]  # squared error: it grows
    assert ce.argmax() in (1, 2, 3) and ce[-1] < 0.8 * ce.max()  # cross entropy: it peaks, and collapses
faded = [runs["MSE", width]["S/F"][-1] for width in (4, 12, 32)]
assert faded[0] > faded[1] > faded[2]  # the wider, the less S

figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
for ax, loss in zip(axes[0], LOSSES, strict=True):
    plot.eigenvalues(STEPS, runs[loss, 12]["largest"], ax).set(
        title=f"{loss}: largest eigenvalues of F", xscale="symlog"
    )
plot.overlap(runs["CE", 12]["vectors"], STEPS, axes[1, 0]).set(title="CE: overlap of F's top 5 at two steps")
model = runs["CE", 12]["model"]
for name, operator in {"H": Hessian, "F": GaussNewton}.items():
    spectrum = density(operator(model, cross_entropy, (x, y)), probes=4, steps=40)
    plot.density(spectrum, axes[1, 1], label=name)
axes[1, 1].legend()
axes[1, 1].set(title="CE: densities of H and F at the end")
figure.savefig("spectra.png", dpi=120)
