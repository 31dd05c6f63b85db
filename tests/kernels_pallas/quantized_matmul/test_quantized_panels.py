"""Weights in panels keep every bit, in as little memory as possible."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.cpu import panels
from tests.kernels_pallas.panel_cases import KINDS, NF4, case, parts


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cover(1)
def test_unpack_returns_every_bit(kind, lead):
  arrays, how = parts(kind, lead)
  w = jax.jit(functools.partial(panels.pack, **how))(*arrays)
  assert w.shape == arrays[0].shape
  unpacked = jax.jit(panels.unpack)(w)
  for got, want in zip(unpacked, arrays, strict=True):
    assert (got is None) == (want is None)
    if want is not None:
      assert got.dtype == want.dtype
      np.testing.assert_array_equal(
        np.asarray(got).view(np.uint8), want.view(np.uint8)
      )


def test_every_bfloat16_is_kept():
  codes = np.arange(1 << 16, dtype=np.uint16).view(jnp.bfloat16)
  got, _, _ = panels.unpack(panels.pack(codes.reshape(256, 256)))
  np.testing.assert_array_equal(
    np.asarray(got).view(np.uint16).reshape(-1), codes.view(np.uint16)
  )


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_what_the_codes_need(kind):
  w, matrix = case(kind)
  lanes = -(-matrix.shape[1] // 16) * 16
  assert w.words.nbytes == w.padded * lanes * w.bits // 8
  assert w.padded - matrix.shape[0] < max(w.group, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_and_take(kind):
  w, matrix = case(kind)
  dense = np.asarray(jax.jit(panels.dense)(w))
  np.testing.assert_allclose(dense, matrix, rtol=2e-7, atol=1e-7)
  ids = np.array([[0, 3, matrix.shape[1] - 1]])
  rows = jax.jit(panels.take)(w, jnp.asarray(ids))
  np.testing.assert_array_equal(rows, dense.T[ids])


@pytest.mark.parametrize("lead", [(), (2,)])
def test_concatenated_matrices(lead):
  arrays, how = parts("signed", lead)  # 16 outputs: whole panels
  w = panels.pack(*arrays, **how)
  three = [w, w, panels.pack(*(x[..., :5] for x in arrays[:2]), **how)]
  got = panels.concatenate(three)
  assert got.shape == (*lead, 100, 37)
  want = np.concatenate([panels.dense(w) for w in three], axis=-1)
  np.testing.assert_array_equal(panels.dense(got), want)


def test_matrices_that_cannot_be_concatenated():
  w = case("signed")[0]
  cut, other = case("affine")[0], dataclasses.replace(w, codebook=NF4)
  wide = dataclasses.replace(w, scale=w.scale.astype(jnp.float32))
  assert panels.concatenate([w, w]) is not None
  for parts_ in ([cut, cut], [w, other], [w, wide], [w, cut]):
    assert panels.concatenate(parts_) is None


GOOD = np.zeros((64, 8), np.uint8), np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
  ("arguments", "how", "message"),
  [
    ((GOOD[0].astype(np.int32), GOOD[1]), {}, "codes: found int32"),
    ((GOOD[0][0], GOOD[1]), {}, "codes: found uint8"),
    ((GOOD[0][:0], GOOD[1]), {}, "codes: found uint8"),
    ((GOOD[0] + 16, GOOD[1]), {}, "found 16, expected 4 bits"),
    ((jnp.asarray(GOOD[0]) + 16, GOOD[1]), {}, "found 16, expected 4 bits"),
    ((GOOD[0],), {}, "scale: missing"),
    ((GOOD[0], None, GOOD[1]), {}, "offset: given without"),
    ((GOOD[0].astype(jnp.bfloat16), GOOD[1]), {}, "bfloat16 weights have none"),
    ((GOOD[0], GOOD[1][:, :7]), {}, r"found float32 \(2, 7\)"),
    ((GOOD[0], GOOD[1].astype(np.float64)), {}, "found float64"),
    ((GOOD[0], np.ones((3, 8), "f4")), {}, "expected a divisor"),
    ((GOOD[0], GOOD[1]), dict(group=12), "positive multiple of 8"),
    ((GOOD[0], GOOD[1]), dict(group=0), "positive multiple of 8"),
    ((GOOD[0], GOOD[1]), dict(codebook=(1.0,) * 15), "16 finite"),
    ((GOOD[0], GOOD[1]), dict(codebook=(np.inf,) * 16), "16 finite"),
  ],
)
def test_mismatched_parts_raise(arguments, how, message):
  with pytest.raises(ValueError, match=message):
    panels.pack(*arguments, **how)


@pytest.mark.parametrize("layout", [panels, planar], ids=["panels", "planar"])
def test_known_codes_are_checked_while_tracing(layout):
  """Traced ones have no values, and are packed as they are."""
  codes, scale = map(jnp.asarray, GOOD)
  w = jax.jit(lambda x: layout.pack(codes, x))(scale)
  np.testing.assert_array_equal(layout.unpack(w)[0], codes)
  wrong = codes + 16
  with pytest.raises(ValueError, match="found 16, expected 4 bits"):
    jax.jit(lambda x: layout.pack(wrong, x))(scale)
  jax.jit(layout.pack)(wrong, scale)
