"""How projectors are stored, and when they are recomputed.

In `Float32`, every so many updates (`FixedInterval`): GaLore. In four bits
(`Int4`), less and less often where the strongest direction of a gradient stays
what it was (`Lazy`): Q-GaLore (Zhang et al. 2024, arXiv:2407.08296, sections
3.2 and 3.3), as its authors' code has it (q-galore-torch 1.0).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.ranges import Ranged, Whole
from research.typing import Array, Bool, Float, Int, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float32:
  """In float32."""

  def encode(self, p: Float[Array, "..."]) -> Any:
    """Returns a projector in floats that say what is kept of it."""
    return p

  def pack(self, found: Any) -> Any:
    """Returns what is kept."""
    return found

  def unpack(self, stored: Any) -> Any:
    """Returns the floats of what is kept; inverts `pack`."""
    return stored

  def decode(self, found: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the projector of such a shape."""
    del shape
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(Ranged):
  """Codes 0 to 15 times a step from a least number, for each `group`.

  Groups follow the elements of the projector of a weight stored `[out, in]`,
  in C order: of ours, transposed.

  Attributes:
    group: numbers that share a step and a least number.
  """

  group: Whole(at_least=2, multiple=2, why="two codes share a byte") = 256

  def encode(self, p: Float[Array, "..."]) -> Mapping[str, Any]:
    """Returns codes, steps and zero codes, all in floats.

    Raises:
      UserError: groups do not divide the projector.
    """
    *lead, rows, columns = p.shape
    if rows * columns % self.group:
      raise UserError(
        f"Int4.group: {self.group} does not divide a projector of"
        f" {rows} x {columns}.\nExpected a divisor of {rows * columns}."
      )
    x = jnp.swapaxes(p, -1, -2).reshape(*lead, -1, self.group)
    step, zero = steps(x, 15)
    codes = jnp.clip(jnp.round(x / step) + zero, 0, 15)
    # Whole numbers up to 256 are exact in bfloat16, in half of the memory.
    return dict(codes=codes.astype(jnp.bfloat16), step=step, zero=zero)

  def pack(self, found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the same with two codes a byte."""
    codes = found["codes"].astype(jnp.uint8)
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return dict(found, codes=packed, zero=found["zero"].astype(jnp.uint8))

  def unpack(self, stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns what `encode` did."""
    codes, step = stored["codes"], stored["step"]
    pairs = jnp.stack([codes & 15, codes >> 4], -1)
    codes = pairs.reshape(*codes.shape[:-1], -1).astype(jnp.bfloat16)
    return dict(stored, codes=codes, zero=stored["zero"].astype(step.dtype))

  def decode(
    self, found: Mapping[str, Any], shape: tuple[int, ...]
  ) -> Float[Array, "..."]:
    """Returns the projector of such a shape."""
    codes, step = found["codes"], found["step"]
    x = step * (codes.astype(step.dtype) - found["zero"])
    *lead, rows, columns = shape
    return jnp.swapaxes(x.reshape(*lead, columns, rows), -1, -2)


Storage = Float32 | Int4


def steps(
  x: Float[Array, "*B N"], top: int
) -> tuple[Float[Array, "*B 1"], Float[Array, "*B 1"]]:
  """Returns the step of each row's codes 0 to `top`, and the code of 0.

  The range has 0 in it, whose code would else be clipped and all numbers with
  it: in the authors' code 5 and 6 become 1. Rows of both signs are theirs.
  """
  high = jnp.maximum(x.max(-1, keepdims=True), 0)
  low = jnp.minimum(x.min(-1, keepdims=True), 0)
  step = jnp.maximum(high - low, 1e-5) / top
  return step, jnp.clip(-jnp.round(low / step), 0, top)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedInterval:
  """Each matrix every so many updates, as `Projection.every` says."""

  def init(self, lead: tuple[int, ...], every: int, size: int) -> Any:
    """Returns what is remembered of a matrix.

    Args:
      lead: `(layers,)`, or `()` for a matrix that is not in a stack.
      every: updates between projectors.
      size: of a projector's vectors.
    """
    del size
    return dict(gap=jnp.full(lead, every, jnp.int32))

  def due(self, state: Any, count: Int[Array, ""]) -> Bool[Array, "*L"]:
    """Returns where a projector is made, after `count` updates."""
    return count % state["gap"] == 0

  def after(
    self, state: Any, due: Bool[Array, "*L"], first: Float[Array, "*L K"]
  ) -> Any:
    """Returns what is remembered once projectors were made.

    Args:
      state: what was.
      due: where they were.
      first: the strongest direction of each.
    """
    del due, first
    return state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lazy(FixedInterval):
  """Rarely where the strongest direction of the gradient stays.

  Once the mean of the last `last` cosines between a matrix's first vector and
  the one before is `threshold` or more, its gap is multiplied, at each new
  projector. Singular vectors have no sign, so that a cosine counts by its
  size; in the authors' code a turned one counts against. Vectors are as they
  are kept: of `Int4` in four bits, where the authors compare those of the
  decomposition, so that cosines here are a little smaller and gaps may grow
  later.

  Attributes:
    threshold: of the mean cosine.
    last: how many of them.
    factor: of the gap.
  """

  threshold: float = 0.4
  last: int = 5
  factor: int = 2

  def init(self, lead, every, size):
    return super().init(lead, every, size) | dict(
      first=jnp.zeros((*lead, size)),
      cosines=jnp.zeros((*lead, self.last)),
      made=jnp.zeros(lead, jnp.int32),
    )

  def after(self, state, due, first):
    before = state["first"]
    norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(first, axis=-1)
    cosine = jnp.abs((before * first).sum(-1)) / jnp.maximum(norms, 1e-8)
    queue = jnp.concatenate([state["cosines"], cosine[..., None]], -1)[..., 1:]
    # The first projector has nothing to be compared with.
    full = state["made"] >= self.last
    longer = full & (queue.mean(-1) >= self.threshold)
    fresh = dict(
      gap=jnp.where(longer, state["gap"] * self.factor, state["gap"]),
      first=first,
      cosines=jnp.where(state["made"][..., None] > 0, queue, state["cosines"]),
      made=state["made"] + 1,
    )

    def chosen(new, old):
      return jnp.where(
        due.reshape(*due.shape, *(1,) * (new.ndim - due.ndim)), new, old
      )

    return jax.tree.map(chosen, fresh, state)
