"""All curvext knows about operations, one file a family. Importing a family registers its rules."""

from importlib import import_module
from pkgutil import iter_modules

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")
