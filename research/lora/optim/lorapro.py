"""LoRA-Pro: factor gradients that best approximate the full gradient.

Wang et al. 2024 (arXiv:2407.18242), theorems 2.1 and 2.3. A step (da, db)
changes the product by `s (daᵀ b + aᵀ db)`. Among all (da, db) for which this is
nearest to the gradient G of the full matrix in Frobenius norm, LoRA-Pro takes
the one nearest to (ga, gb). In this repository's layout, a [r, in], b [r, out]:

  da = s⁻² (b bᵀ)⁻¹ ga + X a
  db = s⁻² (a aᵀ)⁻¹ gb (I - bᵀ (b bᵀ)⁻¹ b) - Xᵀ b
  (b bᵀ) X + X (a aᵀ) = -s⁻² (b bᵀ)⁻¹ ga aᵀ

G itself is never formed. The Sylvester equation is solved in the eigenbases of
the two symmetric r x r matrices.
"""

import jax.numpy as jnp
import optax

from research import ranges
from research.lora.optim import pairs
from research.optim import optim
from research.typing import Array, Float


def sylvester(
  p: Float[Array, "*B R R"],
  q: Float[Array, "*B R R"],
  c: Float[Array, "*B R R"],
) -> Float[Array, "*B R R"]:
  """Solves `p X + X q = c` for X, with p and q symmetric positive definite."""
  left, u = jnp.linalg.eigh(p)
  right, v = jnp.linalg.eigh(q)
  inner = jnp.einsum("...ji,...jk,...kl->...il", u, c, v)
  inner = inner / (left[..., :, None] + right[..., None, :])
  return jnp.einsum("...ij,...jk,...lk->...il", u, inner, v)


def match_full_gradient(
  damping: optim.Number = 1e-8, matching: str = "."
) -> optax.GradientTransformation:
  """Returns LoRA-Pro's gradient transformation, to chain before an optimizer.

  At b = 0 no `da` changes the product, and `da` is 0.

  Args:
    damping: added to the diagonals of `a aᵀ` and `b bᵀ`.
    matching: regular expression of the pairs' paths; other gradients pass
      through.
  """

  ranges.check("optimizer", ranges.NonNegativeFloat, damping=damping)

  def change(a, b, ga, gb, scale):
    p, q = pairs.gram(b, damping), pairs.gram(a, damping)
    da = pairs.solve(p, ga) / scale**2
    x = sylvester(p, q, -jnp.einsum("...ri,...si->...rs", da, a))
    db = pairs.solve(q, gb) / scale**2
    # da already covers the part of db in the row space of b.
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
  """Returns `optim.adamw` on gradients changed by `match_full_gradient`.

  The authors' code instead keeps Adam's moments of `s (daᵀ b + aᵀ db)`, which
  are as large as the full matrix.
  """
  rest = optim.adamw(
    learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip=clip
  )
  return optax.chain(match_full_gradient(damping, matching), rest)
