"""All curvext knows about operations, one file a family. Importing a family registers its rules."""

from . import (
    affine,
    arithmetic,
    elementwise,
    losses,
    shape,
    softmax,
)
