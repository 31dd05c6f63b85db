"""Configurations of before modules moved are read as they were meant."""

import importlib
import importlib.util

from research import moved


def test_every_module_is_where_the_table_says():
  assert len(moved.table()) > 200
  for new in moved.table().values():
    assert importlib.util.find_spec(new) is not None, new
    assert new not in moved.table(), f"{new} has moved again"


def test_imports_alone_are_renamed():
  old = """from research.training import optim
from research.lora.methods import lora
import research.lora.relora
# from research.training import optim
optim.adamw.b1 = 0.9
research.lora.relora.ReLoRA.every = 4
"""
  new = moved.current(old)
  assert new.splitlines()[0] == "from research.optim import optim"
  assert new.splitlines()[1] == "from research.lora.methods import lora"
  assert "import research.lora.optim.relora\n" in new
  assert "# from research.training import optim\n" in new
  assert "optim.adamw.b1 = 0.9" in new
  assert "research.lora.optim.relora.ReLoRA.every = 4" in new
  assert moved.current(new) == new


def test_every_class_is_where_the_table_says():
  for (module, old), new in moved.classes().items():
    assert module not in moved.table(), f"{module} has moved"
    found = importlib.import_module(module)
    assert hasattr(found, new) and not hasattr(found, old), (module, old)


def test_a_model_from_scratch_is_called_so():
  old = """from experiments import fresh
experiment.Experiment.model = @fresh.Fresh()
# Parameters for fresh.Fresh:
fresh.Fresh.sizes = @presets.Sizes()
"""
  want = """from experiments.core import from_scratch
experiment.Experiment.model = @from_scratch.FromScratch()
# Parameters for from_scratch.FromScratch:
from_scratch.FromScratch.sizes = @presets.Sizes()
"""
  assert moved.current(old) == want and moved.current(want) == want


def test_an_error_says_where_a_module_is():
  text = "cannot import name 'optim' from 'research.training' (x.py)"
  assert (
    moved.hint(text) == "research.training.optim is now research.optim.optim"
  )
  text = "No module named 'research.lora.relora'"
  assert "is now research.lora.optim.relora" in moved.hint(text)
  assert moved.hint("No module named 'nothing'") == ""
