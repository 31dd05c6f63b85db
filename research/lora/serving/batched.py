"""Multi-adapter LoRA: each row of a batch uses its own adapter.

A `BatchedTensor` holds a base weight and stacked LoRA factors; smaller ranks
are zero-padded, which is exact. `weights.bind(params, ids=...)` assigns
adapters to rows, so one compiled program serves any mixture.
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

MAX_UNROLLED_RANK = 32
"""Largest rank for which `by_gather` unrolls the sum over the rank.

For batches of one token per row."""

MAX_GATHERED = 1024
"""Largest product of rows and rank for which the unrolled sum is fastest."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedTensor(weights.WrappedWeight):
  """A weight with `n` LoRA adapters, one of which each row uses.

  Attributes:
    w: the base weight, logical shape `[..., in, out]`.
    a: `[..., n, R, in]`.
    b: `[..., n, R, out]`; includes each adapter's scale.
    ids: `[..., B]`, each row's adapter or `NONE`; None applies the base alone.
  """

  w: Any
  a: Any
  b: Any
  ids: Any = None

  is_adapter = True

  def einsum(self, eq: str, x: Float[Array, "B ..."]) -> Float[Array, "..."]:
    """Returns `einsum(eq, x, w)` plus the output of each row's adapter."""
    y = weights.einsum(eq, x, self.w)
    if self.ids is None:
      return y
    first, second = (
      (self.b, self.a) if contracts_output(eq) else (self.a, self.b)
    )
    rows = self._rows(x)
    flat = x.reshape(rows, -1, x.shape[-1])
    return y + rowwise_lora(flat, first, second, self.ids).reshape(y.shape)

  def take(self, ids: Int[Array, "B ..."]) -> Float[Array, "B ... D"]:
    """Returns embedding rows, each adapted as its row of the batch."""
    y = weights.take(self.w, ids)
    if self.ids is None:
      return y
    tokens = ids.reshape(self._rows(ids), -1)
    slots = jnp.maximum(self.ids, 0)
    z = self.a[slots[:, None], :, tokens]
    z = jnp.where(self.ids[:, None, None] == NONE, 0, z)
    update = jnp.einsum("btr,bro->bto", z, self.b[slots])
    return y + update.reshape(y.shape).astype(y.dtype)

  def ragged_dot(
    self, x: Float[Array, "T I"], sizes: Int[Array, "E"]
  ) -> Float[Array, "T O"]:
    """Returns the base's `ragged_dot`; raises UserError if `ids` are bound."""
    if self.ids is not None:
      raise UserError("adapters of experts cannot be chosen by row")
    return weights.ragged_dot(x, self.w, sizes)

  def dense(self) -> Shaped[Array, "..."]:
    """Returns the base: there is no single adapter to merge."""
    return weights.dense(self.w)

  def axes(self, names: tuple[str | None, ...]) -> "BatchedTensor":
    """Shards factors like the matrix, and ids like the batch."""
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
    """Returns a copy with each row's adapter id, for all stacked matrices."""
    bound = super().bind(key=key, ids=ids)
    if ids is not None:
      ids = jnp.asarray(ids, jnp.int32)
      ids = jnp.broadcast_to(ids, (*self.a.shape[:-3], *ids.shape))
    return dataclasses.replace(bound, ids=ids)

  def map_base(self, f: Callable[[Any], Any]) -> "BatchedTensor":
    return dataclasses.replace(self, w=f(self.w))

  def with_factors(self, a: Any, b: Any) -> "BatchedTensor":
    return dataclasses.replace(self, a=a, b=b)

  def _rows(self, x: Any) -> int:
    rows = self.ids.shape[-1]
    if x.shape[0] != rows:
      raise UserError(
        f"a batch of {x.shape[0]} rows, but adapters are bound for {rows}; "
        "bind(params, ids=...) takes one id for each row"
      )
    return rows


def rowwise_lora(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """Returns each row's adapter output `x firstᵀ second`.

  Chooses the fastest of three implementations by size. Microseconds for
  I = 576, O = 1536, fp32, on one CPU core (last row: two cores of another
  machine):

    B    T   n   R  by_gather  by_masking  by_grouping
    32   1   4   8         57          77          105
    32   1  32   8         66         648          659
    64   1   8   8        114         208          189
    64   1   8  16        318         523          347
    256  1  32  16       5365        5923         2547
    256  1  32  64      73671       23447         9831
    32  64   4   8       4850        6683        12464

  Args:
    first, second: stacked factors, in the order of application.
    ids: each row's adapter; `NONE` gives exactly 0.
  """
  n, rank = first.shape[:2]
  rows, time = x.shape[:2]
  first, second = first.astype(x.dtype), second.astype(x.dtype)
  few = rank <= MAX_UNROLLED_RANK and rows * rank <= MAX_GATHERED
  if time > 1 or rows < 2 * n or few:
    return by_gather(x, first, second, ids)
  if n * rank <= 128:
    return by_masking(x, first, second, ids)
  return by_grouping(x, first, second, ids)


def by_gather(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """`rowwise_lora` by gathering each row's factors."""
  slots = jnp.maximum(ids, 0)
  if x.shape[1] == 1 and first.shape[1] <= MAX_UNROLLED_RANK:
    return _one_token(x, first, second, ids, slots)
  z = jnp.einsum("bti,bri->btr", x, first[slots])
  z = jnp.where(ids[:, None, None] == NONE, 0, z)
  return jnp.einsum("btr,bro->bto", z, second[slots])


def _one_token(x, first, second, ids, slots):
  """`by_gather` for one token per row, without copying the second factors.

  A sum of `R` scaled rows is one loop that reads the factors in place, while a
  batched product copies them first: on one core, rank 8, 32 rows, all of
  SmolLM2's 210 matrices, 36 ms instead of 160 in float32 and 29 ms instead of
  169 in bfloat16.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  z = jnp.einsum("bti,bri->br", x, first[slots], preferred_element_type=wide)
  z = jnp.where(ids[:, None] == NONE, 0, z)
  terms = [
    second[slots, r].astype(wide) * z[:, r, None] for r in range(z.shape[1])
  ]
  zero = jnp.zeros((len(x), second.shape[-1]), wide)
  return sum(terms, start=zero)[:, None].astype(x.dtype)


def by_masking(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """`rowwise_lora` as one adapter of rank `n R`, masked to each row's part."""
  z = jnp.einsum("bti,nri->btnr", x, first)
  mine = ids[:, None] == jnp.arange(len(first))
  z = jnp.where(mine[:, None, :, None], z, 0)
  return jnp.einsum("btnr,nro->bto", z, second)


def by_grouping(
  x: Float[Array, "B T I"],
  first: Float[Array, "n R I"],
  second: Float[Array, "n R O"],
  ids: Int[Array, "B"],
) -> Float[Array, "B T O"]:
  """`rowwise_lora` by grouped matmul over rows sorted by adapter.

  Reads each adapter once."""
  n, (rows, time, width) = len(first), x.shape
  order = jnp.argsort(jnp.where(ids == NONE, n, ids))
  sizes = time * jnp.sum(ids[:, None] == jnp.arange(n), axis=0)
  flat = x[order].reshape(rows * time, width)
  z = grouped_matmul.matmul(flat, jnp.swapaxes(first, -1, -2), sizes)
  y = grouped_matmul.matmul(z, second, sizes)
  y = y.reshape(rows, time, second.shape[-1])
  return jnp.zeros_like(y).at[order].set(y)
