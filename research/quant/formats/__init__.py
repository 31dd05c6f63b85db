"""One file a format, or a family of formats that share their arrays.

The files of this folder are the list of formats: whatever subclass of `Format`
one of them defines exists for checkpoints. Configurations name classes
directly.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from research.quant.format import Format


@functools.cache
def all_formats() -> Mapping[str, type[Format]]:
  """Returns every format class by its name."""
  out = {}
  for found in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f"{__name__}.{found.name}")
    for name, kind in inspect.getmembers(module, inspect.isclass):
      if issubclass(kind, Format) and kind.__module__ == module.__name__:
        out[name] = kind
  return out
