"""A joint distribution small enough to enumerate, and its exact conditionals.

research/diffusion/MATH.md 6.2: three symbols, four places,
p(a, b, c, d) proportional to exp(s sin(1 + 3a + 5bc + 7cd + ad)), s = 2.
"""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

V, L, MASK = 3, 4, 3

SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))


@functools.cache
def table(strength=2.0):
  """Returns p of each of `SEQUENCES`, float64 `[81]`."""
  a, b, c, d = SEQUENCES.T
  p = np.exp(strength * np.sin(1 + 3 * a + 5 * b * c + 7 * c * d + a * d))
  return p / p.sum()


def minus_log(x, strength=2.0):
  """Returns -log p(x)."""
  index = int(np.argmax((np.array(x) == SEQUENCES).all(-1)))
  return -np.log(table(strength)[index])


@functools.cache
def conditionals(strength=2.0):
  """Returns log p(x_i = v | what is not masked), `[4^4, L, V]` by noisy row."""
  rows = list(itertools.product(range(V + 1), repeat=L))
  out = np.zeros((len(rows), L, V))
  p = table(strength)
  for n, row in enumerate(rows):
    seen = np.array([r != MASK for r in row])
    fits = (SEQUENCES[:, seen] == np.array(row)[seen]).all(-1)
    for i, v in itertools.product(range(L), range(V)):
      out[n, i, v] = p[fits & (SEQUENCES[:, i] == v)].sum() / p[fits].sum()
  with np.errstate(divide="ignore"):
    return np.log(out)


def scores(strength=2.0, dtype=jnp.float32):
  """Returns `tokens [B, 4] -> logits [B, 4, 4]`: exact, none for the mask."""
  known = conditionals(strength)
  known = np.concatenate([known, np.full((*known.shape[:2], 1), -np.inf)], -1)
  known = jnp.asarray(np.maximum(known, -1e9), dtype)
  place = jnp.asarray((V + 1) ** np.arange(L)[::-1])

  def logits(tokens):
    return known[(tokens * place).sum(-1)]

  return logits
