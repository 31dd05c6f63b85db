"""Prompts that are seen both ways: prefill and steps are one forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.data import batch_of
from research.generation import generate
from research.nn import logits
from research.vlm import WithImages, masks
from tests import support_vlm

MODEL, PARAMS = support_vlm.model(), support_vlm.params()
IMAGE = support_vlm.IMAGE
PROMPTS = [[66, *[IMAGE] * 4, 5, 6, *[IMAGE] * 4, 7], [*[IMAGE] * 4, 8, 9, 10]]
STEPS = 3


def bidirectional(prompt, size):
  return np.arange(size)[None] < len(prompt)


def images_alone(prompt, size):
  """Returns which pairs are in one image."""
  ids = np.full(size, -1)
  image = -1
  for i, token in enumerate(prompt):
    if token == IMAGE:
      image += i == 0 or prompt[i - 1] != IMAGE
      ids[i] = image
  return (ids[:, None] == ids[None]) & (ids[:, None] >= 0)


@pytest.mark.parametrize(
  "policy, also",
  [
    (masks.BidirectionalPrompt(), bidirectional),
    (masks.BidirectionalImages(image_token=IMAGE), images_alone),
    (masks.Causal(), lambda prompt, size: np.zeros((size, size), bool)),
  ],
  ids=lambda x: type(x).__name__,
)
def test_generated_tokens_are_those_of_full_passes(policy, also):
  """By a mask of pairs, written down: causal, or `also`."""
  model = dataclasses.replace(MODEL, mask=policy)
  spliced = model.with_images(PARAMS, jnp.asarray(support_vlm.pixels(2, 2)))
  source = model.token_source()
  found = generate.generate(
    model.language, spliced, PROMPTS, STEPS, source=source
  )
  for row, prompt in enumerate(PROMPTS):
    one = model.with_images(
      PARAMS, jnp.asarray(support_vlm.pixels(2, 2)[row : row + 1])
    )
    ids = list(prompt)
    for _ in range(STEPS):
      size = len(ids)
      pairs = np.tril(np.ones((size, size), bool)) | also(prompt, size)
      scores = logits(
        model.language, one, jnp.asarray([ids]), None, _dense(pairs)
      )
      ids.append(int(scores[0, -1].argmax()))
    assert found.tokens[row] == ids[len(prompt) :]


@pytest.mark.parametrize(
  "policy",
  [
    masks.BidirectionalPrompt(),
    masks.BidirectionalImages(image_token=IMAGE),
    masks.Causal(),
  ],
  ids=lambda x: type(x).__name__,
)
def test_what_is_learned_is_what_is_generated(policy):
  """The loss of an answer is its tokens' by the mask of its prompt."""
  model = dataclasses.replace(MODEL, mask=policy)
  pixels = jnp.asarray(support_vlm.pixels(1, 2))
  prompt, answer = PROMPTS[0], [11, 12, 65]
  row = prompt + answer
  learned = [False] * len(prompt) + [True] * len(answer)
  batch = batch_of([row], [learned]) | {"pixels": pixels}
  found, weight, _ = jax.jit(WithImages(model))(PARAMS, batch, None)
  assert weight == 3
  size = len(row)
  pairs = np.tril(np.ones((size, size), bool))
  # Among the prompt's tokens alone: those of the answer are causal.
  here = np.arange(size) < len(prompt)
  both = here[:, None] & here[None]
  also = {
    masks.BidirectionalPrompt: both,
    masks.BidirectionalImages: images_alone(row, size),
    masks.Causal: False,
  }[type(policy)]
  spliced = model.with_images(PARAMS, pixels)
  scores = logits(
    model.language, spliced, jnp.asarray([row]), None, _dense(pairs | also)
  )
  at = jnp.arange(len(prompt) - 1, size - 1)
  chosen = jax.nn.log_softmax(scores)[0, at, jnp.asarray(answer)]
  np.testing.assert_allclose(found, -chosen.sum(), rtol=1e-4)


def test_the_policies_generate_other_tokens():
  """Else the test above would say nothing."""
  found = []
  for policy in (
    masks.BidirectionalPrompt(),
    masks.BidirectionalImages(image_token=IMAGE),
    masks.Causal(),
  ):
    model = dataclasses.replace(MODEL, mask=policy)
    spliced = model.with_images(PARAMS, jnp.asarray(support_vlm.pixels(2, 2)))
    made = generate.generate(
      model.language, spliced, PROMPTS, STEPS, source=model.token_source()
    )
    found.append(str(made.tokens))
  assert len(set(found)) == 3


def test_a_placeholder_is_never_generated():
  """It is a word of some vocabularies, and this model likes it best."""
  image = 60
  model = dataclasses.replace(MODEL, image_token=image)
  prompts = [[image] * 4 + [5, 6, 7], [image] * 4 + [8, 9, 10]]
  pixels = jnp.asarray(support_vlm.pixels(2, 1))
  spliced = model.with_images(PARAMS, pixels)
  hidden, _ = model.language.apply({"params": spliced}, jnp.asarray(prompts))
  spliced["head"] = spliced["head"].at[:, image].set(100 * hidden[0, -1])
  scores = logits(model.language, spliced, jnp.asarray(prompts))
  assert scores[0, -1].argmax() == image
  made = generate.generate(model.language, spliced, prompts, STEPS)
  assert image not in np.ravel(made.tokens)


def _dense(pairs):
  """Returns the mask in which each query sees some intervals of keys."""
  bounds = np.zeros((8, len(pairs)), np.int32)
  for i, row in enumerate(pairs):
    edges = np.flatnonzero(np.diff(np.r_[0, row.astype(int), 0]))
    bounds[: len(edges), i] = edges
  return Mask.intervals(jnp.asarray(bounds[None]))
