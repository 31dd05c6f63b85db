"""The adapted weight: a base and an adapter of any method, as one leaf.

The base may be any weight, packed or adapted already: QLoRA is this leaf
around a packed base. It may have leading axes (the layers of a scanned run,
experts); the method is applied to one matrix at a time.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.lora.method import Arrays, Method, contracts_output, dense_fp32
from research.typing import Array, Float, Int, PRNGKey, Shaped, UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedTensor(weights.WrappedWeight):
  """A weight under an adapter.

  Attributes:
    w: the base weight, logical shape `[..., in, out]`.
    trained: the method's trained arrays, each `[..., its shape]`.
    fixed: the method's other arrays.
    key: dropout key of this batch, `[...]`, or None.
    gate: where a gated method acts in this batch, `[..., B, T]`, or None.
    method: interprets the arrays; static.
  """

  w: Any
  trained: Arrays
  fixed: Arrays = dataclasses.field(default_factory=dict)
  key: Any = None
  gate: Any = None
  method: Method = dataclasses.field(
    default_factory=Method, metadata=dict(static=True)
  )

  is_adapter = True

  @property
  def arrays(self) -> Arrays:
    return {**self.fixed, **self.trained}

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w + delta)`; contracts either axis of `w`."""
    contracts_output(eq)
    return self.method.einsum(eq, x, self._dropped(x), self.arrays, self.w)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    rows = weights.take(self.w, ids)
    update = self.method.rows(ids, self.arrays, self.w).astype(rows.dtype)
    return rows + self._gated(update)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the experts' matmul; every array has a leading expert axis."""
    # `bind` gave each expert a key, but one mask covers all experts' rows.
    keyed = self if self.key is None else self._with_key(self.key[0])
    y = weights.ragged_dot(x, self.w, sizes)
    return y + self.method.ragged(keyed._dropped(x), self.arrays, self.w, sizes)

  def scaled_bias(self, b: Float[Array, "... O"]) -> Float[Array, "... O"]:
    """Returns the bias `b` after the adapter; fp32 if the adapter scales it."""
    b = weights.scaled_bias(self.w, b)
    gain = self.method.output_gain
    return b if gain is None else dense_fp32(b) * dense_fp32(self.arrays[gain])

  def delta(self) -> Float[Array, "..."]:
    f = self.method.delta
    for _ in self.shape[:-2]:
      f = jax.vmap(f)
    return f(self.arrays, self.w)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the merged weight, summed in fp32, in the dtype of `w`."""
    return (dense_fp32(self.w) + self.delta()).astype(self.dtype)

  def axes(self, names: tuple[str | None, ...]) -> "AdaptedTensor":
    """Returns the logical axes of the base and of the method's arrays."""
    named = self.method.axes(names[-2:])
    lead = names[:-2]

    def cut(arrays):
      return {
        name: weights.axes(x, (*lead, *named[name]))
        for name, x in arrays.items()
      }

    return dataclasses.replace(
      self,
      w=weights.axes(self.w, names),
      trained=cut(self.trained),
      fixed=cut(self.fixed),
      key=None,
      gate=None,
    )

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "AdaptedTensor":
    keys = None
    if key is not None and self.method.dropout:
      lead = self.shape[:-2]
      keys = jax.random.split(key, lead) if lead else key
    if key is not None and weights.is_adapter(self.w):
      key = jax.random.fold_in(key, 1)  # or both would drop the same inputs
    return dataclasses.replace(super().bind(key=key, ids=ids), key=keys)

  def with_tokens(
    self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None
  ) -> "AdaptedTensor":
    """Returns a copy with the gate of a gated method for these tokens."""
    w = weights.with_tokens(self.w, tokens, segments)
    if not self.method.GATED:
      return dataclasses.replace(self, w=w)
    gate = self.method.active(tokens, segments)
    gate = jnp.broadcast_to(gate, (*self.shape[:-2], *gate.shape))
    return dataclasses.replace(self, w=w, gate=gate)

  def select_tokens(self, keep: Int[Array, "B N"]) -> "AdaptedTensor":
    """Returns a copy whose gate covers the tokens at `keep` only."""
    w = weights.select_tokens(self.w, keep)
    if self.gate is None:
      return dataclasses.replace(self, w=w)
    keep = keep.reshape(*(1,) * (self.gate.ndim - keep.ndim), *keep.shape)
    gate = jnp.take_along_axis(self.gate, keep, axis=-1)
    return dataclasses.replace(self, w=w, gate=gate)

  @property
  def token_wise(self) -> bool:
    """Whether each token's product depends on that token alone.

    Not with dropout, nor with a gate that earlier tokens set."""
    return self.key is None and self.gate is None and weights.token_wise(self.w)

  def map_base(self, f: Callable[[Any], Any]) -> "AdaptedTensor":
    return dataclasses.replace(self, w=f(self.w))

  def _with_key(self, key: PRNGKey) -> "AdaptedTensor":
    return dataclasses.replace(self, key=key)

  def _gated(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x [B, T, ...]` where the method acts, elsewhere 0."""
    if not self.method.GATED:
      return x
    if self.gate is None:
      raise UserError(
        f"{type(self.method).__name__}: does not know the batch's tokens; call "
        "weights.with_tokens(params, tokens) before the model"
      )
    gate = self.gate
    if x.shape[1:2] == (1,):
      # One generated token: the gate at the end of the prompt still holds.
      gate = gate[:, -1:]
    if x.shape[:2] != gate.shape:
      raise UserError(
        f"{type(self.method).__name__}: found rows {list(x.shape[:-1])}, "
        f"expected those of its tokens, {list(gate.shape)}; heads and experts "
        "cannot be adapted"
      )
    return jnp.where(gate.reshape(*gate.shape, *(1,) * (x.ndim - 2)), x, 0)

  def _dropped(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
    x = self._gated(x)
    if self.key is None or not self.method.dropout:
      return x
    keep = 1.0 - self.method.dropout
    mask = jax.random.bernoulli(self.key, keep, x.shape)
    return jnp.where(mask, x / keep, 0).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedBias(weights.WrappedWeight):
  """A bias together with the adapted weight that scales it, for merging.

  In a model's tree these are two leaves, `q` and `q_bias`.

  Attributes:
    w: the bias of the base, `[..., out]`.
    matrix: the adapted weight, or one around it, `[..., in, out]`.
  """

  w: Any
  matrix: weights.WrappedWeight

  def dense(self) -> Shaped[Array, "..."]:
    return self.matrix.scaled_bias(jnp.asarray(self.w)).astype(self.dtype)
