"""Hadamard matrices and fast Hadamard transforms.

A Hadamard matrix has entries +-1 and orthogonal rows. For order n = K 2^p it is
the Kronecker product of one of order K (Paley 1933) with p of order 2
(Sylvester), so a transform takes O(n (K + p)) operations. Paley's first
construction has order q + 1 for a prime power q = 3 mod 4, his second 2 (q + 1)
for q = 1 mod 4: 11008 = 344 x 2^5 (q = 7^3), 29568 = 924 x 2^5, 576 = 36 x 2^4.

Vectors are rows, as activations are: `rotate(x)` is `x @ matrix(n) / sqrt(n)`.
SciPy has matrices of orders 2^p alone; those are the same.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float, PRNGKey, UserError

DENSE = 64
"""Largest order of a Sylvester factor that is one dense matrix product."""


@functools.cache
def matrix(n: int) -> np.ndarray:
  """Returns a Hadamard matrix of order `n`, int8 `[n, n]` of +-1.

  Raises:
    UserError: `n` is not 2^p times an order of Paley's constructions.
  """
  core = _core(n)
  if core is None:
    raise UserError(
      f"hadamard: order {n} is not 2^p times an order of Paley's.\nRotate in"
      f" blocks of {block(n)}."
    )
  out = _paley(core)
  while len(out) < n:
    out = np.kron(out, np.array([[1, 1], [1, -1]], np.int8))
  out.setflags(write=False)
  return out


def block(n: int) -> int:
  """Returns the largest divisor of `n` for which `matrix` exists."""
  return next(d for d in range(n, 0, -1) if n % d == 0 and _core(d))


def random_matrix(
  key: PRNGKey, n: int, dtype: Any = jnp.float32
) -> Float[Array, "n n"]:
  """Returns `diag(+-1) matrix(n) / sqrt(n)`, a random orthogonal matrix.

  Block-diagonal if there is no matrix of order `n`.
  """
  return rotate(jnp.diag(jax.random.rademacher(key, (n,), dtype)))


def rotate(
  x: Float[Array, "*B I"], inverse: bool = False
) -> Float[Array, "*B I"]:
  """Returns `x @ matrix(I) / sqrt(I)`, in the dtype of `x`.

  Args:
    x: rows; transformed in blocks of `block(I)` if there is no matrix of order
      I.
    inverse: whether to transpose the matrix, which inverts the rotation.
  """
  size = block(x.shape[-1])
  core = _core(size)
  shape = (*x.shape[:-1], x.shape[-1] // size, core, *_factors(size // core))
  letters = [chr(ord("a") + i) for i in range(len(shape) - x.ndim)]
  y = x.reshape(shape)
  for i, letter in enumerate(letters):
    order = y.shape[x.ndim + i]
    if order == 1:
      continue
    h = _paley(order) if i == 0 else matrix(order)
    h = jnp.asarray(h.T if inverse else h, x.dtype)
    inner = "".join(letters)
    eq = f"...{inner},{letter}z->...{inner.replace(letter, 'z')}"
    y = jnp.einsum(eq, y, h, precision=jax.lax.Precision.HIGHEST)
  return (y * jnp.asarray(size**-0.5, x.dtype)).reshape(x.shape)


def _factors(n: int) -> tuple[int, ...]:
  """Returns powers of 2 up to `DENSE` whose product is `n`."""
  out = []
  while n > 1:
    out.append(min(n, DENSE))
    n //= out[-1]
  return tuple(out)


@functools.cache
def _core(n: int) -> int | None:
  """Returns the smallest order K of Paley's with n = K 2^p, or None."""
  k = n
  while k % 2 == 0:
    k //= 2
  while k <= n:
    if k == 1 or _paley_order(k):
      return k
    k *= 2
  return None


def _paley_order(k: int) -> tuple[int, int] | None:
  """Returns (construction 1 or 2, q) of Paley's order `k`, or None."""
  if k % 4 == 0 and k % 8 and _prime_power(k // 2 - 1):
    return 2, k // 2 - 1  # q = k/2 - 1 is 1 mod 4
  if k % 4 == 0 and _prime_power(k - 1):
    return 1, k - 1
  return None


def _prime_power(q: int) -> tuple[int, int] | None:
  """Returns (p, e) for q = p^e, p prime, or None."""
  if q < 2:
    return None
  p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
  e = round(math.log(q, p))
  return (p, e) if p**e == q else None


@functools.cache
def _paley(k: int) -> np.ndarray:
  if k == 1:
    return np.ones((1, 1), np.int8)
  form, q = _paley_order(k)
  residues = _residues(q)
  sign = -1 if form == 1 else 1
  conference = np.zeros((q + 1, q + 1), np.int8)
  conference[0, 1:], conference[1:, 0] = 1, sign
  conference[1:, 1:] = residues
  eye = np.eye(q + 1, dtype=np.int8)
  if form == 1:
    return conference + eye
  pair, other = [[1, 1], [1, -1]], [[1, -1], [-1, -1]]
  return np.kron(conference, np.array(pair, np.int8)) + np.kron(
    eye, np.array(other, np.int8)
  )


def _residues(q: int) -> np.ndarray:
  """Returns chi(a - b) over the field of `q`, int8 `[q, q]`.

  chi is 0 at 0, 1 at squares and -1 elsewhere. Elements are polynomials over
  the integers mod p, the digits of a number in base p.
  """
  p, e = _prime_power(q)
  digits = np.array(list(itertools.product(range(p), repeat=e)))[:, ::-1]
  place = p ** np.arange(e)
  chi = np.full(q, -1, np.int8)
  chi[(_squares(digits, p, e) * place).sum(-1)] = 1
  chi[0] = 0
  apart = (digits[:, None] - digits[None]) % p
  return chi[(apart * place).sum(-1)]


def _squares(digits: np.ndarray, p: int, e: int) -> np.ndarray:
  """Returns each polynomial squared, modulo an irreducible one."""
  product = np.zeros((len(digits), 2 * e - 1), np.int64)
  for i, j in itertools.product(range(e), repeat=2):
    product[:, i + j] += digits[:, i] * digits[:, j]
  rest = _irreducible(p, e)
  for top in range(2 * e - 2, e - 1, -1):
    # x^e is `rest` in the field.
    carried = product[:, top : top + 1]
    product[:, top - e : top] += carried * rest
    product[:, top] = 0
  return product[:, :e] % p


def _irreducible(p: int, e: int) -> np.ndarray:
  """Returns r, lowest power first, for which x^e - r is irreducible mod p.

  Up to degree 3 a polynomial without roots is irreducible.
  """
  if e > 3:
    raise UserError(f"hadamard: the field of {p}^{e} is not implemented")
  if e == 1:
    return np.zeros(1, np.int64)
  x = np.arange(p)
  powers = x[:, None] ** np.arange(e)
  for r in itertools.product(range(p), repeat=e):
    if np.all((x**e - powers @ np.array(r)) % p):
      return np.array(r)
  raise AssertionError("a finite field has irreducible polynomials")
