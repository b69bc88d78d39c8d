"""Python ``autograd.Function`` classes of other libraries, known by their name.

Your own need no rule, and get one with ``curvext.rule(YourFunction)``; see docs/rules.md.
"""

from __future__ import annotations

from .structure import pointwise

pointwise("GeLUFunctionBackward")  # transformers (BLOOM), Megatron
