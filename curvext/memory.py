"""Memory of an earlier block's results, written again instead of freed: fresh memory costs more than the arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def keep() -> None:
    """Let the C library keep freed memory for the next step; once.

    glibc gives memory at the end of its heap back to the system unless pieces of that size have come and gone before,
    and getting it again page by page takes longer than the arithmetic of a small step. One piece of the largest size
    that it adapts to, never touched, is enough; elsewhere this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def taken(holder: list[Tensor | None], shape: Sequence[int], like: Tensor) -> Tensor | None:
    """The tensor in ``holder``, emptied of it, if it fits and nobody else can see its memory.

    Views, copies by reference, NumPy arrays and DLPack capsules of it all count; where that cannot be told, ``None``.
    """
    x = holder.pop() if holder else None
    if x is None or type(x) is not Tensor or tuple(x.shape) != tuple(shape) or not hasattr(x, "_use_count"):
        return None
    if x.dtype != like.dtype or x.device != like.device or not x.is_contiguous() or x.requires_grad:
        return None
    return x if (sys.getrefcount(x), *_uses(x)) == _ALONE else None


def _uses(x: Any) -> tuple[int, int, int]:
    """References to the tensor in C++, and to its storage in Python and in C++."""
    storage = x.untyped_storage()
    return x._use_count(), sys.getrefcount(storage), torch._C._storage_Use_Count(storage._cdata)


def _counts() -> tuple[int, ...]:
    x = torch.empty(1)
    return (sys.getrefcount(x), *_uses(x)) if hasattr(x, "_use_count") else ()


_ALONE = _counts()  # what the counts are where nobody else holds a tensor
