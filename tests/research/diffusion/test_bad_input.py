"""What a sampler does with input that is wrong, empty or at a limit."""

import dataclasses

import jax
import numpy as np
import pytest

from research import weights
from research.diffusion.sampling import sampler, variable_length
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
)
from research.diffusion.sampling.config import Growth, SamplerConfig
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.policies import Quota, Threshold
from research.generation.sampling import GREEDY, Sampling
from research.interop.diffusion.spec import from_config
from research.typing import UserError
from tests.research.diffusion.sampling.test_sampler import MASK, Wave, run


@dataclasses.dataclass(frozen=True)
class Masking(Wave):
  """Likes nothing as much as the mask."""

  def prefill(self, params, tokens, valid, start, size):
    logits, carry = super().prefill(params, tokens, valid, start, size)
    return logits.at[..., MASK].set(50.0), carry


@pytest.mark.slow
@pytest.mark.parametrize("rules", [GREEDY, Sampling(temperature=2.0)])
def test_a_model_that_predicts_the_mask_fills_in_its_next_choice(rules):
  options = SamplerConfig(mask_id=MASK, length=8, block=8, steps=4)
  found = []
  for asked in (Wave(), Masking()):
    state = sampler.start([[2, 5, 1]], options, jax.random.key(0))
    found.append(sampler.sample(asked, {}, state, options, rules))
  np.testing.assert_array_equal(found[1].tokens, found[0].tokens)
  np.testing.assert_array_equal(found[1].filled, found[0].filled)
  assert (found[1].tokens != MASK).all()


def test_a_block_longer_than_the_answer():
  with pytest.raises(UserError, match="block=16: does not divide length=8"):
    SamplerConfig(mask_id=MASK, length=8, block=16)


def test_steps_beyond_the_places_end_when_all_is_full():
  got = run(block=8, steps=64)
  assert got.calls == 8 and got.counts[0] == 8


def test_an_empty_prompt_is_a_row_of_masks():
  alone = run(prompts=[()], block=8, steps=4)
  assert alone.tokens.shape == (1, 8) and alone.calls == 4
  assert (alone.tokens != MASK).all()
  options = SamplerConfig(mask_id=MASK, length=8, block=8, steps=4)
  tokens = np.full((1, 8), MASK)
  whole = tokens == MASK
  state = sampler.begin(tokens, whole, whole, jax.random.key(0))
  want = sampler.sample(Wave(), {}, state, options)
  np.testing.assert_array_equal(alone.tokens, want.tokens)
  both = sampler.start([[], [1, 2]], options, jax.random.key(0))
  np.testing.assert_array_equal(both.valid.sum(-1), [8, 10])
  np.testing.assert_array_equal(both.masked.sum(-1), [8, 8])


def test_nothing_masked_is_nothing_to_do():
  options = SamplerConfig(mask_id=MASK, length=4, block=4)
  tokens = np.array([[1, 2, 3, 4, 5]])
  state = sampler.begin(tokens, tokens < 0, tokens > 0, jax.random.key(0))
  got = sampler.sample(Wave(), {}, state, options)
  np.testing.assert_array_equal(got.tokens, tokens)
  assert got.counts[0] == 0 and (got.filled == -1).all()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spliced(weights.Weight):
  """An embedding in which token 3 stands for an image's feature."""

  extra_ids = (3, MASK + 9)


def test_a_placeholder_of_images_is_never_filled_in():
  options = SamplerConfig(mask_id=MASK, length=8, block=8, steps=4)
  state, found = sampler.start([[2, 5, 1]], options, jax.random.key(0)), []
  for params in ({}, {"embed": Spliced()}, {"params": {"embed": Spliced()}}):
    found.append(sampler.sample(Wave(), params, state, options).tokens[0, 3:])
  assert 3 in found[0] and 3 not in found[1]
  np.testing.assert_array_equal(found[1], found[2])
  canvas = dataclasses.replace(
    options, steps=None, policy=Threshold(), canvas=Growth(), end=(0,)
  )
  state = variable_length.start([[2, 5, 1]], canvas, jax.random.key(0))
  got = variable_length.sample(Wave(), {"embed": Spliced()}, state, canvas)
  assert 3 not in got.tokens[0, 3:]


@dataclasses.dataclass(frozen=True)
class Blocks(Wave):
  """Of a model with blocks of four tokens."""

  @property
  def unit(self) -> int:
    return 4


@pytest.mark.parametrize("around", [False, True])
def test_blocks_of_a_model_begin_where_its_rows_do(around):
  """Else a block of the sampler lies in two of the model's, in silence."""
  d = Blocks()
  if around:
    d = ClassifierFreeGuidance(inner=d, mask_id=MASK)
    d = Credited(inner=d, mask_id=MASK)
  options = SamplerConfig(mask_id=MASK, length=8, block=4)
  key = jax.random.key(0)
  for prompts, words in (
    ([[2, 5, 1]], "begins at 0 and places to fill from 3 on"),
    ([[2, 5, 1, 3], [1, 2, 3]], "begins at 1 and places to fill from 4 on"),
  ):
    with pytest.raises(UserError, match=f"{words}, expected multiples of 4"):
      sampler.sample(d, {}, sampler.start(prompts, options, key), options)
  long = dataclasses.replace(options, block=8)
  state = sampler.start([[2, 5, 1, 3]], long, key)
  with pytest.raises(UserError, match="block=8, expected a divisor of 4"):
    sampler.sample(d, {}, state, long)
  sampler.check_rows(d, state, options)


def test_all_masks_of_a_row_are_filled_or_it_is_refused():
  options = SamplerConfig(mask_id=MASK, length=4, block=4)
  tokens = np.array([[1, MASK, 3, 4, MASK, 6]])
  state = sampler.begin(tokens, tokens == MASK, tokens > 0, jax.random.key(0))
  with pytest.raises(UserError, match="masks before the last 4 places"):
    sampler.sample(Wave(), {}, state, options)
  long = SamplerConfig(mask_id=MASK, length=8, block=4)
  with pytest.raises(UserError, match="rows of 6 places, .* than length=8"):
    sampler.sample(Wave(), {}, state, long)


@pytest.mark.parametrize("policy", [Quota(), Threshold(threshold=0.5)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_and_are_told(value, policy):
  """Of one place and one token, at the second call."""

  @dataclasses.dataclass(frozen=True)
  class Breaking(Wave):
    def step(self, params, tokens, valid, start, size, carry):
      logits, carry = super().prefill(params, tokens, valid, start, size)
      return logits.at[0, 3, 2].set(value), carry

  options = SamplerConfig(mask_id=MASK, length=8, block=8, policy=policy)
  state = sampler.start([[1, 2]], options, jax.random.key(0))
  with pytest.raises(UserError, match="block at 2 are not finite"):
    sampler.sample(Breaking(), {}, state, options)


@pytest.mark.parametrize(
  ("config", "words"),
  [
    (dict(model_type="llada", vocab_size=16), "mask_token_id"),
    (
      dict(model_type="Dream", vocab_size=16, mask_token_id=16),
      "mask_token_id",
    ),
    (
      dict(vocab_size=16, diffusion=dict(shift=True, block=None)),
      "mask_token_id",
    ),
  ],
)
def test_a_checkpoint_without_a_mask(config, words):
  with pytest.raises(UserError, match=words):
    from_config(config)
  assert from_config(dict(model_type="llama", vocab_size=16)) is None
