"""Rotary position embedding and its extensions to longer contexts.

Su et al. 2021 (arXiv:2104.09864), in the half-split layout that Hugging Face
checkpoints use: dimension `i` pairs with `i + H/2`. Each scaling is a dataclass
whose `frequencies` returns scaled inverse frequencies and an attention factor.
Tokens of images have several coordinates, such as time, row and column; the
rotary axes decide which of them turns which frequency.
"""

import dataclasses
import itertools
import math

import jax.numpy as jnp
import numpy as np

from research.typing import Array, Float, Int, UserError


def inverse_frequencies(theta: float, dim: int) -> np.ndarray:
  """Returns `theta^(-2i/dim)`, `[dim/2]`, in float64."""
  return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""

  factor: float

  def frequencies(self, theta, dim, longest):
    return inverse_frequencies(theta, dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic:
  """Dynamic NTK-aware scaling, by the current length of each row.

  Cached keys keep the rotation of the length at which they were written, as in
  every implementation. So, unlike with the other scalings, cached decoding past
  `original` differs from one full forward pass.
  """

  factor: float
  original: int

  def frequencies(self, theta, dim, longest):
    n = jnp.maximum(longest.astype(jnp.float32), self.original)
    grown = self.factor * n / self.original - (self.factor - 1.0)
    base = theta * grown ** (dim / (dim - 2))
    exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
    return base[:, None] ** -exponent, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Llama 3.1's scaling: interpolates long wavelengths, keeps short ones.

  In between, a linear ramp mixes both.

  Attributes:
    factor: extension of the context.
    low, high: number of rotations over `original` between which the ramp runs.
    original: context length before the extension.
  """

  factor: float
  low: float
  high: float
  original: int

  def frequencies(self, theta, dim, longest):
    plain = inverse_frequencies(theta, dim)
    turns = self.original * plain / (2 * math.pi)
    ramp = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
    return (1 - ramp) * plain / self.factor + ramp * plain, 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """YaRN (Peng et al. 2023, arXiv:2309.00071), sections 3.2 and 3.4.

  Attributes:
    factor: extension of the context.
    original: context length before the extension.
    fast, slow: number of rotations over `original` between which the ramp runs
      (beta).
    attention: multiplies cos and sin. None for `0.1 ln(factor) + 1` or, if
      `mscale` and `mscale_all` are given, for the ratio of both mscales.
    truncate: whether the ramp's ends are rounded to whole dimensions.
  """

  factor: float
  original: int
  fast: float = 32.0
  slow: float = 1.0
  attention: float | None = None
  mscale: float | None = None
  mscale_all: float | None = None
  truncate: bool = True

  def _dimension(self, rotations: float, theta: float, dim: int) -> float:
    ratio = self.original / (rotations * 2 * math.pi)
    return dim * math.log(ratio) / (2 * math.log(theta))

  def _magnitude(self) -> float:
    def of(m):
      return 0.1 * m * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    if self.attention is not None:
      return self.attention
    if self.mscale and self.mscale_all:
      return of(self.mscale) / of(self.mscale_all)
    return of(1.0)

  def frequencies(self, theta, dim, longest):
    plain = inverse_frequencies(theta, dim)
    low = self._dimension(self.fast, theta, dim)
    high = self._dimension(self.slow, theta, dim)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    span = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / span, 0.0, 1.0)
    return ramp * plain / self.factor + (1 - ramp) * plain, self._magnitude()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional:
  """Gemma 4's: the fastest frequencies turn, the others stand still.

  Unlike `Rope.fraction`, the frequencies are those of the whole head, and
  dimension `i` pairs with `i + H/2`.

  Attributes:
    fraction: share of the frequencies that turn.
    factor: divides them.
  """

  fraction: float
  factor: float = 1.0

  def frequencies(self, theta, dim, longest):
    plain = inverse_frequencies(theta, dim)
    turns = np.arange(dim // 2) < int(self.fraction * dim // 2)
    return np.where(turns, plain, 0.0) / self.factor, 1.0


Scaling = Linear | Dynamic | Llama3 | Yarn | Proportional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sections:
  """M-RoPE: each coordinate turns a section of frequencies.

  Wang et al. 2024, Qwen2-VL (arXiv:2409.12191), section 2.1.

  Attributes:
    sizes: number of frequencies per coordinate, `H/2` in total.
  """

  sizes: tuple[int, ...]

  def coordinates(self, count: int) -> np.ndarray:
    """Returns which coordinate turns each of `count` frequencies."""
    _check_sections(self.sizes, count)
    return np.repeat(np.arange(len(self.sizes)), self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterleavedSections:
  """Interleaved M-RoPE of Qwen3-VL: coordinates take turns.

  Coordinate `a > 0` turns frequencies `a, a + n, a + 2 n, ...`, one for each of
  its section, and coordinate 0 all others.

  Attributes:
    sizes: number of frequencies per coordinate, `H/2` in total.
  """

  sizes: tuple[int, ...]

  def coordinates(self, count: int) -> np.ndarray:
    """Returns which coordinate turns each of `count` frequencies."""
    _check_sections(self.sizes, count)
    found, n = np.zeros(count, int), len(self.sizes)
    for a, size in itertools.islice(enumerate(self.sizes), 1, None):
      found[a : n * size : n] = a
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spatial:
  """Rotary embedding of image patches by row and column.

  The frequencies are those of `H / count` dimensions, once per coordinate, as
  in Qwen2-VL's vision encoder.

  Attributes:
    count: number of coordinates.
  """

  count: int = 2

  def coordinates(self, count: int) -> np.ndarray:
    """Returns which coordinate turns each of `count` frequencies."""
    _check_sections((count // self.count,) * self.count, count)
    return np.repeat(np.arange(self.count), count // self.count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialParts(Spatial):
  """Rotary embedding of image patches, a part of each head per coordinate.

  The frequencies are those of `Spatial`; dimensions pair within a part rather
  than over the whole head, as in Gemma 4's vision encoder: the first part turns
  by the last coordinate, the column.
  """

  def coordinates(self, count: int) -> np.ndarray:
    """Returns which coordinate turns each of `count` frequencies."""
    return self.count - 1 - super().coordinates(count)


Axes = Sections | InterleavedSections | Spatial


def _check_sections(sizes: tuple[int, ...], count: int) -> None:
  if sum(sizes) != count:
    raise UserError(
      f"rotary axes: found sections {tuple(sizes)}, expected {count} in total,"
      " half of the rotated dimensions of a head"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """Rotary position embedding.

  Attributes:
    theta: base of the frequencies.
    scaling: extension to longer contexts, or None.
    fraction: share of the head dimensions that are rotated, the first ones.
    axes: for tokens with several coordinates, or None for one.
  """

  theta: float = 10_000.0
  scaling: Scaling | None = None
  fraction: float = 1.0
  axes: Axes | None = None

  @property
  def parts(self) -> int:
    """The parts of a head in which dimensions pair; see `rotate`."""
    return self.axes.count if isinstance(self.axes, SpatialParts) else 1

  def tables(
    self, positions: Int[Array, "B T"] | Int[Array, "B T A"], head_dim: int
  ) -> tuple[Float[Array, "B T X"], Float[Array, "B T X"]]:
    """Returns cos and sin, each `[B, T, rotated/2]`, in fp32.

    Args:
      positions: token positions; negative ones (padding) count as 0. With
        `axes`, a token may have A coordinates; if it has one, all are equal.
      head_dim: H.
    """
    dim = int(head_dim * self.fraction)
    positions = jnp.maximum(positions, 0)
    if self.axes is not None:
      return self._tables_of_axes(positions, dim)
    if self.scaling is None:
      frequencies, magnitude = inverse_frequencies(self.theta, dim), 1.0
    else:
      longest = jnp.max(positions, axis=-1) + 1
      frequencies, magnitude = self.scaling.frequencies(
        self.theta, dim, longest
      )
    frequencies = jnp.asarray(frequencies, jnp.float32)
    if frequencies.ndim == 2:  # frequencies differ between rows
      frequencies = frequencies[:, None]
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude

  def _tables_of_axes(self, positions, dim):
    if self.scaling is not None:
      raise UserError(
        f"Rope: found axes and {type(self.scaling).__name__} scaling, expected"
        " one of them"
      )
    coordinates = self.axes.coordinates(dim // 2)
    if isinstance(self.axes, Spatial):
      part = inverse_frequencies(self.theta, dim // self.axes.count)
      frequencies = np.tile(part, self.axes.count)
    else:
      frequencies = inverse_frequencies(self.theta, dim)
    if positions.ndim == 2:
      positions = positions[..., None]
    elif positions.shape[-1] <= coordinates.max():
      raise UserError(
        f"rotary positions: found {positions.shape[-1]} coordinates, expected"
        f" {coordinates.max() + 1}"
      )
    else:
      positions = positions[..., coordinates]
    angles = positions.astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "B T N H"],
  cos: Float[Array, "B T X"],
  sin: Float[Array, "B T X"],
  parts: int = 1,
) -> Float[Array, "B T N H"]:
  """Returns `x` with its first `2X` dimensions rotated, in its dtype.

  Args:
    x: heads.
    cos, sin: of `Rope.tables`.
    parts: of the rotated dimensions, in each of which the first half pairs with
      the second one.
  """
  if parts > 1:
    pieces = zip(
      *(jnp.split(t, parts, axis=-1) for t in (x, cos, sin)), strict=True
    )
    return jnp.concatenate([rotate(*piece) for piece in pieces], axis=-1)
  half = cos.shape[-1]
  cos, sin = cos[:, :, None], sin[:, :, None]
  wide = x[..., : 2 * half].astype(jnp.float32)
  first, second = wide[..., :half], wide[..., half:]
  turned = [first * cos - second * sin, second * cos + first * sin]
  turned = [t.astype(x.dtype) for t in turned]
  return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
