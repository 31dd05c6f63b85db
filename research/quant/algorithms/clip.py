"""Clipping search: shrinks each group's range to minimise rounding error."""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.ranges import PositiveFloat, Ranged
from research.typing import Array, Float


@runtime_checkable
class Grids(Protocol):
  """A format with a grid per group, as `algorithms.gptq.Grids`."""

  def grid(self, w: Float[Array, "*B S O"]) -> Any: ...

  def codes(self, w: Float[Array, "*B S O"], *grid: Any) -> Array: ...

  def values(self, codes: Array, *grid: Any) -> Float[Array, "*B S O"]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip(Ranged):
  """Grid search over `w (1 - i / steps)` for the least sum of errors.

  The smallest i wins ties. Errors are those of weights: if some inputs are much
  larger than others, clipping may increase the error of outputs.

  Attributes:
    steps: number of steps that divide the range.
    candidates: number of candidates, from the full range down.
    norm: exponent of the absolute errors; GPTQ uses 2.4.
  """

  steps: int = 100
  candidates: int = 80
  norm: PositiveFloat = 2.4

  def __post_init__(self):
    super().__post_init__()
    self.expect("candidates", 1, self.steps)

  def grid(
    self,
    format: Grids,
    w: Float[Array, "*B S O"],
    importance: Float[Array, "*B S"] | None = None,
  ) -> Any:
    """Returns the best grid of each group, arrays `[*B, O]`.

    Args:
      format: a format whose grids depend on the weights' extremes alone.
      importance: weight of each input's errors, or None for 1.
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

    return jax.lax.fori_loop(1, self.candidates, better, tried(jnp.float32(1)))[
      0
    ]
