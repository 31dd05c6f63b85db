"""Padded rows: few shapes, and nothing but the shape of what they were."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import layout, sampler
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
  with_prompt,
)
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.delayed_kv_cache import DelayedKVCache
from research.diffusion.sampling.denoiser import BlockCache, NoCache
from research.diffusion.sampling.policies import Threshold
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.generation.sampling import GREEDY, Sampling
from tests.research.diffusion.sampling.test_denoiser import MASK, network

K, LENGTH = 4, 16
# Of as many tokens with what is filled, so that rows alone share a program.
PROMPTS = [[3, 1, 4], [5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]]
ROWS = [[*p, *[MASK] * (3 + LENGTH - len(p))] for p in PROMPTS]
HOT = Sampling(temperature=1.0)


# Shapes ----------------------------------------------------------------------


def test_the_ladder():
  buckets = sorted({layout.bucket(n) for n in range(1025)})
  assert buckets == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
  assert [layout.bucket(n) for n in (0, 64, 65, 96, 97)] == [
    64,
    64,
    96,
    96,
    128,
  ]


def test_rows_of_a_rung_are_no_shorter_than_they_have_to_be():
  for length, block in ((8, 1), (12, 4), (96, 32), (5, 5)):
    for longest in range(0, 200, 1 if block == 1 else block):
      width = layout.width(longest, length, block)
      assert width >= longest and width % block == 0
      assert width + length < 1.5 * max(longest + length, 64) + block


def test_where_tokens_lie():
  m = MASK
  rows = [[1, 2, 3, m, m, 4], [m, 5], [1, 2, 3, 4, 5, m, m, m]]
  laid = layout.pad_rows(rows, m, 4, 5)
  want = [
    [0, 0, 1, 2, 3, m, m, 4, 0],
    [0, 0, 0, 0, 0, m, 5, 0, 0],
    [1, 2, 3, 4, 5, m, m, m, 0],
  ]
  np.testing.assert_array_equal(laid.tokens, want)
  np.testing.assert_array_equal(laid.masked, np.array(want) == m)
  assert laid.heads == [5, 5, 5] and laid.starts == [2, 5, 0]
  np.testing.assert_array_equal(laid.valid.sum(-1), list(map(len, rows)))
  np.testing.assert_array_equal(laid.prompt.sum(-1), [3, 0, 5])
  # Where blocks of 2 start with the row, rows are moved by whole ones.
  laid = layout.pad_rows(rows, m, 6, 4, 2)
  want = [
    [0, 0, 1, 2, 3, m, m, 4, 0, 0],
    [0, 0, 0, 0, m, 5, 0, 0, 0, 0],
    [1, 2, 3, 4, 5, m, m, m, 0, 0],
  ]
  np.testing.assert_array_equal(laid.tokens, want)
  assert laid.heads == [5, 4, 5] and laid.starts == [2, 4, 0]


# Results ---------------------------------------------------------------------


def run(d, laid, options, sampling, numbers, params=None):
  """Returns what is sampled of rows as they lie."""
  tokens, masked, valid = laid
  key = jax.random.key(3)
  state = sampler.begin(tokens, masked, valid, key, jnp.array(numbers))
  params = network()[1] if params is None else params
  return sampler.sample(d, params, state, options, sampling)


def alone(d, row, options, sampling, number, prompt=None):
  """Returns what is sampled of one row without any padding."""
  tokens, params = np.array([row]), network()[1]
  laid = tokens, tokens == MASK, np.ones_like(tokens, bool)
  if prompt is not None:
    params = with_prompt(params, jnp.arange(len(row))[None] < prompt)
  return run(d, laid, options, sampling, [number], params)


def together(d, rows, options, sampling, block=1):
  """Returns what is sampled of rows of a bucket, and where they begin."""
  heads = [layout.first_mask(row, MASK) // block * block for row in rows]
  width = layout.width(max(heads), options.length, block)
  laid = layout.pad_rows(rows, MASK, options.length, width, block)
  assert laid.tokens.shape[1] == layout.round_up(64, block)
  params = network()[1]
  if isinstance(d, ClassifierFreeGuidance):
    params = with_prompt(params, jnp.asarray(laid.prompt))
  arrays = laid.tokens, laid.masked, laid.valid
  got = run(d, arrays, options, sampling, range(len(rows)), params)
  return got, laid.starts


def same(got, begin, i, want, size):
  """Whether row `i` of `got` is the row that was filled alone."""
  here = slice(begin, begin + size)
  np.testing.assert_array_equal(got.tokens[i, here], want.tokens[0, :size])
  assert got.counts[i] == want.counts[0]
  for name in ("lengths",):
    assert getattr(got, name)[i] == getattr(want, name)[0]
  # Calls of a batch are those of whoever needs them; their order is a row's.
  a, b = got.filled[i, here], want.filled[0, :size]
  np.testing.assert_array_equal(a < 0, b < 0)
  order = np.unique(a[a >= 0], return_inverse=True)[1]
  np.testing.assert_array_equal(
    order, np.unique(b[b >= 0], return_inverse=True)[1]
  )


def readers():
  """Returns ways to read rows of a model all of whose tokens see all."""
  model = network()[0]
  return {
    "whole": NoCache(model=model),
    "shift": NoCache(model=model, shift=True),
    "dual": BlockCache(model=model),
    "near": BlockCache(model=model, before=2, after=1, shift=True),
    # More than there is before the first prompt, and behind any block.
    "far": BlockCache(model=model, before=16, after=4),
    "prefix": PrefixCache(model=model, shift=True),
    "delayed": DelayedKVCache(model=model, mask_id=MASK, halvings=2),
    "renewed": DelayedKVCache(model=model, mask_id=MASK, refresh=2, shift=True),
    "credit": Credited(inner=NoCache(model=model), mask_id=MASK),
  }


# Whole rows are read by `credit`, guided, and with gaps; `--cache=delayed:2` is
# filled beside its rows without padding in test_filling_rows.
SLOW = "whole", "shift", "renewed", "near", "credit"


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ())
    for name in readers()
  ],
)
@pytest.mark.sample(4)
def test_rows_are_what_they_are_alone(name):
  """Of four blocks behind a prompt, and of two behind a longer one."""
  d = readers()[name]
  common = dict(mask_id=MASK, block=K, policy=Threshold(threshold=0.3))
  common |= dict(end=(2, 7))
  got, begins = together(d, ROWS, SamplerConfig(length=LENGTH, **common), HOT)
  for i, row in enumerate(ROWS):
    length = row.count(MASK)
    want = alone(d, row, SamplerConfig(length=length, **common), HOT, i)
    same(got, begins[i], i, want, len(row))


@pytest.mark.slow
@pytest.mark.parametrize(
  "inner", ["whole", pytest.param("near", marks=pytest.mark.slow)]
)
def test_guided_rows_too(inner):
  d = functools.partial(
    ClassifierFreeGuidance, inner=readers()[inner], mask_id=MASK
  )
  common = dict(mask_id=MASK, block=K)
  got, begins = together(
    d(), ROWS, SamplerConfig(length=LENGTH, **common), GREEDY
  )
  for i, row in enumerate(ROWS):
    own = SamplerConfig(length=row.count(MASK), **common)
    want = alone(d(), row, own, GREEDY, i, len(PROMPTS[i]))
    same(got, begins[i], i, want, len(row))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "shift", "edit"),
  [
    ("whole", False, None),
    ("cached", True, 0.4),
    ("guided", True, None),
    pytest.param("cached", True, None, marks=pytest.mark.slow),
    pytest.param("cached", False, 0.4, marks=pytest.mark.slow),
  ],
)
@pytest.mark.sample(2, 1)
def test_rows_of_blocks_too(kind, shift, edit):
  """Prompts end within a block; only one of the rows has a last block more.

  Alone, they are as long as each other, and share a program.
  """
  model = network()[0]
  d = NoCache(model=model, block=K, shift=shift)
  if kind == "cached":
    d = BlockCausal(model=model, block=K, shift=shift)
  prompts = [[3, 1, 4, 1], [5, 9, 2, 6, 5, 3, 5, 8, 9]]
  rows = [[*prompt, *[MASK] * (20 - len(prompt))] for prompt in prompts]
  common = dict(mask_id=MASK, block=K, end=(2,))
  if edit is not None:
    common |= dict(edit=edit, edit_steps=3)
  options = SamplerConfig(length=16, **common)
  guide = functools.partial(
    ClassifierFreeGuidance, inner=d, mask_id=MASK, weight=0.5
  )
  guided = kind == "guided"
  got, begins = together(guide() if guided else d, rows, options, GREEDY, K)
  for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
    length = len(row) - len(prompt) // K * K
    own = SamplerConfig(length=length, **common)
    one = (guide(), row, own, GREEDY, i, len(prompt))
    want = alone(*one) if guided else alone(d, *one[1:5])
    same(got, begins[i], i, want, len(row))


GAPS = [
  [3, 1, MASK, MASK, 5, 6, MASK, 7],
  [MASK, 2, 3, 4, 5, 6, 7, 8, MASK, MASK],
]


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "near",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("shift", "prefix")),
  ],
)
def test_gaps_too(name):
  d = readers()[name]
  rows = [[*GAPS[0], 9, 9], GAPS[1]]  # whole blocks of two behind the first gap
  common = dict(mask_id=MASK, block=2, stop_early=False)
  options = SamplerConfig(length=32, **common)
  got, begins = together(d, rows, options, HOT)
  for i, row in enumerate(rows):
    own = SamplerConfig(
      length=len(row) - layout.first_mask(row, MASK), **common
    )
    want = alone(d, row, own, HOT, i)
    same(got, begins[i], i, want, len(row))
    given = np.array(row) != MASK
    np.testing.assert_array_equal(want.tokens[0][given], np.array(row)[given])


@pytest.mark.slow
def test_gaps_of_a_model_with_blocks_too():
  """What is given behind a gap is padded within its block."""
  model = network()[0]
  options = SamplerConfig(mask_id=MASK, block=K, length=16, stop_early=False)
  rows = [[*GAPS[0], 9], GAPS[1]]  # three blocks each, the last not whole
  for d in (NoCache(model=model, block=K), BlockCausal(model=model, block=K)):
    got, begins = together(d, rows, options, GREEDY, K)
    for i, row in enumerate(rows):
      # A block more of padding by hand: what is there is never seen.
      size = layout.round_up(len(row), K)
      tokens = np.array([[*row, *[0] * (size - len(row))]])
      valid = np.arange(size)[None] < len(row)
      own = SamplerConfig(mask_id=MASK, block=K, length=size, stop_early=False)
      state = tokens, tokens == MASK, valid
      want = run(NoCache(model=model, block=K), state, own, GREEDY, [i])
      same(got, begins[i], i, want, len(row))


@pytest.mark.parametrize(
  "kind", [pytest.param(NoCache, marks=pytest.mark.slow), BlockCache]
)
def test_blocks_in_which_nothing_is_masked_take_no_call(kind):
  row = [1, MASK, *[2] * 10, MASK]
  options = SamplerConfig(mask_id=MASK, block=4, length=12)
  d = kind(model=network()[0])
  assert alone(d, row, options, GREEDY, 0).calls == 2
