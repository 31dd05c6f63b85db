"""What an image costs, by the command; what each tower takes of a step."""

import json

import jax
import pytest

from experiments import plan
from experiments.core import cli, config
from experiments.planning import abstract_step, plan_images, towers
from research.nn import flops
from research.typing import UserError


def test_the_command_prints_and_returns_the_cost(capsys):
  """SmolVLM's thumbnail: 17 views of 64 tokens, and 39 around them."""
  argv = ["plan", "--preset=smolvlm-256m", "--image_size=386x386"]
  assert cli.call(plan.main, [*argv, "--text_tokens=3"]) == 0
  printed = capsys.readouterr().out.splitlines()
  found = json.loads(printed[-1])
  assert found["soft_tokens"] == 17 * 64 and found["wrapper_tokens"] == 39
  assert found["total_tokens"] == 1130
  assert 0.9 < found["encoder_share"] < 1
  assert "17 of 512 x 512" in "\n".join(printed)


@pytest.mark.parametrize("given", ["386", "386x", "0x5", "ax5", "5x5x5"])
def test_sizes_that_are_none(given):
  with pytest.raises(UserError, match="expected HEIGHTxWIDTH"):
    plan_images.plan("smolvlm-256m", given)


@pytest.mark.parametrize("name", ["llava15_7b", "llava_onevision15_4b"])
def test_towers_share_a_step(name):
  """Bytes: 4 of a frozen weight, and 12 of a trained one with its moments."""
  bindings = ["text/shapes.Shapes.count=20", "SHRINK=64", "align/BATCH=2"]
  run = config.read(f"runs/vlm/recipe_{name}.gin", bindings).experiment
  abstract = abstract_step.build(run.stages["align"], jax.devices()[:1])
  found = towers.shares(abstract)
  assert sum(x["flops_share"] for x in found.values()) == pytest.approx(1)
  trained = {name: x["trained"] for name, x in found.items()}
  assert trained == dict(vision=False, connector=True, language=False)
  # Forward, and backward for activations and for weights.
  model, batch = abstract.loaded.model, abstract.batch
  if "patches" in batch:
    rows, views, count, _ = batch["patches"].shape
    grid = count // model.square, model.square
  else:
    rows, views, height, width, _ = batch["pixels"].shape
    grid = model.grid(height, width)
  shape = rows * views, grid[0] * grid[1], model.vision.width
  features = jax.ShapeDtypeStruct(shape, model.vision.dtype)
  once = flops.count_flops(
    lambda params, features: model.connect(params, features, grid),
    abstract.state.params,
    features,
  )
  assert found["connector"]["flops"] == 3 * once
  for x in found.values():
    least = (12 if x["trained"] else 4) * x["parameters"]
    assert least <= x["state_bytes"] <= least + 64
  assert "connector: " in towers.describe(found)
