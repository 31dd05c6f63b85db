"""How matrices are rounded: to nearest, or by GPTQ; one call an input.

Matrices that multiply the same inputs (q, k and v) are rounded together: their
outputs go side by side and the Hessian is factored once. What comes back is
packed, decoded, and measured.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from research.quant.algorithms import gptq
from research.quant.algorithms.clip import Clip
from research.quant.algorithms.gptq import GPTQ
from research.quant.format import Format, Plain
from research.quant.qtensor import QTensor, pack
from research.typing import Array, Float, UserError

InputStats = Mapping[str, Any]
"""Of the inputs: `xx`, the sum of `x xᵀ`, `n`, how many, and maybe `drift`."""


@runtime_checkable
class Method(Protocol):
  """A way to choose codes; hashable, since it is part of a program."""

  @property
  def name(self) -> str:
    """Returns what tables call it."""

  @property
  def weighted(self) -> bool:
    """Whether formats that search are told of the inputs' mean square."""

  def check(self, format: Format, inputs: int, calibrated: bool) -> None:
    """Raises UserError for what it cannot choose codes of.

    Args:
      format: that fits a matrix.
      inputs: of the matrix.
      calibrated: whether inputs are measured.
    """

  def parts(
    self,
    ws: Sequence[Float[Array, "I O"]],
    seen: InputStats | None,
    format: Format,
    starts: Sequence[Any] | None,
  ) -> tuple[list[Any], Any, Any]:
    """Returns (parts of each matrix, order or None, damping or None).

    Args:
      ws: of the same inputs.
      seen: what those were, or None.
      format: that fits them.
      starts: what the format encodes the matrices to, where that cannot be
        traced; else None.
    """


@runtime_checkable
class Parted(Method, Protocol):
  """A method that keeps some rows in full precision, see `outlier_rows`."""

  def apart(
    self,
    ws: Sequence[Float[Array, "I O"]],
    seen: InputStats | None,
    format: Format,
  ) -> tuple[list[Any], list[Any], InputStats | None]:
    """Returns (matrices and inputs without those rows, their outliers)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest:
  """Each weight by itself: round to nearest.

  Attributes:
    clip: a search for narrower grids, or None.
    weighted: whether errors weigh as much as the inputs' mean square, in that
      search and in formats that search themselves.
  """

  clip: Clip | None = None
  weighted: bool = False

  @property
  def name(self) -> str:
    return "nearest" if self.clip is None else "nearest, clipped"

  def check(self, format, inputs, calibrated):
    del inputs
    if self.weighted and not calibrated:
      raise UserError("Nearest.weighted: needs calibration, found none")
    if self.clip is not None:
      _check_local(format, "Nearest.clip")

  def parts(self, ws, seen, format, starts):
    if starts is not None and self.clip is None:
      return list(starts), None, None
    importance = importance_of(seen) if self.weighted else None
    return [self._parts(w, importance, format) for w in ws], None, None

  def _parts(self, w, importance, format):
    if self.clip is None:
      return format.encoded(w, importance)
    groups = w.reshape(-1, format.block, w.shape[-1])
    if importance is not None:
      importance = importance.reshape(-1, format.block)
    grid = self.clip.grid(format, groups, importance)
    return format.parts(format.codes(groups, *grid), *grid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQMethod:
  """GPTQ, see `research.quant.algorithms.gptq`.

  Formats whose grids are not of a group alone (double quantization, scales of
  scales, zeros that were searched for) keep those that they have for the whole
  matrix: static grids, whatever `options.grids` says.

  Attributes:
    options: how.
  """

  options: GPTQ = GPTQ()

  @property
  def name(self) -> str:
    return f"GPTQ, {self.options.order}, {self.options.grids}"

  @property
  def weighted(self) -> bool:
    return True

  def check(self, format, inputs, calibrated):
    del inputs
    if not calibrated:
      raise UserError("GPTQ: needs calibration, found none")
    if self.options.clip is not None:
      _check_local(format, "GPTQ.clip")
    if not (format.local or format.recodable):
      raise UserError(
        f"GPTQ: codes of {format.name} cannot be chosen on its grids, "
        "expected another format, or the method Nearest"
      )

  def parts(self, ws, seen, format, starts):
    side = jnp.concatenate(ws, axis=-1)
    n = seen["n"][0]
    h = seen["xx"] / jnp.maximum(n, 1)
    drift = seen.get("drift")
    if drift is not None:
      drift = drift / jnp.maximum(n, 1)
    ends = [sum(w.shape[-1] for w in ws[:k]) for k in range(1, len(ws))]
    options = self.options
    # Blocks that run across outputs are no groups of inputs.
    group = 1 if len(side) % format.block else format.block
    given = gptq.prepare(side, h, group, options, drift, n)
    split = functools.partial(_split, ends=ends)
    if format.local:
      found = gptq.quantize(given, format, options)
      shape = (-1, format.block, side.shape[-1])
      codes = split(found.codes.reshape(shape))
      grids = zip(*(split(x) for x in found.grid), strict=True)
      parts = [format.parts(c, *g) for c, g in zip(codes, grids, strict=True)]
      return parts, found.order, given.damping
    if starts is None:
      starts = [format.encoded(w, importance_of(seen)) for w in split(given.w)]
    plain = [format.plain(start) for start in starts]
    grids = Known.of(plain[0])
    known = [Known.grid_of(x) for x in plain]
    known = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *known)
    found = gptq.quantize(given, grids, options, known)
    parts = [
      format.recoded(start, codes.astype(x.codes.dtype))
      for start, codes, x in zip(starts, split(found.codes), plain, strict=True)
    ]
    return parts, found.order, given.damping


def _split(x, ends):
  return jnp.split(x, ends, axis=-1)


@dataclasses.dataclass(frozen=True)
class Known:
  """Grids of a format's normal form, `research.quant.format.Plain`.

  Attributes:
    block: inputs that share a scale.
    low, high: the least and the largest code.
    codebook: values of the codes, or None.
  """

  block: int
  low: int
  high: int
  codebook: tuple[float, ...] | None

  @classmethod
  def of(cls, plain: Plain) -> "Known":
    """Returns the grids' kind."""
    signed = jnp.issubdtype(plain.codes.dtype, jnp.signedinteger)
    low = -(2 ** (plain.bits - 1)) if signed else 0
    ends = plain.ends or (low, low + 2**plain.bits - 1)
    return cls(plain.group, *ends, plain.codebook)

  @staticmethod
  def grid_of(plain: Plain) -> tuple[Any, Any]:
    """Returns (scale, what is added), float32 `[G, O]`."""
    scale = jnp.asarray(plain.scale).astype(jnp.float32)
    shift = plain.shift()
    if shift is None:
      return scale, jnp.zeros_like(scale)
    return scale, jnp.broadcast_to(shift.astype(jnp.float32), scale.shape)

  def codes(self, w, scale, shift):
    """Returns the nearest codes."""
    scale, shift = scale[..., None, :], shift[..., None, :]
    unit = (w - shift) / jnp.where(scale == 0, 1, scale)
    if self.codebook is None:
      return jnp.clip(jnp.round(unit), self.low, self.high)
    table = jnp.asarray(self.codebook, jnp.float32)
    return abs(unit[..., None] - table).argmin(-1)

  def values(self, codes, scale, shift):
    """Returns what codes stand for, float32."""
    value = codes.astype(jnp.float32)
    if self.codebook is not None:
      value = jnp.asarray(self.codebook, jnp.float32)[codes]
    return value * scale[..., None, :] + shift[..., None, :]

  def grid(self, w):
    """Raises UserError: these are not fitted."""
    raise UserError("GPTQ: these grids belong to a whole matrix")


def importance_of(seen: InputStats) -> Float[Array, "*E I"]:
  """Returns the mean square of each input, which errors may be weighed by."""
  squares = jnp.diagonal(seen["xx"], axis1=-2, axis2=-1)
  return squares / jnp.maximum(seen["n"], 1)


def _check_local(format: Format, what: str) -> None:
  if not format.local:
    raise UserError(
      f"{what}: the grids of {format.name} are not of a group alone, expected "
      "None"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measures:
  """What became of a matrix; arrays, one entry an expert if there are any.

  Attributes:
    weight_error: of the weights, root mean square over theirs.
    output_error: of the outputs for the inputs seen, the same way; or None.
    nearest_error: that of rounding to nearest in the same format; or None.
    tokens: how many inputs were seen, or None.
    dead: inputs that were always 0, or None.
    damping: what the Hessian took, or None.
  """

  weight_error: Any
  output_error: Any = None
  nearest_error: Any = None
  tokens: Any = None
  dead: Any = None
  damping: Any = None


def rounded(
  ws: tuple[Float[Array, "..."], ...],
  seen: InputStats | None,
  format: Format,
  method: Method,
  compare: bool = False,
  of: str = "float32",
) -> tuple[tuple[QTensor, ...], tuple[Array, ...], tuple[Measures, ...]]:
  """Returns matrices of the same inputs: packed, decoded, measured.

  Args:
    ws: matrices `[I, O]`, or one an expert, `[E, I, O]`.
    seen: what their inputs were, or None; see `Seen`.
    format: that fits them.
    method: how codes are chosen.
    compare: whether rounding to nearest is measured as well.
    of: dtype that decoded numbers are rounded to.

  Raises:
    UserError: the method cannot, see `Method.check`.
  """
  method.check(format, ws[0].shape[-2], seen is not None)
  starts = None
  if not (format.traced or isinstance(method, Parted)):
    importance = None
    if method.weighted and seen is not None:
      importance = importance_of(seen)
    starts = tuple(
      pack(np.asarray(w, np.float32), format, importance).parts for w in ws
    )
  return _rounded(ws, seen, starts, format, method, compare, of)


@functools.partial(
  jax.jit, static_argnames=("format", "method", "compare", "of")
)
def _rounded(ws, seen, starts, format, method, compare, of):
  def one(ws, seen, starts):
    ws = [w.astype(jnp.float32) for w in ws]
    rest, outliers, left = ws, [None] * len(ws), seen
    if isinstance(method, Parted):
      rest, outliers, left = method.apart(ws, seen, format)
    parts, order, damping = method.parts(rest, left, format, starts)
    packed, dense, measures = [], [], []
    for k, (w, part) in enumerate(zip(ws, parts, strict=True)):
      q = QTensor(
        part,
        order,
        outliers[k],
        format=format,
        inputs=w.shape[0],
        outputs=w.shape[1],
        of=of,
      )
      near = None
      if compare and seen is not None:
        start = format.encoded(w) if starts is None else starts[k]
        near = format.decode(start)
      packed.append(q)
      dense.append(q.dense())
      measures.append(_measured(w, dense[-1], near, seen, damping))
    return tuple(packed), tuple(dense), tuple(measures)

  return (jax.vmap(one) if ws[0].ndim > 2 else one)(ws, seen, starts)


def _measured(w, got, near, seen, damping) -> Measures:
  error = got.astype(jnp.float32) - w
  weight = jnp.sqrt((error**2).sum() / jnp.maximum((w**2).sum(), 1e-30))
  if seen is None:
    return Measures(weight)
  h = seen["xx"] / jnp.maximum(seen["n"], 1)

  def size(x):
    y = jnp.matmul(h, x, precision=gptq.HIGHEST)
    return jnp.maximum((x * y).sum(), 0)

  whole = jnp.maximum(size(w), 1e-30)
  return Measures(
    weight,
    jnp.sqrt(size(error) / whole),
    None if near is None else jnp.sqrt(size(near - w) / whole),
    seen["n"][0],
    (jnp.diagonal(h) == 0).sum(),
    damping,
  )
