"""Riemannian preconditioning of LoRA's gradients, and the LoRA-FA optimizer.

Gradient descent on (a, b) scales the step of the product `aᵀ b` with the norms
of the factors. Preconditioning by their Gram matrices makes the step
independent of how the product is split between its factors:

  scaled    ga <- (b bᵀ + d I)⁻¹ ga       gb <- (a aᵀ + d I)⁻¹ gb
  frozen_a  ga <- 0                       gb <- (a aᵀ + d I)⁻¹ gb / s²

The first is Zhang & Pilanci 2024 (arXiv:2402.02347), equation 3 (ScaledGD of
Tong et al. 2021); the second LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) in
PEFT's form, where s gb aᵀ is the part of the full gradient G that a fixed `a`
can express.
"""

from typing import Any

import jax.numpy as jnp
import optax

from research import ranges, tree
from research.lora.optim import pairs
from research.optim import optim


def scaled(
  damping: optim.Number = 1e-2, matching: str = "."
) -> optax.GradientTransformation:
  """Returns the preconditioner `scaled`, to chain before an optimizer.

  At b = 0 the gradient of `a` is 0, and stays 0.

  Args:
    damping: `d`, added to the diagonals.
    matching: regular expression of the pairs' paths; other gradients pass
      through. PEFT excludes embeddings: `"^(?!embed/)"`.
  """
  ranges.check("optimizer", ranges.NonNegativeFloat, damping=damping)

  def change(a, b, ga, gb, scale):
    del scale
    return (
      pairs.solve(pairs.gram(b, damping), ga),
      pairs.solve(pairs.gram(a, damping), gb),
    )

  return pairs.stateless(change, matching)


def frozen_a(
  damping: optim.Number = 1e-8, matching: str = "."
) -> optax.GradientTransformation:
  """Returns the preconditioner `frozen_a`, to chain before an optimizer.

  Args:
    damping: `d`, added to the diagonal.
    matching: regular expression of the pairs' paths; other gradients pass
      through.
  """
  ranges.check("optimizer", ranges.NonNegativeFloat, damping=damping)

  def change(a, b, ga, gb, scale):
    del b
    moved = pairs.solve(pairs.gram(a, damping), gb)
    return jnp.zeros_like(ga), moved / scale**2

  return pairs.stateless(change, matching)


def riemannian(
  learning_rate: optim.Number | optim.Schedule,
  *,
  damping: optim.Number = 1e-2,
  matching: str = ".",
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  weight_decay: optim.Number = 0.0,
  clip: optim.Number | None = 1.0,
) -> optax.GradientTransformation:
  """Returns `optim.adamw` on gradients preconditioned by `scaled`."""
  rest = optim.adamw(
    learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip=clip
  )
  return optax.chain(scaled(damping, matching), rest)


def lora_fa(
  learning_rate: optim.Number | optim.Schedule,
  *,
  damping: optim.Number = 1e-8,
  matching: str = ".",
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-6,
  weight_decay: optim.Number = 0.0,
) -> optax.GradientTransformation:
  """Returns LoRA-FA: every `a` is frozen, `b` uses AdamW after `frozen_a`.

  `a` must be among the trainable parameters, since the preconditioner reads it
  (`trainable` '/trained/|/fixed/a$' where the method fixes `a`). It has no
  moments and no weight decay, and its update is exactly 0.
  """

  def kinds(params: Any) -> Any:
    still = {pair.down for pair in pairs.pairs(params, matching)}
    return tree.map_paths(
      lambda path, _: "still" if path in still else "moving", params
    )

  moving = optax.chain(optim.moments(b1, b2, eps), optim.decaying(weight_decay))
  ways = {"still": optax.set_to_zero(), "moving": moving}
  return optax.chain(
    frozen_a(damping, matching),
    optax.partition(ways, kinds),
    optim.scale_by_rate(learning_rate),
  )
