"""Matrices between bounds: what goes in and what comes out is clipped.

The encoders of the small Gemma 4 models have them; their files carry the
bounds, which get no gradients. Where an optimizer decays what it trains, leave
them out of `trainable` all the same: `^(?!.*_m(in|ax)$)`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.typing import Array, Float, Params, Shaped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clipped(weights.WrappedWeight):
  """`clip(clip(x) w)`.

  Attributes:
    w: the matrix, any weight.
    input_min, input_max, output_min, output_max: scalars.
  """

  w: Any
  input_min: Any
  input_max: Any
  output_min: Any
  output_max: Any

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the matrix, which is not all that it does."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "Clipped":
    return Clipped(
      weights.axes(self.w, names),
      *(weights.axes(bound, ()) for bound in self.bounds().values()),
    )

  def einsum(self, eq: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the bounded product; the bounds themselves are not learned."""
    low, high, least, most = (
      jax.lax.stop_gradient(jnp.asarray(bound)).astype(x.dtype)
      for bound in self.bounds().values()
    )
    y = weights.einsum(eq, jnp.clip(x, low, high), self.w)
    return jnp.clip(y, least, most)

  def bounds(self) -> dict[str, Any]:
    return {name: getattr(self, name) for name in BOUNDS}


BOUNDS = ("input_min", "input_max", "output_min", "output_max")


@dataclasses.dataclass(frozen=True)
class Clipping:
  """Makes `Clipped` of a layer's matrices, with bounds that bound nothing."""

  def __call__(self, params: Params) -> Params:
    def clipped(path: str, x: Any) -> Any:
      del path
      if x.ndim != 2:
        return x
      infinite = jnp.asarray(jnp.inf, x.dtype)
      return Clipped(x, -infinite, infinite, -infinite, infinite)

    return tree.map_paths(clipped, params)
