"""The table of activation ops, by which checkpoints name them."""

import importlib
import pkgutil

from research import quant
from research.quant.activations import Op
from research.quant.ops import OPS


def test_checkpoints_know_every_op():
  for found in pkgutil.walk_packages(quant.__path__, f"{quant.__name__}."):
    importlib.import_module(found.name)
  every, left = {Op}, [Op]
  while left:
    left += (more := left.pop().__subclasses__())
    every |= set(more)
  assert {k for k in every if k.__module__.startswith("research.")} == {
    *OPS.values()
  }
