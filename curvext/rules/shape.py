"""Views, gathers and scatters: every output entry is a copy of an input entry, so J∘J = J."""

from __future__ import annotations

from .structure import selection

selection("ViewBackward0", "TBackward0", "TransposeBackward0", "UnsafeViewBackward0", "SumBackward0", "SumBackward1")
