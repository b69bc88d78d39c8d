"""Every first-order and Gauss-Newton quantity against its dense definition, on whole models, in float64.

Each case is a model as users write it, its input, its loss, and the same loss as one number for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import models
from .dense import check

pytestmark = pytest.mark.usefixtures("float64")

N = 4


def classified(model: nn.Module, x: Any, n: int = N, classes: int = 3, **options: Any) -> None:
    y = torch.randint(0, classes, (n,))
    check(model, x, lambda z: F.cross_entropy(z, y), lambda z: F.cross_entropy(z, y, reduction="none") / n, **options)


def fitted(model: nn.Module, x: Any, *shape: int, **options: Any) -> None:
    """Squared error, for outputs ``[N, *shape]``."""
    y = torch.randn(N, *shape)
    check(model, x, lambda z: F.mse_loss(z, y), lambda z: (z - y).square().flatten(1).sum(1) / y.numel(), **options)


def images(channels: int = 2, *size: int, n: int = N) -> Tensor:
    return torch.randn(n, channels, *(size or (4, 4)))


def sequences(t: int = 3, width: int = 4) -> Tensor:
    return torch.randn(N, t, width)


class Of(nn.Module):
    """A model whose forward pass is a function of its parts and the input."""

    def __init__(self, forward: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = forward

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


class Seeded(nn.Module):
    """A model whose every forward pass draws the same masks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.model(x)


def pooled(*layers: nn.Module, channels: int = 3) -> nn.Module:
    """Layers on images, the mean over positions, and a linear head."""
    return Of(
        lambda m, x: m.head(m.body(x).flatten(2).mean(2)), body=nn.Sequential(*layers), head=nn.Linear(channels, 3)
    )


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

    def test_experts(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            gates = torch.softmax(m.router(x), 1)
            out = torch.zeros(len(x), 3)
            for e, expert in enumerate((m.a, m.b)):
                mine = (gates.argmax(1) == e).nonzero().squeeze(1)
                out = out.index_add(0, mine, expert(x[mine]) * gates[mine, e, None])
            return out

        classified(Of(forward, router=nn.Linear(4, 2), a=models.mlp(), b=nn.Linear(4, 3)), torch.randn(N, 4))

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


class TestSequences:
    @pytest.mark.parametrize("batch_first", [True, False])
    @pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
    def test_recurrent(self, cell, batch_first):
        model = Of(
            lambda m, x: m.head(m.cell(x if batch_first else x.transpose(0, 1))[0].mean(1 if batch_first else 0)),
            **{"cell": cell(4, 3, batch_first=batch_first), "head": nn.Linear(3, 3)},
        )
        classified(model, sequences())

    def test_recurrent_layers_in_both_directions(self):
        model = Of(lambda m, x: m.head(m.cell(x)[0][:, -1]), head=nn.Linear(4, 3),
                   cell=nn.LSTM(3, 2, num_layers=2, bidirectional=True, batch_first=True))  # fmt: skip
        classified(model, sequences(3, 3))

    @pytest.mark.parametrize("weights", [False, True])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_attention(self, batch_first, weights):
        def forward(m: Any, x: Tensor) -> Tensor:
            x = x if batch_first else x.transpose(0, 1)
            x = x + m.attention(x, x, x, need_weights=weights)[0]
            return m.head(x.mean(1 if batch_first else 0))

        classified(Of(forward, attention=nn.MultiheadAttention(4, 2, batch_first=batch_first), head=nn.Linear(4, 3)),
                   sequences())  # fmt: skip

    def test_attention_of_two_sequences(self):
        model = Of(lambda m, x, y: m.head(m.attention(x, y, y)[0].mean(1)), head=nn.Linear(4, 3),
                   attention=nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2 + 1))  # fmt: skip
        classified(model, (sequences(), sequences(2, 3)))

    @pytest.mark.parametrize("mask", ["causal", "padding"])
    def test_masked_attention(self, mask):
        causal, padding = nn.Transformer.generate_square_subsequent_mask(3), torch.zeros(N, 3, dtype=torch.bool)
        padding[1, 2] = padding[3, 1:] = True
        masks = dict(attn_mask=causal, is_causal=True) if mask == "causal" else dict(key_padding_mask=padding)
        model = Of(lambda m, x: m.head(m.attention(x, x, x, need_weights=False, **masks)[0].mean(1)),
                   attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 3))  # fmt: skip
        classified(model, sequences())

    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_an_encoder_layer(self, batch_first, dropout):
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout, F.gelu, batch_first=batch_first)
        model = Of(
            lambda m, x: m.head(m.layer(x if batch_first else x.transpose(0, 1)).mean(1 if batch_first else 0)),
            **{"layer": layer, "head": nn.Linear(4, 3)},
        )
        classified(Seeded(model), sequences())

    def test_a_decoder_layer(self):
        layer = nn.TransformerDecoderLayer(4, 2, 5, 0.0, batch_first=True, norm_first=True)
        model = Of(lambda m, x, y: m.head(m.layer(x, y).mean(1)), layer=layer, head=nn.Linear(4, 3))
        classified(model, (sequences(), sequences(2)))

    def test_a_class_token(self):
        def forward(m: Any, x: Tensor) -> Tensor:
            patches = m.patches(x).flatten(2).transpose(1, 2)
            tokens = torch.cat([m.token.expand(len(x), -1, -1), patches], 1) + m.position
            return m.head(m.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0])

        classified(Of(
            forward,
            patches=nn.Conv2d(2, 4, 2, stride=2), token=nn.Parameter(torch.randn(1, 1, 4)),
            position=nn.Parameter(torch.randn(1, 5, 4)), head=nn.Linear(4, 3),
            attention=nn.MultiheadAttention(4, 2, batch_first=True),
        ), images())  # fmt: skip

    @pytest.mark.parametrize("flat", [False, True])
    def test_token_losses(self, flat):
        tokens = torch.randint(0, 5, (N, 3))
        y = torch.randint(0, 5, (N, 3))
        y[0, 1] = y[2, 2] = y[3, 0] = -100
        model = Of(lambda m, x: m.head(torch.tanh(m.e(x) + m.p[:3])), e=nn.Embedding(5, 3), head=nn.Linear(3, 5),
                   p=nn.Parameter(torch.randn(4, 3)))  # fmt: skip

        def total(z: Tensor) -> Tensor:
            return F.cross_entropy(z.view(-1, 5), y.view(-1)) if flat else F.cross_entropy(z.transpose(1, 2), y)

        check(model, tokens, total,
              lambda z: F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum(1) / (y != -100).sum(),
              samples=N)  # fmt: skip

    @pytest.mark.parametrize("t", [3, 2 * N])
    def test_token_losses_of_sequences_along_the_first_dimension(self, t):
        """The rows of the loss are positions × samples, as the reshape below them shows."""
        y = torch.randint(0, 3, (t, N))
        model = Of(lambda m, x: m.head(m.cell(x)[0]), cell=nn.LSTM(4, 2), head=nn.Linear(2, 3))
        check(
            model, torch.randn(t, N, 4), lambda z: F.cross_entropy(z.view(-1, 3), y.view(-1)),
            lambda z: F.cross_entropy(z.permute(1, 2, 0), y.t(), reduction="none").sum(1) / y.numel(), samples=N,
        )  # fmt: skip

    def test_sequences_of_different_lengths(self):
        lengths = torch.tensor([3, 1, 2, 3])

        def forward(m: Any, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return m.head(nn.utils.rnn.pad_packed_sequence(m.cell(packed)[0], batch_first=True)[0].sum(1))

        classified(Of(forward, cell=nn.GRU(4, 3, batch_first=True), head=nn.Linear(3, 3)), sequences())

    def test_segmentation(self):
        y = torch.randint(0, 3, (N, 3, 3))
        y[0, 0, 0] = -100
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1))
        check(model, images(2, 3, 3), lambda z: F.cross_entropy(z, y),
              lambda z: F.cross_entropy(z, y, reduction="none").sum((1, 2)) / (y != -100).sum())  # fmt: skip

    def test_sequences_as_outputs(self):
        fitted(Of(lambda m, x: m.head(m.cell(x)[0]), cell=nn.GRU(4, 3, batch_first=True), head=nn.Linear(3, 2)),
               sequences(), 3, 2)  # fmt: skip

    def test_images_as_outputs(self):
        fitted(
            nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.ConvTranspose2d(3, 1, 2)),
            images(2, 3, 3),
            1,
            4,
            4,
        )


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
