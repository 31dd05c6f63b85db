"""Quantization formats: one file per format or family of formats.

Checkpoints find every `Format` subclass defined in this folder; there is no
registry. Configurations name classes directly.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from research.quant.format import Format


@functools.cache
def all_formats() -> Mapping[str, type[Format]]:
  """Returns name -> class of every format."""
  out = {}
  for found in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f"{__name__}.{found.name}")
    for name, kind in inspect.getmembers(module, inspect.isclass):
      if issubclass(kind, Format) and kind.__module__ == module.__name__:
        out[name] = kind
  return out
