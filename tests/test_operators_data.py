"""Operators over data: however it is batched, the loss is that over all of it; what cannot be right is refused."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pytest import importorskip, mark, raises
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvext import CurvatureError
from curvext.operators import EmpiricalFisher, Fisher, GaussNewton, Hessian, Jacobian, Residual

from .architectures import torchvision
from .models import mlp
from .reference import gauss_newton, hessian
from .test_operators import ARCHITECTURES, labels, near, tokens

pytestmark = mark.usefixtures("float64")


def ragged(x: Tensor, y: Tensor, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Batches of 4 and 2."""
    return list(zip(x.split(size), y.split(size), strict=True))


def check(model: nn.Module, loss, x: Tensor, y: Tensor, total=None, **options) -> None:
    """H, G and S of batches of 4 and 2 against those of ``total(outputs)`` (by default the loss itself) on all data."""
    parameters = list(model.parameters())
    total = total or (lambda z: loss(z, y))
    h = hessian(lambda: total(model(x)), parameters)
    g = gauss_newton(lambda: model(x), total, parameters)
    for data in (ragged(x, y), DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)):
        near(Hessian(model, loss, data, **options).to_dense(), h)
        near(GaussNewton(model, loss, data, **options).to_dense(), g)
    near(Residual(model, loss, ragged(x, y), keep=True, **options).to_dense(), h - g)


WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
IGNORED = torch.tensor([0, 1, -100, 2, -100, -100])
PROBABILITIES = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.8, 0.1]] * 3, dtype=torch.float64)
CASES = {
    "mean": (nn.CrossEntropyLoss(), labels),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), labels),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), labels),
    "class weights, sum": (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), labels),
    "class weights and smoothing": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), labels),
    "ignored": (nn.CrossEntropyLoss(), lambda n: IGNORED),
    "ignored class": (nn.CrossEntropyLoss(ignore_index=1), lambda n: torch.tensor([0, 1, 2, 0, 1, 1])),
    "weights and ignored": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), lambda n: IGNORED),
    "probabilities": (nn.CrossEntropyLoss(weight=WEIGHTS), lambda n: PROBABILITIES),
    "function": (F.cross_entropy, labels),
    "function with options": (partial(F.cross_entropy, weight=WEIGHTS), lambda n: IGNORED),
    "squared error": (nn.MSELoss(), lambda n: torch.randn(n, 3)),
    "squared error, sum": (partial(F.mse_loss, reduction="sum"), lambda n: torch.randn(n, 3)),
    "Huber": (nn.HuberLoss(), lambda n: torch.randn(n, 3)),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), lambda n: torch.rand(n, 3)),
    "Poisson": (nn.PoissonNLLLoss(), lambda n: torch.rand(n, 3)),
    "divergence, batchmean": (lambda: None, lambda n: PROBABILITIES),
    "multi-label": (nn.MultiLabelSoftMarginLoss(weight=WEIGHTS), lambda n: torch.randint(0, 2, (n, 3)).double()),
}


class KLDiv(nn.KLDivLoss):
    """Of logits."""

    def forward(self, z, y):
        return super().forward(torch.log_softmax(z, -1), y)


CASES["divergence, batchmean"] = (KLDiv(reduction="batchmean"), lambda n: PROBABILITIES)


@mark.parametrize("name", CASES)
def test_losses(name):
    loss, targets = CASES[name]
    check(mlp(), loss, torch.randn(6, 4), targets(6))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans())
def test_any_split(sizes, weighted):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(weight=WEIGHTS if weighted else None, ignore_index=2)
    model, n = nn.Linear(2, 3), sum(sizes)
    x, y = torch.randn(n, 2), torch.cat([torch.tensor([0]), labels(n - 1)])
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    near(Hessian(model, loss, batches).to_dense(), hessian(lambda: loss(model(x), y), list(model.parameters())))


def image(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))


class Tied(nn.Module):
    """One linear layer called three times."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x)


PROBES = {
    "tied layers": lambda: (Tied(), torch.randn(6, 4)),
    "circular padding": lambda: (
        image(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Tanh()), torch.randn(6, 2, 4, 4)
    ),
    "groups": lambda: (image(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh()), torch.randn(6, 4, 4, 4)),
    "layer norm": lambda: (
        nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), torch.randn(6, 4)
    ),
}  # fmt: skip


@mark.parametrize("name", PROBES)
def test_probes(name):
    model, x = PROBES[name]()
    model(x)
    check(model, nn.CrossEntropyLoss(weight=WEIGHTS), x, IGNORED)


class TestPlainLosses:
    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y, weight=WEIGHTS)

    def test_one_batch_needs_no_word(self):
        model, x, y = mlp(), torch.randn(6, 4), labels(6)
        near(
            Hessian(model, self.loss, (x, y)).to_dense(), hessian(lambda: self.loss(model(x), y), [*model.parameters()])
        )

    def test_several_batches_need_one(self):
        with raises(CurvatureError, match="reduction='mean' or"):
            Hessian(mlp(), self.loss, ragged(torch.randn(6, 4), labels(6)))
        with raises(CurvatureError, match="reduction"):
            EmpiricalFisher(mlp(), self.loss, (torch.randn(6, 4), labels(6)))

    def test_counted(self):
        count = lambda batch: WEIGHTS[batch[1]].sum()  # noqa: E731
        check(mlp(), self.loss, torch.randn(6, 4), labels(6), reduction="mean", count=count)

    def test_samples_are_counted_by_default(self):
        check(mlp(), lambda z, y: F.cross_entropy(z, y), torch.randn(6, 4), labels(6), reduction="mean")

    def test_sum(self):
        check(mlp(), lambda z, y: F.cross_entropy(z, y, reduction="sum"), torch.randn(6, 4), labels(6), reduction="sum")

    def test_a_batch_that_counts_for_nothing(self):
        y = torch.tensor([0, 1, 2, 0, -100, -100])
        count = lambda batch: (batch[1] != -100).sum()  # noqa: E731
        check(mlp(), lambda z, y: F.cross_entropy(z, y), torch.randn(6, 4), y, reduction="mean", count=count)
        check(mlp(), nn.CrossEntropyLoss(), torch.randn(6, 4), y)

    def test_contradiction(self):
        with raises(ValueError, match="reduction='mean'"):
            Hessian(mlp(), nn.CrossEntropyLoss(), ragged(torch.randn(6, 4), labels(6)), reduction="sum")
        with raises(ValueError, match="expected 'mean' or 'sum'"):
            Hessian(mlp(), self.loss, (torch.randn(6, 4), labels(6)), reduction="none")
        with raises(ValueError, match="'none'"):
            Hessian(mlp(), nn.CrossEntropyLoss(reduction="none"), ragged(torch.randn(6, 4), labels(6)))
        with raises(ValueError, match="scalar"):
            Hessian(mlp(), nn.CrossEntropyLoss(reduction="none"), (torch.randn(6, 4), labels(6)))


class Masked(nn.Module):
    """Squared error of the targets that are not nan; its mean is over these."""

    reduction = "mean"

    def forward(self, z, y):
        losses = torch.where(y.isnan(), 0, z - y.nan_to_num()).square()
        if self.reduction == "none":
            return losses
        return losses.sum() / (y.isfinite().sum() if self.reduction == "mean" else 1)


class NextToken(nn.CrossEntropyLoss):
    """Of all positions but the last."""

    def forward(self, z, y):
        return super().forward(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def test_a_mean_over_less_than_its_class_says():
    model, x, y, _ = ARCHITECTURES["attention, tied"]()
    with raises(CurvatureError, match="count="):
        Hessian(model, NextToken(), ragged(x, y))
    check(model, NextToken(), x, y, count=lambda batch: batch[1][:, 1:].numel())


def test_a_mean_that_is_not_over_all_terms():
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    y[5, 0] = torch.nan
    operator = Hessian(mlp(), Masked(), ragged(x, y))  # the first batch is as expected
    with raises(CurvatureError, match="count="):
        operator.to_dense()
    check(mlp(), Masked(), x, y, count=lambda batch: batch[1].isfinite().sum())


class Wrapped(nn.Module):
    """As Hugging Face's models: dictionaries in, an object with loss and logits out."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, inputs, labels=None):
        logits = self.net(inputs)
        return SimpleNamespace(logits=logits, loss=F.cross_entropy(logits, labels))


class TestDictionaries:
    def batches(self) -> tuple[dict, list[dict]]:
        x, y = torch.randn(6, 4), IGNORED
        return {"inputs": x, "labels": y}, [{"inputs": a, "labels": b} for a, b in ragged(x, y)]

    @staticmethod
    def count(batch):
        return (batch["labels"] != -100).sum()

    def test_own_loss(self):
        model, (batch, batches) = Wrapped(), self.batches()
        parameters = list(model.parameters())
        h = hessian(lambda: model(**batch).loss, parameters)
        g = gauss_newton(lambda: model(**batch).logits, lambda z: F.cross_entropy(z, IGNORED), parameters)
        for data in (batch, batches):
            options = {} if data is batch else {"reduction": "mean", "count": self.count}
            near(Hessian(model, None, data, **options).to_dense(), h)
            near(GaussNewton(model, None, data, **options).to_dense(), g)

    def test_own_loss_of_several_batches_needs_a_count(self):
        with raises(CurvatureError, match="count="):
            Hessian(Wrapped(), None, self.batches()[1], reduction="mean")

    def test_loss_of_the_batch(self):
        model, (batch, batches) = Wrapped(), self.batches()
        h = hessian(lambda: model(**batch).loss, list(model.parameters()))
        loss = lambda out, batch: F.cross_entropy(out.logits, batch["labels"])  # noqa: E731
        near(Hessian(model, loss, batches, reduction="mean", count=self.count).to_dense(), h)

    def test_several_inputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

            def forward(self, x, y):
                return torch.tanh(self.a(x)) * self.b(y)

        model, x, y = Two(), torch.randn(6, 4), labels(6)
        h = hessian(lambda: F.cross_entropy(model(x, x), y), list(model.parameters()))
        near(Hessian(model, F.cross_entropy, ((x, x), y)).to_dense(), h)


def test_transformer():
    torchvision()
    transformers = importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8, bos_token_id=1,
                                     eos_token_id=1)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 11, (3, 5))
    ids_short = torch.randint(0, 11, (1, 4))
    batches = [{"input_ids": i, "labels": i} for i in (ids, ids_short)]
    options = {"reduction": "mean", "count": lambda batch: batch["labels"][:, 1:].numel()}
    only = "transformer.h.0.*.bias"
    parameters = [p for n, p in model.named_parameters() if n.startswith("transformer.h.0") and n.endswith("bias")]

    def total():  # the fused kernel cannot be differentiated twice
        model.set_attn_implementation("eager")
        a, b = (model(**batch).loss for batch in batches)
        return (12 * a + 3 * b) / 15

    operator = Hessian(model, None, batches, only=only, **options)
    v = torch.randn(operator.shape[0])
    want = _product(total, parameters, v)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        near(operator @ v, want, 1e-6)  # the model casts its logits to float32
    dense = GaussNewton(model, None, batches, only=only, **options).to_dense()
    assert torch.linalg.eigvalsh((dense + dense.T) / 2).min() > -1e-12


def _product(loss, parameters, v):
    g = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([x.flatten() for x in g])
    return torch.cat([x.flatten() for x in torch.autograd.grad(flat, parameters, v)])


class TestRefused:
    def test_dropout(self):
        model = nn.Sequential(nn.Linear(4, 20), nn.Dropout(), nn.Linear(20, 3))
        data = (torch.randn(6, 4), labels(6))
        for kind in (Hessian, GaussNewton):
            with raises(CurvatureError, match="eval"):
                kind(model, F.cross_entropy, data)
        with raises(CurvatureError, match="eval"):
            Jacobian(model, data)
        Hessian(model.eval(), F.cross_entropy, data)

    def test_unchecked_dropout_is_drawn_once(self):
        model = nn.Sequential(nn.Linear(4, 20), nn.Dropout(), nn.Linear(20, 3))
        operator = Hessian(model, F.cross_entropy, (torch.randn(6, 4), labels(6)), check=False)
        v = torch.randn(operator.shape[0])
        assert torch.equal(operator @ v, operator @ v)

    def test_batch_normalisation(self):
        model, x, y, loss = ARCHITECTURES["batch normalisation"]()
        before = model.norm.running_mean.clone()
        Hessian(model, loss, (x, y)) @ torch.randn(sum(p.numel() for p in model.parameters()))
        assert torch.equal(model.norm.running_mean, before), "an operator moved running statistics"
        for kind in (Hessian, Fisher):
            with raises(CurvatureError, match="batch normalisation"):
                kind(model, loss, ragged(x, y))
        with raises(CurvatureError, match="batch normalisation"):
            Jacobian(model, ragged(x, y))
        check(model.eval(), loss, x, y)

    def test_iterators(self):
        with raises(TypeError, match="iterator"):
            Hessian(mlp(), nn.MSELoss(), iter(ragged(torch.randn(6, 4), torch.randn(6, 3))))
        with raises(TypeError, match="expected a batch"):
            Hessian(mlp(), nn.MSELoss(), 3)
        with raises(CurvatureError, match="no batches"):
            Hessian(mlp(), nn.MSELoss(), [])

    def test_linear_losses(self):
        model = nn.Sequential(mlp(), nn.LogSoftmax(-1))
        with raises(CurvatureError, match="logits"):
            GaussNewton(model, nn.NLLLoss(), (torch.randn(6, 4), labels(6))).to_dense()
        check_h = Hessian(model, nn.NLLLoss(), ragged(torch.randn(6, 4), IGNORED))
        assert check_h.to_dense().isfinite().all()

    def test_shuffled_rows(self):
        data = DataLoader(TensorDataset(torch.randn(6, 4), labels(6)), batch_size=4, shuffle=True)
        with raises(CurvatureError, match="shuffle"):
            Jacobian(mlp(), data)
        with raises(CurvatureError, match="shuffle"):
            Fisher(mlp(), nn.CrossEntropyLoss(), data, mc_samples=1)
        Fisher(mlp(), nn.CrossEntropyLoss(), data)

    def test_parameters(self):
        model, data = mlp(), (torch.randn(6, 4), labels(6))
        with raises(ValueError, match="no parameter"):
            Hessian(model, F.cross_entropy, data, only="none")
        model[0].float()
        with raises(CurvatureError, match="several dtypes"):
            Hessian(model, F.cross_entropy, data)

    def test_closures_have_no_samples(self):
        model = mlp()
        with raises(CurvatureError, match="closure"):
            EmpiricalFisher.of(lambda: model(torch.ones(1, 4)).sum(), model)
        with raises(CurvatureError, match="outputs"):
            GaussNewton.of(lambda: model(torch.ones(1, 4)).sum(), model).to_dense()


class TestScope:
    def test_frozen(self):
        model, x, y = mlp(), torch.randn(6, 4), labels(6)
        model[0].weight.requires_grad_(False)
        operator = Hessian(model, F.cross_entropy, (x, y))
        assert list(operator.domain.shapes) == ["0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]
        near(operator.to_dense(), hessian(lambda: F.cross_entropy(model(x), y), [*model.parameters()][1:]))

    def test_unused(self):
        model, x, y = mlp(), torch.randn(6, 4), labels(6)
        model.extra = nn.Parameter(torch.ones(2))
        forward = nn.Sequential(*list(model)[:5])
        for kind in (Hessian, GaussNewton, EmpiricalFisher):
            dense = kind(forward, nn.CrossEntropyLoss(), (x, y), parameters=model).to_dense()
            assert not dense[:2].any() and dense[2:, 2:].any()

    def test_functions_with_parameters(self):
        w = torch.randn(4, 3, requires_grad=True)
        x, y = torch.randn(6, 4), labels(6)
        operator = GaussNewton(lambda x: torch.tanh(x @ w), nn.CrossEntropyLoss(), ragged(x, y), parameters={"w": w})
        g = gauss_newton(lambda: torch.tanh(x @ w), lambda z: F.cross_entropy(z, y), [w])
        near(operator.to_dense(), g)


class TestKept:
    """A kept graph is that of the parameters as they are."""

    def test_follows_the_model(self):
        model, x, y = mlp(), torch.randn(6, 4), labels(6)
        operators = [kind(model, F.cross_entropy, (x, y)) for kind in (Hessian, GaussNewton)]
        batches = Hessian(model, F.cross_entropy, ragged(x, y), keep=True)
        for _ in range(2):
            h = hessian(lambda: F.cross_entropy(model(x), y), list(model.parameters()))
            g = gauss_newton(lambda: model(x), lambda z: F.cross_entropy(z, y), list(model.parameters()))
            for operator, want in zip([*operators, batches], [h, g, h], strict=True):
                near(operator.to_dense(), want)
            with torch.no_grad():
                model[4].bias += 1
                model[0].weight *= 2

    def test_follows_modes_and_data(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        operator = Hessian(model, nn.MSELoss(), (x, y))
        for change in (lambda: None, model.eval, lambda: x.mul_(2), lambda: model[1].running_mean.add_(1)):
            change()
            near(operator.to_dense(), Hessian(model, nn.MSELoss(), (x, y)).to_dense())

    def test_refresh(self):
        model, data = mlp(), (torch.randn(6, 4), labels(6))
        operator = Hessian(model, F.cross_entropy, data)
        before = operator.to_dense()
        model[0].weight.data *= 2
        operator.refresh()
        assert not torch.allclose(operator.to_dense(), before)

    def test_the_model_runs_once(self):
        model, calls = mlp(), []
        model.register_forward_hook(lambda *_: calls.append(1))
        operator = Residual(model, F.cross_entropy, (torch.randn(6, 4), labels(6)), check=False)
        for _ in range(3):
            operator @ torch.randn(operator.shape[0])
        assert len(calls) == 1

    def test_gradients_are_left_alone(self):
        model = mlp()
        operator = Fisher(model, nn.CrossEntropyLoss(), (torch.randn(6, 4), labels(6)), mc_samples=2)
        with torch.no_grad():
            product = operator @ torch.randn(operator.shape[0])
        assert not product.requires_grad and all(p.grad is None for p in model.parameters())


def test_progress(capsys):
    importorskip("tqdm")
    operator = Hessian(mlp(), nn.MSELoss(), ragged(torch.randn(6, 4), torch.randn(6, 3)), progress=True, check=False)
    operator @ torch.ones(operator.shape[0])


def test_interrupted():
    """An exception while batches come leaves the operator as it was."""
    data = ragged(torch.randn(6, 4), torch.randn(6, 3))

    class Data(list):
        broken = False

        def __iter__(self):
            yield data[0]
            if self.broken:
                raise KeyboardInterrupt
            yield data[1]

    batches = Data()
    operator = Hessian(mlp(), nn.MSELoss(), batches, keep=True)
    want = operator.to_dense()
    operator.refresh()
    batches.broken = True
    with raises(KeyboardInterrupt):
        operator.to_dense()
    batches.broken = False
    near(operator.to_dense(), want)


def test_tokens():
    model, x, y, _ = ARCHITECTURES["attention, tied"]()
    check(model, tokens, x, y, reduction="mean")
