"""A Transformer layer: attention and feed-forward with residual connections."""

from typing import Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn import time_embedding
from research.nn.attention import Attention
from research.nn.attention_context import KeysValues, take_tokens
from research.nn.cross_attention import GatedCrossAttention
from research.nn.gemma4.per_layer import PerLayerUpdate
from research.nn.mlp import Mlp, PlainMlp
from research.nn.moe import Moe
from research.nn.moe.routing import Load
from research.nn.norm import LayerScalar, LayerScale, Norm, RMSNorm
from research.typing import Array, Float, Int, Params

ALL_TOKENS = "k", "v", weights.fused_name("qkv")
"""Attention projections that are computed for all tokens, not only queries."""


def _of_tokens(x: Array | None, keep: Array) -> Array | None:
  """Selects tokens of `x [B, T, ...]`; keeps per-row values `[B, 1, ...]`."""
  return x if x is None or x.shape[1] == 1 else take_tokens(x, keep)


class Block(nn.Module):
  """A pre-norm Transformer layer; covers all model families.

  Attributes:
    attention: the attention sublayer.
    mlp: the feed-forward sublayer: gated, plain or MoE.
    norm: normalises the input of both sublayers.
    post_norm: normalises their outputs before the residual add (Gemma 2's
      sandwich norm), or scales them (InternVL), or None.
    modulation: adaptive layer norm from the timestep (`nn.time_embedding`), or
      None.
    cross: a layer before this one that attends to images, or None.
    per_layer: what the layer makes of its own vector of each token, or None.
    output_scale: a learned factor of its output, or None.
  """

  attention: Attention
  mlp: Mlp | PlainMlp | Moe
  norm: Norm = RMSNorm()
  post_norm: Norm | LayerScale | None = None
  modulation: time_embedding.AdaLN | None = None
  cross: GatedCrossAttention | None = None
  per_layer: PerLayerUpdate | None = None
  output_scale: LayerScalar | None = None

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
    conditioning: Float[Array, "B #T C"] | None = None,
    keep: Int[Array, "B N"] | None = None,
    borrowed: KeysValues | None = None,
    vector: Float[Array, "B T P"] | None = None,
  ) -> tuple[Float[Array, "B N D"], Any, Load | None]:
    """Returns the layer's output, its cache, and the router load (MoE only).

    Args:
      x, positions, mask, rotation, cache, length, fresh: as in `Attention`.
      conditioning: timestep conditioning vectors, per row or per token.
      keep: indices of the tokens to compute outputs for; all tokens still get
        keys and values. None for all.
      borrowed: as in `Attention`.
      vector: the layer's own of each token, for `per_layer`.
    """
    x, cache = self.attend(
      x,
      positions,
      mask,
      rotation,
      cache,
      length,
      fresh,
      conditioning,
      keep,
      borrowed,
    )
    if keep is not None:
      positions, conditioning, vector = (
        take_tokens(positions, keep),
        _of_tokens(conditioning, keep),
        _of_tokens(vector, keep),
      )
    x, load = self.feed_forward(x, positions, conditioning)
    if self.per_layer is not None:
      x = x + self.per_layer(x, vector)
    if self.output_scale is not None:
      x = self.output_scale(x)
    return x, cache, load

  @nn.compact
  def attend(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Mask,
    rotation: tuple[Array, Array] | None = None,
    cache: Any = None,
    length: Int[Array, "B"] | None = None,
    fresh: bool = True,
    conditioning: Float[Array, "B #T C"] | None = None,
    keep: Int[Array, "B N"] | None = None,
    borrowed: KeysValues | None = None,
  ) -> tuple[Float[Array, "B N D"], Any]:
    """Runs the attention sublayer; arguments as for `__call__`.

    Returns:
      The residual stream after attention, and the cache.
    """
    if self.cross is not None:
      x = self.cross(x)
    normed, gate = self._read("attention", x, conditioning)
    y, cache = self.attention(
      normed, positions, mask, rotation, cache, length, fresh, keep, borrowed
    )
    if keep is not None:
      x, gate = take_tokens(x, keep), _of_tokens(gate, keep)
    y = self._norm(self.post_norm, "post_attention_norm", y)
    x = x + time_embedding.apply_gate(y, gate)
    x = sharding.constrain(x, "batch", "length", None)
    return checkpoint_name(x, "middle"), cache

  @nn.compact
  def feed_forward(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    conditioning: Float[Array, "B #T C"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Load | None]:
    """Runs the feed-forward sublayer, without what comes after it.

    Args:
      x: the residual stream that `attend` returned.
      positions: of the tokens, negative for padding; MoE layers need them.
      conditioning: as for `__call__`.

    Returns:
      The layer's output, and the router load (MoE only).
    """
    normed, gate = self._read("mlp", x, conditioning)
    if isinstance(self.mlp, Moe):
      y, load = self.mlp(normed, positions >= 0)
    else:
      y, load = self.mlp(normed), None
    y = self._norm(self.post_norm, "post_mlp_norm", y)
    x = x + time_embedding.apply_gate(y, gate)
    return sharding.constrain(x, "batch", "length", None), load

  @staticmethod
  def select_tokens(params: Params, keep: Int[Array, "B N"]) -> Params:
    """Restricts token-bound weights (`weights.with_tokens`) to kept tokens.

    Key and value projections still process all tokens and stay unchanged, as
    does the layer before them that attends to images.
    """
    every = {k: v for k, v in params.items() if k == "cross"}
    all_of_them = params["attention"]
    params = weights.select_tokens(params, keep)
    of_keys = {k: v for k, v in all_of_them.items() if k in ALL_TOKENS}
    return params | every | {"attention": params["attention"] | of_keys}

  def _read(self, name, x, conditioning):
    """Returns a sublayer's normalised input, and its output gate or None."""
    normed = self._norm(self.norm, f"{name}_norm", x)
    if self.modulation is None:
      return normed, None
    change = self.modulation.clone(name=f"{name}_modulation", parent=self)
    shift, scale, gate = change(conditioning, x.shape[-1])
    return time_embedding.modulate(normed, shift, scale), gate

  def _norm(self, norm, name, x):
    return x if norm is None else norm.clone(name=name, parent=self)(x)
