"""Where the factor wave starts: every loss against JᵀBJ with B = ∂²L/∂z² by torch.autograd, in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import curvext
from curvext import (
    GGNMP,
    BatchDiagGGNExact,
    BatchGrad,
    CurvatureError,
    DiagGGNExact,
    DiagHessian,
    GGNBlock,
    HesScale,
    SqrtGGNExact,
    extend,
    sources,
)

from . import dense, models
from .dense import blocks, near
from .reference import gauss_newton, hessian_diagonal
from .targets import GRID, IGNORED, SIGNS, N, P, T, W, Y, data, net

pytestmark = pytest.mark.usefixtures("float64")
Loss = Callable[[Tensor], Tensor]


def by_sample(outputs: Callable[[], Tensor], loss: Loss, parameters: list[Tensor]) -> list[Tensor]:
    """The Gauss-Newton diagonal of every sample, ``[N, *P]`` for each parameter."""
    z = outputs()
    apart = torch.eye(len(z)).repeat_interleave(z[0].numel(), 1)  # which outputs are whose
    b = torch.autograd.functional.hessian(loss, z.detach()).reshape(z.numel(), z.numel())
    assert not b[(apart.T @ apart) == 0].any(), "this loss mixes samples"
    rows = [gauss_newton(outputs, lambda z, m=m: 0.5 * z.flatten() @ (b * m) @ z.flatten(), parameters) for m in apart]
    sizes = [p.numel() for p in parameters]
    found = torch.stack([row.diagonal() for row in rows]).split(sizes, 1)
    return [g.view(-1, *p.shape) for g, p in zip(found, parameters, strict=True)]


def check(loss: Loss, *shape: int, reference: Loss | None = None, mixed: bool = False, **options: int) -> None:
    """All exact quantities of a net whose output has ``[N, *shape]``; ``mixed``: those that no sample need own."""
    torch.manual_seed(1)
    model, x = net(*shape), data(N, 2, seed=1)
    parameters, reference = list(model.parameters()), reference or loss
    several = () if mixed else (BatchDiagGGNExact(), SqrtGGNExact())
    with extend(model, DiagGGNExact(), GGNBlock(), GGNMP(), *several, **options):
        loss(model(x)).backward()
    for p, block in zip(parameters, blocks(lambda: model(x), reference, parameters), strict=True):
        near(p.ggn_block, block)
        near(p.ggnmp(torch.eye(p.numel()).view(-1, *p.shape)).flatten(1), block)
        near(p.diag_ggn_exact, block.diagonal().view_as(p))
        if not mixed:
            columns = p.sqrt_ggn_exact.flatten(2).flatten(0, 1)
            near(columns.T @ columns, block)
    if mixed:
        for quantity in (BatchDiagGGNExact(), SqrtGGNExact()):
            with pytest.raises(CurvatureError, match="no sample owns"), extend(model, quantity, **options):
                loss(model(x)).backward()
    elif options.get("samples") != 1:
        for p, want in zip(parameters, by_sample(lambda: model(x), reference, parameters), strict=True):
            near(p.diag_ggn_exact_batch, want)


LOSSES = {
    "cross entropy": ((3,), lambda z: F.cross_entropy(z, Y)),
    "class weights": ((3,), lambda z: F.cross_entropy(z, Y, weight=W)),
    "ignored by default": ((3,), lambda z: F.cross_entropy(z, IGNORED, weight=W)),
    "ignore_index": ((3,), lambda z: F.cross_entropy(z, Y, ignore_index=2)),
    "label smoothing": ((3,), lambda z: F.cross_entropy(z, IGNORED, weight=W, label_smoothing=0.2)),
    "probabilities": ((3,), lambda z: F.cross_entropy(z, P / P.sum(1, keepdim=True))),
    "probabilities of any sum": ((3,), lambda z: F.cross_entropy(z, P, weight=W, label_smoothing=0.1)),
    "images": ((3, 2, 2), lambda z: F.cross_entropy(z, GRID, weight=W, ignore_index=1, label_smoothing=0.1)),
    "images of probabilities": ((3, 2, 2), lambda z: F.cross_entropy(z, data(N, 3, 2, 2, low=0))),
    "sum": ((3,), lambda z: F.cross_entropy(z, Y, reduction="sum")),
    "none, then weighted": ((3,), lambda z: (F.cross_entropy(z, Y, reduction="none") * T[:, 0].abs()).sum()),
    "scaled": ((3,), lambda z: 3 * F.cross_entropy(z, Y) / 7),
    "two losses of one output": ((3,), lambda z: F.cross_entropy(z, Y) + 0.5 * F.mse_loss(z, T)),
    "two heads": ((5,), lambda z: F.cross_entropy(z[:, :3], Y) + 0.3 * F.mse_loss(z[:, 3:], T[:, :2])),
    "nll of log_softmax": ((3,), lambda z: F.nll_loss(z.log_softmax(1), Y, weight=W)),
    "mse": ((3,), lambda z: F.mse_loss(z, T)),
    "mse of a vector": ((1,), lambda z: F.mse_loss(z.squeeze(1), T[:, 0])),
    "mse of matrices": ((2, 3), lambda z: F.mse_loss(z, data(N, 2, 3), reduction="sum")),
    "mse of one output": ((1,), lambda z: F.mse_loss(z, T[:, :1])),
    "mse, none": ((3,), lambda z: F.mse_loss(z, T, reduction="none").mean(1).sum()),
    "mse with a broadcast target": ((3,), lambda z: ((z - T[:1]) ** 2).mean()),
    "bce with logits": ((3,), lambda z: F.binary_cross_entropy_with_logits(z, P, weight=T.abs(), pos_weight=W)),
    "bce with logits of a vector": ((1,), lambda z: F.binary_cross_entropy_with_logits(z.squeeze(1), P[:, 0])),
    "bce": ((3,), lambda z: F.binary_cross_entropy(0.5 + 0.1 * z, P, weight=T.abs())),
    "gaussian nll": ((3,), lambda z: F.gaussian_nll_loss(z, T, P)),
    "gaussian nll of one variance": ((3,), lambda z: F.gaussian_nll_loss(z, T, P[:, :1], full=True, reduction="sum")),
    "poisson nll": ((3,), lambda z: F.poisson_nll_loss(z, 3 * P, full=True)),
    "poisson nll of rates": ((3,), lambda z: F.poisson_nll_loss(z + 5, P, log_input=False)),
    "huber": ((3,), lambda z: F.huber_loss(z, T, delta=0.5)),
    "huber beyond delta": ((3,), lambda z: F.huber_loss(z, T + 100, delta=0.5)),
    "smooth l1": ((3,), lambda z: F.smooth_l1_loss(z, T, beta=0.5)),
    "kl": ((3,), lambda z: F.kl_div(z.log_softmax(1), P, reduction="batchmean")),
    "kl of logarithms": ((3,), lambda z: F.kl_div(z.log_softmax(1), P.log(), log_target=True, reduction="sum")),
    "soft margin": ((3,), lambda z: F.soft_margin_loss(z, SIGNS)),
    "multi-label soft margin": ((3,), lambda z: F.multilabel_soft_margin_loss(z, P.round(), weight=W)),
    "l1": ((3,), lambda z: F.l1_loss(z, T)),
    "l1 and mse": ((3,), lambda z: F.l1_loss(z, T) + F.mse_loss(z, T)),
    "linear": ((3,), lambda z: (z * T).sum()),
    "margin ranking": ((2,), lambda z: F.margin_ranking_loss(z[:, 0], z[:, 1], SIGNS[:, 0])),
    "hinge embedding": ((3,), lambda z: F.hinge_embedding_loss(z, SIGNS)),
    "hinge": ((1,), lambda z: (1 - z.squeeze(1) * SIGNS[:, 0]).clamp(min=0).mean()),
    "squared hinge": ((1,), lambda z: (1 - z.squeeze(1) * SIGNS[:, 0]).relu().square().mean()),
    "own cross entropy": ((3,), lambda z: (z.logsumexp(1) - z.gather(1, Y.unsqueeze(1)).squeeze(1)).mean()),
    "own cross entropy of images": ((3, 2), lambda z: (z.logsumexp(1) - z[:, 0]).mean()),
    "own cross entropy, keepdim": ((2, 3), lambda z: (z.logsumexp(-1, keepdim=True) - z[..., :1]).mean()),
    "logsumexp of two dimensions": ((2, 3), lambda z: z.logsumexp((1, 2)).mean()),
    "z * z": ((3,), lambda z: (z * z).mean()),
    "fourth power": ((3,), lambda z: z.pow(4).sum()),
    "(z - t) ** 2": ((3,), lambda z: ((z - T) ** 2).sum(1).mean()),
    "(z - t).square()": ((3,), lambda z: (z - T).square().mean()),
    "d * d": ((3,), lambda z: (lambda d: (d * d).mean())(z - T)),
    "exponential": ((3,), lambda z: z.exp().mean()),
    "logistic": ((3,), lambda z: -F.logsigmoid(z * SIGNS).mean()),
    "distances": ((3,), lambda z: (z - T).norm(dim=1).mean()),
    "variances": ((3,), lambda z: z.var(1).sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    shape, loss = LOSSES[name]
    check(loss, *shape)


def test_cross_entropy_of_ones_own_forms_no_matrix(monkeypatch):
    monkeypatch.setattr(sources, "dense_hessian", lambda *_: pytest.fail("a Hessian was formed"))
    for name in ("own cross entropy", "own cross entropy of images"):
        test_losses(name)


def test_every_row_is_a_position():
    """[N·T, C] with samples=N: B has T·C columns for each sample."""
    y = torch.arange(2 * N) % 3
    check(lambda z: F.cross_entropy(z.flatten(0, 1), y), 2, 3, samples=N)
    check(lambda z: F.multi_margin_loss(z.flatten(0, 1), y, p=2), 2, 3, samples=N,
          reference=lambda z: margins(z.flatten(0, 1), y, 1, None).mean())  # fmt: skip


@settings(max_examples=25)
@given(st.data())
def test_options_of_cross_entropy(data):
    draw = data.draw
    inner = draw(st.lists(st.integers(1, 2), max_size=2), label="dimensions")
    c = draw(st.integers(2, 4), label="classes")
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.3])),
        "weight": draw(st.sampled_from([None, torch.rand(c) + 0.5])),
    }
    y = torch.randint(c, (N, *inner))
    if draw(st.booleans(), label="probabilities"):
        y = torch.rand(N, c, *inner)
    elif draw(st.booleans(), label="ignored"):
        options["ignore_index"] = int(y.flatten()[0])
        y.flatten()[-1] = (options["ignore_index"] + 1) % c  # some are left
    check(lambda z: F.cross_entropy(z, y, **options).sum(), c, *inner, samples=N)


def margins(z: Tensor, y: Tensor, margin: float, weight: Tensor | None) -> Tensor:
    """The squared multi-margin loss of every row; PyTorch's own cannot be differentiated twice."""
    apart = (margin - z.gather(1, y.unsqueeze(1)) + z).relu().square() / z.shape[1]
    scale = 1 if weight is None else weight[y].unsqueeze(1)
    return (scale * apart.scatter(1, y.unsqueeze(1), 0)).sum(1)


@pytest.mark.parametrize("weight", [None, W])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_multi_margin(weight, reduction):
    options = {"weight": weight, "margin": 0.7, "reduction": reduction}

    def reference(z):
        rows = margins(z, Y, 0.7, weight)
        return rows.mean() if reduction == "mean" else rows.sum()

    check(lambda z: F.multi_margin_loss(z, Y, p=2, **options).sum(), 3, reference=reference)
    check(lambda z: F.multi_margin_loss(z, Y, p=1, **options).sum(), 3, reference=torch.sum)


def test_multi_label_margin_is_linear():
    y = torch.tensor([[0, 2, -1]] * N)
    check(lambda z: F.multilabel_margin_loss(z, y), 3, reference=torch.sum)


MIXED = {
    "norm": lambda z: (z - T).norm(),
    "squared norm": lambda z: torch.linalg.vector_norm(z - T) ** 2,
    "variance": lambda z: z.var(),
    "logsumexp of all": lambda z: z.logsumexp((0, 1)),
    "logsumexp over samples": lambda z: z.logsumexp(0).sum(),
    "logsumexp over samples and a vector": lambda z: z.sum(1).logsumexp(0),
    "squared mse": lambda z: F.mse_loss(z, T) ** 2,
}


@pytest.mark.parametrize("name", MIXED)
def test_losses_that_mix_samples(name):
    """B has entries between samples: it is taken whole, and what belongs to one sample is refused."""
    check(MIXED[name], 3, mixed=True)


def test_contrastive_loss():
    """A row's part of the loss depends on all samples; it is that row's all the same."""

    def total(z):
        return F.cross_entropy(z @ T.T, torch.arange(N)) + F.cross_entropy(T @ z.T, torch.arange(N))

    def parts(z):
        y = torch.arange(N)
        return (F.cross_entropy(z @ T.T, y, reduction="none") + F.cross_entropy(T @ z.T, y, reduction="none")) / N

    dense.check(net(3), data(N, 2, seed=1), total, parts)


def test_a_function_of_a_mean_is_split_there():
    """φ(mean of losses): the mean is a number that a linear operation made, and the split is at φ."""
    model, x = net(3), data(N, 2, seed=1)
    with extend(model, GGNBlock()):
        (F.cross_entropy(model(x), Y) ** 2).backward()
    parameters = list(model.parameters())
    wanted = blocks(lambda: F.cross_entropy(model(x), Y).view(1), lambda z: (z**2).sum(), parameters)
    for p, block in zip(parameters, wanted, strict=True):
        near(p.ggn_block, block)


def test_output_nonlinearity_is_the_models():
    """The split is below the topmost nonlinear operation: at the probabilities, not at the logits."""
    model = nn.Sequential(net(3), nn.Sigmoid())
    x, parameters = data(N, 2, seed=1), list(model.parameters())
    with extend(model, GGNBlock()):
        F.binary_cross_entropy(model(x), P).backward()
    wanted = blocks(lambda: model(x), lambda z: F.binary_cross_entropy(z, P), parameters)
    for p, block in zip(parameters, wanted, strict=True):
        near(p.ggn_block, block)


REFUSED = {
    "learned variance": ((6,), lambda z: F.gaussian_nll_loss(z[:, :3], T, z[:, 3:].exp()),
                         "not convex.*curvext.output"),
    "log-cosh": ((3,), lambda z: (z - T).cosh().log().mean(), "LogBackward0.*not convex"),
    "cosine": ((6,), lambda z: F.cosine_embedding_loss(z[:, :3], z[:, 3:], SIGNS[:, 0]), "not convex"),
    "triplet": ((9,), lambda z: F.triplet_margin_loss(z[:, :3], z[:, 3:6], z[:, 6:]), "not convex"),
    "ctc": ((4, 3), lambda z: F.ctc_loss(z.transpose(0, 1).log_softmax(2), Y.new_tensor([[1, 2]] * N), (4,) * N,
                                        (2,) * N), "CtcLossBackward0.*neither"),
    "cdist": ((3,), lambda z: torch.cdist(z, T, p=1.5).sum(), "cannot differentiate it twice|not convex"),
    "(z - t) * (z - t)": ((3,), lambda z: ((z - T) * (z - T)).mean(), "MulBackward0.*not convex"),
    "root of mse": ((3,), lambda z: F.mse_loss(z, T).sqrt(), "not convex"),
    "product": ((3,), lambda z: z.prod(), "not convex"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_gradient_kept(name):
    shape, loss, message = REFUSED[name]
    model, x = net(*shape), data(N, 2, seed=1)
    with pytest.raises(CurvatureError, match=message), extend(model, DiagGGNExact(), samples=N):
        loss(model(x)).backward()
    for p, g in zip(model.parameters(), torch.autograd.grad(loss(model(x)), list(model.parameters())), strict=True):
        assert torch.equal(p.grad, g)
        assert not hasattr(p, "diag_ggn_exact")


# the batch as one sample


@pytest.mark.parametrize("name", ["cross entropy", "own cross entropy", "z * z", "huber", "two heads"])
def test_one_sample(name):
    shape, loss = LOSSES[name]
    check(loss, *shape, samples=1)


def test_batch_normalisation_in_training():
    """Samples depend on each other: exact with samples=1, else refused, naming the layer."""
    model, x = models.Residual(), data(N, 2, 3, 3)
    parameters = list(model.parameters())
    with extend(model, DiagGGNExact(), GGNBlock(), samples=1):
        F.cross_entropy(model(x), Y).backward()
    wanted = blocks(lambda: model(x), lambda z: F.cross_entropy(z, Y), parameters)
    for p, block in zip(parameters, wanted, strict=True):
        near(p.ggn_block, block)
        near(p.diag_ggn_exact, block.diagonal().view_as(p))
    for quantity in (DiagGGNExact(), BatchGrad()):
        model.zero_grad()
        with pytest.raises(CurvatureError, match=r"norm\.\w+: batch normalisation.*samples=1"), extend(model, quantity):
            F.cross_entropy(model(x), Y).backward()
        for p, g in zip(parameters, torch.autograd.grad(F.cross_entropy(model(x), Y), parameters), strict=True):
            assert torch.equal(p.grad, g)


# curvext.output

MARKED = {
    **{name: LOSSES[name] for name in ("cross entropy", "images", "huber", "own cross entropy", "l1", "linear")},
    "log-cosh": ((3,), lambda z: (z - T).cosh().log().mean()),
    "(z - t) * (z - t)": ((3,), lambda z: ((z - T) * (z - T)).mean()),
    "log of softmax": ((3,), lambda z: F.nll_loss(z.softmax(1).log(), Y)),
    "bce of sigmoid": ((3,), lambda z: F.binary_cross_entropy(z.sigmoid(), P)),
    "written to in place": ((3,), lambda z: z.sub_(T).square().sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_marked(name):
    shape, loss = MARKED[name]
    check(lambda z: loss(curvext.output(z)), *shape)


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z: F.mse_loss(z, T).sqrt(), id="root of mse"),
        pytest.param(lambda z: F.cross_entropy(z, Y) ** 2, id="squared cross entropy"),
        pytest.param(lambda z: (z @ z.T).trace(), id="products of samples"),
    ],
)
def test_marked_and_mixed(loss):
    check(lambda z: loss(curvext.output(z)), 3, mixed=True)


def test_marked_in_positions():
    y = torch.arange(2 * N) % 3
    check(lambda z: F.cross_entropy(curvext.output(z.flatten(0, 1)), y), 2, 3, samples=N)


@pytest.mark.parametrize("together", [False, True])
def test_several_marks_are_one_output(together):
    """Cross terms of the loss between two heads count."""
    model, x = net(6), data(N, 2, seed=1)

    def heads():
        z = model(x)
        return z[:, :3], z[:, 3:]

    def joint(a, b):
        return ((a - b - T).cosh().log() + a**2).mean()

    with extend(model, GGNBlock(), BatchDiagGGNExact()):
        a, b = heads()
        joint(*(curvext.output((a, b)) if together else (curvext.output(a), curvext.output(b)))).backward()
    parameters = list(model.parameters())
    wanted = blocks(lambda: model(x), lambda z: joint(z[:, :3], z[:, 3:]), parameters)
    for p, block in zip(parameters, wanted, strict=True):
        near(p.ggn_block, block)
        near(p.diag_ggn_exact_batch.sum(0).flatten(), block.diagonal())


def test_trained_temperature():
    """What the loss puts together with the output must be marked as well."""
    model, x = net(3), data(N, 2, seed=1)
    s = nn.Parameter(torch.tensor(0.3))
    tensors = {**dict(model.named_parameters()), "s": s}
    with pytest.raises(CurvatureError, match="not marked"), extend(tensors, DiagGGNExact()):
        F.mse_loss(curvext.output(model(x)) + s**2, T).backward()
    with extend(tensors, DiagGGNExact()):  # linear in it: no curvature goes past the mark
        (F.mse_loss(curvext.output(model(x)), T) + 3 * s).backward()
    assert s.diag_ggn_exact == 0
    with extend(tensors, GGNBlock()):
        z, u = curvext.output((model(x), s))
        F.mse_loss(z + u, T).backward()
    parameters = list(tensors.values())
    wanted = blocks(lambda: torch.cat([model(x).flatten(), s.view(1)]),
                    lambda v: F.mse_loss(v[:-1].view(N, 3) + v[-1], T), parameters)  # fmt: skip
    for p, block in zip(parameters, wanted, strict=True):
        near(p.ggn_block, block)


def test_marks_refuse():
    model, x = net(6), data(N, 2, seed=1)
    cases = {
        "not convex in the tensors marked": lambda z: F.gaussian_nll_loss(z[:, :3], T, z[:, 3:].exp()),
        "computed from another": lambda z: curvext.output(z * 2).square().sum(),
        "cannot differentiate it twice": lambda z: F.multi_margin_loss(z, Y, p=2),
    }
    for message, loss in cases.items():
        with pytest.raises(CurvatureError, match=message), extend(model, DiagGGNExact()):
            loss(curvext.output(model(x))).backward()
        model.zero_grad()
    with pytest.raises(ValueError, match="NoneType"):
        curvext.output(None)
    with pytest.raises(ValueError, match="complex"):
        curvext.output(torch.zeros(2, dtype=torch.complex64))


def test_marks_are_nothing_to_others(monkeypatch):
    """Other quantities, and gradients, are bitwise what they are without; nothing is computed for them."""
    model, x = net(3), data(N, 2, seed=1)
    quantities = (HesScale(), DiagHessian(), BatchGrad())

    def run(mark):
        model.zero_grad()
        with extend(model, *quantities) as results:
            F.cross_entropy(mark(model(x)), Y).backward()
        return [p.grad.clone() for p in model.parameters()] + [t for r in results.values() for t in r.values()]

    monkeypatch.setattr(sys.modules["curvext.output"].Output, "hessians", property(lambda _: pytest.fail("computed")))
    for a, b in zip(run(lambda z: z), run(curvext.output), strict=True):
        assert torch.equal(a, b)
    z = torch.zeros(2)
    assert curvext.output(z) is z
    nested = curvext.output({"a": (z, None), "b": [torch.zeros(2, requires_grad=True)]})
    assert nested["a"][0] is z
    assert nested["b"][0].grad_fn is not None


@pytest.mark.parametrize("kind", ["exact", "last_layer"])
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda z: (curvext.output(z) - T).cosh().log().mean(), id="marked"),
        pytest.param(lambda z: F.nll_loss(curvext.output(z).softmax(1).log(), Y), id="marked below a nonlinear loss"),
        pytest.param(lambda z: curvext.output(z).abs().sum(), id="marked and linear"),
        pytest.param(lambda z: F.l1_loss(z, T), id="l1"),
        pytest.param(lambda z: (z - T).norm() ** 2, id="squared norm"),
    ],
)
def test_hesscale_splits_at_the_same_place(loss, kind):
    """With one hidden layer HesScale(ggn=...) is exact, wherever the split is."""
    model, x = models.one_hidden(), data(N, 4)
    with extend(model, HesScale(ggn=kind)):
        loss(model(x)).backward()
    parameters = list(model.parameters())
    for p, want in zip(parameters, hessian_diagonal(lambda: loss(model(x)), parameters), strict=True):
        near(p.hesscale, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eigenvectors_in_sixteen_bits(dtype):
    model, x = models.mlp(), torch.randn(4, 4).to(dtype)
    found = []
    for of in (torch.float64, dtype):
        with extend(model.to(dtype).to(of), DiagGGNExact()):
            model(x.to(of)).norm(dim=1).mean().backward()
        found.append([p.diag_ggn_exact for p in model.parameters()])
    for want, got in zip(*found, strict=True):
        assert got.dtype is dtype
        assert (want - got).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("n", [1, 3])
def test_a_hessian_without_closed_form_belongs_to_its_sample(n):
    """Also if there is one sample."""
    dense.check(models.mlp(), torch.randn(n, 4), lambda z: z.norm(dim=1).mean(), lambda z: z.norm(dim=1) / n)
