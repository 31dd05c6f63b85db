"""Statistics of a weight's inputs and output gradients, for `research.taps`.

A statistic is a dataclass with three methods: the array shapes for a matrix
`[in, out]` (`shapes`), the arrays for the input rows of one call (`compute`),
and the combination of two calls (`join`). All are sums, not means, so that the
caller divides once, and all are fp32.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from research import weights
from research.typing import Array, Float, UserError

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rows:
  """Inputs and output cotangents of a matrix, or of stacked experts.

  Attributes:
    x: inputs `[..., in]`.
    dy: cotangents of the outputs `[..., out]`.
    counts: weight of each row `[...]`, or None for 1.
    sizes: number of rows of each expert, for rows `[T, ...]` sorted by expert;
      None for a single matrix.
  """

  x: Float[Array, "..."]
  dy: Float[Array, "..."]
  counts: Any = None
  sizes: Any = None

  @property
  def row_weights(self) -> Float[Array, "..."]:
    """The weight of each row, fp32."""
    if self.sizes is not None:
      return jnp.any(self.dy != 0, axis=-1).astype(jnp.float32)
    if self.counts is None:
      return jnp.ones(self.x.shape[:-1], jnp.float32)
    return self.counts.astype(jnp.float32)

  def outer(
    self, a: Float[Array, "... I"], b: Float[Array, "... J"]
  ) -> Float[Array, "*E I J"]:
    """Returns the sum of outer products over rows, per expert."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if self.sizes is None:
      # Not flattened: a mesh may shard both batch and sequence.
      return jnp.einsum(
        "...i,...j->ij", a, b, precision=jax.lax.Precision.HIGHEST
      )
    # Per expert, this is the gradient of a grouped matmul by its weights.
    shape = (len(self.sizes), a.shape[-1], b.shape[-1])
    w = jnp.zeros_like(a, shape=shape)  # device-varying over the rows' axes
    _, pull = jax.vjp(lambda w: weights.ragged_dot(a, w, self.sizes), w)
    return pull(b)[0]

  def total(self, a: Float[Array, "... I"]) -> Float[Array, "*E I"]:
    """Returns the sum over rows, per expert."""
    return self.outer(jnp.ones_like(a[..., :1]), a)[..., 0, :]

  def max(self, a: Float[Array, "... I"]) -> Float[Array, "*E I"]:
    """Returns the maximum over rows, at least 0, per expert.

    Raises:
      UserError: experts under a mesh.
    """
    if self.sizes is None:
      return a.max(axis=tuple(range(a.ndim - 1)), initial=0)
    if jax.sharding.get_abstract_mesh().manual_axes:
      raise UserError(
        "taps: found experts on a mesh, for which maxima are not supported.\n"
        "Collect on one device."
      )
    ends = jnp.cumsum(self.sizes)
    ids = jnp.searchsorted(ends, jnp.arange(len(a)), side="right")
    found = jax.ops.segment_max(a, ids, num_segments=len(self.sizes))
    return jnp.maximum(found, 0)


@runtime_checkable
class Statistic(Protocol):
  """A statistic of one matrix; hashable, since it is a static argument."""

  def shapes(self, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array for a matrix `[size_in, size_out]`."""

  def compute(self, rows: Rows) -> Arrays:
    """Returns the arrays for the rows of one call, experts leading."""

  def join(self, a: Arrays, b: Arrays) -> Arrays:
    """Returns the combined arrays of two calls."""


@dataclasses.dataclass(frozen=True)
class Covariance:
  """Sums of `x xᵀ` (`xx`), of `x`, and of rows (`n`): GPTQ's Hessian, EVA's
  principal directions."""

  def shapes(self, size_in, size_out):
    return dict(xx=(size_in, size_in), x=(size_in,), n=(1,))

  def compute(self, rows):
    c = rows.row_weights[..., None]
    x = rows.x.astype(jnp.float32)
    return dict(xx=rows.outer(c * x, x), x=rows.total(c * x), n=rows.total(c))

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)


@dataclasses.dataclass(frozen=True)
class SampleCovariance:
  """CorDA's covariance: sum of `x xᵀ`, each sample's `x` scaled by its maximum.

  Yang et al. 2024 (arXiv:2406.05223) as implemented in PEFT: the divisor is the
  absolute value of the maximum, not the maximum absolute value. A sample is a
  row of the batch; the rows of experts, which have no batch axis, count as one
  sample.
  """

  def shapes(self, size_in, size_out):
    return dict(xx=(size_in, size_in), n=(1,))

  def compute(self, rows):
    c, x = rows.row_weights[..., None], rows.x.astype(jnp.float32)
    within = tuple(range(0 if x.ndim < 3 else 1, x.ndim))
    low = jnp.finfo(x.dtype).min
    largest = jnp.abs(jnp.where(c > 0, x, low).max(axis=within, keepdims=True))
    some = (c > 0).any(axis=within, keepdims=True)
    x = jnp.where(c > 0, x / jnp.where(some & (largest > 0), largest, 1), 0)
    n = some.sum().astype(jnp.float32)
    if rows.sizes is not None:
      n = (rows.total(c)[..., 0] > 0).astype(jnp.float32)
    return dict(xx=rows.outer(c * x, x), n=n[..., None])

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)


@dataclasses.dataclass(frozen=True)
class Magnitudes:
  """Each input's maximum magnitude (`most`), and sums of magnitudes, squares
  and rows; used by AWQ, SmoothQuant and importance matrices."""

  def shapes(self, size_in, size_out):
    each = dict.fromkeys(("most", "sizes", "squares"), (size_in,))
    return each | dict(n=(1,))

  def compute(self, rows):
    c = rows.row_weights[..., None]
    size = jnp.abs(rows.x.astype(jnp.float32))
    return dict(
      most=rows.max(jnp.where(c > 0, size, 0)),
      sizes=rows.total(c * size),
      squares=rows.total(c * size**2),
      n=rows.total(c),
    )

  def join(self, a, b):
    both = jax.tree.map(jnp.add, a, b)
    return both | dict(most=jnp.maximum(a["most"], b["most"]))


@dataclasses.dataclass(frozen=True)
class Gradient:
  """The gradient `g [in, out]` of the loss by the matrix, even if packed."""

  def shapes(self, size_in, size_out):
    return dict(g=(size_in, size_out))

  def compute(self, rows):
    return dict(g=rows.outer(rows.x, rows.dy))

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)
