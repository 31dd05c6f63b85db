"""Published recipes of vision language models: their numbers, and one step."""

import dataclasses
import functools
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from experiments.core import config
from experiments.planning import abstract_step
from experiments.stages import running
from experiments.stages.staged import Staged, StageResult
from research import tree, weights
from research.io import folders
from research.optim import optim
from research.vlm.model import TOWERS
from research.vlm.presets import PRESETS

FEW_WORDS = ["text/shapes.Shapes.count=20"]


class Stage(NamedTuple):
  """What is published of a stage.

  Attributes:
    samples: of one pass; None where steps are published.
    batch: of samples.
    rate: highest one of connector and language model.
    warmup: steps of it, as far as the run goes.
    vision_rate: highest one of the encoder, or None where it is frozen.
    steps: None where they follow from the samples.
    trained: parameters, where they are published; None elsewhere.
  """

  samples: int | None
  batch: int | None
  rate: float
  warmup: int | None
  vision_rate: float | None = None
  steps: int | None = None
  trained: int | None = None


PUBLISHED = {
  # 3% of warm-up; 7B's projector has 20,979,712 parameters.
  "llava15_7b": {
    "align": Stage(558_128, 256, 1e-3, 66, trained=20_979_712),
    "tune": Stage(665_298, 128, 2e-5, 156, trained=20_979_712 + 6_738_415_616),
  },
  "smolvlm_256m": {
    "adapt": Stage(None, 1024, 1e-4, 2000, 1e-4, 25_750),
    "all": Stage(None, 2048, 1e-4, 100, 1e-4, 3_000),
    "instruct": Stage(None, 8192, 1e-4, 100, 1e-4, 2_000),
  },
  "paligemma_3b": {
    "low": Stage(10**9, None, 2e-5, None, 2e-5),
    "middle": Stage(5 * 10**7, None, 2e-5, None, 2e-5),
    "high": Stage(10**7, None, 2e-5, None, 2e-5),
  },
  "paligemma_3b_vqav2": {
    "": Stage(6_581_110, 256, 1e-5, 1_285, 1e-5),  # 10 epochs, 5%
  },
  "llava_onevision15_4b": {
    "align": Stage(None, 8, 1e-4, 5, steps=2_500),
    "mid": Stage(None, 16, 1e-5, 40, 1e-5, 20_000),
    "instruct": Stage(None, 224, 1e-5, 7, 1e-5, 3_500),
  },
  "llada_v_8b": {
    "align": Stage(558_128, 64, 1e-3, 262),
    "single": Stage(10_000_000, 256, 1e-5, 1172, 2e-6),
    "several": Stage(2_000_000, 256, 1e-5, 234, 2e-6),
    "reasoning": Stage(900_000, 256, 1e-5, 105, 2e-6),
  },
}


@functools.cache
def _read(name):
  return config.read(f"runs/vlm/recipe_{name}.gin", FEW_WORDS).experiment


def _stages(name, place, shrink=1):
  """Returns the experiments by stage, of models with fewer weights."""
  run = _read(name)
  if not isinstance(run, Staged):
    return {"": _smaller(run, shrink)}
  stages = {k: _smaller(x, shrink) for k, x in run.stages.items()}
  return dataclasses.replace(run, stages=stages).in_workdir(place).stages


def _smaller(experiment, shrink):
  if isinstance(experiment.model, StageResult):
    return experiment
  model = dataclasses.replace(experiment.model, shrink=shrink)
  return dataclasses.replace(experiment, model=model)


def _first_rates(experiment):
  """Returns the rates of the first update, of each tower that is trained."""
  params = {k: {"norm": jnp.ones(1)} for k in TOWERS}
  params["language"]["trained"] = {"a": jnp.ones(1)}
  trained, _ = tree.partition(params, experiment.trainable)
  found = optim.learning_rates(experiment.optimizer.init(trained))
  shared = found.get("learning_rate")
  if shared is None:
    shared = found["learning_rate/rest"]
  own = found.get("learning_rate/vision", shared)
  frozen = not jax.tree.leaves(trained["vision"])
  return float(shared), None if frozen else float(own)


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_are_the_published_ones(name, tmp_path):
  """Nothing is read: models have their real sizes, as shapes."""
  stages = _stages(name, tmp_path)
  assert list(stages) == list(PUBLISHED[name])
  for stage, want in PUBLISHED[name].items():
    experiment = stages[stage]
    batch, steps = experiment.data.batch_size, experiment.plan.steps
    assert want.batch in (None, batch)
    if want.samples is not None:
      assert steps in (want.samples // batch, want.samples // batch + 1)
    else:
      assert steps == want.steps
    rate, vision = _first_rates(experiment)
    if want.warmup is not None:
      assert rate == pytest.approx(want.rate / want.warmup)
      assert vision == want.vision_rate or vision == pytest.approx(
        want.vision_rate / want.warmup
      )
    assert (vision is None) == (want.vision_rate is None)
    if want.trained is not None:
      params = experiment.load_abstract().params
      trained, _ = tree.partition(params, experiment.trainable)
      assert weights.count(trained) == want.trained


@pytest.mark.parametrize(
  ("name", "stage"),
  [
    ("llava15_7b", "tune"),
    ("smolvlm_256m", "adapt"),
    pytest.param("paligemma_3b", "middle", marks=pytest.mark.slow),
    pytest.param("paligemma_3b_vqav2", "", marks=pytest.mark.slow),
    pytest.param("llava_onevision15_4b", "mid", marks=pytest.mark.slow),
    pytest.param("llada_v_8b", "single", marks=pytest.mark.slow),
  ],
)
def test_a_step_can_be_traced(name, stage, tmp_path):
  """Of few weights; rows, images and their tokens are as many as published."""
  experiment = _stages(name, tmp_path, shrink=64)[stage]
  taken = abstract_step.build(experiment, jax.devices()[:1])
  sums = jax.eval_shape(
    taken.objective, taken.state.params, taken.batch, taken.key
  )
  assert sums[0].shape == ()
  if "patches" in taken.batch:
    _, views, count, _ = taken.batch["patches"].shape
    soft = views * count // taken.loaded.model.square**2
  else:
    _, views, height, width, _ = taken.batch["pixels"].shape
    soft = views * taken.loaded.model.tokens_per_view(height, width)
  assert taken.batch["tokens"].shape[1] >= soft


def test_a_stage_at_448_pixels_has_the_shapes_of_that_model(tmp_path):
  found = _stages("paligemma_3b", tmp_path)["middle"].load_abstract()
  published = PRESETS["paligemma-3b-448"].model(dtype="bfloat16")
  assert found.model.vision.positions == published.vision.positions
  want = jax.eval_shape(published.init, jax.random.key(0))
  assert jax.tree.map(jnp.shape, found.params) == jax.tree.map(jnp.shape, want)


@pytest.mark.slow
def test_both_stages_of_llava_run(tmp_path):
  small = ["SHRINK=64", "LENGTH=640", "DTYPE='float32'"]
  small += ["HELDOUT_SAMPLES=2", "FSDP=1"]
  for stage in ("align", "tune"):
    small += [f"{stage}/{x}" for x in ("STEPS=2", "WARMUP=1", "BATCH=2")]
  read = config.read("runs/vlm/recipe_llava15_7b.gin", [*FEW_WORDS, *small])
  workdir = running.claim(read.experiment, read.text, tmp_path / "run")
  result = running.train(read.experiment, workdir)
  assert list(result["stages"]) == ["align", "tune"]
  align, tune = result["stages"].values()
  assert 0 < align["trainable_parameters"] < tune["trainable_parameters"]
  saved = folders.folder(workdir) / "result.json"
  assert json.loads(saved.read_text("utf-8"))["steps"] == 2
