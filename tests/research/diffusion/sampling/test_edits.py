"""Edits of filled places against LLaDA 2.1's loop, row by row in Python."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import Denoiser
from research.diffusion.sampling.policies import Quota, Threshold

MASK, SIZE = 7, 8


@dataclasses.dataclass(frozen=True)
class Restless(Denoiser):
  """Surely 0 at a mask, and surely the token after the one that stands there.

  So every place that may change does, at every call. With `calm`, a token
  stays once it has reached 3.
  """

  calm: bool = False

  def prefill(self, params, tokens, valid, start, size):
    after = (tokens + 1) % MASK
    if self.calm:
      after = jnp.where(tokens == 3, 3, after)
    sure = jax.nn.one_hot(jnp.where(tokens == MASK, 0, after), MASK + 1)
    return jax.lax.dynamic_slice_in_dim(30 * sure, start, size, axis=1), ()

  def step(self, params, tokens, valid, start, size, carry):
    return self.prefill(params, tokens, valid, start, size)


def reference(row, at_once, edit_steps, calm=False):
  """Returns a row and its calls, by LLaDA 2.1's loop (`generate`).

  A call that finds the block full counts against `edit_steps`, before it is
  made; the loop ends when one changes nothing, too.
  """
  row, ours = list(row), [x == MASK for x in row]
  calls = extra = 0
  while True:
    places = [i for i, x in enumerate(row) if x == MASK]
    if not places:
      extra += 1
      if extra > edit_steps:
        return row, calls
    calls, before = calls + 1, list(row)
    for i, x in enumerate(before):
      if x == MASK or not ours[i]:
        continue
      row[i] = x if calm and x == 3 else (x + 1) % MASK
    for i in places[:at_once]:
      row[i] = 0
    if not places and row == before:
      return row, calls


@functools.cache
def rows():
  """A row of masks, one that is full before it, and one with two gaps."""
  return np.array(
    [[MASK] * SIZE, [MASK] * 2 + [4] * 6, [1, MASK, 2, 3, MASK, 5, 6, 0]]
  )


def edited(policy, edit_steps, calm=False, block=SIZE):
  options = SamplerConfig(
    mask_id=MASK, length=SIZE, block=block, policy=policy, edit=0.5,
    edit_steps=edit_steps,
  )  # fmt: skip
  masked = rows() == MASK
  state = sampler.begin(rows(), masked, np.ones_like(masked), jax.random.key(0))
  return sampler.sample(Restless(calm), {}, state, options)


@pytest.mark.parametrize("edit_steps", [0, 1, 5])
@pytest.mark.parametrize(
  ("policy", "at_once"), [(Threshold(), SIZE), (Quota(), 1)], ids=str
)
@pytest.mark.sample(5)
def test_edits_are_counted_from_when_a_row_is_full(policy, at_once, edit_steps):
  got = edited(policy, edit_steps)
  want = [reference(row, at_once, edit_steps) for row in rows().tolist()]
  np.testing.assert_array_equal(got.tokens, [row for row, _ in want])
  np.testing.assert_array_equal(got.counts, [calls for _, calls in want])
  assert got.calls == got.counts.max()


@pytest.mark.parametrize(
  ("policy", "at_once"), [(Threshold(), SIZE), (Quota(), 1)], ids=str
)
def test_edits_end_where_nothing_changes(policy, at_once):
  got = edited(policy, 16, calm=True)
  want = [reference(row, at_once, 16, calm=True) for row in rows().tolist()]
  np.testing.assert_array_equal(got.tokens, [row for row, _ in want])
  np.testing.assert_array_equal(got.counts, [calls for _, calls in want])


def test_each_block_has_edits_of_its_own():
  got = edited(Threshold(), 2, block=4)
  want = [
    [reference(half, SIZE, 2)[0] for half in (row[:4], row[4:])]
    for row in rows().tolist()
  ]
  np.testing.assert_array_equal(got.tokens, np.reshape(want, got.tokens.shape))
  assert got.calls == 2 * (1 + 2)


def test_an_edited_place_is_as_sure_as_its_new_token():
  """Half sure at a mask; what a search masks again is what is least sure."""

  @dataclasses.dataclass(frozen=True)
  class Mended(Restless):
    def prefill(self, params, tokens, valid, start, size):
      logits, _ = Restless(calm=True).prefill(params, tokens, valid, 0, SIZE)
      half = 30.0 * (jnp.arange(MASK + 1) < 2)
      return jnp.where((tokens == MASK)[..., None], half, logits), ()

  options = SamplerConfig(
    mask_id=MASK, length=SIZE, block=SIZE, policy=Threshold(), edit=0.5
  )
  masked = rows() == MASK
  state = sampler.begin(rows(), masked, np.ones_like(masked), jax.random.key(0))
  got, *_ = sampler.fill_block(Mended(), {}, state, jnp.int32(0), options)
  assert (np.asarray(got.tokens)[masked] == 3).all()
  np.testing.assert_allclose(got.confidence, 1.0, atol=1e-6)
