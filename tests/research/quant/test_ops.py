"""The table of activation ops, by which checkpoints name them."""

import importlib
import pkgutil

from research import quant
from research.quant.activations import Op
from research.quant.ops import OPS


def test_checkpoints_know_every_op():
  """A config's `@Round` is a subclass of its own with the name of `Round`: only
  classes that modules of this package define are in the table."""
  defined = set()
  for found in pkgutil.walk_packages(quant.__path__, f"{quant.__name__}."):
    module = importlib.import_module(found.name)
    defined |= {k for k in vars(module).values() if isinstance(k, type)}
  assert {k for k in defined if issubclass(k, Op)} == {*OPS.values()}
