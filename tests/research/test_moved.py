"""Configurations with old names keep their meaning."""

import importlib
import importlib.util

import pytest

from research import moved


def modules():
  return {old: new for old, new in moved.table().items() if ":" not in old}


def configurables():
  return {old: new for old, new in moved.table().items() if ":" in old}


def test_every_module_is_where_the_table_says():
  assert len(modules()) > 200
  for new in modules().values():
    assert importlib.util.find_spec(new) is not None, new
    assert new not in moved.table(), f"{new} has moved again"


@pytest.mark.parametrize("old", configurables())
def test_every_configurable_has_its_new_name(old):
  module, _, names = moved.table()[old].partition(":")
  assert old.startswith(f"{module}:") and module not in moved.table()
  found = importlib.import_module(module)
  assert not hasattr(found, old.partition(":")[2].partition(".")[0]) or (
    "." in names
  )
  name, _, field = names.partition(".")
  found = getattr(found, name)
  assert not field or field in found.__dataclass_fields__


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


def test_bindings_follow_modules_and_configurables_of_another_name():
  old = """from research.lora import adapt
from research.lora import look
from research.training import loop

adapt.Adapt.look = @look.Covariances()
look.Covariances.reading = @look.Reading()
loop.Plan.steps = 8  # as look.Reading says
"""
  new = moved.current(old)
  assert (
    new
    == """from research.lora import adapt
from research.lora import init_stats
from research.training import loop

adapt.Adapt.init_stats = @init_stats.Covariances()
init_stats.Covariances.calibration = @init_stats.CalibrationData()
loop.TrainConfig.steps = 8  # as init_stats.CalibrationData says
"""
  )
  assert moved.current(new) == new


def test_a_binding_of_the_command_line_is_of_today():
  assert moved.binding("loop.Plan.steps=5") == "loop.TrainConfig.steps=5"
  assert moved.binding("LATER='loop.Planned'") == "LATER='loop.Planned'"


def test_an_error_says_where_a_module_is():
  text = "cannot import name 'optim' from 'research.training' (x.py)"
  assert (
    moved.hint(text) == "research.training.optim is now research.optim.optim"
  )
  text = "No module named 'research.lora.relora'"
  assert "is now research.lora.optim.relora" in moved.hint(text)
  assert moved.hint("No module named 'nothing'") == ""
