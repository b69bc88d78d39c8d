"""Every first-order and Gauss-Newton quantity against its dense definition, on whole models, in float64.

Each case is a model as users write it, its input, its loss, and the same loss as one number for each sample.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .dense import check
from .whole import N, Of, Seeded, classified, fitted, images, pooled, sequences

pytestmark = pytest.mark.usefixtures("float64")


class TestGraphs:
    """What is not a chain."""

    def test_a_residual_net_with_functional_additions(self):
        model = Of(
            lambda m, x: m.head(torch.tanh(m.c1(x) + m.c2(torch.tanh(m.c1(x))) + x).mean((2, 3))),
            **{"c1": nn.Conv2d(2, 2, 3, padding=1), "c2": nn.Conv2d(2, 2, 1), "head": nn.Linear(2, 3)},
        )
        classified(model, images())

    def test_tied_weights(self):
        encoder, decoder = nn.Linear(3, 4), nn.Linear(4, 3)
        model = Of(lambda m, x: F.linear(torch.tanh(m.a(x)), m.a.weight.t(), m.b.bias), a=encoder, b=decoder)
        decoder.weight.requires_grad_(False)
        fitted(model, torch.randn(N, 3), 3)

    def test_a_module_used_twice(self):
        layer = nn.Linear(4, 4)
        classified(nn.Sequential(layer, nn.Tanh(), layer, nn.Sigmoid(), nn.Linear(4, 3)), torch.randn(N, 4))

    def test_a_convolution_used_at_two_sizes(self):
        conv = nn.Conv2d(2, 2, 3, padding=1)
        classified(pooled(conv, nn.Tanh(), nn.AvgPool2d(2), conv, channels=2), images())

    def test_two_towers(self):
        model = Of(
            lambda m, x: m.head(torch.cat([torch.tanh(m.a(x)), F.silu(m.b(x[:, :2]))], 1)),
            **{"a": nn.Linear(4, 3), "b": nn.Linear(2, 2), "head": nn.Linear(5, 3)},
        )
        classified(model, torch.randn(N, 4))

    def test_two_inputs_through_one_tower(self):
        model = Of(
            lambda m, x, y: m.head(torch.tanh(m.a(x)) * torch.tanh(m.a(y)) - m.a(x - y)),
            **{"a": nn.Linear(4, 3), "head": nn.Linear(3, 3)},
        )
        classified(model, (torch.randn(N, 4), torch.randn(N, 4)))

    def test_both_inputs_in_one_batch(self):
        """Two halves of a doubled batch belong to the same samples."""
        model = Of(lambda m, x, y: (m.a(torch.cat([x, y]))).chunk(2), a=models.mlp())
        x, y = torch.randn(N, 4), torch.randn(N, 4)
        check(model, (x, y), lambda z: (z[0] - z[1]).square().sum(), lambda z: (z[0] - z[1]).square().sum(1))

    def test_two_heads_with_two_losses(self):
        model = Of(
            lambda m, x: (m.a(torch.tanh(m.body(x))), m.b(torch.tanh(m.body(x))).squeeze(1)),
            **{"body": nn.Linear(4, 3), "a": nn.Linear(3, 3), "b": nn.Linear(3, 1)},
        )
        y, t = torch.randint(0, 3, (N,)), torch.rand(N)
        check(
            model,
            torch.randn(N, 4),
            lambda z: F.cross_entropy(z[0], y) + 0.3 * F.binary_cross_entropy_with_logits(z[1], t),
            lambda z: (F.cross_entropy(z[0], y, reduction="none")
                       + 0.3 * F.binary_cross_entropy_with_logits(z[1], t, reduction="none")) / N,
        )  # fmt: skip

    def test_a_bare_parameter_as_scale(self):
        model = Of(
            lambda m, x: m.out(torch.tanh(m.scale * m.a(x)) + m.shift.exp()),
            **{"a": nn.Linear(4, 3), "out": nn.Linear(3, 3)},
            **{"scale": nn.Parameter(torch.randn(())), "shift": nn.Parameter(torch.randn(3))},
        )
        classified(model, torch.randn(N, 4))

    def test_bare_parameters_in_products(self):
        model = Of(
            lambda m, x: torch.tanh(x @ m.a) @ m.a.t() @ m.b + torch.einsum("ni,ijk,nj->nk", x, m.c, x),
            **{"a": nn.Parameter(torch.randn(4, 3)), "b": nn.Parameter(torch.randn(4, 3))},
            **{"c": nn.Parameter(torch.randn(4, 4, 3))},
        )
        classified(model, torch.randn(N, 4))

    def test_a_view_between_layers(self):
        """A square batch, transposed and back, and reshapes that move the samples."""
        model = Of(
            lambda m, x: m.head(m.a(torch.tanh(m.a(x)).t().contiguous().t()).view(-1, 2, 2).transpose(1, 2).flatten(1)),
            **{"a": nn.Linear(4, 4), "head": nn.Linear(4, 3)},
        )
        classified(model, torch.randn(4, 4))

    def test_the_samples_last(self):
        model = Of(lambda m, x: (m.b @ torch.tanh(m.a @ x.t())).t(), a=nn.Parameter(torch.randn(5, 4)),
                   b=nn.Parameter(torch.randn(3, 5)))  # fmt: skip
        classified(model, torch.randn(N, 4))

    def test_a_hypernetwork(self):
        """A weight that is computed, from parameters alone and from the sample."""
        model = Of(
            lambda m, x: torch.bmm(m.h(x).view(-1, 3, 4), x.unsqueeze(2)).squeeze(2) @ torch.tanh(m.u @ m.v),
            **{"h": nn.Linear(4, 12), "u": nn.Parameter(torch.randn(3, 2)), "v": nn.Parameter(torch.randn(2, 3))},
        )
        classified(model, torch.randn(N, 4))

    def test_an_unrolled_fixed_point(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            z = torch.zeros(len(x), 3)
            for _ in range(3):
                z = torch.tanh(m.w(z) + m.u(x))
            return m.head(z)

        classified(Of(forward, w=nn.Linear(3, 3), u=nn.Linear(4, 3), head=nn.Linear(3, 3)), torch.randn(N, 4))


class TestSamplesThatMeet:
    """Where samples depend on each other, the gradient of ``parts`` still is that of one sample's part of the loss."""

    def test_a_contrastive_loss(self):
        model = Of(lambda m, x: (lambda z: z @ z.t())(m.a(x)), a=models.mlp())
        check(model, torch.randn(N, 4), lambda z: F.cross_entropy(z, torch.arange(N)),
              lambda z: F.cross_entropy(z, torch.arange(N), reduction="none") / N)  # fmt: skip

    def test_two_towers_that_are_compared(self):
        model = Of(
            lambda m, x, y: F.normalize(m.a(x)) @ F.normalize(m.b(y)).t() * m.scale.exp(),
            **{"a": models.mlp(), "b": nn.Linear(4, 3), "scale": nn.Parameter(torch.tensor(0.3))},
        )
        check(model, (torch.randn(N, 4), torch.randn(N, 4)), lambda z: F.cross_entropy(z, torch.arange(N)),
              lambda z: F.cross_entropy(z, torch.arange(N), reduction="none") / N)  # fmt: skip

    @pytest.mark.parametrize(
        "between",
        [
            pytest.param(lambda h: (h - h.mean(0)) / h.std(0), id="normalised by hand"),
            pytest.param(lambda h: h + torch.zeros_like(h).index_add(0, torch.tensor([1, 2, 3, 0, 2]),
                                                                     h[torch.tensor([0, 1, 2, 3, 0])]), id="messages"),
            pytest.param(lambda h: 0.3 * h + 0.7 * h[torch.tensor([2, 0, 1, 3])], id="mixed"),
            pytest.param(lambda h: h.flip(0) + h.roll(1, 0) + h.cumsum(0) + h.softmax(0) + h.sort(0)[0], id="moved"),
            pytest.param(lambda h: (h @ h.t()).tanh() @ h, id="compared"),
            pytest.param(lambda h: (h[:, :2] @ h[:, :2].t()).tanh().sum(1, keepdim=True) * h[:, 1:], id="parts"),
            pytest.param(lambda h: (lambda a, b: (a @ a.t()).sum(1)[:, None] * b)(*h.split([1, 2], 1)), id="split"),
            pytest.param(lambda h: torch.stack([row * 2 for row in h]), id="one by one"),
            pytest.param(lambda h: torch.cat([h[:1].tanh(), h[1:]]), id="in two batches"),
            pytest.param(lambda h: torch.ones(N, N).triu().to_sparse() @ h, id="a sparse product"),
        ],
    )  # fmt: skip
    def test_mixing(self, between):
        first, last = nn.Linear(4, 3), nn.LazyLinear(3)
        last(between(first(torch.randn(N, 4))))
        classified(Of(lambda m, x: m.last(between(m.first(x))), first=first, last=last), torch.randn(N, 4))

    @pytest.mark.parametrize("idle", [None, 0, 1])
    def test_experts(self, idle):
        """Also where one of them gets no sample."""

        def forward(m: Any, x: Tensor) -> Tensor:
            gates = torch.softmax(m.router(x), 1)
            out = torch.zeros(len(x), N)
            for e, expert in enumerate((m.a, m.b)):
                mine = (gates.argmax(1) == e).nonzero().squeeze(1)
                out = out.index_add(0, mine, expert(x[mine]) * gates[mine, e, None])
            return out

        router = nn.Linear(4, 2)
        if idle is not None:
            router.bias.data[idle] -= 9
        experts = {"a": nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, N)), "b": nn.Linear(4, N)}
        classified(Of(forward, router=router, **experts), torch.randn(N, 4), classes=N)

    @pytest.mark.parametrize("dim", [0, 1])
    def test_bags_of_instances(self, dim):
        model = Of(lambda m, x: m.head(torch.tanh(m.a(x.flatten(0, 1))).view(N, N, 3).mean(dim)), a=nn.Linear(4, 3),
                   head=nn.Linear(3, 3))  # fmt: skip
        classified(model, torch.randn(N, N, 4))


class TestSharedTensors:
    """Between a parameter and the first operation that samples enter."""

    def test_positions(self):
        model = Of(
            lambda m, x: m.head(torch.tanh(m.e(x) + m.positions(torch.arange(N))).mean(1)),
            **{"e": nn.Embedding(6, 3), "positions": nn.Embedding(5, 3), "head": nn.Linear(3, 3)},
        )
        classified(model, torch.randint(0, 6, (N, N)))

    def test_a_table_of_relative_positions(self):
        index = torch.randint(0, 5, (N, N))

        def forward(m: Any, x: Tensor) -> Tensor:
            q = x.unflatten(-1, (2, 2)).transpose(1, 2)
            bias = m.table[index.view(-1)].view(N, N, -1).permute(2, 0, 1).unsqueeze(0)
            return m.head((torch.softmax(q @ q.mT + bias, -1) @ q).transpose(1, 2).flatten(2).mean(1))

        classified(Of(forward, table=nn.Parameter(torch.randn(5, 2)), head=nn.Linear(4, 3)), torch.randn(N, N, 4))

    def test_standardised_weights(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            w = (m.w - m.w.mean((1, 2, 3), keepdim=True)) / m.w.std((1, 2, 3), keepdim=True)
            return m.head(torch.tanh(F.conv2d(x, w, padding=1)).mean((2, 3)))

        classified(Of(forward, w=nn.Parameter(torch.randn(3, 2, 3, 3)), head=nn.Linear(3, 3)), images())

    def test_an_initial_state(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            state = m.h.expand(-1, len(x), -1).contiguous(), m.c.repeat(1, len(x), 1)
            return m.head(m.cell(x, state)[0][:, -1])

        parts = dict(h=nn.Parameter(torch.randn(1, 1, 3)), c=nn.Parameter(torch.randn(1, 1, 3)))
        classified(Of(forward, cell=nn.LSTM(4, 3, batch_first=True), head=nn.Linear(3, 3), **parts), sequences())

    def test_prototypes(self):
        model = Of(lambda m, x: F.cosine_similarity(m.a(x)[:, None], m.p, dim=2) - torch.cdist(m.a(x), m.p),
                   a=nn.Linear(4, 5), p=nn.Parameter(torch.randn(3, 5)))  # fmt: skip
        classified(model, torch.randn(N, 4))

    def test_a_filter_in_the_spectrum(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            filtered = torch.fft.irfft(torch.fft.rfft(m.a(x), dim=1) * torch.view_as_complex(m.f), n=3, dim=1)
            return m.head(torch.fft.fft2(filtered).real.tanh().mean(1))

        classified(
            Of(forward, a=nn.Linear(4, 3), f=nn.Parameter(torch.randn(2, 3, 2)), head=nn.Linear(3, 3)), sequences()
        )

    def test_a_system_of_equations(self):
        model = Of(lambda m, x: torch.linalg.solve(3 * torch.eye(3) + m.w, m.a(x).t()).t(), a=nn.Linear(4, 3),
                   w=nn.Parameter(torch.randn(3, 3)))  # fmt: skip
        classified(model, torch.randn(N, 4))

    def test_an_orthogonal_layer(self):
        layer = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3))
        classified(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), layer), torch.randn(N, 4))

    def test_writing_into_parts_of_a_tensor(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            z = torch.zeros(len(x), 4)
            z[:, :2] = m.a(x)
            z[:, 2:] = torch.tanh(m.b(x))
            z[:1] *= m.scale
            return m.head(z)

        parts = dict(a=nn.Linear(4, 2), b=nn.Linear(4, 2), head=nn.Linear(4, 3), scale=nn.Parameter(torch.randn(4)))
        classified(Of(forward, **parts), torch.randn(N, 4))

    def test_choosing_between_tensors(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            return m.head(torch.where(x[:, :3] > 0, m.a(x), m.s).clamp(max=m.t) + torch.maximum(m.a(x), m.s))

        parts = dict(s=nn.Parameter(torch.randn(3)), t=nn.Parameter(torch.rand(3)))
        classified(Of(forward, a=nn.Linear(4, 3), head=nn.Linear(3, 3), **parts), torch.randn(N, 4))


class TestLayers:
    @pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, nn.Softplus, nn.Mish, nn.ELU, nn.Hardswish, nn.PReLU,
                                            lambda: nn.ReLU(inplace=True), lambda: nn.LeakyReLU(0.1, inplace=True),
                                            lambda: nn.SiLU(inplace=True), lambda: nn.Softmax(1)])  # fmt: skip
    def test_activations(self, activation):
        classified(models.mlp(activation), torch.randn(N, 4))

    @pytest.mark.parametrize(
        "norm",
        [lambda: nn.GroupNorm(2, 4), lambda: nn.GroupNorm(1, 4), lambda: nn.InstanceNorm2d(4, affine=True),
         lambda: nn.BatchNorm2d(4).eval(), lambda: nn.LayerNorm([4, 4, 4]), lambda: nn.LayerNorm(4),
         lambda: nn.RMSNorm(4), lambda: nn.GroupNorm(2, 4, affine=False)],
        ids=["group", "group of one", "instance", "batch", "layer", "layer of width", "rms", "without weights"],
    )  # fmt: skip
    def test_normalisation(self, norm):
        classified(pooled(nn.Conv2d(2, 4, 3, padding=1), norm(), nn.GELU(), nn.Conv2d(4, 3, 1)), images())

    def test_layer_norm_of_vectors(self):
        classified(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3)), torch.randn(N, 4))

    @pytest.mark.parametrize(
        "layer",
        [
            *[dict(padding_mode=mode, padding=1) for mode in ("circular", "reflect", "replicate")],
            *[dict(groups=2), dict(groups=4), dict(dilation=2), dict(stride=2, padding=1), dict(padding="same")],
            dict(groups=2, dilation=(1, 2), stride=(2, 1), padding=(2, 1), bias=False),
        ],
        ids=str,
    )
    def test_convolutions(self, layer):
        model = pooled(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 3, **layer), nn.Tanh(), channels=4)
        classified(model, images(2, 5, 5))

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("d", [1, 2, 3])
    def test_transposed_convolutions(self, d, groups):
        convolution = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[d - 1]
        layer = convolution(2, 4, 3, stride=2, padding=1, output_padding=1, groups=groups)
        classified(pooled(layer, nn.Tanh(), channels=4), images(2, *[2] * d))

    @pytest.mark.parametrize("d", [1, 3])
    def test_convolutions_of_other_dimensions(self, d):
        layer = (nn.Conv1d, None, nn.Conv3d)[d - 1](2, 3, 2, groups=1, padding=1)
        classified(pooled(layer, nn.SiLU()), images(2, *[3] * d))

    @pytest.mark.parametrize(
        "pool", [nn.MaxPool2d(2), nn.AvgPool2d(2, divisor_override=3), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                 nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2), nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2),
                 nn.PixelShuffle(2), nn.Unfold(2), nn.ZeroPad2d(1)], ids=lambda m: type(m).__name__)  # fmt: skip
    def test_pooling_and_resampling(self, pool):
        channels = {nn.PixelShuffle: 1, nn.Unfold: 16}.get(type(pool), 4)
        classified(pooled(nn.Conv2d(2, 4, 3, padding=1), nn.Softplus(), pool, channels=channels), images(2, 4, 4))

    def test_weight_norm(self):
        parametrized = nn.utils.parametrizations.weight_norm
        layers = parametrized(nn.Linear(4, 5)), parametrized(nn.Linear(5, 3), dim=1)
        classified(nn.Sequential(layers[0], nn.Tanh(), layers[1]), torch.randn(N, 4))

    def test_spectral_norm(self):
        layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)).eval()
        classified(nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3)), torch.randn(N, 4))

    @pytest.mark.parametrize("option", [dict(padding_idx=0), dict(sparse=True), dict(max_norm=1.0)], ids=str)
    def test_an_embedding(self, option):
        model = Of(lambda m, x: m.head(torch.tanh(m.e(x)).mean(1)), e=nn.Embedding(6, 3, **option),
                   head=nn.Linear(3, 3))  # fmt: skip
        classified(model, torch.tensor([[0, 1, 1], [2, 0, 0], [3, 4, 5], [1, 2, 3]]))

    @pytest.mark.parametrize("mode", ["mean", "sum", "max"])
    def test_a_bag_of_embeddings(self, mode):
        model = nn.Sequential(nn.EmbeddingBag(6, 3, mode=mode), nn.Tanh(), nn.Linear(3, 3))
        classified(model, torch.randint(0, 6, (N, 3)))

    def test_a_bilinear_layer(self):
        model = Of(lambda m, x: m.head(torch.tanh(m.b(x, x[:, :2]))), b=nn.Bilinear(4, 2, 3), head=nn.Linear(3, 3))
        classified(model, torch.randn(N, 4))

    @pytest.mark.parametrize(
        "dropout", [nn.Dropout(0.4), nn.Dropout(0.4, inplace=True), nn.AlphaDropout(0.4), nn.Dropout1d(0.4)], ids=str
    )
    def test_dropout_in_training(self, dropout):
        model = nn.Sequential(
            nn.Linear(4, 6), nn.Hardtanh(0, 3), nn.Unflatten(1, (3, 2)), dropout, nn.Flatten(), nn.Linear(6, 3)
        )
        classified(Seeded(model), torch.cat([torch.randn(N - 1, 4), torch.zeros(1, 4)]))


class TestLosses:
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_ignored_targets_weights_and_smoothing(self, reduction):
        y = torch.tensor([0, 7, 2, 1])
        weight = torch.tensor([0.2, 1.0, 3.0])
        options: dict[str, Any] = dict(weight=weight, ignore_index=7, label_smoothing=0.1)
        scale = weight[y[y != 7]].sum() if reduction == "mean" else 1
        check(
            models.mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, y, reduction=reduction, **options),
            lambda z: F.cross_entropy(z, y, reduction="none", **options) / scale,
        )  # fmt: skip

    def test_probabilities_as_targets(self):
        y = torch.rand(N, 3)
        check(models.mlp(), torch.randn(N, 4), lambda z: F.cross_entropy(z, y),
              lambda z: F.cross_entropy(z, y, reduction="none") / N)  # fmt: skip

    def test_a_scaled_loss(self):
        y = torch.randn(N, 3)
        check(models.mlp(), torch.randn(N, 4), lambda z: 3 * F.mse_loss(z, y, reduction="sum") / 7 + 1,
              lambda z: 3 * (z - y).square().sum(1) / 7 + 1 / N)  # fmt: skip

    def test_a_weight_for_every_sample(self):
        y, w = torch.randint(0, 3, (N,)), torch.tensor([0.0, 1.0, 2.0, 0.5])
        check(models.mlp(), torch.randn(N, 4), lambda z: (w * F.cross_entropy(z, y, reduction="none")).mean(),
              lambda z: w * F.cross_entropy(z, y, reduction="none") / N)  # fmt: skip

    def test_one_output(self):
        y = torch.rand(N)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0))
        check(model, torch.randn(N, 4), lambda z: F.binary_cross_entropy_with_logits(z, y),
              lambda z: F.binary_cross_entropy_with_logits(z, y, reduction="none") / N)  # fmt: skip

    def test_one_sample(self):
        classified(models.cnn(), images(2, 6, 6, n=1), n=1)

    def test_one_sample_with_one_output(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        check(model, torch.randn(1, 4), lambda z: F.mse_loss(z, torch.ones(1, 1)), lambda z: (z - 1).square().sum(1))


class TestPartsOfModels:
    def test_frozen_parts(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        model[0].weight.requires_grad_(False)
        model[2].requires_grad_(False)
        classified(model, torch.randn(N, 4))

    @pytest.mark.parametrize("kind", ["vectors", "images"])
    def test_inputs_that_require_gradients(self, kind):
        x, model = {"vectors": (torch.randn(N, 4), models.mlp()), "images": (images(2, 6, 6), models.cnn())}[kind]
        classified(model, x.requires_grad_())

    def test_a_low_rank_adapter(self):
        model = Of(
            lambda m, x: m.head(torch.tanh(m.a(x) + x @ m.u @ m.v)),
            **{"a": nn.Linear(4, 5).requires_grad_(False), "head": nn.Linear(5, 3)},
            **{"u": nn.Parameter(torch.randn(4, 2)), "v": nn.Parameter(torch.randn(2, 5))},
        )
        classified(model, torch.randn(N, 4))

    def test_a_parameter_that_is_not_used(self):
        model = Of(lambda m, x: m.a(x), a=nn.Linear(4, 3), b=nn.Linear(2, 2).requires_grad_(False))
        classified(model, torch.randn(N, 4))
