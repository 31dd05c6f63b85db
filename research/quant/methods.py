"""Rounding methods (round to nearest, GPTQ) and the errors that they cause.

Matrices that multiply the same inputs (q, k and v) are rounded together: their
outputs are concatenated and the Hessian is factored once. `round_matrices`
returns packed matrices, decoded matrices and errors.
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
from research.quant.format import Format, NormalForm
from research.quant.qtensor import QTensor, pack
from research.typing import Array, Float, UserError

InputStats = Mapping[str, Any]
"""Statistics of inputs x: `xx`, the sum of `x xᵀ`; `n`, their count; and
optionally `drift`, see `algorithms.error_propagation`."""


@runtime_checkable
class Method(Protocol):
  """A method of choosing codes; hashable, as a static argument of `jax.jit`."""

  @property
  def name(self) -> str:
    """The method's name in tables."""

  @property
  def weighted(self) -> bool:
    """Whether formats that search weigh errors by the inputs' mean square."""

  def check(self, format: Format, inputs: int, calibrated: bool) -> None:
    """Raises UserError for a format or matrix that the method cannot round.

    Args:
      calibrated: whether input statistics are available.
    """

  def parts(
    self,
    ws: Sequence[Float[Array, "I O"]],
    stats: InputStats | None,
    format: Format,
    encoded: Sequence[Any] | None,
  ) -> tuple[list[Any], Any, Any]:
    """Returns (parts of each matrix, order or None, damping or None).

    Args:
      ws: matrices with the same inputs.
      stats: statistics of these inputs, or None.
      encoded: the matrices rounded to nearest, for formats whose encoder cannot
        be traced; else None.
    """


@runtime_checkable
class SplitsOutliers(Method, Protocol):
  """A method that keeps some rows in higher precision, see `outlier_rows`."""

  def split_outliers(
    self,
    ws: Sequence[Float[Array, "I O"]],
    stats: InputStats | None,
    format: Format,
  ) -> tuple[list[Any], list[Any], InputStats | None]:
    """Returns (matrices without those rows, the rows, remaining statistics)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundToNearest:
  """Rounds each weight to the nearest code.

  Attributes:
    clip: a search for a clipped range of each group, or None.
    weighted: whether that search, and formats that search, weigh errors by the
      inputs' mean square.
  """

  clip: Clip | None = None
  weighted: bool = False

  @property
  def name(self) -> str:
    return "nearest" if self.clip is None else "nearest, clipped"

  def check(self, format, inputs, calibrated):
    del inputs
    if self.weighted and not calibrated:
      raise UserError("RoundToNearest.weighted: needs calibration, found none")
    if self.clip is not None:
      _check_local(format, "RoundToNearest.clip")

  def parts(self, ws, stats, format, encoded):
    if encoded is not None and self.clip is None:
      return list(encoded), None, None
    importance = input_importance(stats) if self.weighted else None
    return [self._parts(w, importance, format) for w in ws], None, None

  def _parts(self, w, importance, format):
    if self.clip is None:
      return format.encode_traced(w, importance)
    groups = w.reshape(-1, format.block, w.shape[-1])
    if importance is not None:
      importance = importance.reshape(-1, format.block)
    grid = self.clip.grid(format, groups, importance)
    return format.parts(format.codes(groups, *grid), *grid)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQMethod:
  """GPTQ, see `research.quant.algorithms.gptq`.

  Formats whose grids do not depend on one group alone (double quantization,
  second-level scales, searched zeros) use the grids of the original matrix:
  static grids, for any `options.grids`.
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
    if not (format.group_local or format.recodable):
      raise UserError(
        f"GPTQ: codes of {format.name} cannot be chosen on its grids, "
        "expected another format, or the method RoundToNearest"
      )

  def parts(self, ws, stats, format, encoded):
    side = jnp.concatenate(ws, axis=-1)
    n = stats["n"][0]
    h = stats["xx"] / jnp.maximum(n, 1)
    drift = stats.get("drift")
    if drift is not None:
      drift = drift / jnp.maximum(n, 1)
    ends = [sum(w.shape[-1] for w in ws[:k]) for k in range(1, len(ws))]
    options = self.options
    # A block that spans several outputs is not a group of inputs.
    group = 1 if len(side) % format.block else format.block
    given = gptq.prepare(side, h, group, options, drift, n)
    split = functools.partial(_split, ends=ends)
    if format.group_local:
      found = gptq.quantize(given, format, options)
      shape = (-1, format.block, side.shape[-1])
      codes = split(found.codes.reshape(shape))
      grids = zip(*(split(x) for x in found.grid), strict=True)
      parts = [format.parts(c, *g) for c, g in zip(codes, grids, strict=True)]
      return parts, found.order, given.damping
    if encoded is None:
      encoded = [
        format.encode_traced(w, input_importance(stats)) for w in split(given.w)
      ]
    plain = [format.normal_form(start) for start in encoded]
    grids = FixedGrids.from_normal_form(plain[0])
    known = [FixedGrids.grid_from(x) for x in plain]
    known = jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *known)
    found = gptq.quantize(given, grids, options, known)
    parts = [
      format.with_codes(start, codes.astype(x.codes.dtype))
      for start, codes, x in zip(
        encoded, split(found.codes), plain, strict=True
      )
    ]
    return parts, found.order, given.damping


def _split(x, ends):
  return jnp.split(x, ends, axis=-1)


@dataclasses.dataclass(frozen=True)
class FixedGrids:
  """The fixed grids of a matrix in normal form, for GPTQ.

  Implements `gptq.Grids` for a `research.quant.format.NormalForm`.

  Attributes:
    block: number of inputs that share a scale.
    low, high: smallest and largest code.
    codebook: values of the codes, or None.
  """

  block: int
  low: int
  high: int
  codebook: tuple[float, ...] | None

  @classmethod
  def from_normal_form(cls, plain: NormalForm) -> "FixedGrids":
    signed = jnp.issubdtype(plain.codes.dtype, jnp.signedinteger)
    low = -(2 ** (plain.bits - 1)) if signed else 0
    ends = plain.code_range or (low, low + 2**plain.bits - 1)
    return cls(plain.group, *ends, plain.codebook)

  @staticmethod
  def grid_from(plain: NormalForm) -> tuple[Any, Any]:
    """Returns (scale, additive constant), float32 `[G, O]`."""
    scale = jnp.asarray(plain.scale).astype(jnp.float32)
    shift = plain.shift()
    if shift is None:
      return scale, jnp.zeros_like(scale)
    return scale, jnp.broadcast_to(shift.astype(jnp.float32), scale.shape)

  def codes(self, w, scale, shift):
    scale, shift = scale[..., None, :], shift[..., None, :]
    unit = (w - shift) / jnp.where(scale == 0, 1, scale)
    if self.codebook is None:
      return jnp.clip(jnp.round(unit), self.low, self.high)
    table = jnp.asarray(self.codebook, jnp.float32)
    return abs(unit[..., None] - table).argmin(-1)

  def values(self, codes, scale, shift):
    value = codes.astype(jnp.float32)
    if self.codebook is not None:
      value = jnp.asarray(self.codebook, jnp.float32)[codes]
    return value * scale[..., None, :] + shift[..., None, :]

  def grid(self, w):
    """Raises UserError: fixed grids cannot be fitted to weights."""
    raise UserError("GPTQ: these grids belong to a whole matrix")


def input_importance(stats: InputStats) -> Float[Array, "*E I"]:
  """Returns the mean square of each input, a weight of its errors."""
  squares = jnp.diagonal(stats["xx"], axis1=-2, axis2=-1)
  return squares / jnp.maximum(stats["n"], 1)


def _check_local(format: Format, what: str) -> None:
  if not format.group_local:
    raise UserError(
      f"{what}: the grids of {format.name} are not of a group alone, expected "
      "None"
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundingErrors:
  """Errors of a rounded matrix; arrays, with one entry per expert.

  Attributes:
    weight_error: root mean square error of the weights over that of the
      weights themselves.
    output_error: the same for outputs on the calibration inputs, or None.
    nearest_error: `output_error` of rounding to nearest in the same format, or
      None.
    tokens: number of calibration inputs, or None.
    dead: number of inputs that were always 0, or None.
    damping: damping of the Hessian, or None.
  """

  weight_error: Any
  output_error: Any = None
  nearest_error: Any = None
  tokens: Any = None
  dead: Any = None
  damping: Any = None


def round_matrices(
  ws: tuple[Float[Array, "..."], ...],
  stats: InputStats | None,
  format: Format,
  method: Method,
  compare: bool = False,
  of: str = "float32",
) -> tuple[tuple[QTensor, ...], tuple[Array, ...], tuple[RoundingErrors, ...]]:
  """Rounds matrices with the same inputs.

  Args:
    ws: matrices `[I, O]`, or stacked experts `[E, I, O]`.
    stats: statistics of their inputs, or None; see `InputStats`.
    compare: whether to compute the error of rounding to nearest as well.
    of: dtype of the decoded matrices.

  Returns:
    (packed matrices, decoded matrices, errors).

  Raises:
    UserError: the method cannot round them, see `Method.check`.
  """
  method.check(format, ws[0].shape[-2], stats is not None)
  encoded = None
  if not (format.traceable or isinstance(method, SplitsOutliers)):
    importance = None
    if method.weighted and stats is not None:
      importance = input_importance(stats)
    encoded = tuple(
      pack(np.asarray(w, np.float32), format, importance).parts for w in ws
    )
  return _rounded(ws, stats, encoded, format, method, compare, of)


@functools.partial(
  jax.jit, static_argnames=("format", "method", "compare", "of")
)
def _rounded(ws, stats, encoded, format, method, compare, of):
  def one(ws, stats, encoded):
    ws = [w.astype(jnp.float32) for w in ws]
    rest, outliers, left = ws, [None] * len(ws), stats
    if isinstance(method, SplitsOutliers):
      rest, outliers, left = method.split_outliers(ws, stats, format)
    parts, order, damping = method.parts(rest, left, format, encoded)
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
      if compare and stats is not None:
        start = format.encode_traced(w) if encoded is None else encoded[k]
        near = format.decode(start)
      packed.append(q)
      dense.append(q.dense())
      measures.append(_measured(w, dense[-1], near, stats, damping))
    return tuple(packed), tuple(dense), tuple(measures)

  return (jax.vmap(one) if ws[0].ndim > 2 else one)(ws, stats, encoded)


def _measured(w, got, near, stats, damping) -> RoundingErrors:
  error = got.astype(jnp.float32) - w
  weight = jnp.sqrt((error**2).sum() / jnp.maximum((w**2).sum(), 1e-30))
  if stats is None:
    return RoundingErrors(weight)
  h = stats["xx"] / jnp.maximum(stats["n"], 1)

  def size(x):
    y = jnp.matmul(h, x, precision=gptq.HIGHEST)
    return jnp.maximum((x * y).sum(), 0)

  whole = jnp.maximum(size(w), 1e-30)
  return RoundingErrors(
    weight,
    jnp.sqrt(size(error) / whole),
    None if near is None else jnp.sqrt(size(near - w) / whole),
    stats["n"][0],
    (jnp.diagonal(h) == 0).sum(),
    damping,
  )
