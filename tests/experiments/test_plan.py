"""Plans for virtual devices, against what a run there compiles and holds."""

import dataclasses
import json
import pathlib

import jax
import pytest

from experiments import plan
from experiments.core import cli, config, experiment
from experiments.planning import abstract_step, plan_training
from research.io import unread
from research.nn import flops
from research.planning import chips
from research.sharding import Layout
from research.training import step
from tests import support_plan

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "models"
LAYOUTS = {
  "data": Layout(data=8),
  "fsdp": Layout(data=1, fsdp=8),
  "mixed": Layout(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module", params=["data", "fsdp", "mixed"])
def planned(request):
  """(experiment, plan) on each mesh; adapters on the mixed one."""
  whole = support_plan.experiment(LAYOUTS[request.param])
  if request.param == "mixed":
    whole = support_plan.adapted(whole)
  return whole, plan_training.plan(whole, chips.topology("cpu:8"))


@pytest.mark.slow
@pytest.mark.sample(3, 1)
def test_arguments_are_what_the_table_says(planned):
  whole, found = planned
  predicted = found["predicted_argument_bytes"]
  assert found["argument_bytes"] == pytest.approx(predicted, rel=0.05)
  # The same count by hand: each array's part, on the first device.
  taken = abstract_step.build(whole, jax.devices())
  parts = jax.tree.leaves((taken.state, taken.batch))
  held = sum(
    x.dtype.itemsize * _size(x.sharding.shard_shape(x.shape)) for x in parts
  )
  assert predicted == held


def _size(shape):
  out = 1
  for dim in shape:
    out *= dim
  return out


@pytest.mark.slow
@pytest.mark.sample(4)
def test_work_is_what_the_step_asks_for_and_split_among_devices(planned):
  whole, found = planned
  taken = abstract_step.build(whole, jax.devices())
  update = step.make_train_step(taken.objective, whole.optimizer)
  asked = flops.count_flops(update, taken.state, taken.batch, jax.random.key(0))
  done = 8 * found["flops"]
  # Some of what two heads share cannot be split over tensor.
  most = 1.3 if "tensor" in found["mesh"] else 1.02
  assert asked * 0.98 <= done <= most * asked
  assert 0.5 < found["useful_flops"] < 1.02


@pytest.mark.slow
@pytest.mark.sample(3)
def test_collectives_are_those_of_the_mesh(planned):
  whole, found = planned
  mesh, rows = found["mesh"], found["collectives"]
  assert {axis for row in rows for axis in row["axes"]} <= set(mesh)
  if set(mesh) == {"data"}:
    assert {row["kind"] for row in rows} == {"all-reduce"}
  depth = whole.model.sizes.depth
  if "fsdp" in mesh:
    gathers = [
      r for r in rows if r["kind"] == "all-gather" and r["axes"] == ["fsdp"]
    ]
    # Layer by layer: the scan's length, or twice it, never once for a stack.
    assert any(row["count"] % depth == 0 for row in gathers)
  assert not any(f"[{depth}," in s for row in rows for s in row["shapes"])


@pytest.mark.slow
def test_seconds_of_a_machine_that_nobody_knows_are_null(planned):
  _, found = planned
  assert found["seconds"] is None and found["mfu_bound"] is None
  assert found["seconds_by_part"] == {}
  assert found["fits"]


@pytest.mark.slow
def test_accumulation_counts_every_microbatch():
  whole = support_plan.experiment(Layout(data=4), batch=16, accumulate=4)
  found = plan_training.plan(whole, chips.topology("cpu:4"))
  taken = abstract_step.build(whole, jax.devices()[:4])
  update = step.make_train_step(taken.objective, whole.optimizer)
  asked = flops.count_flops(update, taken.state, taken.batch, jax.random.key(0))
  assert 4 * found["flops"] == pytest.approx(asked, rel=0.02)


@pytest.mark.parametrize(
  "name, packed",
  [("llama", False), ("gguf_q4_1", True), ("peft_patterns", False)],
)
def test_no_weight_is_read(monkeypatch, name, packed):
  folder = GOLDEN / name
  file = next(folder.glob("*.gguf"), folder)

  def read(*_):
    raise AssertionError("a weight was read")

  monkeypatch.setattr(unread.LazyArray, "__getattribute__", _without(read))
  whole = support_plan.adapted(
    dataclasses.replace(
      support_plan.experiment(Layout(fsdp=2)),
      model=experiment.Pretrained(name=str(file), packed=packed),
    )
  )
  taken = abstract_step.build(whole, jax.devices()[:2])
  leaves = jax.tree.leaves(taken.state)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


def _without(read):
  get = object.__getattribute__
  return lambda self, name: read if name == "read" else get(self, name)


RUN = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'data/markov.gin'
include 'optim/adamw_cosine.gin'
include 'mesh/data.gin'
from experiments.core import experiment
from experiments.core import from_scratch
from research.nn import presets
STEPS = 8
LEARNING_RATE = 1e-3
experiment.Experiment.model = @from_scratch.FromScratch()
from_scratch.FromScratch.sizes = @presets.Sizes()
presets.Sizes.vocab = %STATES
presets.Sizes.width = 32
presets.Sizes.depth = 2
presets.Sizes.heads = 2
presets.Sizes.kv_heads = 1
presets.Sizes.head_dim = 16
presets.Sizes.hidden = 64
"""


def test_the_command_ends_with_its_result(tmp_path, capsys):
  config, text = tmp_path / "run.gin", tmp_path / "step.hlo"
  config.write_text(RUN)
  flags = [f"--config={config}", "--topology=cpu:2", f"--hlo={text}"]
  status = cli.call(plan.main, ["plan", *flags, "--set=LENGTH=32"])
  lines = capsys.readouterr()
  assert status == 0, lines.err
  found = json.loads(lines.out.splitlines()[-1])
  assert found["mesh"] == {"data": 2} and found["fits"]
  assert found["tokens"] == 8 * 32
  assert "memory of a device:" in lines.out and "bytes/device" in lines.out
  assert "ENTRY" in text.read_text()


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--topology=cpu:2"], "--config: is missing"),
    (["--config=runs/quickstart.gin"], "--topology: is missing"),
    (["--config=runs/quickstart.gin", "--topology=x"], "slice of a TPU pod"),
  ],
)
def test_what_the_command_refuses(capsys, flags, words):
  assert cli.call(plan.main, ["plan", *flags]) == 1
  assert words in capsys.readouterr().err


def test_what_the_mesh_does_not_divide_is_said():
  bindings = ["DATA=1", "TENSOR=2", "LENGTH=32"]
  experiment = config.parse(RUN, bindings).experiment
  taken = abstract_step.build(experiment, jax.devices())
  said = plan_training._table(experiment, taken).splitlines()[-1]
  assert "does not divide kv_heads of 1 (run0/layer0/attention/" in said
