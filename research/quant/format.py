"""Base class of quantization formats and their common normal form.

A format, such as `Affine(bits=4, block=64)`, defines how a matrix `[I, O]` is
encoded to arrays and decoded. It holds no arrays and is a static argument of
`jax.jit`. Each file of `research.quant.formats` defines a format or a family.
Packed weights, products, kernel layouts and reports use only this interface.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.numerics import codebooks
from research.ranges import Ranged
from research.typing import Array, Float, UInt8, UserError

Parts = Mapping[str, Any]
"""name -> array; all share the same leading axes over matrices."""


@dataclasses.dataclass(frozen=True)
class NormalForm:
  """The normal form to which every format decodes; leading axes are matrices.

    weight[i, o] = (value[i, o] - zero) * scale + offset

  where `scale`, `offset` and `zero` are those of group `i // group`, and the
  value is the code itself or its entry in the codebook.

  Attributes:
    codes: uint8 or int8 `[..., I, O]`.
    scale: `[..., G, O]`, any floating dtype.
    group: number of inputs that share a scale.
    offset: `[..., G, O]`, or None for 0.
    zero: `[..., G, O]`, or one number for all groups.
    codebook: value of each code, or None if codes are the values.
    bits: bits of a code.
    code_range: smallest and largest code, or None for all codes of `bits`.
  """

  codes: Array | np.ndarray
  scale: Array | np.ndarray
  group: int
  offset: Array | np.ndarray | None = None
  zero: Array | np.ndarray | float = 0.0
  codebook: tuple[float, ...] | None = None
  bits: int = 4
  code_range: tuple[int, int] | None = None

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
    """Returns `offset - zero * scale`, which is added to `value * scale`."""
    if isinstance(self.zero, float) and not self.zero:
      return self.offset
    scale = self.scale.astype(jnp.float32)
    shift = -scale * jnp.asarray(self.zero).astype(jnp.float32)
    return shift if self.offset is None else shift + self.offset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Ranged):
  """Base class of formats: encodes a matrix to arrays and decodes it.

  Attributes:
    block: number of weights, along the inputs, per step of the layout's axis
      `x`.
  """

  block: int = 64

  @property
  def name(self) -> str:
    raise NotImplementedError

  @property
  def traceable(self) -> bool:
    """Whether JAX can trace `encode`; otherwise it is NumPy code."""
    return True

  @property
  def separable(self) -> bool:
    """Whether an output's scales depend on that output's weights alone.

    Ignores second-level scales that many outputs share.
    """
    return True

  @property
  def sliceable(self) -> bool:
    """Whether `to_sliceable` gives parts whose outputs can be sliced."""
    return True

  def to_sliceable(self, parts: Parts) -> tuple["Format", Parts]:
    """Returns an equivalent (format, parts) whose outputs can be sliced.

    Slicing outputs of the matrix then means slicing the axis `o` of every part
    that has one; other parts belong to the whole matrix. By default a format
    is sliceable as it is.
    """
    return self, parts

  @property
  def group_local(self) -> bool:
    """Whether a group's grid depends on that group's weights alone.

    Such a format implements `algorithms.gptq.Grids`, and `parts`, which makes
    the parts from codes and grids.
    """
    return False

  @property
  def recodable(self) -> bool:
    """Whether `with_codes` can replace codes on existing grids."""
    return type(self).with_codes is not Format.with_codes

  def layout(self) -> dict[str, str]:
    """Returns each part's trailing axes, one letter per axis.

    `x` is blocks of inputs, `o` outputs, and `.` any other axis.
    """
    raise NotImplementedError

  def for_shape(self, inputs: int, outputs: int) -> "Format":
    """Returns the format adapted to a matrix `[I, O]`; usually itself.

    Raises:
      UserError: the format cannot hold such a matrix.
    """
    del outputs
    if self.block < 1 or inputs % self.block:
      raise UserError(
        f"{self.name}: {inputs} inputs are no multiple of its block of "
        f"{self.block}; choose another block or format for this matrix"
      )
    return self

  def group(self, inputs: int, outputs: int) -> int:
    """Returns the number of inputs that share a scale in a matrix `[I, O]`."""
    found = []

    def read(parts):
      found.append(self.normal_form(parts).group)

    jax.eval_shape(read, self.shapes(inputs, outputs))
    return found[0]

  def shapes(self, inputs: int, outputs: int) -> dict[str, Any]:
    """Returns the parts of a matrix `[I, O]` as `jax.ShapeDtypeStruct`s."""
    if self.traceable:
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
    """Encodes one matrix to its parts.

    Args:
      w: finite, float32; NumPy arrays may be encoded in NumPy.
      importance: weight of each input's errors, such as its mean square, for
        formats that search.
    """
    raise NotImplementedError

  def encode_traced(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    """Returns `encode(w, importance)`, also for traced arrays.

    Calls NumPy encoders through `jax.pure_callback`, with float32 arrays.
    """
    given = (w,) if importance is None else (w, importance)
    if self.traceable or not any(isinstance(x, jax.core.Tracer) for x in given):
      return self.encode(*given)

    def host(*given):
      return self.encode(*(np.asarray(x, np.float32) for x in given))

    return jax.pure_callback(
      host, self.shapes(*w.shape), *given, vmap_method="sequential"
    )

  def normal_form(self, parts: Parts) -> NormalForm:
    """Returns the normal form of the parts of one matrix or of a stack."""
    raise NotImplementedError

  def with_codes(
    self, parts: Parts, codes: UInt8[Array, "I O"]
  ) -> dict[str, Any]:
    """Returns the parts with other codes on the same grids.

    Raises:
      UserError: the format cannot replace codes.
    """
    raise UserError(
      f"{self.name}: GPTQ needs fixed scales, and this format chooses scales "
      "and codes together; expected another format, or rounding to nearest"
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    return self.normal_form(parts).dense()


def format_for(where: str, format: Format, shape: Sequence[int]) -> Format:
  """Returns `format.for_shape` of a matrix `[..., I, O]`.

  Raises:
    UserError: the format cannot hold such a matrix.
  """
  try:
    return format.for_shape(*shape[-2:])
  except UserError as e:
    raise UserError(f"{where}: {e}" if where else str(e)) from e
