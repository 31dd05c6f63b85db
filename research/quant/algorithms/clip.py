"""Narrower grids: a search for the share of the range that errs least."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.typing import Array, Float, UserError


@runtime_checkable
class Grids(Protocol):
  """A format with a grid for each group, as `algorithms.gptq.Grids`."""

  def grid(self, w: Float[Array, "*B S O"]) -> Any: ...

  def codes(self, w: Float[Array, "*B S O"], *grid: Any) -> Array: ...

  def values(self, codes: Array, *grid: Any) -> Float[Array, "*B S O"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
  """Grids of `w (1 - i / steps)`, for the `i` whose errors sum to least.

  The first of equals. Errors are those of weights: where some inputs are much
  larger than others this may make the outputs worse.

  Attributes:
    steps: how finely the range is divided.
    tried: how many of the shares, from all of it down.
    norm: the power of the errors that are summed; GPTQ's is 2.4.
  """

  steps: int = 100
  tried: int = 80
  norm: float = 2.4

  def __post_init__(self):
    if not 1 <= self.tried <= self.steps:
      raise UserError(
        f"Clip: tried is {self.tried}, expected 1 to steps, {self.steps}"
      )
    if not self.norm > 0:
      raise UserError(f"Clip: norm is {self.norm}, expected more than 0")

  def grid(
    self,
    format: Grids,
    w: Float[Array, "*B S O"],
    importance: Float[Array, "*B S"] | None = None,
  ) -> Any:
    """Returns the best grid of each group, arrays `[*B, O]`.

    Args:
      format: whose grids depend on the extremes of the weights alone.
      w: groups of `S` weights, float32.
      importance: what each input's errors weigh, or None for 1.
    """
    weigh = 1.0 if importance is None else importance[..., None]
    shape = (*w.shape[:-2], w.shape[-1])

    def tried(share):
      grid = jax.tree.map(
        lambda x: jnp.broadcast_to(x, shape), format.grid(share * w)
      )
      error = abs(format.values(format.codes(w, *grid), *grid) - w)
      return grid, (weigh * error**self.norm).sum(-2)

    def better(i, best):
      grid, error = tried(1 - i / self.steps)
      take = error < best[1]
      return jax.tree.map(
        lambda a, b: jnp.where(take, a, b), (grid, error), best
      )

    return jax.lax.fori_loop(1, self.tried, better, tried(jnp.float32(1)))[0]
