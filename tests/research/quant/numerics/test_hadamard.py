"""Tests Hadamard matrices for orthogonality, and fast transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from research.quant.numerics import hadamard
from research.typing import UserError

# Sylvester's, Paley's forms over primes and over fields of 9, 25 and 343.
ORDERS = (1, 2, 4, 12, 20, 28, 36, 40, 52, 60, 64, 108, 140, 312, 344, 576)


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal(n):
  m = hadamard.matrix(n).astype(np.int64)
  assert set(np.unique(m)) <= {-1, 1}
  np.testing.assert_array_equal(m @ m.T, n * np.eye(n, dtype=np.int64))


@pytest.mark.parametrize(
  "n, core",
  [(11008, 344), (13824, 108), (14336, 28), (29568, 924), (1536, 12)],
)
def test_widths_of_known_models_have_one(n, core):
  """Llama 2 7B, 13B, Llama 3 8B, Qwen2 72B, SmolLM2: all of one block."""
  assert hadamard.block(n) == n
  assert n % core == 0 and hadamard.block(core) == core
  assert len(hadamard.matrix(core)) == core


def test_scipy_has_powers_of_two_alone():
  for n in (1, 2, 64, 256):
    np.testing.assert_array_equal(hadamard.matrix(n), linalg.hadamard(n))
  with pytest.raises(ValueError, match="power of 2"):
    linalg.hadamard(12)


# Of 44 the matrix is not its own inverse.
@pytest.mark.parametrize("n", [8, 36, 44, 256, 1536])
def test_the_fast_product_is_the_matrix(n):
  x = np.random.default_rng(0).standard_normal((3, n)).astype(np.float32)
  want = x.astype(np.float64) @ hadamard.matrix(n) / np.sqrt(n)
  y = hadamard.rotate(jnp.asarray(x))
  np.testing.assert_allclose(y, want, atol=1e-5)
  np.testing.assert_allclose(hadamard.rotate(y, inverse=True), x, atol=1e-5)


def test_without_a_matrix_it_rotates_in_blocks():
  with pytest.raises(UserError, match="blocks of 4"):
    hadamard.matrix(172)
  x = np.random.default_rng(1).standard_normal((2, 172)).astype(np.float32)
  want = x.reshape(2, 43, 4) @ hadamard.matrix(4) / 2
  y = hadamard.rotate(jnp.asarray(x))
  np.testing.assert_allclose(y, want.reshape(2, 172), atol=1e-6)


def test_a_random_matrix_is_orthogonal_and_depends_on_its_key():
  a = hadamard.random_matrix(jax.random.key(0), 36)
  b = hadamard.random_matrix(jax.random.key(1), 36)
  np.testing.assert_allclose(a @ a.T, np.eye(36), atol=1e-6)
  assert np.any(a != b)
  np.testing.assert_allclose(np.abs(a), 1 / 6, rtol=1e-6)
