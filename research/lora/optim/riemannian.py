"""Gradients of a pair, measured by the product that it makes.

With G the gradient of the full matrix, plain descent on (a, b) moves the
product by a, b's own sizes; these divide by them, so that it no longer depends
on how the product is shared between its factors.

  scaled       ga <- (b bᵀ + d I)⁻¹ ga       gb <- (a aᵀ + d I)⁻¹ gb
  frozen_down  ga <- 0                        gb <- (a aᵀ + d I)⁻¹ gb / s²

The first is Zhang & Pilanci 2024 (arXiv:2402.02347), equation 3 (ScaledGD of
Tong et al. 2021); the second LoRA-FA (Zhang et al. 2023, arXiv:2308.03303) as
PEFT has it: s gb aᵀ is then the part of G that a fixed `a` can express.
"""

from typing import Any

import jax.numpy as jnp
import optax

from research import tree
from research.lora.optim import pairs
from research.optim import optim, ranges


def scaled(
  damping: optim.Number = 1e-2, matching: str = "."
) -> optax.GradientTransformation:
  """Returns the transformation `scaled`, to stand before any optimizer.

  At b = 0 the gradient of `a` is 0, and stays 0.

  Args:
    damping: `d`, added to the diagonals.
    matching: regular expression of the pairs' paths; all else passes through.
      PEFT leaves out those on embeddings: `"^(?!embed/)"`.
  """
  ranges.non_negative("optimizer", damping=damping)

  def change(a, b, ga, gb, scale):
    del scale
    return (
      pairs.solve(pairs.gram(b, damping), ga),
      pairs.solve(pairs.gram(a, damping), gb),
    )

  return pairs.stateless(change, matching)


def frozen_down(
  damping: optim.Number = 1e-8, matching: str = "."
) -> optax.GradientTransformation:
  """Returns the transformation `frozen_down`, to stand before any optimizer.

  Args:
    damping: `d`, added to the diagonal.
    matching: regular expression of the pairs' paths; all else passes through.
  """
  ranges.non_negative("optimizer", damping=damping)

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
  """Returns AdamW of gradients that `scaled` changed.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    damping: added to the diagonals.
    matching: regular expression of the pairs' paths.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    clip: bound of the global norm of the changed gradients, or None.
  """
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
  """Returns LoRA-FA: every `a` stays, `b` moves by AdamW of `frozen_down`.

  `a` must be among the trainable parameters, since its values are needed here
  (`trainable` '/trained/|/fixed/a$', where the method fixes it); it has no
  moments, does not decay, and its update is exactly 0.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    damping: see `frozen_down`.
    matching: regular expression of the pairs' paths.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
  """

  def kinds(params: Any) -> Any:
    still = {pair.down for pair in pairs.pairs(params, matching)}
    return tree.map_paths(
      lambda path, _: "still" if path in still else "moving", params
    )

  moving = optax.chain(optim.moments(b1, b2, eps), optim.decaying(weight_decay))
  ways = {"still": optax.set_to_zero(), "moving": moving}
  return optax.chain(
    frozen_down(damping, matching),
    optax.partition(ways, kinds),
    optim.scale_by_rate(learning_rate),
  )
