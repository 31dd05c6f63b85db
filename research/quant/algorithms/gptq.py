"""GPTQ: rounds a matrix row by row and compensates each error in later rows.

Frantar et al. 2022 (arXiv:2210.17323). For a matrix `w [I, O]` and the Hessian
`h = Σ x xᵀ` of its inputs, rows are rounded one after the other, and later rows
are updated to compensate a row's error in the outputs. Outputs are independent,
so they may be sharded over a mesh. Updates are applied lazily, in one product
per block of rows.

A group's grid is fitted at its first row, to the updated weights (`fresh`).
Other implementations fit it before the updates of the current block (`stale`):
a tenth more error on the specification's small problem (groups of 16), none on
real layers (0.999 ± 0.005 of fresh grids' error in SmolLM2). `static` grids are
fitted to the original weights and allow any order of rows without permuting
groups.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research.quant.algorithms import hessian
from research.quant.algorithms.clip import Clip
from research.quant.algorithms.hessian import Damping
from research.ranges import NonNegativeFloat, Ranged, Share
from research.typing import Array, Float, Int, UserError

MAX_BLOCK = 128
"""Largest number of rows per block of lazy updates."""

HIGHEST = jax.lax.Precision.HIGHEST


@runtime_checkable
class Grids(Protocol):
  """Interface of a format with a grid per group.

  `grid` is any pytree of arrays `[*B, O]`."""

  block: int

  def grid(self, w: Float[Array, "*B S O"]) -> Any:
    """Returns the grid of each group of `S` weights."""

  def codes(self, w: Float[Array, "*B S O"], *grid: Any) -> Array:
    """Returns the nearest codes."""

  def values(self, codes: Array, *grid: Any) -> Float[Array, "*B S O"]:
    """Returns the values of codes, float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Ranged):
  """Settings of GPTQ.

  Attributes:
    order: order of the rows. `"natural"`; `"activations"`, rows with the
      largest inputs first (act-order), which with dynamic grids scatters the
      groups, so that the packed matrix stores a permutation; `"groups"`, sorted
      by group and within each group, which needs no permutation.
    grids: when a group's grid is fitted: `"fresh"`, `"stale"` or `"static"`.
    damp: share of the mean diagonal added to the Hessian's, see
      `hessian.inverse_factor`.
    dead: treatment of rows whose inputs were always 0: `"round"`, or `"zero"`
      as in the authors' code, which loses weights that later inputs may need.
    clip: a search for a clipped range of each group, or None.
    drift: share of the input drift to correct, 0 to 1; see
      `research.quant.algorithms.error_propagation`.
  """

  order: Literal["natural", "activations", "groups"] = "groups"
  grids: Literal["fresh", "stale", "static"] = "fresh"
  damp: NonNegativeFloat = 0.01
  dead: Literal["round", "zero"] = "round"
  clip: Clip | None = None
  drift: Share = 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
  """A matrix prepared for rounding.

  Attributes:
    w: `[I, O]`, corrected for drift.
    u: `[I, I]`, see `hessian.inverse_factor`; in the order of `rows`.
    rows: indices of the rows in the order of rounding, `[I]`.
    dead: number of rows whose inputs were always 0.
    damping: damping of the Hessian.
  """

  w: Any
  u: Any
  rows: Any
  dead: Any
  damping: Damping


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
  """A rounded matrix.

  Attributes:
    codes: `[I, O]`, as stored.
    grid: the groups' grids, arrays `[G, O]`.
    order: row `i` of the matrix is stored at `order[i]`; or None.
    loss: half the sum over rows and outputs of GPTQ's squared errors.
  """

  codes: Any
  grid: Any
  order: Any
  loss: Any


def prepare(
  w: Float[Array, "I O"],
  h: Float[Array, "I I"],
  group: int,
  options: GPTQ,
  drift: Float[Array, "I I"] | None = None,
  tokens: Float[Array, ""] | None = None,
) -> Prepared:
  """Factors the Hessian, orders rows and corrects `w` for drift.

  Args:
    h: sum of `x xᵀ` over the inputs, times any number; float32, or float64,
      in which everything but the grids is then computed.
    group: number of rows that share a grid.
    drift: sum of `(x - y) yᵀ`, where `y` are the inputs of `h` and `x` those
      of the original model, scaled as `h`; None for no correction.
    tokens: number of inputs in `h`, for more damping if they are few; or None.

  Raises:
    UserError: the group does not divide I.
  """
  if group < 1 or w.shape[0] % group:
    raise UserError(
      f"GPTQ: {w.shape[0]} inputs are no multiple of the groups of {group}"
    )
  w = w.astype(h.dtype)
  diagonal = jnp.diagonal(h)
  dead = diagonal == 0
  h, diagonal = _fill_diagonal(h, diagonal, dead)
  if options.dead == "zero":
    # A matrix without any inputs, such as an unused expert's, keeps its rows.
    w = jnp.where((dead & ~dead.all())[:, None], 0, w)
  rows = _order(diagonal, options.order, group)
  damp: Any = options.damp
  if tokens is not None:
    damp = hessian.damping_for_tokens(damp, tokens, w.shape[0])
  u, damping = hessian.inverse_factor(h[rows][:, rows], damp)
  if drift is not None and options.drift:
    change = _times(drift.astype(h.dtype).T, w)[rows]
    change = options.drift * _times(u.T, _times(u, change))
    w = w + jnp.where(damping.failed, 0, change[jnp.argsort(rows)])
  return Prepared(w, u, rows, dead.sum(), damping)


def quantize(
  given: Prepared,
  format: Grids,
  options: GPTQ,
  known: Any = None,
) -> Rounded:
  """Rounds a matrix to the grids of `format`.

  Args:
    known: the groups' grids, a tuple of arrays `[G, O]`; None to fit them.
  """
  w, rows, group = given.w, given.rows, format.block
  back = jnp.argsort(rows)
  fit = _fitter(format, options.clip)
  if known is None and (options.grids == "static" or group == len(w)):
    known = fit(w.reshape(-1, group, w.shape[1]))
  codes, grid, loss = _rows(
    w[rows], given.u, format, fit, options, known, rows // group
  )
  order = None
  if known is not None:
    codes, grid = codes[back], known
  elif options.order == "groups":
    codes = codes[back]
    home = jnp.argsort(rows[::group] // group)
    grid = jax.tree.map(lambda x: x[home], grid)
  elif options.order == "activations":
    order = back.astype(jnp.int32)
  return Rounded(codes, grid, order, loss)


def _rows(w, u, format, fit, options, static, home):
  """Returns (codes, grid, loss) of rows in the order of rounding.

  Args:
    u: as `hessian.inverse_factor`.
    static: fixed grids `[G, O]`, or None.
    home: the group of each row in `static`.
  """
  inputs, outputs = w.shape
  group, free = format.block, static is not None
  size = _lazy(inputs, group, free, options.grids == "stale")
  chunk = size if free else max(size, group)

  def current(errors, start, count):
    """Returns `count` rows, updated for all errors before them."""
    rows = jax.lax.dynamic_slice_in_dim(w, start, count)
    spread = jax.lax.dynamic_slice_in_dim(u, start, count, axis=1)
    return rows - _times(spread.T, errors)

  def block(grid, near, errors, start, rows=None):
    rows = current(errors, start, size) if rows is None else rows
    spread = jax.lax.dynamic_slice(u, (start, start), (size, size))
    codes, found = _block(rows, spread, near, format, grid)
    errors = jax.lax.dynamic_update_slice_in_dim(errors, found, start, 0)
    return errors, codes

  def step(errors, start):
    rows = current(errors, start, chunk)
    grid, kept = static, None
    near = jax.lax.dynamic_slice_in_dim(home, start, chunk)
    if not free:
      grid = kept = fit(rows.reshape(-1, group, outputs))
      near = jnp.arange(chunk) // group
    if chunk == size:
      errors, codes = block(grid, near, errors, start, rows)
      return errors, (codes, kept)

    def part(errors, k):
      some = jax.lax.dynamic_slice_in_dim(near, k * size, size)
      return block(grid, some, errors, start + k * size)

    errors, codes = jax.lax.scan(part, errors, jnp.arange(chunk // size))
    return errors, (codes.reshape(chunk, outputs), kept)

  errors, (codes, kept) = jax.lax.scan(
    step, jnp.zeros_like(w), jnp.arange(0, inputs, chunk)
  )
  grid = jax.tree.map(lambda x: x.reshape(-1, outputs), kept)
  return codes.reshape(inputs, outputs), grid, (errors**2).sum() / 2


def _block(w, u, near, format, grid):
  """Returns (codes, scaled errors) `[S, O]` of a block of rows.

  Args:
    w: `[S, O]`, updated for all errors before the block.
    near: index in `grid` of each row's group.
  """

  def row(w, given):
    i, spread, group = given
    here = jax.tree.map(lambda x: x[group], grid)
    one = w[i]
    codes = format.codes(one[None].astype(jnp.float32), *here)
    value = format.values(codes, *here)[0].astype(w.dtype)
    error = (one - value) / spread[i]
    # `u` is upper triangular, so rounded rows do not change.
    return w - spread[:, None] * error, (codes[0], error)

  given = (jnp.arange(len(w)), u, near)
  return jax.lax.scan(row, w, given)[1]


def _lazy(inputs: int, group: int, free: bool, stale: bool) -> int:
  """Returns the number of rows per block of lazy updates."""
  sizes = [n for n in range(1, min(MAX_BLOCK, inputs) + 1) if inputs % n == 0]
  if free:
    return sizes[-1]
  whole = [n for n in sizes if n % group == 0]
  if stale and whole:
    return whole[-1]
  return next(n for n in reversed(sizes) if group % n == 0)


def _fill_diagonal(h, diagonal, dead):
  """Returns `h` and its diagonal with zeros on the diagonal made positive.

  By a small value, so that the mean diagonal, which scales the damping, hardly
  changes.
  """
  mean = diagonal.mean()
  fill = jnp.where(dead, jnp.where(mean > 0, 1e-6 * mean, 1), 0)
  return h + jnp.diag(fill), diagonal + fill


def _order(diagonal, order: str, group: int) -> Int[Array, " I"]:
  if order == "natural":
    return jnp.arange(len(diagonal))
  if order == "activations":
    return jnp.argsort(-diagonal, stable=True)
  of = diagonal.reshape(-1, group)
  first = jnp.argsort(-of.max(-1), stable=True)
  inside = jnp.argsort(-of, axis=-1, stable=True)
  return (first[:, None] * group + inside[first]).reshape(-1)


def _fitter(format: Grids, clip: Clip | None) -> Callable[[Array], Any]:
  """Returns a function that fits grids `[groups, O]` to `[groups, S, O]`."""

  def fit(w):
    w = w.astype(jnp.float32)
    grid = format.grid(w) if clip is None else clip.grid(format, w)
    shape = (w.shape[0], w.shape[-1])
    return jax.tree.map(lambda x: jnp.broadcast_to(x, shape), grid)

  return fit


def _times(a, b):
  return jnp.matmul(a, b, precision=HIGHEST)
