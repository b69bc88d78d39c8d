"""Views, copies, joins and paddings: every output entry is a copy of at most one input entry, so J∘J = J."""

from __future__ import annotations

from functools import partial

from .structure import selection

copies = partial(selection, layout="copies")

# views, and the copies they become under functionalization. Where as_strided reads a tensor that overlaps itself (an
# expanded one), PyTorch's Jᵀ gives each of c entries at one place 1/c; with h shared out in this way, what was expanded
# gets all of it back, which is exact. Equation (2) to the letter gives 1/c², dropping what equal entries have in common
copies(
    "AliasBackward0",
    "AsStridedBackward0",
    "DiagonalBackward0",
    "ExpandBackward0",
    "LiftFreshBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "TBackward0",
    "TransposeBackward0",
    "UnfoldBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
)
copies(
    "AliasBackward0_copy",
    "AsStridedBackward0_copy",
    "DiagonalBackward0_copy",
    "ExpandBackward0_copy",
    "LiftFreshBackward0_copy",
    "NarrowCopyBackward0",
    "PermuteBackward0_copy",
    "ReshapeAliasBackward0_copy",
    "ReshapeCopyBackward0",
    "SelectBackward0_copy",
    "SliceBackward0_copy",
    "SqueezeBackward0_copy",
    "SqueezeBackward1_copy",
    "SqueezeBackward2_copy",
    "TBackward0_copy",
    "TransposeBackward0_copy",
    "UnfoldBackward0_copy",
    "UnsqueezeBackward0_copy",
    "ViewBackward0_copy",
)
# views in place
copies(
    "AsStridedBackward1",
    "SqueezeBackward3",
    "SqueezeBackward4",
    "SqueezeBackward5",
    "TBackward1",
    "TransposeBackward1",
    "UnsqueezeBackward1",
)
# several outputs
copies(
    "SplitBackward0",
    "SplitBackward0_copy",
    "SplitWithSizesBackward0",
    "SplitWithSizesBackward0_copy",
    "UnbindBackward0",
    "UnbindBackward0_copy",
    "UnsafeSplitBackward0",
    "UnsafeSplitWithSizesBackward0",
    outputs="all",
)
# copies, rearranged, repeated, or joined
copies(
    "BlockDiagBackward0",
    "CatBackward0",
    "ChannelShuffleBackward0",
    "CloneBackward0",
    "DiagEmbedBackward0",
    "FlipBackward0",
    "LazyCloneBackward0",
    "LiftBackward0",
    "PinMemoryBackward0",
    "PixelShuffleBackward0",
    "PixelUnshuffleBackward0",
    "RepeatBackward0",
    "RollBackward0",
    "Rot90Backward0",
    "StackBackward0",
    "ToCopyBackward0",
    "TrilBackward0",
    "TriuBackward0",
    "UnsafeViewBackward0",
    "torch::autograd::CopyBackwards",
)
# sliding windows: unfold copies, fold adds
copies("Im2ColBackward0")
selection("Col2ImBackward0")
# paddings
copies(
    "ConstantPadNdBackward0",
    "ReflectionPad1DBackward0",
    "ReflectionPad2DBackward0",
    "ReflectionPad3DBackward0",
    "ReplicationPad1DBackward0",
    "ReplicationPad2DBackward0",
    "ReplicationPad3DBackward0",
)
# what backward passes record when they are part of the loss (gradient penalties); those of paddings and windows add
copies("DiagonalBackwardBackward0", "SelectBackwardBackward0", "SliceBackwardBackward0")
selection(
    "ReflectionPad1DBackwardBackward0",
    "ReflectionPad2DBackwardBackward0",
    "ReflectionPad3DBackwardBackward0",
    "ReplicationPad1DBackwardBackward0",
    "ReplicationPad2DBackwardBackward0",
    "ReplicationPad3DBackwardBackward0",
    "UnfoldBackwardBackward0",
)
