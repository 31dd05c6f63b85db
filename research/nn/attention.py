"""Self- and cross-attention, computed by the `flash_attention` kernels."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.masks import Mask
from research import weights
from research.nn import rope as ropes
from research.nn.attention_context import (
  AttentionContext,
  KeysValues,
  attend,
  attend_to,
  select_queries,
  take_tokens,
)
from research.nn.norm import Norm, UnitRMS
from research.typing import Array, Float, Int, UserError


class Attention(nn.Module):
  """Attention of `heads` query heads over `kv_heads` key/value heads.

  Attributes:
    heads, kv_heads, head_dim: `N`, `K` (divides `N`), `H`.
    rope: rotary embedding of queries and keys, or None.
    window: attention window in tokens, including the query; None for unlimited.
    scale: of the attention logits; None for `H**-0.5`.
    softcap: c of the soft cap `c tanh(logits / c)`, or None.
    qk_norm: normalises the queries and keys of each head before the rotation.
    v_norm: normalises the values of each head.
    values: whether values have a projection of their own, or are what becomes
      of keys before their norm and rotation.
    kv: whether keys and values are the layer's own, its own and `lent` to
      layers after it, or `borrowed` of the last layer of the same window that
      lends (shared caches, Brandon et al. 2024, arXiv:2405.12981).
    images: whether tokens of an image see each other where the mask lets them,
      or as text does, backwards.
    qkv_bias, out_bias: whether those projections have a bias.
  """

  heads: int
  kv_heads: int
  head_dim: int
  rope: ropes.Rope | None = ropes.Rope()
  window: int | None = None
  scale: float | None = None
  softcap: float | None = None
  qk_norm: Norm | None = None
  v_norm: Norm | UnitRMS | None = None
  values: Literal["projected", "keys"] = "projected"
  kv: Literal["own", "lent", "borrowed"] = "own"
  images: Literal["as_masked", "causal"] = "as_masked"
  qkv_bias: bool = False
  out_bias: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Mask,
    rotation: tuple[Array, Array] | None = None,
    cache: Any = None,
    length: Int[Array, "B"] | None = None,
    fresh: bool = True,
    keep: Int[Array, "B N"] | None = None,
    borrowed: KeysValues | None = None,
  ) -> tuple[Float[Array, "B N D"], Any]:
    """Returns the attention output and the updated cache.

    Of a layer that lends, the second is the cache and what it lends.

    Args:
      x: activations.
      positions: of the tokens, negative for padding.
      mask: the attention mask, without this layer's window.
      rotation: cos and sin of `positions`.
      cache: this layer's cache (`research.nn.cache.LayerCache`, or another
        class with its `attend`), or None.
      length: number of tokens of each row in the cache after this call.
      fresh: whether the cache was empty before this call.
      keep: indices of the tokens used as queries; None for all.
      borrowed: keys and values of another layer, for one that borrows.
    """
    q, k, v = self._rotated(x, rotation, keep)
    q, k, v = (
      None if t is None else checkpoint_name(t, "qkv") for t in (q, k, v)
    )
    mask = self.own_mask(mask)
    if keep is not None:
      mask = select_queries(mask, keep, x.shape[1])
    call = AttentionContext(
      positions,
      take_tokens(positions, keep),
      length,
      mask,
      fresh,
      window=self.window,
      bias=self._key_bias,
      scale=self.scale,
      softcap=self.softcap,
    )
    if self.kv != "own":
      cache, y = self._share(q, k, v, call, cache, borrowed)
    elif cache is None:
      y = attend(q, k, v, mask=mask, **call.options)
    else:
      cache, y = cache.attend(q, k, v, call)
    y = y.reshape(*y.shape[:2], self.heads * self.head_dim)
    y = weights.project(self, y, "o", x.shape[-1], self.out_bias)
    return y, cache

  def own_mask(self, mask):
    """Returns the mask within this layer's window, for its view of images."""
    if self.images == "causal" and mask.kind == "intervals":
      # Without positions of queries, those of keys are mere coordinates.
      at = mask.kv_positions if mask.q_positions is not None else None
      mask = dataclasses.replace(
        mask, kind="causal", bounds=None, kv_positions=at
      )
    if self.window is not None:
      left, right = mask.window
      left_window = self.window - 1
      left_window = left_window if left is None else min(left_window, left)
      mask = dataclasses.replace(mask, window=(left_window, right))
    return mask

  def _share(self, q, k, v, call, cache, borrowed):
    """Returns the cache, with what this layer lends, and the output."""
    if self.kv == "borrowed":
      if borrowed is None:
        raise UserError(
          "Attention.kv: found a layer that borrows keys and values, and none"
          " before it that lends; expected one with the same window"
        )
      return cache, attend_to(q, borrowed, call)
    lent = KeysValues(k, v)
    if cache is not None:
      cache, lent = cache.store(k, v, call)
    return (cache, lent), attend_to(q, lent, call)

  @nn.compact
  def heads_of(
    self,
    x: Float[Array, "B T D"],
    rotation: tuple[Array, Array] | None = None,
  ) -> tuple[Array, Array, Array]:
    """Returns queries, keys and values `[B, T, heads, H]`, rotated.

    Keys and values are those that a cache stores.

    Args:
      x, rotation: as for `__call__`.

    Raises:
      UserError: the layer borrows keys and values.
    """
    if self.kv == "borrowed":
      raise UserError(
        "heads_of: found a layer that borrows keys and values of another,"
        " expected one with its own"
      )
    return self._rotated(x, rotation)

  def _rotated(self, x, rotation, keep=None):
    q, k, v = self._heads(x, keep)
    if self.qk_norm is not None:
      q = self.qk_norm.clone(name="q_norm", parent=self)(q)
      if k is not None:
        k = self.qk_norm.clone(name="k_norm", parent=self)(k)
    if self.v_norm is not None and v is not None:
      v = self.v_norm(v)
    if rotation is not None:
      parts = self.rope.parts
      q = ropes.rotate(q, *(take_tokens(x, keep) for x in rotation), parts)
      if k is not None:
        k = ropes.rotate(k, *rotation, parts)
    return q, k, v

  def _heads(self, x, keep):
    """Returns queries, keys and values; None for what is borrowed."""
    heads = {"q": self.heads}
    if self.kv != "borrowed":
      heads["k"] = self.kv_heads
      if self.values == "projected":
        heads["v"] = self.kv_heads
    sizes = {name: n * self.head_dim for name, n in heads.items()}
    fused = self.has_variable("params", weights.fused_name(sizes))
    together = fused and len(sizes) > 1
    if keep is None or together:
      parts = weights.project_all(self, x, sizes, self.qkv_bias)
      parts[0] = take_tokens(parts[0], keep)
    else:
      few = {"q": sizes.pop("q")}
      parts = weights.project_all(
        self, take_tokens(x, keep), few, self.qkv_bias
      )
      parts += weights.project_all(self, x, sizes, self.qkv_bias)
    q, *kv = (y.reshape(*y.shape[:2], -1, self.head_dim) for y in parts)
    return (q, kv[0], kv[-1]) if kv else (q, None, None)

  def _key_bias(self, positions):
    """Returns the (rotated) bias of keys at `positions`, `[B, S, K, H]`."""
    rotated = self.rope is not None
    # The rotation of a cached key must follow from its position alone.
    varies = rotated and (
      isinstance(self.rope.scaling, ropes.Dynamic) or self.rope.axes is not None
    )
    if not self.qkv_bias or self.qk_norm is not None or varies:
      raise UserError(
        "kv less_bias: found a model whose keys have no bias, or one that a "
        "norm, dynamic rotary scaling or rotary axes change.\nLeave less_bias"
        " out."
      )
    k, bias = (self.get_variable("params", name) for name in ("k", "k_bias"))
    bias = weights.scaled_bias(k, bias).astype(jnp.float32)
    shape = (*positions.shape, self.kv_heads, self.head_dim)
    bias = jnp.broadcast_to(bias.reshape(shape[2:]), shape)
    if not rotated:
      return bias
    return ropes.rotate(bias, *self.rope.tables(positions, self.head_dim))


class CrossAttention(nn.Module):
  """Attention of tokens over another sequence, `memory`.

  Parameters are those of `Attention`: `q`, `k`, `v`, `o` and their biases.

  Attributes:
    heads, head_dim: `N`, `H`.
    kv_heads: of keys and values, `K` (divides `N`); None for N.
    size: width of the output; None for that of the tokens.
    scale: of the attention logits; None for `H**-0.5`.
    qk_norm: normalises the queries and keys of each head, or None.
    qkv_bias, out_bias: whether those projections have a bias.
  """

  heads: int
  head_dim: int
  size: int | None = None
  scale: float | None = None
  qk_norm: Norm | None = None
  qkv_bias: bool = False
  out_bias: bool = False
  kv_heads: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    memory: Float[Array, "B S C"],
    mask: Mask | None = None,
  ) -> Float[Array, "B T E"]:
    """Returns the attention output; 0 for a query that sees nothing.

    Args:
      x: what asks.
      memory: what is attended to.
      mask: which of the S each of the T sees; None for all.
    """
    return self.attend_to(x, *self.keys_and_values(memory), mask)

  @nn.compact
  def keys_and_values(
    self, memory: Float[Array, "B S C"]
  ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Returns the keys and values of `memory`, whoever asks."""
    size = (self.kv_heads or self.heads) * self.head_dim
    names = {"k": size, "v": size}
    k, v = map(
      self._by_head, weights.project_all(self, memory, names, self.qkv_bias)
    )
    return self._norm("k_norm", k), v

  @nn.compact
  def attend_to(
    self,
    x: Float[Array, "B T D"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K H"],
    mask: Mask | None = None,
  ) -> Float[Array, "B T E"]:
    """Returns the attention output.

    Args:
      x, mask: as for `__call__`.
      keys, values: from `keys_and_values`.
    """
    size = self.heads * self.head_dim
    q = self._by_head(weights.project(self, x, "q", size, self.qkv_bias))
    heads = self._norm("q_norm", q), keys, values
    q, k, v = (checkpoint_name(y.astype(x.dtype), "qkv") for y in heads)
    mask = Mask.full() if mask is None else mask
    y = attend(q, k, v, mask=mask, scale=self.scale)
    y = y.reshape(*y.shape[:2], size)
    return weights.project(
      self, y, "o", self.size or x.shape[-1], self.out_bias
    )

  def _by_head(self, x):
    return x.reshape(*x.shape[:2], -1, self.head_dim)

  def _norm(self, name, x):
    if self.qk_norm is None:
      return x
    return self.qk_norm.clone(name=name, parent=self)(x)
