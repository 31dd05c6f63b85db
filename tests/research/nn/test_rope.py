"""Rotary embeddings for longer contexts, by the papers' formulas."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from research.nn.rope import (
  Dynamic,
  InterleavedSections,
  Linear,
  Llama3,
  Rope,
  Sections,
  Spatial,
  Yarn,
)
from research.typing import UserError

DIM, LENGTH = 16, 40
POSITIONS = jnp.arange(LENGTH)[None]
LLAMA3 = Llama3(factor=8.0, low=1.0, high=4.0, original=64)


def lengths(scaling):
  """Returns how much longer each pair of numbers becomes by its rotation."""
  cos, sin = Rope(scaling=scaling).tables(POSITIONS, DIM)
  return np.hypot(np.asarray(cos, np.float64), np.asarray(sin, np.float64))


@pytest.mark.parametrize(
  "scaling",
  [
    *(None, LLAMA3, Linear(factor=4.0)),
    Dynamic(factor=2.0, original=16),
  ],
  ids=str,
)
def test_rotations_keep_lengths(scaling):
  np.testing.assert_allclose(lengths(scaling), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
  "more, expected",
  [
    ({}, 0.1 * math.log(4) + 1),  # section 3.4
    (dict(attention=1.5), 1.5),
    (
      dict(mscale=0.7, mscale_all=1.0),
      (0.07 * math.log(4) + 1) / (0.1 * math.log(4) + 1),
    ),
  ],
)
def test_yarn_lengthens_by_its_temperature(more, expected):
  scaling = Yarn(factor=4.0, original=16, **more)
  np.testing.assert_allclose(lengths(scaling), expected, rtol=1e-5)


def test_llama3_keeps_short_waves_and_stretches_long_ones():
  """As Meta's code says it, a wave at a time."""
  plain = 10_000.0 ** -(np.arange(0, DIM, 2) / DIM)
  expected = []
  for frequency in plain:
    turns = LLAMA3.original * frequency / (2 * math.pi)
    if turns > LLAMA3.high:
      expected.append(frequency)
    elif turns < LLAMA3.low:
      expected.append(frequency / LLAMA3.factor)
    else:
      smooth = (turns - LLAMA3.low) / (LLAMA3.high - LLAMA3.low)
      mixed = (1 - smooth) / LLAMA3.factor + smooth
      expected.append(mixed * frequency)
  assert (
    len({round(e / p, 3) for e, p in zip(expected, plain, strict=True)}) > 2
  )
  cos, sin = Rope(scaling=LLAMA3).tables(POSITIONS, DIM)
  angles = np.arange(LENGTH)[:, None] * expected
  np.testing.assert_allclose(cos[0], np.cos(angles), atol=1e-5)
  np.testing.assert_allclose(sin[0], np.sin(angles), atol=1e-5)


# What transformers' get_rope_index gives two words, an image of 2 x 3, two
# words (Qwen2-VL): time, row and column of each token.
QWEN = np.array(
  [
    *([0] * 3, [1] * 3, [2, 2, 2], [2, 2, 3], [2, 2, 4]),
    *([2, 3, 2], [2, 3, 3], [2, 3, 4], [5] * 3, [6] * 3),
  ]
)


@pytest.mark.parametrize(
  "axes, coordinate",
  [
    (Sections(sizes=(2, 3, 3)), [0, 0, 1, 1, 1, 2, 2, 2]),
    (InterleavedSections(sizes=(4, 2, 2)), [0, 1, 2, 0, 1, 2, 0, 0]),
    (InterleavedSections(sizes=(3, 3, 2)), [0, 1, 2, 0, 1, 2, 0, 1]),
  ],
)
def test_each_frequency_turns_by_its_coordinate(axes, coordinate):
  cos, sin = Rope(axes=axes).tables(jnp.asarray(QWEN[None]), DIM)
  frequency = 10_000.0 ** -(np.arange(0, DIM, 2) / DIM)
  angle = QWEN[:, coordinate] * frequency
  np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-6)
  np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-6)


def test_words_turn_as_they_do_without_axes():
  axes = Rope(axes=Sections(sizes=(2, 3, 3)))
  for positions in (POSITIONS, jnp.stack([POSITIONS] * 3, axis=-1)):
    for found, expected in zip(
      axes.tables(positions, DIM), Rope().tables(POSITIONS, DIM), strict=True
    ):
      np.testing.assert_allclose(found, expected, atol=1e-6)


def test_patches_turn_by_row_and_column():
  """Row frequencies, then column frequencies, of half a head each."""
  at = np.array([[0, 0], [0, 1], [2, 3]])
  cos, _ = Rope(axes=Spatial()).tables(jnp.asarray(at[None]), DIM)
  half = 10_000.0 ** -(np.arange(0, DIM // 2, 2) / (DIM // 2))
  expected = np.cos(np.concatenate([at[:, :1] * half, at[:, 1:] * half], -1))
  np.testing.assert_allclose(cos[0], expected, atol=1e-6)


def test_sections_of_another_size_are_refused():
  with pytest.raises(UserError, match="expected 8 in total"):
    Rope(axes=Sections(sizes=(2, 3))).tables(jnp.asarray(QWEN[None]), DIM)
