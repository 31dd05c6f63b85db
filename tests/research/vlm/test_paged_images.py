"""Prompts with images in pages: the tokens of a contiguous cache."""

import functools

import chex
import jax.numpy as jnp
import pytest

from research.generation import generate, generate_paged
from research.generation.paging import Paging
from research.generation.sampling import Sampling
from research.typing import UserError
from research.vlm import masks
from tests import support_vlm

IMAGE, NEW = support_vlm.IMAGE, 7
SOFT = [IMAGE] * 4
PROMPTS = [
  [*SOFT, 5, 6, *SOFT, 7],
  [*SOFT, 5, 6, *SOFT, 7],  # other pixels than those of the first
  [9, 8],
  [5, *SOFT, 4],
]


@functools.cache
def case():
  model, params = support_vlm.model(), support_vlm.params()
  pixels = jnp.asarray(support_vlm.pixels(len(PROMPTS), 2))
  return model.language, model.with_images(params, pixels)


def tokens(source):
  # Placeholders, which are outside of the vocabulary, are not penalised.
  rules = Sampling(repetition_penalty=1.3)
  return generate.generate(*case(), PROMPTS, NEW, rules, source=source).tokens


@pytest.mark.parametrize(
  "mask",
  [
    masks.Causal(),
    masks.BidirectionalPrompt(),
    masks.BidirectionalImages(image_token=IMAGE),
  ],
  ids=lambda x: type(x).__name__,
)
def test_pages_have_the_tokens_of_a_contiguous_cache(mask):
  """Two rows at a time, so that a row's image changes with its prompt."""
  causal = isinstance(mask, masks.Causal)
  contiguous = functools.partial(generate.chunks, mask=None if causal else mask)
  paged = functools.partial(
    generate_paged.chunks,
    layout=Paging(size=4, rows=2),
    mask=masks.by_index(mask),
  )
  expected = tokens(contiguous)
  assert tokens(paged) == expected
  assert expected[0] != expected[1]


@pytest.mark.parametrize(
  "mask",
  [masks.BidirectionalPrompt(), masks.BidirectionalImages(image_token=IMAGE)],
  ids=lambda x: type(x).__name__,
)
def test_masks_by_index_are_those_with_segments(mask):
  batch = jnp.asarray([[*SOFT, 5, *SOFT, 7, 0], [5, *SOFT, 4, 0, 0, 0, 0, 0]])
  lengths = jnp.asarray([10, 6])
  place = jnp.arange(batch.shape[1])
  inside = place < lengths[:, None]
  both = inside[:, :, None] & inside[:, None]
  found, expected = (
    f(batch, lengths).visible(len(place), len(place))
    for f in (masks.by_index(mask), mask)
  )
  chex.assert_trees_all_equal(
    jnp.broadcast_to(found, both.shape)[both],
    jnp.broadcast_to(expected, both.shape)[both],
  )


def test_what_pages_refuse():
  with pytest.raises(UserError, match="BidirectionalVision"):
    masks.by_index(masks.BidirectionalVision(tokens=(IMAGE,)))
  with pytest.raises(UserError, match="images of 4 prompts, expected those of"):
    next(generate_paged.chunks(*case(), PROMPTS[:2], NEW))
