"""The layout of weights for TPU kernels keeps every bit, as specified."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import planar
from tests.kernels_pallas.planar_cases import KINDS, case


@pytest.mark.parametrize("lead", [(), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cover(1)
def test_unpack_returns_every_bit(kind, lead):
  w, parts, matrix = case(kind, lead)
  assert w.shape == parts[0].shape
  for got, want in zip(planar.unpack(w), parts, strict=True):
    assert (got is None) == (want is None)
    if want is not None:
      assert got.dtype == want.dtype
      np.testing.assert_array_equal(
        np.asarray(got).view(np.uint8), want.view(np.uint8)
      )
  np.testing.assert_allclose(
    planar.dense(w), matrix, rtol=2e-7, atol=2e-6 * np.abs(matrix).max()
  )


def test_the_layout_of_codes():
  """The layout is an interface: other programs may write it."""
  codes = np.random.default_rng(0).integers(0, 16, (256, 128), np.uint8)
  w = planar.pack(codes, np.ones((1, 128), np.float32))
  words = np.asarray(w.codes)
  for row in (0, 1, 2, 31, 32, 95, 127, 128, 255):
    block, inside = divmod(row, 128)
    plane, inside = divmod(inside, 32)
    word, half = divmod(inside, 2)
    found = words[16 * block + word] >> (16 * half + 4 * plane) & 15
    np.testing.assert_array_equal(found, codes[row])


@pytest.mark.parametrize("kind", ["affine", "int8, channels"])
def test_parts_along_each_axis_are_packed_matrices(kind):
  """So that a mesh can shard them."""
  bits = 8 if kind.startswith("int8") else 4
  dtype = np.uint8 if bits == 4 else np.int8
  codes = np.random.default_rng(0).integers(0, 16, (256, 256)).astype(dtype)
  scale = np.random.default_rng(1).uniform(1, 2, (8, 256)).astype(np.float32)
  w = planar.pack(codes, scale)
  for axis in (0, 1):
    halves = zip(
      *(np.split(part, 2, axis) for part in (w.codes, w.scale)), strict=True
    )
    cut = zip(
      *(np.split(part, 2, axis) for part in (codes, scale)), strict=True
    )
    for half, parts in zip(halves, cut, strict=True):
      packed = planar.pack(*parts)
      np.testing.assert_array_equal(packed.codes, half[0])
      np.testing.assert_array_equal(packed.scale, half[1])


GOOD = np.zeros((64, 8), np.uint8), np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
  ("arguments", "how", "message"),
  [
    ((GOOD[0].astype(np.int32), GOOD[1]), {}, "codes: found int32"),
    ((GOOD[0][0], GOOD[1]), {}, "codes: found uint8"),
    ((GOOD[0][:0], GOOD[1]), {}, "codes: found uint8"),
    ((GOOD[0] + 16, GOOD[1]), {}, "found 16, expected 4 bits"),
    ((jnp.asarray(GOOD[0]) + 16, GOOD[1]), {}, "found 16, expected 4 bits"),
    ((GOOD[0], GOOD[1], GOOD[1][:1]), {}, r"offset: found float32 \(1, 8\)"),
    ((GOOD[0], GOOD[1][:, :7]), {}, r"found float32 \(2, 7\)"),
    ((GOOD[0], GOOD[1].astype(np.float64)), {}, "found float64"),
    ((GOOD[0], np.ones((3, 8), "f4")), {}, "expected a divisor"),
    ((GOOD[0], np.ones((8, 8), "f4")), {}, "group: found 8, expected 16"),
    ((GOOD[0], GOOD[1]), dict(group=0), "group: found 0, expected 16"),
    ((GOOD[0], GOOD[1]), dict(codebook=(1.0,) * 15), "16 finite"),
    ((GOOD[0], GOOD[1]), dict(codebook=(np.inf,) * 16), "16 finite"),
  ],
)
def test_mismatched_parts_raise(arguments, how, message):
  with pytest.raises(ValueError, match=message):
    planar.pack(*arguments, **how)
