"""One layer of the stack: attention and feed-forward around a residual."""

from typing import Any

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas.masks import Mask
from research import sharding, weights
from research.nn import time_embedding
from research.nn.attention import Attention
from research.nn.attention_context import take
from research.nn.mlp import Mlp
from research.nn.moe import Moe
from research.nn.moe.routing import Load
from research.nn.norm import RMSNorm
from research.typing import Array, Float, Int, Params

ALL_TOKENS = "k", "v", weights.fused_name("qkv")
"""Projections in attention that every token goes through."""


def _of_tokens(x: Array | None, keep: Array) -> Array | None:
  """Returns what is of some tokens, unless it is of whole rows."""
  return x if x is None or x.shape[1] == 1 else take(x, keep)


class Block(nn.Module):
  """A pre-norm layer; every layer of every family is one of these values.

  Attributes:
    attention: the token mixer.
    mlp: the feed-forward.
    norm: normalises the input of both.
    post_norm: normalises both outputs before they are added (Gemma 2's
      sandwich), or None.
    modulation: what the time changes of both (`research.nn.time_embedding`), or None.
  """

  attention: Attention
  mlp: Mlp | Moe
  norm: RMSNorm = RMSNorm()
  post_norm: RMSNorm | None = None
  modulation: time_embedding.AdaLN | None = None

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
    told: Float[Array, "B #T C"] | None = None,
    keep: Int[Array, "B N"] | None = None,
  ) -> tuple[Float[Array, "B N D"], Any, Load | None]:
    """Returns the layer's output, its cache and its experts' load.

    The first two as in `Attention`; no load without experts.

    Args:
      x, positions, mask, rotation, cache, length, fresh: as in `Attention`.
      told: of the time, of rows or tokens.
      keep: which tokens have an output; all have keys and values. None for all.
    """
    x, cache = self.attend(
      x, positions, mask, rotation, cache, length, fresh, told, keep
    )
    if keep is not None:
      positions, told = take(positions, keep), _of_tokens(told, keep)
    x, load = self.feed(x, positions, told)
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
    told: Float[Array, "B #T C"] | None = None,
    keep: Int[Array, "B N"] | None = None,
  ) -> tuple[Float[Array, "B N D"], Any]:
    """Returns what goes into the feed-forward, and the cache; as in a call."""
    normed, gate = self._read("attention", x, told)
    y, cache = self.attention(
      normed, positions, mask, rotation, cache, length, fresh, keep
    )
    if keep is not None:
      x, gate = take(x, keep), _of_tokens(gate, keep)
    y = self._norm(self.post_norm, "post_attention_norm", y)
    x = x + time_embedding.gated(y, gate)
    x = sharding.constrain(x, "batch", "length", None)
    return checkpoint_name(x, "middle"), cache

  @nn.compact
  def feed(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    told: Float[Array, "B #T C"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Load | None]:
    """Returns the layer's output of what `attend` returned, and the load.

    Args:
      x: see `attend`.
      positions: for a layer with experts.
      told: as in a call.
    """
    normed, gate = self._read("mlp", x, told)
    if isinstance(self.mlp, Moe):
      y, load = self.mlp(normed, positions >= 0)
    else:
      y, load = self.mlp(normed), None
    y = self._norm(self.post_norm, "post_mlp_norm", y)
    x = x + time_embedding.gated(y, gate)
    return sharding.constrain(x, "batch", "length", None), load

  @staticmethod
  def of_tokens(params: Params, keep: Int[Array, "B N"]) -> Params:
    """Returns parameters for a call that keeps some tokens.

    What stands behind the queries knows those alone (`weights.with_tokens`);
    keys and values are of all.
    """
    all_of_them = params["attention"]
    params = weights.of_tokens(params, keep)
    of_keys = {k: v for k, v in all_of_them.items() if k in ALL_TOKENS}
    return params | {"attention": params["attention"] | of_keys}

  def _read(self, name, x, told):
    """Returns a sublayer's input, and the gate of its output or None."""
    normed = self._norm(self.norm, f"{name}_norm", x)
    if self.modulation is None:
      return normed, None
    change = self.modulation.clone(name=f"{name}_modulation", parent=self)
    shift, scale, gate = change(told, x.shape[-1])
    return time_embedding.modulated(normed, shift, scale), gate

  def _norm(self, norm, name, x):
    return x if norm is None else norm.clone(name=name, parent=self)(x)
