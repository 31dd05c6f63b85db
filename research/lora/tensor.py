"""LoRA as a weight: `w + s·AB` without ever forming the product.

Hu et al. 2021 (arXiv:2106.09685), equation 3. `w` is any weight, packed or
not, so QLoRA (Dettmers et al. 2023) is `LoRATensor(w=packed, a, b)`.

Layout: for a logical `w [in, out]`, `a [r, in]` and `b [r, out]`. Both thin
factors keep the rank first: their gradients are then `[r, tokens] x
[tokens, width]` matmuls, which never transpose an activation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import sharding, weights
from research.typing import Array, Float, Int, PRNGKey, Shaped


def _flat(x: Float[Array, "..."]) -> Float[Array, "..."]:
  return x.reshape(-1, x.shape[-1])


def _outer(
  z: Float[Array, "*B R"], x: Float[Array, "*B I"]
) -> Float[Array, "R I"]:
  """Returns the sum over all rows of the outer products, in fp32."""
  return jnp.einsum("...r,...i->ri", z, x, preferred_element_type=jnp.float32)


@jax.custom_vjp
def low_rank(
  x: Float[Array, "*B I"], a: Float[Array, "R I"], b: Float[Array, "R O"]
) -> Float[Array, "*B O"]:
  """Returns `x aᵀ b` in the dtype of `x`."""
  z = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype))
  return jnp.einsum("...r,ro->...o", z, b.astype(x.dtype))


def _low_rank_fwd(x, a, b):
  z = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype))
  y = jnp.einsum("...r,ro->...o", z, b.astype(x.dtype))
  return y, (x, z, a, b)


def _low_rank_bwd(saved, dy):
  x, z, a, b = saved
  dz = jnp.einsum("...o,ro->...r", dy, b.astype(dy.dtype))
  dx = jnp.einsum("...r,ri->...i", dz, a.astype(dy.dtype))
  if sharding.is_cut():
    # Rows of a batch and tokens of a row may both be cut; flat they cannot.
    return dx, _outer(dz, x).astype(a.dtype), _outer(z, dy).astype(b.dtype)
  # The barrier keeps the small operand the transposed one; without it XLA
  # rewrites the product to transpose the activations (15 times slower).
  zt, dzt = jax.lax.optimization_barrier((_flat(z).T, _flat(dz).T))
  f32 = jnp.float32
  da = jnp.dot(dzt, _flat(x), preferred_element_type=f32).astype(a.dtype)
  db = jnp.dot(zt, _flat(dy), preferred_element_type=f32).astype(b.dtype)
  return dx, da, db


low_rank.defvjp(_low_rank_fwd, _low_rank_bwd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRATensor:
  """A weight and its low-rank update.

  Attributes:
    w: the base weight, logical shape `[..., in, out]`.
    a: `[..., r, in]`.
    b: `[..., r, out]`.
    key: dropout key of this batch, `[...]`, or None.
    scale: `s`; a Python float, never trained.
    dropout: rate on the input of the branch, used where `key` is bound.
  """

  w: Any
  a: Any
  b: Any
  key: Any = None
  scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
  dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape

  @property
  def dtype(self) -> Any:
    return self.w.dtype

  @property
  def ndim(self) -> int:
    return len(self.shape)

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w) + s·(branch)`; contracts either axis of `w`."""
    forward = _contracted_axis(eq) == 0
    first, second = (self.a, self.b) if forward else (self.b, self.a)
    # The scale rides on a thin factor, never on the wide output.
    second = second * jnp.asarray(self.scale, second.dtype)
    return weights.einsum(eq, x, self.w) + low_rank(
      self._dropped(x), first, second
    )

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns embedding rows: `w[ids] + s·aᵀ[ids] b`."""
    rows = weights.take(self.w, ids)
    z = jnp.take(self.a, ids, axis=-1)  # [r, ...]
    delta = jnp.einsum("r...,rd->...d", z, self.b) * self.scale
    return rows + delta.astype(rows.dtype)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the experts' matmul; `a [E, r, in]`, `b [E, r, out]`."""
    a = jnp.swapaxes(self.a, -1, -2)
    # One mask over all experts' rows; `bind` gave each expert a key.
    one = self if self.key is None else self._with_key(self.key[0])
    z = weights.ragged_dot(one._dropped(x), a, sizes)
    delta = weights.ragged_dot(z, self.b * self.scale, sizes)
    return weights.ragged_dot(x, self.w, sizes) + delta

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the merged weight, added in fp32, in the dtype of `w`."""
    base = weights.dense(self.w)
    delta = jnp.einsum(
      "...ri,...ro->...io",
      self.a.astype(jnp.float32),
      self.b.astype(jnp.float32),
    )
    merged = base.astype(jnp.float32) + self.scale * delta
    return merged.astype(base.dtype)

  def axes(self, names: tuple[str | None, ...]) -> "LoRATensor":
    """`a` keeps the input's name, `b` the output's; the rank is unsharded."""
    return dataclasses.replace(
      self,
      w=weights.axes(self.w, names),
      a=weights.axes(self.a, (*names[:-2], None, names[-2])),
      b=weights.axes(self.b, (*names[:-2], None, names[-1])),
      key=None,
    )

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "LoRATensor":
    """Returns itself with a dropout key for each matrix it stacks."""
    w = self.w
    if weights.is_weight(w):
      w = w.bind(key=key, ids=ids)
    if key is None or not self.dropout:
      return dataclasses.replace(self, w=w, key=None)
    lead = self.a.shape[:-2]
    keys = jax.random.split(key, lead) if lead else key
    return dataclasses.replace(self, w=w, key=keys)

  def _with_key(self, key: PRNGKey) -> "LoRATensor":
    return dataclasses.replace(self, key=key)

  def _dropped(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    if self.key is None or not self.dropout:
      return x
    keep = 1.0 - self.dropout
    mask = jax.random.bernoulli(self.key, keep, x.shape)
    return jnp.where(mask, x / keep, 0).astype(x.dtype)


def _contracted_axis(eq: str) -> int:
  """Returns which axis of the 2-D weight in `eq` is summed over."""
  _, right = eq.split(",")
  w, out = right.split("->")
  if len(w) != 2 or (w[0] in out) == (w[1] in out):
    raise ValueError(
      f"einsum {eq!r}: a low-rank weight takes one contracted and one kept axis"
    )
  return 1 if w[0] in out else 0
