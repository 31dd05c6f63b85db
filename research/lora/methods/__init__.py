"""Parameter-efficient methods: one file per method or family of methods.

The reader of PEFT's files and checkpoints find every `Method` subclass defined
in this folder; there is no registry. Configurations name classes directly.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from research.lora.method import Method


@functools.cache
def all_methods() -> Mapping[str, type[Method]]:
  """Returns name -> class of every method."""
  out = {}
  for entry in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f"{__name__}.{entry.name}")
    for name, kind in inspect.getmembers(module, inspect.isclass):
      if issubclass(kind, Method) and kind.__module__ == module.__name__:
        out[name] = kind
  return out


def of_peft_type(name: str) -> list[type[Method]]:
  """Returns the methods with PEFT's `peft_type` `name`.

  Methods with a `PEFT_FLAG` come first.
  """
  kinds = [kind for kind in all_methods().values() if name == kind.PEFT]
  return sorted(kinds, key=lambda kind: kind.PEFT_FLAG is None)
