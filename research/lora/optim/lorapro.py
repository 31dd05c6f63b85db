"""LoRA-Pro: the step of a pair that is nearest to that of the full matrix.

Wang et al. 2024 (arXiv:2407.18242), theorems 2.1 and 2.3. The product moves by
`s (daᵀ b + aᵀ db)`. Among all (da, db) for which that is nearest to the
gradient G of the full matrix, in Frobenius norm, this takes the one nearest to
(ga, gb). In this repository's layout, a [r, in] and b [r, out]:

  da = s⁻² (b bᵀ)⁻¹ ga + X a
  db = s⁻² (a aᵀ)⁻¹ gb (I - bᵀ (b bᵀ)⁻¹ b) - Xᵀ b
  (b bᵀ) X + X (a aᵀ) = -s⁻² (b bᵀ)⁻¹ ga aᵀ

G itself is never formed. Sylvester's equation is solved in the eigenvectors of
the two symmetric r x r matrices.
"""

import jax.numpy as jnp
import optax

from research.lora.optim import pairs
from research.optim import optim, ranges
from research.typing import Array, Float


def sylvester(
  p: Float[Array, "*B R R"],
  q: Float[Array, "*B R R"],
  c: Float[Array, "*B R R"],
) -> Float[Array, "*B R R"]:
  """Returns X of `p X + X q = c`, for p and q symmetric and positive."""
  left, u = jnp.linalg.eigh(p)
  right, v = jnp.linalg.eigh(q)
  inner = jnp.einsum("...ji,...jk,...kl->...il", u, c, v)
  inner = inner / (left[..., :, None] + right[..., None, :])
  return jnp.einsum("...ij,...jk,...lk->...il", u, inner, v)


def nearest(
  damping: optim.Number = 1e-8, matching: str = "."
) -> optax.GradientTransformation:
  """Returns the transformation, to stand before any optimizer.

  At b = 0, where no `da` moves the product, `da` is 0.

  Args:
    damping: added to the diagonals of `a aᵀ` and `b bᵀ`.
    matching: regular expression of the pairs' paths; all else passes through.
  """

  ranges.non_negative("optimizer", damping=damping)

  def change(a, b, ga, gb, scale):
    p, q = pairs.gram(b, damping), pairs.gram(a, damping)
    da = pairs.solve(p, ga) / scale**2
    x = sylvester(p, q, -jnp.einsum("...ri,...si->...rs", da, a))
    db = pairs.solve(q, gb) / scale**2
    # What of db lies in the rows of b is what da can do.
    inside = pairs.solve(p, jnp.einsum("...ro,...so->...rs", b, db))
    db = db - jnp.einsum("...rs,...ro->...so", inside, b)
    return (
      da + jnp.einsum("...rs,...si->...ri", x, a),
      db - jnp.einsum("...rs,...ro->...so", x, b),
    )

  return pairs.stateless(change, matching)


def lorapro(
  learning_rate: optim.Number | optim.Schedule,
  *,
  damping: optim.Number = 1e-8,
  matching: str = ".",
  weight_decay: optim.Number = 0.0,
  clip: optim.Number | None = 1.0,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
) -> optax.GradientTransformation:
  """Returns AdamW of the gradients that `nearest` changed.

  The authors' own code takes Adam's moments of `s (daᵀ b + aᵀ db)` instead,
  which are as large as the full matrix.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    damping: see `nearest`.
    matching: regular expression of the pairs' paths.
    weight_decay: share of a parameter taken off at rate 1.
    clip: bound of the global norm of the changed gradients, or None.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
  """
  rest = optim.adamw(
    learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip=clip
  )
  return optax.chain(nearest(damping, matching), rest)
