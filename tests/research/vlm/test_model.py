"""A vision language model's loss: what it depends on, and what it does not."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import training, tree
from research.data import batch_of
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.alignment.preference import VRPO
from research.diffusion.block import BlockDiffusion
from research.diffusion.learned import GenMD4
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.schedule import Linear
from research.nn import logits
from research.prm.objective import StepReward
from research.sharding import Layout
from research.training import global_batch
from research.training.alignment.policy_gradient import PolicyGradient
from research.training.objectives.distill import Distill
from research.training.objectives.objective import NextToken, with_model
from research.training.objectives.preference import DPO
from research.typing import UserError
from research.vlm import WithImages, connectors, masks
from research.vlm.answering import Answerer
from research.vlm.encoders import EncoderSizes, clip
from research.vlm.encoders.vit import Features
from tests import support_vlm

MODEL, PARAMS = support_vlm.model(), support_vlm.params()
IMAGE = support_vlm.IMAGE
# Row 0 has two images, row 1 one, row 2 none.
TOKENS = [
  [66, *[IMAGE] * 4, 5, *[IMAGE] * 4, 6, 7],
  [4, 8, *[IMAGE] * 4, 9, 10],
  [11, 12, 13],
]
PIXELS = support_vlm.pixels(3, 2)


def assert_close(found, expected):
  """Sums over two short models in another order, by each array's largest."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for x, y in pairs:
    size = 1 + np.abs(y).max()
    np.testing.assert_allclose(x / size, y / size, rtol=0, atol=2e-5)


def batch(tokens=TOKENS, pixels=PIXELS):
  mask = [[i not in (0, IMAGE) for i in row] for row in tokens]
  size = max(map(len, tokens))
  mask = np.array([row + [False] * (size - len(row)) for row in mask])
  return batch_of(tokens, mask) | {"pixels": jnp.asarray(pixels)}


@functools.cache
def compiled(objective=NextToken()):
  loss = WithImages(MODEL, objective)

  def sums(params, batch, key):
    total, weight, _ = loss(params, batch, key)
    return total, weight

  return jax.jit(jax.value_and_grad(sums, has_aux=True))


def loss_of(batch, params=PARAMS):
  (total, _), grads = compiled()(params, batch, None)
  return total, grads


@pytest.fixture(scope="module")
def reference():
  return loss_of(batch())


@pytest.mark.slow
def test_every_weight_of_every_tower_has_a_gradient(reference):
  for path, gradient in tree.flatten_paths(reference[1]):
    assert np.abs(gradient).max() > 0, path


def test_pixels_of_an_image_change_the_loss(reference):
  pixels = PIXELS.copy()
  pixels[1, 0, :4, :4] ^= 255
  assert abs(loss_of(batch(pixels=pixels))[0] - reference[0]) > 1e-3


def test_views_that_no_placeholder_shows_change_nothing(reference):
  pixels = PIXELS.copy()
  pixels[1, 1] ^= 255
  pixels[2] ^= 255
  chex.assert_trees_all_equal(loss_of(batch(pixels=pixels)), reference)


def test_rows_see_their_own_images(reference):
  order = [2, 0, 1]
  moved = batch([TOKENS[i] for i in order], PIXELS[order])
  assert_close(loss_of(moved), reference)


def test_text_alone_is_the_language_models():
  tokens = [TOKENS[2], [5, 6, 7]]
  text = batch(tokens, PIXELS[:2])
  found, _, _ = WithImages(MODEL)(PARAMS, text, None)
  expected, _, _ = NextToken(MODEL.language)(PARAMS["language"], text, None)
  chex.assert_trees_all_equal(found, expected)


def test_a_connector_of_zeros_gives_the_loss_of_zero_embeddings():
  """PaliGemma's first step, whatever the pixels; and it learns from there."""
  zeros = jax.tree.map(jnp.zeros_like, PARAMS["connector"])
  params, given = PARAMS | {"connector": zeros}, batch()
  total, grads = loss_of(given, params)
  blind, _ = loss_of(batch(pixels=PIXELS ^ 255), params)
  assert total == blind
  own, here = {"params": PARAMS["language"]}, given["tokens"] == IMAGE
  rows = jnp.where(here, 0, given["tokens"])
  words = jnp.where(here[..., None], 0, own["params"]["embed"][rows])

  @jax.jit
  def scores_of(own, words):
    hidden, _ = MODEL.language.apply(own, words)
    return MODEL.language.apply(own, hidden, method="logits")

  scores = scores_of(own, words)
  targets = jnp.where(given["weights"] > 0, given["targets"], 0)
  losses = optax.softmax_cross_entropy_with_integer_labels(scores, targets)
  assert_close(total, np.sum(losses * given["weights"]))
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["connector"]))


def test_a_language_model_alone_is_refused():
  """Such as that of a GGUF file, whatever `Pretrained.towers` says."""
  found = "found Transformer, expected VisionLanguageModel"
  with pytest.raises(UserError, match=f"WithImages.model: {found}"):
    with_model(WithImages(), MODEL.language)


@dataclasses.dataclass(frozen=True)
class TakesAnyMask:
  """An objective that returns whether it has the expected mask."""

  expected: Any
  model: Any = None
  mask: Any = None

  def with_mask(self, mask):
    return dataclasses.replace(self, mask=mask)

  def __call__(self, params, batch, key):
    return jnp.float32(self.mask == self.expected), jnp.ones(()), {}


def test_any_objective_that_takes_a_mask_has_the_models():
  model = dataclasses.replace(MODEL, mask=masks.BidirectionalPrompt())
  objective = TakesAnyMask(expected=model.mask.of_rows)
  same, _, _ = WithImages(model, objective)(PARAMS, batch(), None)
  assert same == 1


@pytest.mark.slow
def test_masked_diffusion_sees_images_too():
  """All may be masked but placeholders, which would shift their features."""
  objective = MaskedDiffusion(mask_id=2)
  given = batch()
  pixels = PIXELS.copy()
  pixels[0] ^= 255
  key = jax.random.key(0)
  (one, weight), grads = compiled(objective)(PARAMS, given, key)
  (other, _), _ = compiled(objective)(PARAMS, batch(pixels=pixels), key)
  assert weight == sum(token != IMAGE for row in TOKENS for token in row)
  assert abs(one - other) > 1e-3
  assert np.abs(grads["vision"]["patch_embed"]).max() > 0


@pytest.mark.parametrize(
  "objective",
  [
    DPO(),
    VRPO(mask_id=2),
    BlockDiffusion(mask_id=2),
    GenMD4(mask_id=2),
    MaskedDiffusion(mask_id=2, schedule=Linear(), complement=True),
    GRPO(mask_id=2, block=4),
  ],
  ids=lambda x: type(x).__name__,
)
def test_objectives_of_other_rows_are_refused(objective):
  """A copy of a row would get the features that follow the row's own."""
  found = f"WithImages.objective: found {type(objective).__name__}, which reads"
  with pytest.raises(UserError, match=found):
    WithImages(MODEL, objective)


@pytest.mark.parametrize(
  "objective", [Distill(), PolicyGradient(), StepReward()]
)
def test_causal_objectives_of_prompts_that_are_not_causal_are_refused(
  objective,
):
  assert WithImages(MODEL, objective).model is MODEL
  model = dataclasses.replace(MODEL, mask=masks.BidirectionalPrompt())
  with pytest.raises(UserError, match="which is causal, and a model"):
    WithImages(model, objective)
  with pytest.raises(UserError, match="the mask BidirectionalPrompt, expected"):
    with_model(WithImages(objective=objective), model)
  diffusion = MaskedDiffusion(mask_id=2)
  assert WithImages(model, diffusion).objective is diffusion


def test_answers_are_those_of_full_forward_passes():
  answerer = Answerer(
    model=MODEL,
    params=PARAMS,
    tokenizer=support_vlm.tokenizer(),
    preprocessor=support_vlm.PREPROCESSOR,
    max_new_tokens=3,
  )
  images = [(PIXELS[0, 0],), (PIXELS[1, 0],)]
  questions = ["w5 w6", "w7"]
  found = answerer(images, questions)
  for each, question, text in zip(images, questions, found, strict=True):
    words = [int(word[1:]) for word in question.split()]
    ids = [IMAGE] * 4 + words
    spliced = MODEL.with_images(PARAMS, jnp.asarray(each[0])[None, None])
    for _ in range(3):
      scores = logits(MODEL.language, spliced, jnp.asarray([ids]))
      ids.append(int(scores[0, -1].argmax()))
    new = ids[4 + len(words) :]
    end = new.index(65) if 65 in new else 3
    names = {65: "<end>", 66: "<begin>"}
    assert text.split() == [names.get(i, f"w{i}") for i in new[:end]]


@pytest.mark.slow
@pytest.mark.parametrize(
  "sizes",
  [
    dict(data=2, sequence=2),
    dict(data=1, fsdp=2, tensor=2),
    dict(data=2, ring=2),
  ],
  ids=str,
)
def test_a_mesh_cuts_rows_of_pixels_and_no_other_axis(sizes):
  """Views could be cut like tokens, were they not named."""
  tokens = [*TOKENS, TOKENS[0]]
  whole = batch(tokens, support_vlm.pixels(4, 2, seed=1))
  (total, _), grads = compiled()(PARAMS, whole, None)
  layout = Layout(**sizes)
  mesh = layout.mesh(jax.devices()[:4])
  with jax.set_mesh(mesh):
    params = jax.device_put(PARAMS, layout.shardings(PARAMS, mesh))
    placed = global_batch.to_global(whole, layout.batch(mesh))
    views = placed["pixels"].sharding.shard_shape(placed["pixels"].shape)
    assert views[1:] == placed["pixels"].shape[1:]
    (found, _), moved = compiled()(params, placed, None)
  assert_close((found, moved), (total, grads))


@pytest.mark.slow
def test_microbatches_are_rows_with_their_images():
  """The gradient is that of the whole batch, whatever a row's images."""
  tokens = [*TOKENS, TOKENS[0]]
  whole = batch(tokens, support_vlm.pixels(4, 2, seed=1))
  optimizer = optax.sgd(0.1)
  found = []
  for accumulate in (1, 2):
    state = training.create(PARAMS, ".", optimizer)
    step = training.make_train_step(WithImages(MODEL), optimizer, accumulate)
    after, metrics = jax.jit(step)(state, whole, jax.random.key(0))
    found.append((after.trainable, metrics["loss"], metrics["grad_norm"]))
  assert_close(*found)


@pytest.mark.parametrize("height, width", [(8, 16), (16, 8), (32, 32)])
def test_views_of_another_grid_than_the_positions_are_refused(height, width):
  pixels = jnp.zeros((1, 1, height, width, 3), jnp.uint8)
  with pytest.raises(UserError, match=f"{height // 4} x {width // 4} patches"):
    MODEL.encode(PARAMS, pixels)


@pytest.mark.parametrize(
  "connector, tokens",
  [
    (connectors.Linear(size=32), 17),
    (connectors.Mlp(size=32), 17),
    (connectors.Squares(side=2, inner=connectors.Linear(size=32)), None),
    (connectors.AttentionPool(size=32, queries=3), 3),
  ],
)
def test_a_class_token_has_a_placeholder_or_is_refused(connector, tokens):
  """A connector of squares would give it the first one's, and so on."""
  sizes = EncoderSizes(width=24, depth=1, heads=2, hidden=28, patch=4, grid=4)
  model = dataclasses.replace(
    MODEL,
    vision=clip(sizes),
    connector=connector,
    features=Features(normed=False, class_token=True),
  )
  pixels = jax.ShapeDtypeStruct((1, 2, 16, 16, 3), jnp.uint8)
  params = jax.eval_shape(model.new_towers, jax.random.key(0))
  if tokens is None:
    with pytest.raises(UserError, match="17 features of 4 x 4 patches"):
      jax.eval_shape(model.encode, params, pixels)
  else:
    soft = jax.eval_shape(model.encode, params, pixels)
    assert soft.shape == (1, 2 * tokens, 32)
    assert model.tokens_per_view(16, 16) == tokens
