"""How numbers are kept: what every format of a packed matrix answers.

A format is a value, `Affine(bits=4, block=64)`, that knows which arrays a
matrix `[I, O]` becomes, and what they stand for. It has no arrays itself, and
is static where it meets `jax.jit`. One file of `research.quant.formats` is one
format, or a family; everything else (the leaf, its products, the kernels'
panels, reports) works from what is said here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.numerics import codebooks
from research.typing import Array, Float, UInt8, UserError

Parts = Mapping[str, Any]
"""name -> array; the leading axes, over matrices, are those of all."""


@dataclasses.dataclass(frozen=True)
class Plain:
  """The normal form of every format; leading axes are matrices.

    weight[i, o] = (value[i, o] - zero) * scale + offset

  where `scale`, `offset` and `zero` are those of group `i // group`, and the
  value is the code, or its entry in the codebook.

  Attributes:
    codes: uint8 or int8 `[..., I, O]`.
    scale: `[..., G, O]`, of any floating type.
    group: inputs that share a scale.
    offset: `[..., G, O]`, or None for 0.
    zero: `[..., G, O]`, or one number for all.
    codebook: values of the codes, or None where they stand for themselves.
    bits: of a code.
    ends: the least and the largest code, or None for all that the bits have.
  """

  codes: Array | np.ndarray
  scale: Array | np.ndarray
  group: int
  offset: Array | np.ndarray | None = None
  zero: Array | np.ndarray | float = 0.0
  codebook: tuple[float, ...] | None = None
  bits: int = 4
  ends: tuple[int, int] | None = None

  def dense(self) -> Float[Array, "... I O"]:
    """Returns the matrix, float32, by the formula above."""
    if self.codebook is not None:
      values = codebooks.lookup(
        self.codes, jnp.asarray(self.codebook, jnp.float32)
      )
    else:
      values = self.codes.astype(jnp.float32)
    *lead, inputs, outputs = values.shape

    def spread(part: Any) -> Any:
      return jnp.asarray(part).astype(jnp.float32)[..., None, :]

    if self.group == inputs:
      values = values[..., None, :, :]
    else:
      values = values.reshape(*lead, -1, self.group, outputs)
    if not isinstance(self.zero, float):
      values = values - spread(self.zero)
    elif self.zero:
      values = values - self.zero
    values = values * spread(self.scale)
    if self.offset is not None:
      values = values + spread(self.offset)
    return values.reshape(*lead, inputs, outputs)

  def shift(self) -> Array | None:
    """Returns what is added to `value * scale`: zero and offset as one."""
    if isinstance(self.zero, float) and not self.zero:
      return self.offset
    scale = self.scale.astype(jnp.float32)
    shift = -scale * jnp.asarray(self.zero).astype(jnp.float32)
    return shift if self.offset is None else shift + self.offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """A way to keep a matrix; subclasses are the formats.

  Attributes:
    block: weights, along the inputs, that one step of the axis `x` stands for.
  """

  block: int = 64

  @property
  def name(self) -> str:
    """Returns what tables call it."""
    raise NotImplementedError

  @property
  def traced(self) -> bool:
    """Whether `encode` can be compiled; else it is NumPy's."""
    return True

  @property
  def separable(self) -> bool:
    """Whether an output's scales follow from that output's weights alone.

    Scales of scales, which many outputs share, are not counted.
    """
    return True

  @property
  def sliceable(self) -> bool:
    """Whether some outputs decode from those outputs of `by_output`."""
    return True

  def by_output(self, parts: Parts) -> tuple["Format", Parts]:
    """Returns a format, and parts, whose outputs may be cut; the same numbers.

    Some outputs are then the same outputs of every part that has an axis `o`;
    the others are the whole matrix'. It is what formats are that say nothing.
    """
    return self, parts

  @property
  def local(self) -> bool:
    """Whether a group's grid follows from the group's weights alone.

    Then it has the methods of `algorithms.gptq.Grids`, and `parts`, which
    makes the parts of codes and grids.
    """
    return False

  @property
  def recodable(self) -> bool:
    """Whether codes can be chosen on grids that there are, by `recoded`."""
    return type(self).recoded is not Format.recoded

  def layout(self) -> dict[str, str]:
    """Returns each part's trailing axes, a letter each.

    `x` are blocks of inputs, `o` outputs, and `.` what is neither.
    """
    raise NotImplementedError

  def fitted(self, inputs: int, outputs: int) -> "Format":
    """Returns the format that a matrix `[I, O]` is kept in: mostly itself.

    Raises:
      UserError: it cannot hold such a matrix.
    """
    del outputs
    if self.block < 1 or inputs % self.block:
      raise UserError(
        f"{self.name}: {inputs} inputs are no multiple of its block of "
        f"{self.block}; choose another block or format for this matrix"
      )
    return self

  def group(self, inputs: int, outputs: int) -> int:
    """Returns how many inputs share a scale, in a matrix `[I, O]` that fits."""
    found = []

    def read(parts):
      found.append(self.plain(parts).group)

    jax.eval_shape(read, self.shapes(inputs, outputs))
    return found[0]

  def shapes(self, inputs: int, outputs: int) -> dict[str, Any]:
    """Returns the parts of a matrix `[I, O]` as shapes and types."""
    if self.traced:
      w = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
      return dict(jax.eval_shape(self.encode, w))
    one = self.encode(np.zeros((self.block, 1), np.float32))
    sizes = {"x": inputs // self.block, "o": outputs}
    layout = self.layout()
    return {
      name: jax.ShapeDtypeStruct(
        tuple(
          sizes.get(letter, n)
          for letter, n in zip(layout[name], part.shape, strict=True)
        ),
        part.dtype,
      )
      for name, part in one.items()
    }

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    """Returns the parts of one matrix.

    Args:
      w: finite, float32; an array of NumPy is encoded by NumPy.
      importance: of each input, such as its mean square; formats that search
        weigh errors by it.
    """
    raise NotImplementedError

  def encoded(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    """Returns what `encode` does, also inside of a program.

    An encoder of NumPy is then called by the program, with numbers in float32.
    """
    given = (w,) if importance is None else (w, importance)
    if self.traced or not any(isinstance(x, jax.core.Tracer) for x in given):
      return self.encode(*given)

    def host(*given):
      return self.encode(*(np.asarray(x, np.float32) for x in given))

    return jax.pure_callback(
      host, self.shapes(*w.shape), *given, vmap_method="sequential"
    )

  def plain(self, parts: Parts) -> Plain:
    """Returns the normal form of what `encode` returned, or of a stack."""
    raise NotImplementedError

  def recoded(self, parts: Parts, codes: UInt8[Array, "I O"]) -> dict[str, Any]:
    """Returns parts with other codes on the same grids.

    Args:
      parts: of one matrix.
      codes: as `plain` has them.

    Raises:
      UserError: the format cannot.
    """
    raise UserError(
      f"{self.name}: its codes cannot be chosen apart from its grids, as GPTQ "
      "does; expected another format, or rounding to nearest"
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    """Returns the matrix, float32."""
    return self.plain(parts).dense()


def fit(where: str, format: Format, shape: Sequence[int]) -> Format:
  """Returns `format.fitted` for a matrix `[..., I, O]`; errors say where."""
  try:
    return format.fitted(*shape[-2:])
  except UserError as e:
    raise UserError(f"{where}: {e}" if where else str(e)) from e
