"""HesScale against the exact Hessian diagonal while a small network learns to read digits.

The off-diagonals that HesScale drops matter little at the start and more once the softmax has become peaked.
AdaHesScale trains on the estimate; its step runs the block itself.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from curvext import DiagHessian, HesScale, extend
from curvext.optim import AdaHesScale

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16), torch.nn.Tanh())
model.append(torch.nn.Linear(16, 10))
optimizer = AdaHesScale(model.parameters(), lr=3e-3)


def relative_error() -> tuple[float, float]:
    """Σ|estimate - exact| / Σ|exact| for HesScale and for its Gauss-Newton form, on 200 images."""
    with extend(model, HesScale(), HesScale(gauss_newton=True), DiagHessian()):
        torch.nn.functional.cross_entropy(model(x[:200]), y[:200]).backward()
    exact = torch.cat([p.diag_h.flatten() for p in model.parameters()])
    estimates = ("hesscale", "hesscale_gn")
    flat = [torch.cat([getattr(p, name).flatten() for p in model.parameters()]) for name in estimates]
    return tuple(float((f - exact).abs().sum() / exact.abs().sum()) for f in flat)  # type: ignore[return-value]


steps, errors, losses = [], [], []
for step in range(101):
    if step % 20 == 0:
        steps.append(step)
        errors.append(relative_error())
    rows = torch.randint(0, len(x), (64,))
    losses.append(optimizer.step(lambda rows=rows: torch.nn.functional.cross_entropy(model(x[rows]), y[rows])).item())

assert losses[-1] < 0.5 * losses[0]
print(
    *(f"step {s:3d}  HesScale {a:.1%}  Gauss-Newton form {b:.1%}" for s, (a, b) in zip(steps, errors, strict=True)),
    sep="\n",
)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
left.plot(steps, errors, marker="o", label=["HesScale", "HesScaleGN"])
left.set(xlabel="step", ylabel="relative error of the diagonal", yscale="log")
left.legend()
right.plot(losses)
right.set(xlabel="step", ylabel="training loss of AdaHesScale", yscale="log")
figure.savefig("train_digits.png", dpi=120)
