"""Embeddings, and bags of them."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from . import Built, Draw, case, of_module


@case(examples=12)
def embedding(d: Draw) -> Built:
    v, e = d.sizes(2)
    options = d.choice(
        {},
        {"padding_idx": 0},
        {"padding_idx": -1},
        {"scale_grad_by_freq": True},
        {"scale_grad_by_freq": True, "padding_idx": 0},
    )
    layer = nn.Embedding(v, e, **options)
    indices = d.index(v, *d.shape(1, 3))
    function, weight = of_module(d, layer)
    return lambda w: function(w, indices), weight


@case
def embedding_sparse(d: Draw) -> Built:
    """The gradient is sparse, the wave dense."""
    indices, padding = d.index(4, 3, 2), d.choice(None, 0)
    return lambda w: F.embedding(indices, 2 * w, padding, sparse=True), [d.tensor(4, 2)]


@case
def embedding_of_one_index(d: Draw) -> Built:
    return lambda w: F.embedding(torch.tensor(1), w), [d.tensor(3, 2)]


@case
def embedding_with_max_norm(d: Draw) -> Built:
    """Rows are made shorter in place before they are looked up, outside of the graph."""
    indices = d.index(4, 3, 2)
    return lambda w: F.embedding(indices, w, max_norm=0.5), [d.tensor(4, 3)]


@case
def embedding_twice(d: Draw) -> Built:
    """Tied to an output layer."""
    indices = d.index(4, 3)
    return lambda w: F.linear(F.embedding(indices, w).tanh(), w), [d.tensor(4, 3)]


@case
def one_hot_matmul(d: Draw) -> Built:
    one_hot = F.one_hot(d.index(4, 3, 2), 4).to(d.dtype)
    return lambda w: one_hot @ w, [d.tensor(4, 3)]


@case
def embedding_backward(d: Draw) -> Built:
    """The gradient of an embedding, as gradient penalties have it."""
    indices, options = d.index(4, 3, 2), (4, d.choice(-1, 1), d.boolean())
    return lambda g: torch.ops.aten.embedding_dense_backward(g, indices, *options), [d.tensor(3, 2, 2)]


def _bags(d: Draw, v: int) -> dict:
    """Indices in bags: rows of a matrix, or a list cut at offsets; some bags may be empty."""
    if d.boolean():
        return {"input": d.index(v, *d.sizes(2))}
    n = d.integer(1, 7)
    inner = sorted(d.integer(0, n) for _ in range(d.integer(0, 3)))
    last = d.boolean()
    offsets = torch.tensor([0, *inner, n] if last else [0, *inner])
    return {"input": d.index(v, n), "offsets": offsets, "include_last_offset": last}


@case(examples=30)
def embedding_bag(d: Draw) -> Built:
    v, e = d.integer(1, 4), d.integer(1, 3)
    options = _bags(d, v)
    options["padding_idx"] = d.choice(None, 0, -1)
    options["mode"] = d.choice("sum", "mean", "max")
    if options["mode"] != "max":
        options["scale_grad_by_freq"] = d.boolean()
    return lambda w: F.embedding_bag(weight=w, **options), [d.tensor(v, e).requires_grad_()]


@case
def embedding_bag_empty(d: Draw) -> Built:
    """One bag is empty, and one is all padding."""
    indices, offsets, mode = torch.tensor([0, 1, 0, 2, 2, 1]), torch.tensor([0, 2, 2, 3]), d.choice("max", "mean")
    return lambda w: F.embedding_bag(indices, w, offsets, mode=mode, padding_idx=0), [d.tensor(3, 2).requires_grad_()]


@case
def embedding_bag_sparse(d: Draw) -> Built:
    options, mode = _bags(d, 3), d.choice("sum", "mean")
    return lambda w: F.embedding_bag(weight=2 * w, mode=mode, sparse=True, **options), [d.tensor(3, 2)]


@case(examples=15)
def embedding_bag_weighted(d: Draw) -> Built:
    v, e = d.integer(1, 4), d.integer(1, 3)
    options = _bags(d, v)
    options["padding_idx"] = d.choice(None, 0, -1)

    def function(w, s):
        return F.embedding_bag(weight=w, per_sample_weights=s, mode="sum", **options)

    return function, [d.tensor(v, e), d.tensor(*options["input"].shape)]
