"""Operations through which curvature cannot be had; each says what to do instead.

Python functions of these names, whichever class they are: some classes are made afresh for every graph, and several
libraries have a checkpoint of their own.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ..errors import CurvatureError
from ..graph import HIDING, Operation
from ..registry import rule

REASONS = {
    "CheckpointFunctionBackward": (
        "a reentrant checkpoint runs a backward pass of its own, whose parameters this graph does not show. Run this "
        "step without torch.utils.checkpoint (use_reentrant=False does not help: it lets a saved tensor be read only "
        "once)."
    ),
    "CompiledFunctionBackward": (
        "the operations inside a graph made by torch.compile cannot be seen. Run this step with the module as it was "
        "before torch.compile (compiled._orig_mod, or under torch.compiler.set_stance('force_eager'))."
    ),
    "torch::jit::(anonymous namespace)::DifferentiableGraphBackward": (
        "the operations inside a graph fused by TorchScript cannot be seen. Run this step with the module as it was "
        "before torch.jit.script."
    ),
    "FlexAttentionAutogradOpBackward": (
        "flex_attention computes its scores with a function that this graph does not show. Use "
        "torch.nn.functional.scaled_dot_product_attention with attn_mask= for this step."
    ),
}
HIDING.add("CheckpointFunctionBackward")


@rule(*REASONS, how="refused", outputs="all", coincident=True)
@rule(*REASONS, wave="any", how="refused")
def refuse(op: Operation, *_: Any) -> NoReturn:
    """Cannot be had: the operations inside are hidden."""
    raise CurvatureError(REASONS[op.name])
