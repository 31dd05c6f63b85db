"""Transforms of one tower, as configuration: adapters, packed weights, both."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.core import config
from research import tree, weights
from research.data import batch_of
from research.lora import Adapt, LoRA
from research.quant import Quantize
from research.quant.algorithms.rotate import Rotate
from research.quant.algorithms.spinquant import SpinQuant
from research.quant.qtensor import QTensor
from research.quant.reports import report_errors
from research.training import state, step
from research.typing import UserError
from research.vlm import WithImages, Within
from tests import support_vlm

MODEL, PARAMS = support_vlm.model(), support_vlm.params()
KEY = jax.random.key(0)
GIN = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'models/vlm_tiny.gin'
include 'data/shapes.gin'
include 'optim/adamw_cosine.gin'
from experiments.core import experiment
from research.lora import adapt
from research.lora.methods import lora
from research.quant import quantize
from research.vlm import within
STEPS = 3000
LEARNING_RATE = 2e-3
experiment.Experiment.transforms = (@packed/within.Within(), @within.Within())
experiment.Experiment.trainable = '/trained/'
packed/within.Within.transform = @quantize.Quantize()
within.Within.transform = @adapt.Adapt()
within.Within.tower = 'language'
adapt.Adapt.method = @lora.LoRA()
lora.LoRA.rank = 2
"""


def test_configuration_packs_and_adapts_the_language_model_alone():
  experiment = config.parse(GIN).experiment
  params = experiment.load_abstract().params
  packed = [
    path
    for path, w in weights.named_weights(params)
    if isinstance(weights.unwrap(w), QTensor)
  ]
  assert packed
  assert all(x.startswith("language/run0/") for x in packed)
  trained, _ = tree.partition(params, experiment.trainable)
  paths = [path for path, _ in tree.flatten_paths(trained)]
  assert len(paths) == 2 * len(packed)
  assert all(x.startswith("language/run0/") for x in paths)
  table = tree.describe(params, experiment.trainable)
  assert f"{paths[0]} " in table and "vision/" in table
  sizes = report_errors.sizes(params)
  layers = params["language"]["run0"]["layer0"]
  matrices = [w for _, w in weights.named_weights(layers) if len(w.shape) == 3]
  assert sizes.packed_weights == sum(int(np.prod(w.shape)) for w in matrices)


@pytest.mark.slow
def test_a_step_moves_the_towers_adapters_and_nothing_else():
  transform = Adapt(method=LoRA(rank=2))
  adapted = Within("language", transform)(PARAMS, KEY)
  for name in ("vision", "connector"):
    assert adapted[name] is PARAMS[name]
  same = transform(PARAMS["language"], KEY)
  chex.assert_trees_all_equal(adapted["language"], same)
  adapted = Within("vision", transform)(adapted, KEY)
  tx = optax.sgd(0.1)
  now = state.create(adapted, "/trained/", tx)
  update = jax.jit(step.make_train_step(WithImages(MODEL), tx))
  image = support_vlm.IMAGE
  tokens = [[66, *[image] * 4, 5, 6, 7]]
  batch = batch_of(tokens) | {"pixels": jnp.asarray(support_vlm.pixels(1, 1))}
  moved, metrics = update(now, batch, KEY)
  assert np.isfinite(metrics["loss"])
  pairs = zip(
    tree.flatten_paths(moved.params),
    tree.flatten_paths(now.params),
    strict=True,
  )
  changed = {path for (path, x), (_, y) in pairs if not np.array_equal(x, y)}
  assert {path.split("/")[0] for path in changed} == {"language", "vision"}
  # The other factors have no gradient while these are zero.
  assert all(path.endswith("/trained/b") for path in changed)


def test_a_transform_that_needs_a_model_gets_the_towers():
  got = []

  @dataclasses.dataclass(frozen=True)
  class Keeps:
    def with_model(self, loaded):
      got.append(loaded)
      return self

    def __call__(self, params, key):
      return params

  @dataclasses.dataclass(frozen=True)
  class Loaded:
    model: object
    params: object
    tokenizer: str = "words"

  bound = Within("language", Keeps()).with_model(Loaded(MODEL, PARAMS))
  assert got == [Loaded(MODEL.language, PARAMS["language"])]
  assert bound(PARAMS, KEY) == PARAMS
  plain = Within("language", Quantize())
  assert plain.with_model(Loaded(MODEL, PARAMS)) is plain


def test_what_has_no_such_tower_is_refused():
  with pytest.raises(UserError, match="found no tower 'language' in embed"):
    Within("language", Quantize())(PARAMS["language"], KEY)


@pytest.mark.parametrize("transform", [Rotate(), SpinQuant()])
def test_rotations_that_images_do_not_pass_through_are_refused(transform):
  """What the connector makes would be in the basis before the rotation."""
  with pytest.raises(UserError, match="into which images come unrotated"):
    Within("language", transform)


def test_rotated_values_change_no_logits_of_images():
  made = Within("language", Rotate(residual=False, model=MODEL.language))
  rotated = made(PARAMS, KEY)
  images = jnp.asarray(support_vlm.pixels(1, 1))
  soft = MODEL.encode(PARAMS, images).shape[1]
  tokens = jnp.asarray([[MODEL.image_token] * soft + [1, 2, 3]])

  def logits(params):
    spliced = {"params": MODEL.with_images(params, images)}
    hidden, _ = MODEL.language.apply(spliced, tokens)
    return MODEL.language.apply(spliced, hidden, method="logits")

  chex.assert_trees_all_close(logits(rotated), logits(PARAMS), atol=1e-4)


@pytest.mark.parametrize("transform", [Quantize(), Adapt()])
def test_without_a_tower_there_are_no_layers_to_transform(transform):
  with pytest.raises(
    UserError, match=r"(?s)found no layers.*Within\('language'"
  ):
    transform(PARAMS, KEY)
