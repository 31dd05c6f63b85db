"""A weight under many adapters, of which each row of a batch uses one.

The adapters are plain LoRA's factors, stacked; ranks below the largest are
padded with zeros, which is exact. `weights.bind(params, ids=...)` says which
row uses which, so a batch of any mixture is one program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import grouped_matmul
from research import weights
from research.lora.method import contracts_output
from research.typing import Array, Float, Int, PRNGKey, Shaped, UserError

NONE = -1
"""Id of a row that uses no adapter."""

UNROLLED = 32
"""The largest rank whose sum over one token a row is unrolled."""

FEW = 1024
"""Rows times their rank, up to which that is the fastest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedTensor(weights.WrappedWeight):
  """A weight, and `n` adapters that are applied by row.

  Attributes:
    w: the base weight, logical shape `[..., in, out]`.
    a: `[..., n, R, in]`.
    b: `[..., n, R, out]`; has each adapter's scale in it.
    ids: `[..., B]`, each row's adapter or `NONE`; None computes the base.
  """

  w: Any
  a: Any
  b: Any
  ids: Any = None

  is_adapter = True

  def einsum(self, eq: str, x: Float[Array, "B ..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` and what each row's adapter adds."""
    y = weights.einsum(eq, x, self.w)
    if self.ids is None:
      return y
    first, second = (
      (self.b, self.a) if contracts_output(eq) else (self.a, self.b)
    )
    rows = self._rows(x)
    flat = x.reshape(rows, -1, x.shape[-1])
    return y + added(flat, first, second, self.ids).reshape(y.shape)

  def take(self, ids: Int[Array, "B ..."]) -> Float[Array, "B ... D"]:
    """Returns embedding rows, each as its row of the batch has them."""
    y = weights.take(self.w, ids)
    if self.ids is None:
      return y
    tokens = ids.reshape(self._rows(ids), -1)
    own = jnp.maximum(self.ids, 0)
    z = self.a[own[:, None], :, tokens]
    z = jnp.where(self.ids[:, None, None] == NONE, 0, z)
    more = jnp.einsum("btr,bro->bto", z, self.b[own])
    return y + more.reshape(y.shape).astype(y.dtype)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the base's; experts are not adapted by row."""
    if self.ids is not None:
      raise UserError("adapters of experts cannot be chosen by row")
    return weights.ragged_dot(x, self.w, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the base: no adapter is the one to merge."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "BatchedTensor":
    """Factors are cut like the matrix, rows like all rows."""
    lead = (None,) * (self.ndim - 2)
    return BatchedTensor(
      w=weights.axes(self.w, names),
      a=(*lead, None, None, names[-2]),
      b=(*lead, None, None, names[-1]),
      ids=None if self.ids is None else (*lead, "batch"),
    )

  def bind(
    self, *, key: PRNGKey | None, ids: Int[Array, "B"] | None
  ) -> "BatchedTensor":
    """Returns itself with each row's adapter, for every matrix it stacks."""
    bound = super().bind(key=key, ids=ids)
    if ids is not None:
      ids = jnp.asarray(ids, jnp.int32)
      ids = jnp.broadcast_to(ids, (*self.a.shape[:-3], *ids.shape))
    return dataclasses.replace(bound, ids=ids)

  def map_base(self, f: Callable[[Any], Any]) -> "BatchedTensor":
    """Returns itself around `f(w)`."""
    return dataclasses.replace(self, w=f(self.w))

  def holding(self, a: Any, b: Any) -> "BatchedTensor":
    """Returns itself with other adapters."""
    return dataclasses.replace(self, a=a, b=b)

  def _rows(self, x: Any) -> int:
    rows = self.ids.shape[-1]
    if x.shape[0] != rows:
      raise UserError(
        f"a batch of {x.shape[0]} rows, but adapters are bound for {rows}; "
        "bind(params, ids=...) takes one id for each row"
      )
    return rows


def added(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """Returns each row times its adapter's factors, by the fastest way here.

  On one core, in microseconds for I = 576 and O = 1536, fp32 (the last on two
  of another machine):

    B    T   n   R   gathered  beside  grouped
    32   1   4   8         57      77      105
    32   1  32   8         66     648      659
    64   1   8   8        114     208      189
    64   1   8  16        318     523      347
    256  1  32  16       5365    5923     2547
    256  1  32  64      73671   23447     9831
    32  64   4   8       4850    6683    12464

  Args:
    x: activations.
    first, second: factors in the order of their use.
    ids: which adapter; `NONE` adds exactly 0.
  """
  n, rank = first.shape[:2]
  rows, time = x.shape[:2]
  first, second = first.astype(x.dtype), second.astype(x.dtype)
  few = rank <= UNROLLED and rows * rank <= FEW
  if time > 1 or rows < 2 * n or few:
    return gathered(x, first, second, ids)
  if n * rank <= 128:
    return beside(x, first, second, ids)
  return grouped(x, first, second, ids)


def gathered(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """`added`, each row with a copy of its own factors."""
  own = jnp.maximum(ids, 0)
  if x.shape[1] == 1 and first.shape[1] <= UNROLLED:
    return _one_token(x, first, second, ids, own)
  z = jnp.einsum("bti,bri->btr", x, first[own])
  z = jnp.where(ids[:, None, None] == NONE, 0, z)
  return jnp.einsum("btr,bro->bto", z, second[own])


def _one_token(x, first, second, ids, own):
  """`gathered` of a token a row: no factor is copied on the way back up.

  A sum of `R` scaled rows is one loop that reads the factors where they are.
  As a product of batches they are copied first: on one core, rank 8, 32 rows
  that take all of SmolLM2's 210 matrices, 36 ms instead of 160 in float32 and
  29 instead of 169 in bfloat16.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  z = jnp.einsum("bti,bri->br", x, first[own], preferred_element_type=wide)
  z = jnp.where(ids[:, None] == NONE, 0, z)
  terms = [
    second[own, r].astype(wide) * z[:, r, None] for r in range(z.shape[1])
  ]
  zero = jnp.zeros((len(x), second.shape[-1]), wide)
  return sum(terms, start=zero)[:, None].astype(x.dtype)


def beside(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """`added` as one adapter of rank `n R`, the others' part of it zeroed."""
  z = jnp.einsum("bti,nri->btnr", x, first)
  mine = ids[:, None] == jnp.arange(len(first))
  z = jnp.where(mine[:, None, :, None], z, 0)
  return jnp.einsum("btnr,nro->bto", z, second)


def grouped(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """`added` over rows sorted by adapter, each adapter read once."""
  n, (rows, time, width) = len(first), x.shape
  order = jnp.argsort(jnp.where(ids == NONE, n, ids))
  sizes = time * jnp.sum(ids[:, None] == jnp.arange(n), axis=0)
  flat = x[order].reshape(rows * time, width)
  z = grouped_matmul.matmul(flat, jnp.swapaxes(first, -1, -2), sizes)
  y = grouped_matmul.matmul(z, second, sizes)
  y = y.reshape(rows, time, second.shape[-1])
  return jnp.zeros_like(y).at[order].set(y)
