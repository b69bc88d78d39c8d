"""Where the samples of an operation's inputs are, given where those of its outputs are: rules of the wave "samples".

A rule is called as ``rule(op, out, n)`` with one :class:`~curvext.axes.Axis` or ``None`` for each output, and
returns the same for each input: ``None`` for an input that all samples share. It may look at shapes and at what the
node saved, not at values. An operation without a rule is asked itself (:func:`curvext.samples.probe`): two products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..axes import Axis, State
from ..errors import CurvatureError
from ..graph import Operation
from ..registry import RULES, Layout, rule
from ..samples import probe
from . import activation, arithmetic, elementwise


def aligned(op: Operation, out: Sequence[State], n: int) -> list[State]:
    """Entry by entry, with broadcasting: an input holds the samples where the output does, unless it is broadcast."""
    axis = next(a for a in out if a is not None)
    k = out.index(axis)
    return [_aligned(op.outputs[k].shape, meta.shape, axis) for meta in _inputs(op)]


def _inputs(op: Operation) -> list[Any]:
    return [meta if meta is not None else _NOTHING for meta in op.inputs]


class _NOTHING:
    shape: tuple[int, ...] = ()


def _aligned(shape: Sequence[int], of_input: Sequence[int], axis: Axis) -> State:
    dim = axis.dim - len(shape) + len(of_input)
    return Axis(dim, axis.inner) if dim >= 0 and of_input[dim] == shape[axis.dim] else None


def alongside(*names: str) -> None:
    """Entry by entry, with broadcasting: an input holds the samples where the output does, unless it is broadcast."""
    rule(*names, wave="samples", how="structure", coincident=True, layout="aligned")(aligned)


def kept(*names: str, data: Sequence[int] | None = None, batch: bool = False, moves: str = "dim") -> None:
    """Inputs of the output's rank hold the samples in the same dimension, if the operation leaves that one alone.

    Args:
        data: the inputs that may hold samples; all by default.
        batch: whether that is known of the first dimension only; of the others, the node is asked.
        moves: what the node saved as the dimension, or dimensions, that it does not leave alone, if it did.
    """

    def kept_rule(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
        """Inputs hold the samples in the same dimension as the output."""
        axis = next(a for a in out if a is not None)
        rank = len(op.outputs[out.index(axis)].shape)
        if any(a not in (None, axis) for a in out) or axis.dim in _moved(op, moves, rank) or (batch and axis.dim):
            return probe(op, out, n)
        size = op.outputs[out.index(axis)].shape[axis.dim]
        states: list[State] = []
        for i, meta in enumerate(_inputs(op)):
            like = len(meta.shape) == rank and meta.shape[axis.dim] == size
            states.append(axis if like and (data is None or i in data) else None)
        return states

    rule(*names, wave="samples", how="structure", coincident=True)(kept_rule)


def _moved(op: Operation, name: str, rank: int) -> set[int]:
    """The dimensions that the node saved under ``name``; none if it saved no such thing."""
    dims = getattr(op.node, "_saved_" + name, None)
    if dims is None:
        return set()
    dims = getattr(op, name)
    return {d % max(rank, 1) for d in ((dims,) if isinstance(dims, int) else dims)}


def reshaped(op: Operation, out: Sequence[State], n: int) -> list[State]:
    """Entries keep their order: sample (f // q) % N has the entry f, wherever the dimensions end."""
    axis, shape, of_input = out[0], op.outputs[0].shape, op.inputs[0].shape
    assert axis is not None
    q = axis.inner * _product(shape[axis.dim + 1 :])
    for dim, size in enumerate(of_input):
        below = _product(of_input[dim + 1 :])
        if q % below == 0 and size and size % (q // below * n) == 0:
            return [Axis(dim, q // below)]
    return probe(op, out, n)


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


rule(
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ReshapeCopyBackward0", "ViewBackward0_copy"),
    *("UnsqueezeBackward0", "SqueezeBackward0", "SqueezeBackward1", "SqueezeBackward2", "AliasBackward0"),
    *("UnsqueezeBackward1", "SqueezeBackward3", "SqueezeBackward4", "SqueezeBackward5"),
    *("CloneBackward0", "ToCopyBackward0", "LiftFreshBackward0"),
    wave="samples",
    how="structure",
    layout="reshaped",
)(reshaped)


def moved(*names: str, layout: Layout = "moved") -> Any:
    """Register ``source(op, dim)``: the dimension of the input that dimension ``dim`` of the output was."""

    def register(source: Any) -> Any:
        def moved_rule(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
            """The dimensions change places."""
            axis = next(a for a in out if a is not None)
            if any(a not in (None, axis) for a in out):
                return probe(op, out, n)
            dim = source(op, axis.dim)
            fits = [dim is not None and dim < len(m.shape) and m.shape[dim] % n == 0 for m in _inputs(op)]
            return [Axis(dim, axis.inner) if fit else None for fit in fits] if dim is not None else probe(op, out, n)

        rule(*names, wave="samples", how="structure", coincident=True, layout=layout)(moved_rule)
        return source

    return register


@moved("TBackward0", "TBackward1")
def _t(op: Operation, dim: int) -> int:
    rank = len(op.outputs[0].shape)
    return rank - 1 - dim


@moved("TransposeBackward0", "TransposeBackward1")
def _transpose(op: Operation, dim: int) -> int:
    rank = len(op.outputs[0].shape)
    a, b = op.dim0 % rank, op.dim1 % rank
    return {a: b, b: a}.get(dim, dim)


@moved("PermuteBackward0")
def _permute(op: Operation, dim: int) -> int:
    return int(op.dims[dim] % len(op.dims))


@moved("SelectBackward0")
def _select(op: Operation, dim: int) -> int:
    return dim + (dim >= op.dim % len(op.inputs[0].shape))


@moved("UnbindBackward0")
def _unbind(op: Operation, dim: int) -> int:
    return dim + (dim >= op.dim % len(op.inputs[0].shape))


@moved("StackBackward0")
def _stack(op: Operation, dim: int) -> int | None:
    place = op.dim % len(op.outputs[0].shape)
    return None if dim == place else dim - (dim > place)


@moved("NllLossBackward0", "NllLoss2DBackward0", layout="")
def _nll(op: Operation, dim: int) -> int:
    return dim + (dim > 0)


@moved(
    *("SumBackward1", "MeanBackward1", "LogsumexpBackward0", "AmaxBackward0", "AminBackward0", "ProdBackward1"),
    *("MaxBackward0", "MinBackward0", "VarBackward0", "StdBackward0", "LinalgVectorNormBackward0", "NormBackward1"),
    layout="",
)
def _reduced(op: Operation, dim: int) -> int | None:
    rank = len(op.inputs[0].shape)
    if len(op.outputs[0].shape) == rank:  # keepdim, or nothing was reduced
        return None if dim in _moved(op, "dim", rank) else dim
    gone = _moved(op, "dim", rank)
    return [d for d in range(rank) if d not in gone][dim]


def matrices(first: int, batched: bool) -> Any:
    """y = A B after ``first`` other inputs: rows of y are rows of A, columns of y are columns of B."""

    def matrices_rule(op: Operation, out: Sequence[State], n: int) -> list[State]:
        """Rows of y are rows of A, columns of y are columns of B; a batch is a batch of both."""
        axis = out[0]
        assert axis is not None
        rank = len(op.outputs[0].shape)
        a = axis if axis.dim < rank - 1 else None
        b = axis if axis.dim == rank - 1 or (batched and axis.dim == 0) else None
        added = [_aligned(op.outputs[0].shape, op.inputs[0].shape, axis) if op.inputs[0] is not None else None]
        return [*(added if first else []), a, b]

    return matrices_rule


rule("MmBackward0", wave="samples", how="structure", coincident=True)(matrices(0, False))
rule("AddmmBackward0", wave="samples", how="structure")(matrices(1, False))
rule("BmmBackward0", wave="samples", how="structure", coincident=True)(matrices(0, True))
rule("BaddbmmBackward0", wave="samples", how="structure")(matrices(1, True))


@rule("MvBackward0", wave="samples", how="structure")
def mv(op: Operation, out: Sequence[State], n: int) -> list[State]:
    """Entries of y are rows of A."""
    return [out[0], None]


@rule("LinearBackward0", wave="samples", how="structure")
def linear(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
    """y = x Wᵀ + b where it is one operation: only the last dimension changes."""
    if out[0] is None or out[0].dim == len(op.outputs[0].shape) - 1:
        return probe(op, out, n)
    return [out[0], *[None] * (len(op.edges) - 1)]


@rule("EmbeddingBackward0", wave="samples", how="structure")
def embedding(op: Operation, out: Sequence[State], n: int) -> list[State]:
    """The weight is shared, unless features tell samples apart."""
    axis = out[0]
    features = axis is not None and axis.dim == len(op.outputs[0].shape) - 1
    return [Axis(1, axis.inner) if features else None]  # type: ignore[union-attr]


@rule("EmbeddingBagBackward0", wave="samples", how="structure")
def embedding_bag(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
    """As of an embedding; weights of entries hold the samples if bags are of one size, which the node tells."""
    return [*embedding(op, out, n), *(probe(op, out, n)[1:] if any(op.needs[1:]) else [None] * (len(op.edges) - 1))]


@rule(
    "NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0", wave="samples", how="structure"
)
def batch_norm(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
    """Channel by channel; with running statistics entry by entry, with those of the batch its samples mix."""
    if out[0] is not None and out[0].dim == 1:  # the channels tell the samples apart: instance normalisation
        return [out[0], *[Axis(0, out[0].inner)] * (len(op.edges) - 1)]
    if getattr(op.node, "_saved_training", True) and n > 1:
        raise CurvatureError(
            "batch normalisation in training mode mixes the samples, so that there is no gradient or curvature of one "
            "sample. Put the normalisation in evaluation mode (module.eval()), use GroupNorm or LayerNorm, or pass "
            "samples=1 to extend, which treats the batch as one sample (DiagGGNMC and others are right then)"
        )
    return [out[0], *[None] * (len(op.edges) - 1)]


@rule("MkldnnRnnLayerBackward0", wave="samples", how="structure")
def lstm_layer(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
    """Sequences are side by side: in the second dimension of y and of x, in the first of states."""
    inner = next(axis for axis in out if axis is not None).inner
    if any(axis not in (None, Axis(1 if k == 0 else 0, inner)) for k, axis in enumerate(out)):
        return probe(op, out, n)
    return [Axis(1, inner), *[None] * 4, Axis(0, inner), Axis(0, inner)]


kept(
    *("ConvolutionBackward0", "ConvolutionOverrideableBackward0", "MkldnnConvolutionBackward0"),
    *("ConvDepthwise2DBackward0", "ConvDepthwise3DBackward0", "SlowConv2DBackward0", "SlowConv3DBackward0"),
    *("SlowConvDilated2DBackward0", "SlowConvDilated3DBackward0", "SlowConvTranspose2DBackward0"),
    *("SlowConvTranspose3DBackward0", "CudnnConvolutionBackward0", "CudnnConvolutionTransposeBackward0"),
    *("MiopenConvolutionBackward0", "MiopenConvolutionTransposeBackward0", "MiopenDepthwiseConvolutionBackward0"),
    *("NativeGroupNormBackward0", "MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"),
    *("AvgPool2DBackward0", "AvgPool3DBackward0", "AdaptiveAvgPool2DBackward0", "AdaptiveAvgPool3DBackward0"),
    *("AdaptiveMaxPool2DBackward0", "AdaptiveMaxPool3DBackward0", "Im2ColBackward0", "Col2ImBackward0"),
    *("PixelShuffleBackward0", "PixelUnshuffleBackward0", "UpsampleNearest1DBackward0", "UpsampleNearest2DBackward0"),
    *("UpsampleNearest3DBackward0", "UpsampleLinear1DBackward0", "UpsampleBilinear2DBackward0"),
    *("UpsampleTrilinear3DBackward0", "UpsampleBicubic2DBackward0"),
    data=(0,),
    batch=True,
)


@rule(
    *("ScaledDotProductFlashAttentionForCpuBackward0", "ScaledDotProductFlashAttentionBackward0"),
    *("ScaledDotProductEfficientAttentionBackward0", "ScaledDotProductCudnnAttentionBackward0"),
    wave="samples",
    how="structure",
    coincident=True,
)
def attention(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
    """Batches and heads are apart; the output's positions are those of the queries, and of a mask."""
    axis, shape = out[0], op.outputs[0].shape
    if axis is None or axis.dim == len(shape) - 1 or any(a not in (None, axis) for a in out):
        return probe(op, out, n)
    inputs = [len(m.shape) == len(shape) and m.shape[axis.dim] == shape[axis.dim] for m in _inputs(op)]
    if axis.dim == len(shape) - 2:
        inputs[1:3] = [False, False]
    return [axis if like else None for like in inputs]


kept(
    *("ReflectionPad1DBackward0", "ReflectionPad2DBackward0", "ReflectionPad3DBackward0"),
    *("ReplicationPad1DBackward0", "ReplicationPad2DBackward0", "ReplicationPad3DBackward0"),
    batch=True,
)
kept("ConstantPadNdBackward0", batch=True)
kept(
    *("LogSoftmaxBackward0", "SoftmaxBackward0", "SafeSoftmaxBackward0", "CumsumBackward0", "LogcumsumexpBackward0"),
    *("CatBackward0", "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0"),
    *("IndexSelectBackward0", "GluBackward0"),
)
kept("FlipBackward0", moves="dims")


@rule("NativeLayerNormBackward0", "FusedRmsNormBackward0", wave="samples", how="structure")
def layer_norm(op: Operation, out: Sequence[State], n: int) -> Sequence[State]:
    """The last dimensions are normalised; weight and bias are shared."""
    axis = out[0]
    if axis is None or axis.dim >= len(op.outputs[0].shape) - len(op.normalized_shape):
        return probe(op, out, n)
    return [axis, *[None] * (len(op.edges) - 1)]


alongside(
    "ExpandBackward0", "NativeDropoutBackward0", "MseLossBackward0", "HuberLossBackward0", "SmoothL1LossBackward0"
)
alongside("torch::autograd::CopyBackwards")
alongside("BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0", "SoftMarginLossBackward0")
alongside(
    *sorted(
        name
        for (name, wave), entry in list(RULES.items())
        if wave == "diagonal"
        and entry.family in [family.__name__.rsplit(".", 1)[-1] for family in (activation, arithmetic, elementwise)]
        and (name, "samples") not in RULES
    )
)
