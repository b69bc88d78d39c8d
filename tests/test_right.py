"""What "right" means: options that are easy to get silently wrong, each against the Hessian by autograd.

Everywhere here HesScale is exact: below the loss there is one operation with a diagonal Hessian at its output, and
under it only parameters that act entry by entry, or one layer with weights.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from curvext import HesScale, extend
from curvext.testing import EXACT, check_quantity

from .models import MODELS, one_hidden
from .reference import equation_2, hessian_diagonal

pytestmark = pytest.mark.usefixtures("float64")


def check(parameters, loss, tolerance=1e-9):
    """The block's result equals the diagonal of the Hessian."""
    parameters = list(parameters)
    with extend(parameters, enumerate_up_to=EXACT):
        loss().backward()
    want = hessian_diagonal(loss, parameters)
    assert any(h.any() for h in want)
    torch.testing.assert_close([p.hesscale for p in parameters], want, rtol=tolerance, atol=tolerance)


def check_between(function, *shape, bend=torch.tanh, positive=False):
    """A function between entrywise parameters and a separable loss."""
    x, s = torch.randn(shape), torch.randn(shape, requires_grad=True)

    def outputs():
        z = bend(x * s)
        return function(z.exp() if positive else z)

    target = torch.randn(outputs().shape)
    check([s], lambda: ((outputs() - target) ** 2).sum() / 7 + outputs().pow(3).sum())


CROSS_ENTROPIES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "class weights": {"weight": [0.2, 3.0, 1.1]},
    "class weights, sum": {"weight": [0.2, 3.0, 1.1], "reduction": "sum"},
    "ignore_index": {"ignore_index": 1},
    "label smoothing": {"label_smoothing": 0.2},
    "all": {"weight": [0.2, 3.0, 1.1], "ignore_index": 1, "label_smoothing": 0.2},
}


class TestLosses:
    @pytest.mark.parametrize("name", CROSS_ENTROPIES)
    @pytest.mark.parametrize("positions", [(), (2,), (2, 2)], ids=["", "1d", "2d"])
    def test_cross_entropy(self, name, positions):
        options = dict(CROSS_ENTROPIES[name])
        if "weight" in options:
            options["weight"] = torch.tensor(options["weight"])
        layer, y = nn.Linear(4, 3), torch.randint(0, 3, (6, *positions))
        y.view(-1)[0] = 1
        x = torch.randn(6, *positions, 4)
        check(layer.parameters(), lambda: F.cross_entropy(layer(x).movedim(-1, 1), y, **options))

    @pytest.mark.parametrize("name", ["mean", "sum", "class weights", "label smoothing"])
    def test_cross_entropy_with_probabilities(self, name):
        options = dict(CROSS_ENTROPIES[name])
        if "weight" in options:
            options["weight"] = torch.tensor(options["weight"])
        layer, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.softmax(torch.randn(6, 3), 1)
        check(layer.parameters(), lambda: F.cross_entropy(layer(x), y, **options))

    def test_every_target_ignored_but_one(self):
        layer, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([1, 1, 1, 0, 1, 1])
        check(layer.parameters(), lambda: F.cross_entropy(layer(x), y, ignore_index=1))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("pos_weight", [None, [0.5, 1.0, 2.0]])
    def test_binary_cross_entropy(self, reduction, pos_weight):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.rand(6, 3)
        options = {"reduction": reduction, "weight": torch.rand(6, 3)}
        options["pos_weight"] = None if pos_weight is None else torch.tensor(pos_weight)
        check(model.parameters(), lambda: F.binary_cross_entropy_with_logits(model(x), y, **options))

    @pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
    def test_reductions_and_terms(self, reduction):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)

        def loss():
            z = model(x)
            value = F.mse_loss(z, y, reduction=reduction)
            return 3 * value.sum() + 0.2 * z.exp().mean() + 0.1 * sum(p.square().sum() for p in model.parameters())

        check(model.parameters(), loss)

    def test_ragged_last_batches(self):
        model, x, y = one_hidden(), torch.randn(10, 4), torch.randn(10, 3)
        for a, b in zip(x.split(4), y.split(4), strict=True):
            check(model.parameters(), lambda a=a, b=b: F.mse_loss(model(a), b))

    def test_an_empty_part_of_a_batch(self):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        check(model.parameters(), lambda: F.mse_loss(model(x), y) + F.mse_loss(model(x[:0]), y[:0], reduction="sum"))


CONVOLUTIONS = {
    "stride": {"stride": 2, "padding": 1},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4, "padding": 1},
    "dilation": {"dilation": (1, 2)},
    "same": {"padding": "same", "dilation": 2},
    "same, even kernel": {"padding": "same", "kernel_size": 2},
    "valid": {"padding": "valid"},
    "uneven": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2)},
    "no bias": {"bias": False},
}


class TestConvolutions:
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_weights_and_inputs(self, name):
        options = {"kernel_size": 3, **CONVOLUTIONS[name]}
        layer, x = nn.Conv2d(4, 4, **options), torch.randn(2, 4, 5, 5)
        y = torch.randn(layer(x).shape)
        check(layer.parameters(), lambda: F.mse_loss(layer(x), y))
        check_between(layer.requires_grad_(False), 1, 4, 5, 5)

    @pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
    def test_padding_modes(self, mode):
        layer, x = nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode=mode), torch.randn(2, 2, 4, 4)
        y = torch.randn(layer(x).shape)
        check(layer.parameters(), lambda: F.mse_loss(layer(x), y))
        s = torch.randn(2, 2, 4, 4, requires_grad=True)
        check_quantity(HesScale(), [s], lambda: F.mse_loss(layer(torch.tanh(s * x)), y))

    @pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
    def test_padding_alone(self, mode):
        check_between(lambda z: F.pad(z, (1, 2, 2, 1), mode=mode), 1, 2, 3, 3)

    @pytest.mark.parametrize("dimensions", [1, 2, 3])
    def test_transposed(self, dimensions):
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
        layer = kind(4, 2, 2, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
        x = torch.randn(2, 4, *[3, 2, 2][:dimensions])
        y = torch.randn(layer(x).shape)
        check(layer.parameters(), lambda: F.mse_loss(layer(x), y))
        check_between(layer.requires_grad_(False), *x.shape)


POOLS = {
    "ceil_mode": nn.AvgPool2d(2, ceil_mode=True),
    "ceil_mode, padding": nn.AvgPool2d(3, 2, padding=1, ceil_mode=True),
    "count_include_pad": nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
    "divisor_override": nn.AvgPool2d(2, divisor_override=3),
    "overlapping": nn.AvgPool2d(3, 1),
    "average, 1d": nn.AvgPool1d(3, 2, padding=1, ceil_mode=True),
    "average, 3d": nn.AvgPool3d(2, ceil_mode=True, divisor_override=5),
    "adaptive": nn.AdaptiveAvgPool2d((2, 3)),
    "maximum": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "maximum, overlapping": nn.MaxPool2d(3, 1),
    "maximum, dilated": nn.MaxPool2d(2, 2, dilation=2, return_indices=False),
    "maximum, 1d": nn.MaxPool1d(3, 2),
    "maximum, 3d": nn.MaxPool3d(2),
    "adaptive maximum": nn.AdaptiveMaxPool2d((2, 3)),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name):
    dimensions = 1 if "1d" in name else 3 if "3d" in name else 2
    check_between(POOLS[name], 2, 2, *[5, 4, 3][:dimensions])


class TestSharing:
    def test_a_module_applied_to_two_inputs(self):
        model, (x1, x2), y = nn.Linear(4, 3), torch.randn(2, 6, 4), torch.randn(6, 3)
        check(model.parameters(), lambda: F.mse_loss(model(x1), y) + F.cross_entropy(model(x2), y.argmax(1)))

    def test_weights_tied_between_embedding_and_head(self):
        """Every use alone is exact; the result is the sum over the uses."""
        embedding, tokens, y = nn.Embedding(5, 4), torch.tensor([0, 1, 1, 3]), torch.tensor([1, 2, 0, 4])
        head = embedding.weight
        check([head], lambda: F.cross_entropy(torch.randn(4, 4, generator=torch.Generator()) @ head.T, y))
        check([head], lambda: torch.tanh(embedding(tokens)).square().sum())
        frozen = head.detach()

        def loss(lower, upper):
            return F.cross_entropy(torch.tanh(F.embedding(tokens, lower)) @ upper.T, y)

        parts = []
        for weights in ((head, frozen), (frozen, head), (head, head)):
            with extend([head]):
                loss(*weights).backward()
            parts.append(head.hesscale)
        torch.testing.assert_close(parts[2], parts[0] + parts[1])

    def test_embedding_with_repeated_and_padding_indices(self):
        embedding, tokens = nn.Embedding(5, 4, padding_idx=1), torch.tensor([[0, 1, 1], [3, 3, 3]])
        check([embedding.weight], lambda: torch.tanh(embedding(tokens)).pow(2).mean())
        assert not embedding.weight.hesscale[1].any()


class TestLayouts:
    @pytest.mark.parametrize(
        "activation",
        [
            nn.ReLU(True),
            nn.ELU(inplace=True),
            nn.SiLU(True),
            nn.LeakyReLU(0.1, True),
            nn.Hardtanh(inplace=True),
            torch.tanh_,
        ],
        ids=lambda activation: getattr(activation, "__name__", None) or str(activation),
    )
    def test_activations_in_place(self, activation):
        first, second, x, y = nn.Linear(4, 5), nn.Linear(5, 3), torch.randn(6, 4), torch.randn(6, 3)
        parameters = [*first.parameters(), *second.parameters()]
        check(parameters, lambda: F.mse_loss(second(activation(first(x))), y))

    def test_arithmetic_in_place(self):
        first, x, y = nn.Linear(4, 5), torch.randn(6, 4), torch.randn(6, 5)

        def loss():
            z = first(x)
            z *= 2
            z[:, 1:3] += 1
            z[0] = torch.tanh(z[1])
            return F.mse_loss(z.exp_(), y)

        check_quantity(HesScale(), first, loss)

    @pytest.mark.parametrize(
        "between",
        [
            lambda z: z.view(3, 2, 4).transpose(0, 1).reshape(6, 4),
            lambda z: z.t().contiguous().t(),
            lambda z: z[:, [3, 1, 0, 2]].flip(0),
            lambda z: torch.cat([z[:, 2:], z[:, :2]], 1).unsqueeze(0).squeeze(0),
            lambda z: z.view(6, 2, 2).permute(0, 2, 1).flatten(1),
            lambda z: torch.stack(z.unbind(1), 1).expand(2, 6, 4)[0],
            lambda z: z.as_strided((6, 4), (4, 1)) + 0,
        ],
        ids=["view", "transpose", "index", "cat", "permute", "unbind", "as_strided"],
    )
    def test_views_between_layers(self, between):
        first, second, x, y = nn.Linear(4, 4), nn.Linear(4, 3), torch.randn(6, 4), torch.randn(6, 3)
        parameters = [*first.parameters(), *second.parameters()]
        check(parameters, lambda: F.mse_loss(second(torch.tanh(between(first(x)))), y))

    def test_memory_formats(self):
        layer, x, y = nn.Conv2d(2, 3, 3), torch.randn(2, 2, 4, 4), torch.randn(2, 3, 2, 2)
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        check(layer.parameters(), lambda: F.mse_loss(layer(x), y))


class TestRandomAndBatch:
    @pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_dropout_of_exact_zeros(self, p, inplace):
        model = nn.Sequential(nn.Linear(4, 5), nn.Softshrink(0.2), nn.Dropout(p, inplace), nn.Linear(5, 3))
        x, y = torch.randn(6, 4), torch.randn(6, 3)
        x[x.abs() < 0.5] = 0

        def loss():
            torch.manual_seed(3)
            return F.mse_loss(model(x), y)

        check(model.parameters(), loss)

    def test_channelwise_and_alpha_dropout(self):
        for dropout in (nn.Dropout1d(0.4), nn.Dropout2d(0.4), nn.AlphaDropout(0.4), nn.FeatureAlphaDropout(0.4)):
            state = torch.get_rng_state()

            def seeded(z, dropout=dropout, state=state):
                torch.set_rng_state(state)
                return dropout(z)

            check_between(seeded, *((2, 3, 4) if isinstance(dropout, nn.Dropout1d) else (2, 3, 2, 2)))

    @pytest.mark.parametrize("train", [True, False])
    def test_batch_normalisation(self, train):
        layer = nn.BatchNorm2d(2, track_running_stats=not train).train(train)
        nn.init.normal_(layer.weight)
        if not train:
            layer.running_mean.normal_()
        check_between(layer.requires_grad_(False), 3, 2, 2, 2)
        layer.requires_grad_(True)
        x, y = torch.randn(3, 2, 2, 2), torch.randn(3, 2, 2, 2)
        check(layer.parameters(), lambda: F.mse_loss(layer(x), y))

    def test_running_statistics_move_as_without_the_block(self):
        layers = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
        x = torch.randn(5, 3)
        with extend(layers[0]):
            layers[0](x).pow(3).sum().backward()
        layers[1](x).pow(3).sum().backward()
        for (name, a), (_, b) in zip(layers[0].named_buffers(), layers[1].named_buffers(), strict=True):
            assert torch.equal(a, b), name


class TestSurroundings:
    @pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
    @pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
    def test_autocast(self, name, inside):
        torch.set_default_dtype(torch.float32)
        model, loss = MODELS[name]()
        with extend(model) as curvature:
            loss().backward()
        want = torch.cat([h.flatten() for h in curvature.hesscale.values()])
        with extend(model) as curvature:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss()
                if inside:
                    value.backward()
            if not inside:
                value.backward()
        for name, p in model.named_parameters():
            assert p.hesscale.dtype == torch.float32 and p.hesscale.shape == p.shape and p.hesscale.isfinite().all(), (
                name
            )
        got = torch.cat([h.flatten() for h in curvature.hesscale.values()])
        assert (got - want).norm() < 0.05 * want.norm()

    @pytest.mark.parametrize("kept", [0, 2, 4])
    def test_frozen_parts_change_nothing_elsewhere(self, kept):
        model, loss = MODELS["mlp"]()
        with extend(model) as curvature:
            loss().backward()
        want = curvature.hesscale[f"{kept}.weight"]
        model.requires_grad_(False)
        model[kept].weight.requires_grad_(True)
        with extend(model) as curvature:
            loss().backward()
        assert list(curvature.hesscale) == [f"{kept}.weight"]
        torch.testing.assert_close(curvature.hesscale[f"{kept}.weight"], want)

    def test_inputs_that_require_gradients(self):
        model, x, y = one_hidden(), torch.randn(6, 4, requires_grad=True), torch.randn(6, 3)
        with extend(model) as curvature:
            F.mse_loss(model(x), y).backward()
        assert len(curvature.hesscale) == 4 and not hasattr(x, "hesscale") and x.grad is not None
        check(model.parameters(), lambda: F.mse_loss(model(x), y))

    def test_a_copy_of_a_used_model(self):
        model, x, y = one_hidden(), torch.randn(6, 4), torch.randn(6, 3)
        check(model.parameters(), lambda: F.mse_loss(model(x), y))
        before = [p.hesscale.clone() for p in model.parameters()]
        other = copy.deepcopy(model)
        check(other.parameters(), lambda: F.mse_loss(other(2 * x), y))
        torch.testing.assert_close([p.hesscale for p in model.parameters()], before)

    def test_weight_normalisation(self):
        """The normalisation is one more operation between the parameters and the weight."""
        layer, x, y = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), torch.randn(6, 4), torch.randn(6, 3)
        g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
        nn.init.uniform_(g, 0.5, 2)
        weight = layer.weight.detach().requires_grad_()
        with extend([weight]):
            F.mse_loss(F.linear(x, weight, layer.bias.detach()), y).backward()
        with extend(layer):
            F.mse_loss(layer(x), y).backward()

        def normalised(g, v):
            return g * v / v.norm(dim=1, keepdim=True)

        for i, p in enumerate((g, v)):
            want = equation_2(normalised, [g.detach(), v.detach()], i, weight.grad, weight.hesscale)
            torch.testing.assert_close(p.hesscale, want)


def test_the_layout_is_the_parameters():
    layer, w = nn.Linear(5, 3), torch.randn(5, 3, requires_grad=True)
    with extend({"layer": layer.weight, "w": w}):
        (layer(torch.randn(4, 5)) + torch.randn(4, 5) @ w).square().mean().backward()
    assert layer.weight.hesscale.stride() == layer.weight.stride() and w.hesscale.stride() == w.stride()
