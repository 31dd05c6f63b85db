"""Configurations with old names keep their meaning."""

import importlib
import importlib.util

import pytest

from research import moved


def test_every_module_is_where_the_table_says():
  assert len(moved.table()) > 200
  for new in moved.table().values():
    assert importlib.util.find_spec(new) is not None, new
    assert new not in moved.table(), f"{new} has moved again"


@pytest.mark.parametrize(("module", "old"), moved.classes())
def test_every_class_and_field_has_its_new_name(module, old):
  assert module not in moved.table(), f"{module} has moved"
  name, _, field = moved.classes()[module, old].partition(".")
  found = importlib.import_module(module)
  assert hasattr(found, name) and (field or not hasattr(found, old))
  assert not field or field in getattr(found, name).__dataclass_fields__


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
loop.Plan.steps = 8
"""
  new = moved.current(old)
  assert (
    new
    == """from research.lora import adapt
from research.lora import init_stats
from research.training import loop

adapt.Adapt.init_stats = @init_stats.Covariances()
init_stats.Covariances.calibration = @init_stats.CalibrationData()
loop.TrainConfig.steps = 8
"""
  )
  assert moved.current(new) == new


def test_a_binding_of_the_command_line_is_of_today():
  assert moved.binding("loop.Plan.steps=5") == "loop.TrainConfig.steps=5"
  assert moved.binding("LATER='loop.Planned'") == "LATER='loop.Planned'"


def test_a_module_with_another_last_name_is_called_by_it():
  old = """from research.diffusion import growth
from research.diffusion import canvas as longer
growth.Growth.start = 4
# Parameters for growth.Growth:
run.growth = [@growth.Growth(), "growth.Growth", @a/growth.Growth()]
a/growth.Growth.by = 2
regrowth.Growth.by = 2
"""
  want = """from research.diffusion.sampling import config
from research.diffusion.sampling import variable_length as longer
config.Growth.start = 4
# Parameters for config.Growth:
run.growth = [@config.Growth(), "growth.Growth", @a/config.Growth()]
a/config.Growth.by = 2
regrowth.Growth.by = 2
"""
  assert moved.current(old) == want and moved.current(want) == want


def test_a_name_that_is_taken_is_left_to_whoever_has_it():
  old = """from elsewhere import config
from research.diffusion import growth
growth.Growth.start = 4
config.Config.size = 4
"""
  want = old.replace(
    "from research.diffusion import growth",
    "from research.diffusion.sampling import config as growth",
  )
  assert moved.current(old) == want and moved.current(want) == want


def test_batches_of_before_are_transformed_as_they_were():
  """Line by line as a run of today says it, so that one of before goes on."""
  old = """from research.diffusion import objective as masked
from research.diffusion import rows
masked.MaskedDiffusion.rewrites = (@rows.Ended(),)
# Parameters for rows.Ended:
rows.Ended.end = 9
"""
  assert moved.current(old).splitlines() == [
    "from research.diffusion import objective as masked",
    "from research.diffusion import batch_transforms",
    "masked.MaskedDiffusion.batch_transforms"
    " = (@batch_transforms.PadWithEOS(),)",
    "# Parameters for batch_transforms.PadWithEOS:",
    "batch_transforms.PadWithEOS.end = 9",
  ]


def test_a_class_with_another_name_is_called_by_it(monkeypatch):
  monkeypatch.setattr(moved, "classes", lambda: {("a.b", "Old"): "New"})
  old = """from a import b as c
import a.b
from d import b
c.Old.x = @a.b.Old()
first/c.Old.x = @b.Old()
c.Older.x = @cc.c.Old()
x.y = "c.Old.x"
"""
  assert moved.current(old).splitlines()[3:] == [
    "c.New.x = @a.b.New()",
    "first/c.New.x = @b.Old()",
    "c.Older.x = @cc.c.Old()",
    'x.y = "c.Old.x"',
  ]


def test_an_error_says_where_a_module_is():
  text = "cannot import name 'optim' from 'research.training' (x.py)"
  assert (
    moved.hint(text) == "research.training.optim is now research.optim.optim"
  )
  text = "No module named 'research.lora.relora'"
  assert "is now research.lora.optim.relora" in moved.hint(text)
  assert moved.hint("No module named 'nothing'") == ""


USED = """\
from __gin__ import dynamic_registration
import research.nn.presets
from research.optim import optim
from research.training import loop as training

optim.adamw.b2 = 0.98
test/training.Plan.steps = @research.nn.presets.tiny()
"""


@pytest.mark.parametrize(
  "unused", ["import c", "from a import adamw", "from optim import b as plan"]
)
def test_imports_that_nothing_uses_are_no_difference(unused):
  more = USED.replace("import research", f"{unused}\nimport research")
  assert more != USED
  assert moved.without_unused_imports(more) == USED
  assert moved.without_unused_imports(USED) == USED


def test_an_import_is_used_by_the_name_that_it_gives():
  """Or two runs of other modules would be taken for one."""
  one, other = (
    f"import research.{module} as m\n\nm.Config.steps = 2\n"
    for module in ("training.loop", "lora.adapt")
  )
  assert moved.without_unused_imports(one) == one
  assert moved.without_unused_imports(other) == other
  more = f"import research.nn as n\n{one}"
  assert moved.without_unused_imports(more) == one
