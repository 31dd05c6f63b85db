"""Rotations in config.json: every field is read, and written again."""

import pytest

from research.interop.hf import rope
from research.io.fields import Fields
from research.nn.rope import Dynamic, Linear, Llama3, Rope, Yarn

THEIRS = [
  (dict(rope_type="linear", factor=4.0), Linear(factor=4.0)),
  (dict(type="dynamic", factor=2.0), Dynamic(factor=2.0, original=64)),
  (
    dict(
      rope_type="llama3",
      factor=8.0,
      low_freq_factor=1.5,
      high_freq_factor=3.0,
      original_max_position_embeddings=32,
    ),
    Llama3(factor=8.0, low=1.5, high=3.0, original=32),
  ),
  (
    dict(
      rope_type="yarn",
      factor=4.0,
      original_max_position_embeddings=16,
      beta_fast=8.0,
      beta_slow=2.0,
      attention_factor=1.5,
      mscale=0.7,
      mscale_all_dim=0.9,
      truncate=False,
    ),
    Yarn(
      factor=4.0,
      original=16,
      fast=8.0,
      slow=2.0,
      attention=1.5,
      mscale=0.7,
      mscale_all=0.9,
      truncate=False,
    ),
  ),
]


@pytest.mark.parametrize("theirs, ours", THEIRS, ids=str)
def test_every_field_is_read_and_written(theirs, ours):
  longest = dict(max_position_embeddings=64)
  config = dict(rope_theta=5e5, rope_scaling=theirs) | longest
  assert rope.from_config(Fields(config, "config.json"), False) == (
    *(5e5, None, ours),
  )
  written = rope.to_config(Rope(theta=5e5, scaling=ours)) | longest
  assert rope.from_config(Fields(written, "config.json"), False) == (
    *(5e5, None, ours),
  )
