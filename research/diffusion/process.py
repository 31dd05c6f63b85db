"""The forward process: times, and tokens that masks replace.

What is random for an example comes from the example's own key, so that its
masks do not depend on the batch that it is in, nor on the mesh.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from research import weights as parameters
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError

Spread = Literal["independent", "even"]


FIXED = 17
"""Seed of the masks in evaluation."""


def drawing(key: PRNGKey | None, tokens: Int[Array, "*B T"]) -> PRNGKey:
  """Returns what a batch's masks are drawn from: `key`, or its own for None.

  In evaluation, where there is none, it follows from the batch's tokens: a
  batch has the same masks every time, and two batches have others. With the
  same for all, an evaluation would be one of the few times that a batch's rows
  have, and no number of batches would bring it nearer to the bound.

  Args:
    key: of the batch, or None.
    tokens: of the batch.
  """
  if key is not None:
    return key
  # Random factors, so that hardly two batches have one sum; odd ones, so that
  # one other token gives another. Whole numbers: a mesh changes nothing.
  key = jax.random.key(FIXED)
  factors = jax.random.bits(key, tokens.shape, jnp.uint32) | 1
  number = (factors * tokens.astype(jnp.uint32)).sum(dtype=jnp.uint32)
  return jax.random.fold_in(key, number)


def learned(weights: Float[Array, "B T"]) -> Bool[Array, "B T"]:
  """Returns which tokens are targets of the place before them.

  Args:
    weights: of next-token prediction's targets.
  """
  return jnp.pad(weights, ((0, 0), (1, 0)))[:, :-1] > 0


def ranks(x: Float[Array, "*B T"]) -> Int[Array, "*B T"]:
  """Returns each number's place in its row in order; ties: the lower index."""
  return jnp.argsort(jnp.argsort(x, axis=-1, stable=True), axis=-1)


def times(
  key: PRNGKey, count: int, spread: Spread = "independent"
) -> Float[Array, " N"]:
  """Returns times in (0, 1], each of them uniform.

  Args:
    key: of the batch.
    count: how many.
    spread: `"even"`: one number is drawn, and the times are it plus i/N, mod 1
      (Kingma et al. 2021, arXiv:2107.00630, section I.1), so that a batch has
      small and large ones.
  """
  if spread == "independent":
    return 1 - jax.random.uniform(key, (count,))
  first = jax.random.uniform(key, ())
  return 1 - (first + jnp.arange(count) / count) % 1


def mask_each(
  keys: PRNGKey, maskable: Bool[Array, "B T"], rate: Float[Array, "B #T"]
) -> Bool[Array, "B T"]:
  """Returns which tokens are masked, each with probability `rate`."""
  draw = jax.vmap(lambda k: jax.random.uniform(k, maskable.shape[1:]))
  return maskable & (draw(keys) < rate)


def moments(keys: PRNGKey, maskable: Bool[Array, "B T"]) -> Float[Array, "B T"]:
  """Returns when each token is masked, by the share of masks at that time.

  Uniform on [0, 1); 2 for those that never are.
  """
  draw = jax.vmap(lambda k: jax.random.uniform(k, maskable.shape[1:]))
  return jnp.where(maskable, draw(keys), 2.0)


def mask_count(
  keys: PRNGKey, maskable: Bool[Array, "B T"], count: Int[Array, "B"]
) -> Bool[Array, "B T"]:
  """Returns masks of exactly `count` tokens, any set as likely as any other.

  The first ones of `moments`.
  """
  return maskable & (ranks(moments(keys, maskable)) < count[:, None])


def without_images(
  params: Params, tokens: Int[Array, "B T"], maskable: Bool[Array, "B T"]
) -> Bool[Array, "B T"]:
  """Returns what may be masked, without the placeholders of images.

  The i-th placeholder of a row stands for its i-th feature: if one were hidden,
  those after it would have another's.

  Args:
    params: of the network; its embedding knows placeholders.
    tokens: rows.
    maskable: which tokens may be masked.
  """
  for token in parameters.extra_ids(params):
    maskable &= tokens != token
  return maskable


def noisy(
  tokens: Int[Array, "*#B T"], masked: Bool[Array, "*#B T"], mask_id: int
) -> Int[Array, "*B T"]:
  """Returns the tokens with masks in their places.

  Raises:
    UserError: there is no mask.
  """
  if mask_id < 0:
    raise UserError(
      f"mask_id: found {mask_id}, expected the id of the token that hides"
      " others.\nA causal model has none: `experiments.convert"
      " --mask_token=new` adds one"
    )
  return jnp.where(masked, mask_id, tokens)
