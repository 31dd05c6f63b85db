"""Adam with moments in 8 bits, in blocks.

Dettmers et al. 2022 (arXiv:2110.02861): a moment is the code of a number in
[-1, 1] times the largest magnitude of its block of 256. The codes' values are
the dynamic map, as bitsandbytes makes it: signed for means, unsigned for mean
squares. A step decodes, mixes in the gradient, moves, and encodes again.

Blocks follow an array's elements in C order, as in bitsandbytes. Where 256
divides the last axis a block lies within a row, and the magnitudes have the
array's own axes (`[..., out / 256]`), so that a mesh cuts them alike; else
they are one list.

By hand, since optax (0.2.8) has no moments in integers; `test_adam8bit.py`
compares with bitsandbytes.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import tree
from research.optim import optim
from research.typing import Array, Float, UInt8

BLOCK = 256

FULL_PRECISION = r"(^|/)(embed|head)$"
"""What stays in 32 bits besides small arrays, as bitsandbytes advises."""


@functools.cache
def dynamic_map(signed: bool) -> np.ndarray:
  """Returns the 256 values of the codes, ascending, float32.

  From 1 down, each of seven decades has half as many fractions as the one
  before, the last a single one. Zero and one are values of their own.

  Args:
    signed: whether half of the codes are negative.
  """
  f32, decades = np.float32, 7
  values = []
  for i in range(decades):
    count = 2**i if signed else 2 ** (i + 1)
    edges = _line(count + 1)
    means = (edges[:-1] + edges[1:]) / f32(2)
    found = f32(10.0 ** (i - (decades - 1))) * means
    values += [*found, *(-found if signed else ())]
  values += [f32(0), f32(1)]
  return np.sort(np.asarray(values, f32))


def _line(count: int) -> np.ndarray:
  """Returns 0.1 to 1 in equal steps, rounded as torch.linspace rounds them."""
  f32 = np.float32
  step = f32((f32(1) - f32(0.1)) / f32(count - 1))
  i = np.arange(count)
  below = (np.float64(f32(0.1)) + np.float64(step) * i).astype(f32)
  above = (1.0 - np.float64(step) * (count - 1 - i)).astype(f32)
  return np.where(i < count // 2, below, above)


def _blocks(x: Array) -> Array:
  """Returns the elements of an array in blocks: the last axis."""
  if x.ndim and x.shape[-1] % BLOCK == 0:
    return x.reshape(*x.shape[:-1], -1, BLOCK)
  flat = x.reshape(-1)
  return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def _unblocked(blocks: Array, shape: tuple[int, ...]) -> Array:
  if shape and shape[-1] % BLOCK == 0:
    return blocks.reshape(shape)
  return blocks.reshape(-1)[: int(np.prod(shape))].reshape(shape)


def encode(
  x: Float[Array, "..."], values: np.ndarray
) -> tuple[UInt8[Array, "..."], Float[Array, "..."]]:
  """Returns the nearest codes, and the largest magnitude of each block.

  Args:
    x: any array.
    values: from `dynamic_map`.
  """
  blocks = _blocks(x)
  top = jnp.abs(blocks).max(-1)
  unit = blocks / jnp.where(top > 0, top, 1)[..., None]
  between = (values[:-1] + values[1:]) / np.float32(2)
  # Compared with all at once it would take 255 times the memory.
  codes = jnp.searchsorted(between, unit, method="scan_unrolled")
  return _unblocked(codes.astype(jnp.uint8), x.shape), top


def decode(
  codes: UInt8[Array, "..."], top: Float[Array, "..."], values: np.ndarray
) -> Float[Array, "..."]:
  """Returns about what `encode` was given."""
  found = jnp.asarray(values)[_blocks(codes)] * top[..., None]
  return _unblocked(found, codes.shape)


class Adam8bitState(NamedTuple):
  """Updates done; codes and magnitudes of both moments."""

  count: Array
  mean: Any
  mean_top: Any
  square: Any
  square_top: Any


def scale_by_adam8bit(
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  full_precision: str = FULL_PRECISION,
  least: int = 4096,
) -> optax.GradientTransformation:
  """Returns Adam with moments in 8 bits, but for small and chosen arrays.

  Args:
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    full_precision: regular expression of the paths whose moments stay in 32
      bits.
    least: elements of an array from which on its moments are packed.
  """

  def kinds(params):
    def kind(path, x):
      small = x.size < least or re.search(full_precision, path)
      return "whole" if small else "packed"

    return tree.map_paths(kind, params)

  ways = {
    "whole": optim.moments(b1, b2, eps),
    "packed": _packed(b1, b2, eps),
  }
  return optax.partition(ways, kinds)


def _packed(b1, b2, eps) -> optax.GradientTransformation:
  signed, unsigned = dynamic_map(True), dynamic_map(False)

  def init(params):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    mean, square = (_encoded(zeros, v) for v in (signed, unsigned))
    return Adam8bitState(jnp.zeros((), jnp.int32), *mean, *square)

  def update(updates, state, params=None):
    del params
    count = optax.safe_increment(state.count)

    def moved(codes, tops, values, decay, order):
      def one(g, c, top):
        old = decode(c, top, values)
        return decay * old + (1 - decay) * g.astype(jnp.float32) ** order

      return jax.tree.map(one, updates, codes, tops)

    mean = moved(state.mean, state.mean_top, signed, b1, 1)
    square = moved(state.square, state.square_top, unsigned, b2, 2)

    def move(g, m, v):
      root = jnp.sqrt(v) / jnp.sqrt(1 - b2**count)
      return (m / (1 - b1**count) / (root + eps)).astype(g.dtype)

    moves = jax.tree.map(move, updates, mean, square)
    packed = *_encoded(mean, signed), *_encoded(square, unsigned)
    return moves, Adam8bitState(count, *packed)

  return optax.GradientTransformation(init, update)


def _encoded(arrays: Any, values: np.ndarray) -> tuple[Any, Any]:
  """Returns trees of codes and of magnitudes."""
  pairs = [encode(x, values) for x in jax.tree.leaves(arrays)]
  codes, tops = ([pair[i] for pair in pairs] for i in range(2))
  structure = jax.tree.structure(arrays)
  return structure.unflatten(codes), structure.unflatten(tops)


def adamw8bit(
  learning_rate: optim.Number | optim.Schedule,
  *,
  b1: optim.Number = 0.9,
  b2: optim.Number = 0.999,
  eps: optim.Number = 1e-8,
  weight_decay: optim.Number = 0.0,
  decayed: str = ".*",
  clip: optim.Number | None = 1.0,
  full_precision: str = FULL_PRECISION,
  least: int = 4096,
) -> optax.GradientTransformation:
  """Returns AdamW with moments in 8 bits.

  Args:
    learning_rate: a number, or a schedule of the updates done.
    b1: decay of the mean.
    b2: decay of the mean square.
    eps: added to the root of the mean square.
    weight_decay: share of a parameter taken off at rate 1.
    decayed: regular expression of the paths that decay.
    clip: bound of the gradient's global norm, or None.
    full_precision: regular expression of the paths whose moments stay in 32
      bits.
    least: elements of an array from which on its moments are packed.
  """
  return optax.chain(
    optim.clipped(clip),
    scale_by_adam8bit(b1, b2, eps, full_precision, least),
    optim.decaying(weight_decay, optim.decay_mask(decayed)),
    optim.scale_by_rate(learning_rate),
  )
