"""Invalid calls of attention raise before anything runs."""

import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask

B, T, S, H = 2, 5, 8, 4
UNCHECKED = inspect.unwrap(flash_attention)
GOOD = {
  "q": np.zeros((B, T, 4, H), np.float32),
  "k": np.zeros((B, S, 2, H), np.float32),
  "v": np.zeros((B, S, 2, H), np.float32),
}
AT = Mask.causal(q_positions=jnp.zeros((B, T), np.int32))


def zeros(*shape, dtype=np.float32):
  return np.zeros(shape, dtype)


def unlike(*sizes, most=12):
  """Draws a size that is none of `sizes`."""
  return st.integers(0, most).filter(lambda n: n not in sizes)


@st.composite
def mistakes(draw):
  """Invalid arguments, and the name that the message must contain."""
  pick, size = draw, lambda *ok: draw(unlike(*ok))
  shapes = st.lists(st.integers(0, 4), max_size=6)
  wrong = {
    "rank": lambda: (
      {"q": zeros(*pick(shapes.filter(lambda s: len(s) != 4)))}, "q"),
    "batch": lambda: ({"q": zeros(size(B), T, 4, H)}, "q"),
    "heads": lambda: ({"q": zeros(B, T, pick(
      st.integers(1, 9).filter(lambda n: n % 2)), H)}, "q"),
    "depth": lambda: ({"q": zeros(B, T, 4, size(H))}, "q"),
    "keys": lambda: ({"k": zeros(B, size(S), 2, H)}, "k"),
    "no key heads": lambda: (
      {"k": zeros(B, S, 0, H), "v": zeros(B, S, 0, H)}, "k"),
    "no queries": lambda: ({"q": zeros(B, 0, 4, H)}, "q"),
    "no keys": lambda: (
      {"k": zeros(B, 0, 2, H), "v": zeros(B, 0, 2, H)}, "k"),
    "values": lambda: ({"v": zeros(B, S, size(2), H)}, "v"),
    "bias": lambda: ({"bias": zeros(size(1, T), S)}, "bias"),
    "bias rank": lambda: ({"bias": zeros(1, B, 4, T, S)}, "bias"),
    "sinks": lambda: ({"sinks": zeros(size(4))}, "sinks"),
    "segments": lambda: (
      {"segment_ids": (zeros(B, size(T), dtype=np.int32),
                       zeros(B, S, dtype=np.int32))}, "q_segment"),
    "one segment": lambda: (
      {"segment_ids": zeros(B, T, dtype=np.int32)}, "segment_ids"),
    "window": lambda: (
      {"window": (pick(st.integers(-9, -1)), None)}, "window"),
    "alignment": lambda: (
      {"causal_alignment": pick(st.text(max_size=9))}, "causal_alignment"),
    "offset": lambda: ({"q_offset": pick(st.integers(-9, -1))}, "q_offset"),
    "softcap": lambda: (
      {"softcap": pick(st.sampled_from([0.0, -1.0, np.nan, np.inf]))},
      "softcap"),
    "rate": lambda: (
      {"dropout_rate": pick(st.sampled_from([-0.1, 1.0, 2.0, np.nan])),
       "dropout_seed": 0}, "dropout_rate"),
    "seed": lambda: (
      {"dropout_rate": pick(st.floats(0.01, 0.9))}, "dropout_seed"),
    "both": lambda: ({"mask": Mask.full(), "causal": True}, "mask"),
    "backend": lambda: ({"backend": pick(st.text(max_size=9))}, "backend"),
    "config": lambda: (
      {"backend": "mosaic_tpu", "config": Blocks()}, "config"),
    "f16 on TPU": lambda: (
      {n: x.astype(np.float16) for n, x in GOOD.items()}
      | {"backend": "mosaic_tpu"}, "float16"),
    "parts": lambda: (
      {"backend": "mosaic_tpu",
       "config": Tiles(forward=Tile(64, 64, 64, 64))}, "tile"),
    "no floats": lambda: (pick(st.sampled_from(
      [({n: GOOD[n].astype(d)}, n) for n in "qkv"
       for d in (np.int32, np.int8, np.bool_, np.complex64)]))),
    "mask as bias": lambda: ({"bias": zeros(T, S, dtype=np.bool_)}, "bias"),
    "whole sinks": lambda: ({"sinks": zeros(4, dtype=np.int32)}, "sinks"),
    "part of a key": lambda: ({"kv_lens": zeros(B)}, "kv_lens"),
    "unsigned": lambda: (
      {"kv_lens": zeros(B, dtype=np.uint8)}, "kv_lens"),
    "unsigned positions": lambda: (
      {"mask": jax.tree.map(lambda x: x.astype(np.uint32), AT)}, "q_positions"),
    "lengths": lambda: ({"kv_lens": zeros(size(B), dtype=np.int32)}, "kv_lens"),
    "long": lambda: ({"kv_lens": np.array([S, pick(st.sampled_from(
      [-1, S + 1, 2**30]))], np.int32)}, "kv_lens"),
  }  # fmt: skip
  return wrong[draw(st.sampled_from(sorted(wrong)))]()


@hypothesis.settings(max_examples=300)
@hypothesis.given(mistake=mistakes())
def test_invalid_arguments_raise_before_anything_runs(mistake):
  """While the program is traced, with a message that names the argument."""
  arguments, named = mistake
  arguments = jax.tree.map(
    lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x,
    GOOD | arguments,
  )
  # Without the annotations' checks, which users do not have.
  with pytest.raises(ValueError, match=rf"\b{named}"):
    jax.eval_shape(lambda: UNCHECKED(**arguments))
