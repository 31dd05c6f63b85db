"""Processing of one block of keys in the TPU decoding kernel."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from kernels_pallas.decode_attention.pages import MAX_CODE
from kernels_pallas.decode_attention.spec import Spec
from kernels_pallas.decode_attention.work import Problem

NAMES = (
  "row", "position", "count", "low", "high", "base", "start", "stop",
  "slot", "first", "next",
)  # fmt: skip
"""Fields of each entry. The last three describe the stream of blocks: the
buffer of its first block, whether it is the first entry with blocks, and the
item of the next such entry."""

HEADS = 8
"""Key heads that are unrolled; more are processed in a loop."""

LANES = 128
NT = (((1,), (1,)), ((), ()))
NN = (((1,), (0,)), ((), ()))


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static part of a problem, as the kernel needs it.

  Attributes:
    spec: Static part of the call.
    dims: (items, K, M, H), M padded to whole registers; H + Hv if keys and
      values are used side by side.
    width_v: Width of the output: Hv, or H + Hv.
    group: G.
    few: Rows of an item's first token, padded; M if items have one token.
    unit, block: Keys per page, per block.
    capacity: Most keys of a row.
    pages: Pages per row of the table; 0 for a cache.
    dtype: Dtype of the matmuls' operands.
    names: Names of the arrays to copy.
    shapes: Shapes of their blocks.
  """

  spec: Spec
  dims: tuple[int, ...]
  width_v: int
  group: int
  few: int
  unit: int
  block: int
  capacity: int
  pages: int
  dtype: Any
  names: tuple[str, ...]
  shapes: Any


@dataclasses.dataclass(frozen=True)
class Entry:
  """An entry of the work list in scalar memory, read by field name.

  Attributes:
    entries: The list, `[fields x E]`.
    index: Index of the entry.
  """

  entries: Any
  index: Any

  def __getitem__(self, name: str) -> jax.Array:
    size = self.entries.shape[0] // len(NAMES)
    return self.entries[NAMES.index(name) * size + self.index]


def plan(p: Problem) -> Plan:
  """Returns the static part of `p`."""
  items, _, M, _ = p.q.shape
  K, H, Hv = p.heads
  sublanes = 32 // p.q.dtype.itemsize
  count, M = p.block // p.unit, _up(M, sublanes)
  if p.table is None:
    shapes = {"k": (1, K, p.block, H), "v": (1, K, p.block, Hv)}
  else:
    shapes = {"kv": (count, *p.storage.kv.shape[1:])}
    if p.storage.scale is not None:
      shapes["scale"] = (count, *p.storage.scale.shape[1:])
    if H % LANES:
      H = Hv = H + Hv
  plain = [dtype for dtype in memory_dtypes(p) if dtype not in MAX_CODE]
  return Plan(
    spec=p.spec,
    dims=(items, K, M, H),
    width_v=Hv,
    group=p.group,
    few=min(_up(p.group, sublanes), M),
    unit=p.unit,
    block=p.block,
    capacity=p.capacity,
    pages=0 if p.table is None else p.table.shape[1],
    dtype=jnp.result_type(p.q.dtype, *plain),
    names=tuple(shapes),
    shapes=shapes,
  )


def memory_dtypes(p: Problem) -> tuple[Any, ...]:
  """Returns the dtypes of keys and values in memory."""
  if p.table is None:
    return p.storage.k.dtype, p.storage.v.dtype
  return (p.storage.kv.dtype,)


def first_key(x: Plan, entry: Entry, n: Any) -> jax.Array:
  """Returns the first key copied for block n: the last block of a row of a
  cache is shifted back to end with it."""
  first = entry["base"] + n * x.block
  if x.pages:
    return first
  aligned = math.gcd(x.block, x.capacity)
  first = jnp.minimum(first, x.capacity - x.block)
  return pl.multiple_of(first, aligned)


def attend(x: Plan, entry: Entry, n: Any, q, storage, state) -> None:
  """Adds block n of an entry to the softmax state (kernels_pallas/MATH.md 2.1).

  Skips work that the block does not need: masks unless at an edge of the
  visible range, and the rows of all but the first token if there is no other.

  Args:
    x: The plan.
    entry: The entry.
    n: The block.
    q: Ref [K, M, H].
    storage: Refs of the block, by name.
    state: Refs of maximum, sum [K, M, 1] and output [K, M, Hv].
  """
  first, fresh = first_key(x, entry, n), entry["base"] + n * x.block
  whole = (first == fresh) & (first + x.block - 1 <= entry["position"])
  if x.spec.window is not None:
    last = entry["position"] + entry["count"] - 1
    whole &= first > last - x.spec.window
  whole &= first + x.block <= entry["high"]
  single = entry["count"] == 1

  def run(rows, masked):
    def heads(start):
      for h in range(start[0], start[1]):
        _head(x, entry, (first, fresh), h, rows, masked, q, storage, state)

    K = x.dims[1]
    unrolled = math.gcd(K, HEADS)
    if unrolled == K:
      heads((0, K))
      return

    def some(j, carry):
      for h in range(unrolled):
        _head(x, entry, (first, fresh), j * unrolled + h, rows, masked, q,
              storage, state)  # fmt: skip
      return carry

    jax.lax.fori_loop(0, K // unrolled, some, 0)

  many = x.dims[2]
  for rows in sorted({x.few, many}):
    chosen = single if rows < many else jnp.logical_not(single)
    chosen = True if x.few == many else chosen
    pl.when(chosen & whole)(lambda rows=rows: run(rows, False))
    pl.when(chosen & ~whole)(lambda rows=rows: run(rows, True))


def _head(x: Plan, entry, keys, h, rows, masked, q, storage, state):
  m, l, acc = state
  here = pl.ds(0, rows)
  k, v = _keys_and_values(x, storage, h)
  s = _dot(x, q[h, here].astype(x.dtype), k.astype(x.dtype), NT)
  t = _logits(x, s, storage, h)
  if masked:
    t = jnp.where(_visible(x, entry, keys, rows), t, -jnp.inf)
    # Invisible values may be NaN, and 0 * NaN is NaN.
    v = jnp.where(_alive(x, entry, keys), v.astype(x.dtype), 0)
  before = m[h, here]
  after = jnp.maximum(before, jnp.max(t, axis=1, keepdims=True))
  probabilities = jnp.exp2(t - after)
  factor = jnp.exp2(before - after)
  l[h, here] = l[h, here] * factor + jnp.sum(
    probabilities, axis=1, keepdims=True
  )
  m[h, here] = after
  if "scale" in storage:
    scale = _row(storage["scale"][:, 1, h])
    if masked:
      scale = jnp.where(_alive_row(x, entry, keys), scale, 0)
    probabilities = probabilities * scale
  values = _dot(x, probabilities.astype(x.dtype), v.astype(x.dtype), NN)
  acc[h, here] = acc[h, here] * factor + values


def _logits(x: Plan, s, storage, h):
  """Returns base-2 logits of products."""
  unit = 1 / math.log(2)
  scale = x.spec.scale * (unit if x.spec.softcap is None else 1)
  if x.spec.softcap is not None:
    scale = scale / x.spec.softcap
  t = s * scale
  if "scale" in storage:
    t = t * _row(storage["scale"][:, 0, h])
  if x.spec.softcap is not None:
    t = x.spec.softcap * unit * jnp.tanh(t)
  return t


def _visible(x: Plan, entry, keys, rows):
  """Returns which queries see which keys, [rows, block]."""
  first, fresh = keys
  key = first + jax.lax.broadcasted_iota(jnp.int32, (rows, x.block), 1)
  row = jax.lax.broadcasted_iota(jnp.int32, (rows, x.block), 0)
  query = jax.lax.div(row, np.int32(x.group))
  position = jnp.minimum(entry["position"] + query, entry["high"] - 1)
  seen = (key <= position) & (key >= fresh)
  if x.spec.window is not None:
    seen &= key > position - x.spec.window
  return seen


def _alive(x: Plan, entry, keys):
  """Returns which keys any query sees, [block, 1]."""
  key = keys[0] + jax.lax.broadcasted_iota(jnp.int32, (x.block, 1), 0)
  return _among(entry, keys, key)


def _alive_row(x: Plan, entry, keys):
  key = keys[0] + jax.lax.broadcasted_iota(jnp.int32, (1, x.block), 1)
  return _among(entry, keys, key)


def _among(entry, keys, key):
  low = jnp.maximum(entry["low"], keys[1])
  return (key >= low) & (key < entry["high"])


def store_rows(ref, columns) -> None:
  """Writes columns [K, M, 1] as the rows of a ref [K, 1, M]."""
  for h in range(columns.shape[0]):
    wide = jnp.broadcast_to(columns[h], (columns.shape[1], LANES))
    ref[h] = wide.T[:1]


def varying(x: jax.Array, shape: tuple[int, ...]) -> Any:
  """Returns a float32 output type that varies over the mesh as `x` does."""
  return jax.eval_shape(
    lambda x: jnp.zeros_like(x, jnp.float32, shape=shape), x
  )


def _keys_and_values(x: Plan, storage, h):
  """Returns keys and values of one head, [block, H] and [block, width_v].

  If a head does not fill a register, both are keys and values side by side: the
  queries are zero where the values are, and the keys' part of the output is
  dropped. A matrix unit is that wide anyway.
  """
  if "k" in storage:
    return storage["k"][0, h], storage["v"][0, h]
  kv = storage["kv"][:, h].reshape(x.block, -1)
  H = x.dims[3]
  return (kv, kv) if kv.shape[1] == H else (kv[:, :H], kv[:, H:])


def _row(scales):
  """Reshapes [pages, size] to [1, block]."""
  return jnp.concatenate(
    [scales[j : j + 1] for j in range(scales.shape[0])], axis=1
  )


def _dot(x: Plan, a, b, dims):
  return jax.lax.dot_general(
    a, b, dims, precision=x.spec.precision, preferred_element_type=jnp.float32
  )


def _up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
