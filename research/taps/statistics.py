"""Statistics of the rows that a weight multiplies, for `research.taps`.

Each is a value that says which arrays it has for a matrix `[in, out]`, what
they are for the rows of one call, and how those of two calls become one. They
are sums, never means: who reports divides once. All are fp32.
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
  """What went in and came back, of one matrix or of stacked experts.

  Attributes:
    x: inputs `[..., in]`.
    dy: cotangents of the outputs `[..., out]`.
    counts: how much each row counts `[...]`, or None.
    sizes: how many rows each expert has, of rows `[T, ...]` sorted by expert;
      None for one matrix.
  """

  x: Float[Array, "..."]
  dy: Float[Array, "..."]
  counts: Any = None
  sizes: Any = None

  @property
  def counted(self) -> Float[Array, "..."]:
    """How much each row counts, fp32."""
    if self.sizes is not None:
      return jnp.any(self.dy != 0, axis=-1).astype(jnp.float32)
    if self.counts is None:
      return jnp.ones(self.x.shape[:-1], jnp.float32)
    return self.counts.astype(jnp.float32)

  def outer(
    self, a: Float[Array, "... I"], b: Float[Array, "... J"]
  ) -> Float[Array, "*E I J"]:
    """Returns the sum over rows of outer products, for each expert."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if self.sizes is None:
      # Not flat: a mesh may cut both rows of a batch and tokens of a row.
      return jnp.einsum(
        "...i,...j->ij", a, b, precision=jax.lax.Precision.HIGHEST
      )
    # What the gradient of a grouped matmul is.
    shape = (len(self.sizes), a.shape[-1], b.shape[-1])
    w = jnp.zeros_like(a, shape=shape)  # as varying over a mesh as the rows
    _, pull = jax.vjp(lambda w: weights.ragged_dot(a, w, self.sizes), w)
    return pull(b)[0]

  def total(self, a: Float[Array, "... I"]) -> Float[Array, "*E I"]:
    """Returns the sum over rows, for each expert."""
    return self.outer(jnp.ones_like(a[..., :1]), a)[..., 0, :]

  def most(self, a: Float[Array, "... I"]) -> Float[Array, "*E I"]:
    """Returns the largest over rows, at least 0, for each expert."""
    if self.sizes is None:
      return a.max(axis=tuple(range(a.ndim - 1)), initial=0)
    if jax.sharding.get_abstract_mesh().manual_axes:
      raise UserError(
        "taps: experts that a mesh cuts have sums, but no largest values.\n"
        "Collect on one device."
      )
    ends = jnp.cumsum(self.sizes)
    ids = jnp.searchsorted(ends, jnp.arange(len(a)), side="right")
    found = jax.ops.segment_max(a, ids, num_segments=len(self.sizes))
    return jnp.maximum(found, 0)


@runtime_checkable
class Statistic(Protocol):
  """What is seen of a matrix; hashable, since it is part of a program."""

  def shapes(self, size_in: int, size_out: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array, for one matrix."""

  def of(self, rows: Rows) -> Arrays:
    """Returns the arrays for the rows of one call, experts in front."""

  def join(self, a: Arrays, b: Arrays) -> Arrays:
    """Returns the arrays for the rows of two calls."""


@dataclasses.dataclass(frozen=True)
class Covariance:
  """Sums of `x xᵀ` (`xx`), of `x`, and of rows (`n`): GPTQ's Hessian, EVA's
  principal directions."""

  def shapes(self, size_in, size_out):
    return dict(xx=(size_in, size_in), x=(size_in,), n=(1,))

  def of(self, rows):
    c = rows.counted[..., None]
    x = rows.x.astype(jnp.float32)
    return dict(xx=rows.outer(c * x, x), x=rows.total(c * x), n=rows.total(c))

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)


@dataclasses.dataclass(frozen=True)
class SampleCovariance:
  """CorDA's: each sample's `x xᵀ`, of `x` over its largest entry, summed.

  Yang et al. 2024 (arXiv:2406.05223) as PEFT has it: the divisor is the
  absolute value of the largest, not the largest absolute value. A sample is a
  row of the batch; rows without one (those of all experts) are one together.
  """

  def shapes(self, size_in, size_out):
    return dict(xx=(size_in, size_in), n=(1,))

  def of(self, rows):
    c, x = rows.counted[..., None], rows.x.astype(jnp.float32)
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
  """Each input's largest size (`most`), and sums of sizes, squares and rows:
  what AWQ, SmoothQuant and an importance matrix read."""

  def shapes(self, size_in, size_out):
    each = dict.fromkeys(("most", "sizes", "squares"), (size_in,))
    return each | dict(n=(1,))

  def of(self, rows):
    c = rows.counted[..., None]
    size = jnp.abs(rows.x.astype(jnp.float32))
    return dict(
      most=rows.most(jnp.where(c > 0, size, 0)),
      sizes=rows.total(c * size),
      squares=rows.total(c * size**2),
      n=rows.total(c),
    )

  def join(self, a, b):
    both = jax.tree.map(jnp.add, a, b)
    return both | dict(most=jnp.maximum(a["most"], b["most"]))


@dataclasses.dataclass(frozen=True)
class Gradient:
  """The loss's gradient `g [in, out]` by the matrix, be it packed or not."""

  def shapes(self, size_in, size_out):
    return dict(g=(size_in, size_out))

  def of(self, rows):
    return dict(g=rows.outer(rows.x, rows.dy))

  def join(self, a, b):
    return jax.tree.map(jnp.add, a, b)
