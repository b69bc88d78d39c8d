"""The same numbers as BackPACK's, where BackPACK is right: every quantity it has, on every kind of chain it supports.

Which extension knows which module is read off BackPACK itself. Where its numbers are wrong, tests/test_backpack.py
compares with the dense definition.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from curvext import backpack as ours
from curvext.backpack import extensions as our_extensions

theirs = pytest.importorskip("backpack", reason="BackPACK is not installed")
ReduceTuple = pytest.importorskip("backpack.custom_module.reduce_tuple").ReduceTuple

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:The Kronecker factors stored in"),
]

N = 4
FIRST = ("BatchGrad", "BatchL2Grad", "SumGradSquared", "Variance")
ROOTS = ("SqrtGGNExact", "SqrtGGNMC")  # unique up to a rotation of the columns
DIAGONALS = ("DiagGGNExact", "BatchDiagGGNExact", "DiagHessian", "BatchDiagHessian")
KRONECKER = ("KFLR", "KFRA")
PRODUCTS = ("GGNMP", "HMP", "PCHMP")
EXACT = [*FIRST, "SqrtGGNExact", *DIAGONALS, *KRONECKER, *PRODUCTS]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def model(shape: tuple[int, ...], *layers: nn.Module, outputs: int = 3) -> nn.Sequential:
    """The layers for inputs of this shape, and a linear head."""
    body = nn.Sequential(*layers, nn.Flatten()).eval()
    x = torch.zeros(1, *shape, dtype=torch.int64 if isinstance(layers[0], nn.Embedding) else None)
    return nn.Sequential(*body, nn.Linear(body(x).shape[1], outputs))


def batch_norm(kind: type[nn.Module], features: int) -> nn.Module:
    norm = kind(features).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5)
    return norm


IMAGE, SIGNAL, VOLUME = (2, 6, 6), (2, 9), (2, 4, 4, 4)
ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU, nn.SELU, nn.LogSigmoid)
SHAPES = {1: SIGNAL, 2: IMAGE, 3: VOLUME}


def convolutions(d: int) -> dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]]:
    """Chains with convolutions, pooling and normalisation in d dimensions."""
    kind, transposed = getattr(nn, f"Conv{d}d"), getattr(nn, f"ConvTranspose{d}d")
    lift = lambda **options: kind(2, 4, 2, **options)  # noqa: E731
    layers = {
        "conv": lambda: [lift(stride=2, padding=1), nn.Tanh(), kind(4, 3, 2, bias=False)],
        "conv, one position": lambda: [kind(2, 3, SHAPES[d][-1]), nn.Tanh()],
        "dilated": lambda: [lift(dilation=2), nn.Sigmoid()],
        "grouped": lambda: [kind(2, 4, 2, groups=2), nn.ReLU()],
        "transposed": lambda: [transposed(2, 3, 2, stride=2, padding=1), nn.Tanh(), transposed(3, 2, 2)],
        "transposed, grouped": lambda: [transposed(2, 4, 2, groups=2, bias=False), nn.Sigmoid()],
        "max pooling": lambda: [lift(), getattr(nn, f"MaxPool{d}d")(2, stride=1), nn.Tanh()],
        "average pooling": lambda: [lift(), getattr(nn, f"AvgPool{d}d")(2, padding=1), nn.Sigmoid()],
        "adaptive pooling": lambda: [lift(padding=1, stride=1), nn.ReLU(), getattr(nn, f"AdaptiveAvgPool{d}d")(1)],
        "batch norm": lambda: [lift(), batch_norm(getattr(nn, f"BatchNorm{d}d"), 4), nn.Tanh()],
    }
    return {f"{name}, {d}d": (SHAPES[d], made) for name, made in layers.items()}


CHAINS: dict[str, tuple[tuple[int, ...], Callable[[], list[nn.Module]]]] = {
    **{a.__name__: ((4,), lambda a=a: [nn.Linear(4, 5), a(), nn.Linear(5, 4), a()]) for a in ACTIVATIONS},
    "no bias": ((4,), lambda: [nn.Linear(4, 5, bias=False), nn.Tanh()]),
    "positions": ((3, 4), lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)]),
    "identity and dropout": ((4,), lambda: [nn.Linear(4, 5), nn.Identity(), nn.Dropout(), nn.ReLU()]),
    "padding": (IMAGE, lambda: [nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, 3), nn.Tanh()]),
    "vectors, batch norm": ((4,), lambda: [nn.Linear(4, 5), batch_norm(nn.BatchNorm1d, 5), nn.Sigmoid()]),
    "RNN": ((3, 4), lambda: [nn.RNN(4, 3, batch_first=True), ReduceTuple()]),
    "LSTM": ((3, 4), lambda: [nn.LSTM(4, 3, batch_first=True), ReduceTuple()]),
    "embedding": ((3,), lambda: [nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 4), nn.Tanh()]),
    **convolutions(1),
    **convolutions(2),
    **convolutions(3),
}

Loss = tuple[Callable[[], nn.Module], Callable[[], Tensor], int]
LOSSES: dict[str, Loss] = {
    "cross entropy": (nn.CrossEntropyLoss, lambda: torch.randint(0, 3, (N,)), 3),
    "cross entropy, sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), lambda: torch.randint(0, 3, (N,)), 3),
    "label smoothing": (lambda: nn.CrossEntropyLoss(label_smoothing=0.2), lambda: torch.randint(0, 3, (N,)), 3),
    "probabilities": (nn.CrossEntropyLoss, lambda: torch.rand(N, 3).softmax(1), 3),
    "squared error": (nn.MSELoss, lambda: torch.randn(N, 2), 2),
    "squared error, sum": (lambda: nn.MSELoss(reduction="sum"), lambda: torch.randn(N, 3), 3),
    "binary": (nn.BCEWithLogitsLoss, lambda: torch.randint(0, 2, (N, 1)).to(torch.get_default_dtype()), 1),
    "binary, sum": (lambda: nn.BCEWithLogitsLoss(reduction="sum"), lambda: torch.rand(N, 1).round(), 1),
}


def knows(name: str, modules: list[nn.Module]) -> bool:
    """Whether BackPACK has this extension for these modules."""
    table = getattr(theirs.extensions, name)()._BackpropExtension__module_extensions
    needed = [m for m in modules if name not in FIRST or any(True for _ in m.parameters())]
    return all(type(m) in table or isinstance(m, ReduceTuple) for m in needed)


def right(name: str, modules: list[nn.Module], chain: str, loss: str) -> bool:
    """Whether it is right, or works at all, where it says that it has it."""
    if name in KRONECKER and any(isinstance(m, CONVOLUTIONS) for m in modules) and "one position" not in chain:
        return False  # off by the number of positions
    if name == "BatchL2Grad" and "grouped" in chain:
        return False  # more than the squared norm of its own grad_batch
    if name in KRONECKER and chain == "positions":
        return False  # matrices only
    if name == "PCHMP" and any(isinstance(m, (nn.Sigmoid, nn.Tanh)) for m in modules):
        return False  # the residual is multiplied by the gradient twice
    return not (name == "KFRA" and (loss.startswith("binary") or chain == "identity and dropout"))  # not implemented


def combinations() -> list[tuple[str, str, str]]:
    with torch.random.fork_rng():
        pairs = [(chain, "cross entropy") for chain in CHAINS]
        pairs += [("Tanh", loss) for loss in LOSSES if loss != "cross entropy"]
        found = []
        for chain, loss in pairs:
            modules = [*model(CHAINS[chain][0], *CHAINS[chain][1]()), LOSSES[loss][0]()]
            found += [(n, chain, loss) for n in EXACT if knows(n, modules) and right(n, modules, chain, loss)]
        return found


def data(chain: str, loss: str) -> tuple[nn.Sequential, nn.Module, Tensor, Tensor]:
    shape, layers = CHAINS[chain]
    make, target, outputs = LOSSES[loss]
    network = model(shape, *layers(), outputs=outputs)
    x = torch.randint(0, 5, (N, *shape)) if chain == "embedding" else torch.randn(N, *shape)
    return network, make(), x, target()


def results(library, extensions, name: str, network, loss, x, y, **options) -> list:
    """The quantity of every parameter."""
    library.extend(network), library.extend(loss)
    extension = getattr(extensions, name)(**options)
    with library.backpack(extension):
        loss(network(x), y).backward()
    return [comparable(name, getattr(p, extension.savefield), p) for p in network.parameters()]


def comparable(name: str, value, p: Tensor) -> list[Tensor]:
    if name in ROOTS:
        columns = value.flatten(0, 1).flatten(1)
        return [columns.mT @ columns]
    if name in PRODUCTS:
        vectors = torch.randn(2, *p.shape, generator=torch.Generator().manual_seed(0))
        return [value(vectors).detach()]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def test_curvext_has_them_all():
    assert set(theirs.extensions.__all__) - {"HBP"} <= set(vars(our_extensions))


def same(name: str, problem, **options) -> None:
    got = results(ours, our_extensions, name, *problem, **options)
    want = results(theirs, theirs.extensions, name, *problem, **options)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "chain", "loss"), combinations())
def test_same_numbers(name, chain, loss):
    same(name, data(chain, loss))


@pytest.mark.parametrize("name", KRONECKER)
@pytest.mark.parametrize(
    "chain", ["padding", *(f"{kind}, 2d" for kind in ("max pooling", "average pooling")),
              *(f"{kind}, {d}d" for kind in ("conv", "transposed") for d in (1, 2, 3))]
)  # fmt: skip
def test_same_factors_beside_weights_of_convolutions(name, chain):
    problem = data(chain, "cross entropy")
    got = results(ours, our_extensions, name, *problem)
    want = results(theirs, theirs.extensions, name, *problem)
    for p, a, b in zip(problem[0].parameters(), got, want, strict=True):
        if p.dim() <= 2:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*FIRST, "SqrtGGNExact", *DIAGONALS])
def test_same_numbers_for_classified_positions(name):
    network = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 2))
    same(name, (network, nn.CrossEntropyLoss(), torch.randn(N, 2, 5), torch.randint(0, 3, (N, 3))))


@pytest.mark.parametrize("name", ["BatchGrad", "SqrtGGNExact"])
def test_same_samples(name):
    same(name, data("Tanh", "cross entropy"), subsampling=[2, 0])


@pytest.mark.parametrize("name", ["DiagGGNMC", "BatchDiagGGNMC", "SqrtGGNMC", "KFAC"])
@pytest.mark.parametrize("loss", ["cross entropy", "squared error", "binary, sum"])
def test_same_mean_of_random_quantities(name, loss):
    problem = data("Tanh", loss)
    got = results(ours, our_extensions, name, *problem, mc_samples=4000)
    want = results(theirs, theirs.extensions, name, *problem, mc_samples=4000)
    for pair in zip(got, want, strict=True):
        for a, b in zip(*pair, strict=True):
            assert a.shape == b.shape and (a - b).norm() < 0.15 * b.norm()
