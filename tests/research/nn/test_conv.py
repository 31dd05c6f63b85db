"""Convolutions by patches and by XLA, against explicit sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.nn import conv
from research.quant import qtensor
from research.quant.formats.int8 import Int8
from research.typing import UserError

CASES = {
  "patch": dict(strides=(2, 3), padding="VALID"),
  "any": dict(strides=(2, 1), padding=((1, 1), (2, 2))),
  "same": dict(strides=(1, 2), padding="SAME"),
}


def images(seed=0, size=(2, 7, 9, 4)):
  return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def kernel(seed=1, size=(2, 3, 4, 6)):
  return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def written_out(x, w, strides, padding):
  """Returns the sums of a convolution, one by one."""
  window = w.shape[:2]
  if padding == "SAME":
    outs = [-(-n // s) for n, s in zip(x.shape[1:3], strides, strict=True)]
    more = [
      max((o - 1) * s + k - n, 0)
      for o, s, k, n in zip(outs, strides, window, x.shape[1:3], strict=True)
    ]
    padding = [(m // 2, m - m // 2) for m in more]
  elif padding == "VALID":
    padding = [(0, 0)] * 2
  x = np.pad(x.astype(np.float64), ((0, 0), *padding, (0, 0)))
  rows, columns = (
    (n - k) // s + 1
    for n, k, s in zip(x.shape[1:3], window, strides, strict=True)
  )
  out = np.zeros((len(x), rows, columns, w.shape[-1]))
  for p in range(rows):
    for q in range(columns):
      i, j = p * strides[0], q * strides[1]
      seen = x[:, i : i + window[0], j : j + window[1]]
      out[:, p, q] = np.tensordot(seen, w, 3)
  return out


@pytest.mark.parametrize("case", CASES)
def test_both_ways_are_the_sum(case):
  x, w, fields = images(), kernel(), CASES[case]
  image = jnp.asarray(x)
  want = written_out(x, w, **fields)
  plain = conv.conv(image, jnp.asarray(w), **fields)
  np.testing.assert_allclose(plain, want, atol=1e-5)
  held = conv.kernel_to_matrix(jnp.asarray(w))
  np.testing.assert_array_equal(held.dense(), w)
  np.testing.assert_allclose(conv.conv(image, held, **fields), want, atol=1e-5)
  rows = conv.patches(image, held.window, **fields)
  got = weights.einsum("...d,df->...f", rows, held.matrix)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_packed_kernel_is_multiplied_as_patches():
  x, w = images(), kernel()
  held = conv.kernel_to_matrix(jnp.asarray(w))
  packed = conv.ConvTensor(qtensor.pack(held.matrix, Int8()), held.window)
  got = conv.conv(jnp.asarray(x), packed, **CASES["any"])
  want = written_out(x, np.asarray(packed.dense()), **CASES["any"])
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert np.abs(np.asarray(packed.dense()) - w).max() > 1e-4


def test_the_module_takes_either():
  module = conv.Conv(features=6, window=(2, 3))
  x = jnp.asarray(images())
  params = module.init(jax.random.key(0), x)["params"]
  params = dict(params, bias=jnp.arange(6.0))
  want = module.apply({"params": params}, x)
  assert want.shape == (2, 3, 3, 6)
  held = conv.AsMatrices()(params)
  assert held["kernel"].matrix.shape == (24, 6)
  np.testing.assert_allclose(module.apply({"params": held}, x), want, atol=1e-5)


def test_bad_use():
  with pytest.raises(UserError, match="'x' matches no kernel"):
    conv.AsMatrices(kernels="x")({"kernel": jnp.ones((2, 2, 3, 4))})
  with pytest.raises(UserError, match=r"\(3, 4\), expected a kernel"):
    conv.AsMatrices()({"kernel": jnp.ones((3, 4))})
  with pytest.raises(UserError, match="at least as large"):
    conv.patches(jnp.ones((1, 2, 2, 1)), (3, 3), (1, 1))
