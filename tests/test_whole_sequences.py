"""Every first-order and Gauss-Newton quantity against its dense definition, on models of sequences, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dense import check
from .whole import N, Of, Seeded, classified, fitted, images, sequences

pytestmark = pytest.mark.usefixtures("float64")


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
