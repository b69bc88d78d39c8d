"""Views, copies, joins and paddings."""

from functools import partial

import torch
import torch.nn.functional as F

from . import add_case

aten = torch.ops.aten

ELSEWHERE_SHAPE = {"PinMemoryBackward0": "needs an accelerator"}


def _add(name, function, *shape):
    """A case of one leaf of this shape. A list of several outputs: every variant at once."""
    add_case(f"shape_{name}", lambda d: (function, [d.tensor(*shape)]), examples=1)


def backward_of(function, *shape):
    """The backward pass of ``function`` on inputs of this shape, as a function of the gradient."""

    def backward(g):
        x = torch.zeros(shape, dtype=g.dtype, requires_grad=True)
        return torch.autograd.grad(function(x), x, g, create_graph=True)[0]

    return backward


def _padded(padding, dims):
    return (1, 1, *[3 + padding[2 * (dims - 1 - d)] + padding[2 * (dims - 1 - d) + 1] for d in range(dims)])


VIEWS = {
    "view": lambda x: x.view(6, 4),
    "reshape": lambda x: x.mT.reshape(-1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "transpose": lambda x: [x.transpose(0, 1), x.transpose(-1, 0)],
    "swapaxes": lambda x: x.swapaxes(0, 2),
    "movedim": lambda x: x.movedim(0, 2),
    "permute": lambda x: x.permute(2, 0, 1),
    "expand": lambda x: x.unsqueeze(1).expand(2, 5, 3, 4),
    "expand_as": lambda x: x[:1].expand_as(x),
    "broadcast_to": lambda x: torch.broadcast_to(x, (2, 2, 3, 4)),
    "unsqueeze": lambda x: [x.unsqueeze(0), x.unsqueeze(-1)],
    "squeeze": lambda x: x[:1, :, :1].squeeze(),
    "squeeze_dim": lambda x: x[:1].squeeze(0),
    "squeeze_dims": lambda x: x[:1, :1].squeeze((0, 1, 2)),
    "slice": lambda x: [x[:, 1:], x[:, ::2], x[..., -2:], x[:, 0:0]],
    "select": lambda x: [x[0], x[-1, ..., 1]],
    "narrow": lambda x: x.narrow(2, 1, 2),
    "split": lambda x: [*x.split(2, 1), *x.split(3, 2)],
    "split_first": lambda x: x.split(2, 2)[1] * 1,
    "split_with_sizes": lambda x: x.split([1, 3], 2),
    "chunk": lambda x: x.chunk(2, 1),
    "tensor_split": lambda x: x.tensor_split(3, 2),
    "unbind": lambda x: [*x.unbind(0), *x.unbind(-1)],
    "unbind_one": lambda x: x.unbind(1)[2] * 1,
    "unsafe_split": lambda x: x.unsafe_split(1, 1),
    "unsafe_split_with_sizes": lambda x: x.unsafe_split_with_sizes([1, 2], 1),
    "diagonal": lambda x: [x.diagonal(-1, 1, 2), x.diagonal(1, 0, 2)],
    "alias": lambda x: aten.alias(x),
    "as_strided": lambda x: x.as_strided((4, 3), (2, 1), 3),
    "as_strided_overlapping": lambda x: x.as_strided((5, 6), (1, 2), 0),
    "unfold": lambda x: [x.unfold(2, 2, 1), x.unfold(1, 2, 2), x.unfold(-1, 3, 1)],
    "view_as": lambda x: x.view_as(x),
    "lift": lambda x: [aten.lift(x.clone()), aten.lift_fresh(x.clone())],
    "reshape_alias": lambda x: aten._reshape_alias(x, (6, 4), (4, 1)),
    "atleast": lambda x: torch.atleast_3d(x[0, 0]),
    "real_of_real": lambda x: torch.real(x) * 1,
}
COPIES = {
    "alias_copy": lambda x: torch.alias_copy(x),
    "as_strided_copy": lambda x: torch.as_strided_copy(x, (4, 3), (2, 1), 3),
    "diagonal_copy": lambda x: torch.diagonal_copy(x, 0, 1, 2),
    "diag_of_matrix": lambda x: torch.diag(x[0]),
    "expand_copy": lambda x: torch.expand_copy(x, (5, 2, 3, 4)),
    "narrow_copy": lambda x: torch.narrow_copy(x, 2, 1, 2),
    "permute_copy": lambda x: torch.permute_copy(x, (1, 0, 2)),
    "reshape_alias_copy": lambda x: aten._reshape_alias_copy(x, (6, 4), (4, 1)),
    "reshape_copy": lambda x: aten._reshape_copy(x, (6, 4)),
    "lift_fresh_copy": lambda x: aten.lift_fresh_copy(x),
    "select_copy": lambda x: torch.select_copy(x, 1, 1),
    "slice_copy": lambda x: torch.slice_copy(x, 1, 1, 3),
    "split_copy": lambda x: torch.split_copy(x, 2, 2),
    "split_with_sizes_copy": lambda x: torch.split_with_sizes_copy(x, (1, 3), 2),
    "squeeze_copy": lambda x: torch.squeeze_copy(x[:1]),
    "squeeze_dim_copy": lambda x: torch.squeeze_copy(x[:1], 0),
    "squeeze_dims_copy": lambda x: torch.squeeze_copy(x[:1], (0, 1)),
    "t_copy": lambda x: torch.t_copy(x[0]),
    "transpose_copy": lambda x: torch.transpose_copy(x, 1, 2),
    "unbind_copy": lambda x: torch.unbind_copy(x, 1),
    "unfold_copy": lambda x: torch.unfold_copy(x, 2, 2, 1),
    "unsqueeze_copy": lambda x: torch.unsqueeze_copy(x, 1),
    "view_copy": lambda x: torch.view_copy(x, (6, 4)),
    "t": lambda x: x[0].t(),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.mT.contiguous(),
    "to_float": lambda x: x.float() * 1,
    "lazy_clone": lambda x: aten._lazy_clone(x),
}
IN_PLACE = {
    "as_strided_": lambda x: x.clone().as_strided_((2, 3), (3, 1)),
    "squeeze_": lambda x: x[:1].clone().squeeze_(),
    "squeeze_dim_": lambda x: x[:1].clone().squeeze_(0),
    "squeeze_dims_": lambda x: x[:1].clone().squeeze_((0, 1)),
    "t_": lambda x: x[0].clone().t_(),
    "transpose_": lambda x: x.clone().transpose_(0, 2),
    "unsqueeze_": lambda x: x.clone().unsqueeze_(1),
}
ARRANGED = {
    "diag_embed": lambda x: [torch.diag_embed(x), torch.diag_embed(x[0], -1)],
    "diag_of_vector": lambda x: torch.diag(x[0, 0]),
    "tril": lambda x: [x.tril(), x.tril(-1)],
    "triu": lambda x: [x.triu(), x.triu(1)],
    "trace": lambda x: x[0].trace(),
    "flip": lambda x: [x.flip(0), x.flip((1, 2))],
    "roll": lambda x: [x.roll((1, -2), (0, 2)), x.roll(5)],
    "rot90": lambda x: [x.rot90(1, (1, 2)), x.rot90(2, (0, 1))],
    "repeat": lambda x: x.repeat(2, 1, 2, 1),
    "tile": lambda x: x.tile(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1),
    "repeat_interleave_each": lambda x: x.repeat_interleave(torch.tensor([1, 0, 3]), 1),
    "block_diag": lambda x: torch.block_diag(x[0], x[0], x[1, :1]),
    "stack": lambda x: [torch.stack([x, x, x * 2]), torch.stack([x, x], -1)],
    "cat": lambda x: [torch.cat([x, x, x * 2]), torch.cat([x, x[..., :1]], -1)],
    "hstack": lambda x: torch.hstack([x, x]),
    "column_stack": lambda x: torch.column_stack([x[0], x[1]]),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij"),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0, 0], x[0, 1]),
    "combinations": lambda x: torch.combinations(x[0, 0], with_replacement=True),
    "sum_all": lambda x: x.sum(),
    "sum_dims": lambda x: [x.sum(0), x.sum((1, 2), keepdim=True)],
}
for _name, _function in {**VIEWS, **COPIES, **IN_PLACE, **ARRANGED}.items():
    _add(_name, _function, 2, 3, 4)

IMAGES = {
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (1, 4, 2, 3)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2), (1, 2, 4, 2)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), (2, 4, 2)),
    "im2col": (lambda x: F.unfold(x, (2, 3), 1, 1, (2, 1)), (1, 2, 4, 4)),
    "col2im": (lambda x: F.fold(x, (3, 4), 2, 1, 1, 1), (1, 8, 20)),
    "pad_constant": (lambda x: [F.pad(x, (1, 2), value=3.0), F.pad(x, (-1, 1, 0, -2))], (2, 3, 4)),
    "pad_circular": (lambda x: F.pad(x, (1, 2, 1, 0), mode="circular"), (1, 1, 3, 3)),
}
for _dims in (1, 2, 3):
    _padding = (1, 0, 2, 1, 0, 1)[: 2 * _dims]
    for _mode in ("reflect", "replicate"):
        _pad = partial(F.pad, pad=_padding, mode=_mode)
        IMAGES[f"pad_{_mode}_{_dims}d"] = (_pad, (1, 1, *[3] * _dims))
        IMAGES[f"pad_{_mode}_{_dims}d_backward"] = (backward_of(_pad, 1, 1, *[3] * _dims), _padded(_padding, _dims))
for _name, (_function, _shape) in IMAGES.items():
    _add(_name, _function, *_shape)

BACKWARD = {
    "diagonal_backward": lambda x: backward_of(torch.diagonal, 4, 4)(x[0, 0]),
    "select_backward": lambda x: backward_of(lambda y: y[1], 2, 3, 4)(x[0]),
    "slice_backward": lambda x: backward_of(lambda y: y[::2], 4, 3, 4)(x),
    "unfold_backward": lambda x: backward_of(lambda y: y.unfold(1, 4, 2), 2, 8)(x),
    "slice_inverse": lambda x: aten.slice_inverse(x[..., :2], x, 2, 0, 4, 2),
}
for _name, _function in BACKWARD.items():
    _add(_name, _function, 2, 3, 4)
