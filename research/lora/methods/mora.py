"""MoRA: one square matrix between parameter-free compression and expansion.

Jiang et al. 2024 (arXiv:2405.12130), section 4: as many parameters as LoRA of
rank r, in a matrix of side `sqrt((in + out) r)`, hence of higher rank.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from research import sharding
from research.lora.method import Method, contracts_output, dense_fp32, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoRA(Method):
  """`expand(m compress(x))`, `m [side, side]` starts as zero; no scale.

  Attributes:
    form: 'share' adds the groups of the input up and repeats the output (the
      authors' type 1, for large ranks); 'rotate' multiplies every group, told
      apart by a rotation (their type 6).
  """

  form: Literal["rotate", "share"] = "rotate"

  def side(self, size_in: int, size_out: int) -> int:
    """Returns the side of the square matrix, even for rotations."""
    side = int(((size_in + size_out) * self.rank) ** 0.5 + 0.5)
    return max(side // 2 * 2, 2) if self.form == "rotate" else side

  def start(self, key, place, w, seen=None):
    side = self.side(place.size_in, place.size_out)
    return {"m": zeros(side, side)}, {}

  def delta(self, p, w):
    return self._product(jnp.eye(w.shape[-2]), dense_fp32(p["m"]), w.shape[-1])

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    return self._product(x, p["m"].astype(x.dtype), w.shape[-1])

  def _product(self, x, m, size_out):
    side = m.shape[0]
    # Cut along what is folded here, XLA gives wrong gradients of x (jax 0.12).
    # Groups straddle cuts anyway: left to itself it gathers, or permutes more
    # often. Only activations are gathered, of a device's own rows.
    x = sharding.whole(x)
    # Filled up with its own first entries.
    more = -x.shape[-1] % side
    again = jnp.concatenate([x] * -(-more // x.shape[-1]), -1) if more else x
    x = jnp.concatenate([x, again[..., :more]], -1)
    x = x.reshape(*x.shape[:-1], -1, side)
    y = jnp.sum(x, -2) if self.form == "share" else _rotated(x)
    y = y @ m
    y = sharding.whole(y.reshape(*x.shape[:-2], -1))
    times = -(-size_out // y.shape[-1])
    return jnp.tile(y, (1,) * (y.ndim - 1) + (times,))[..., :size_out]

  def axes(self, names):
    return {"m": (None, None)}


def _rotated(x):
  """Returns group j, `[side]`, turned by the angles `j 10000^(-2i/side)`."""
  groups, side = x.shape[-2:]
  rates = 10000.0 ** (-jnp.arange(0, side, 2) / side)
  angles = jnp.arange(groups)[:, None] * rates
  cos, sin = (
    jnp.tile(f(angles), 2).astype(x.dtype) for f in (jnp.cos, jnp.sin)
  )
  low, high = jnp.split(x, 2, axis=-1)
  return x * cos + jnp.concatenate([-high, low], -1) * sin
