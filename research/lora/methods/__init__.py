"""One file a method, or a family of methods that share their arrays.

The files of this folder are the list of methods: whatever subclass of `Method`
one of them defines exists for PEFT's reader and for checkpoints. Configurations
name classes directly.
"""

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Mapping

from research.lora.method import Method


@functools.cache
def all_methods() -> Mapping[str, type[Method]]:
  """Returns every method class by its name."""
  out = {}
  for found in pkgutil.iter_modules(__path__):
    module = importlib.import_module(f"{__name__}.{found.name}")
    for name, kind in inspect.getmembers(module, inspect.isclass):
      if issubclass(kind, Method) and kind.__module__ == module.__name__:
        out[name] = kind
  return out


def of_peft_type(name: str) -> list[type[Method]]:
  """Returns the methods that PEFT writes as `peft_type` `name`.

  Those that a field of the file switches on come first.
  """
  kinds = [kind for kind in all_methods().values() if name == kind.PEFT]
  return sorted(kinds, key=lambda kind: kind.PEFT_FLAG is None)
