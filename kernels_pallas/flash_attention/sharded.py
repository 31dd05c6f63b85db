"""Flash attention over a mesh: each device runs the kernel on its own part.

Rows and heads do not depend on each other, so no device needs another's. Where
queries are cut along the sequence, keys and values are gathered for one layer
at a time (and their gradients scattered back, summed): a device then computes
its own queries against all keys, as Llama 3's context parallelism does
(Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.masks import Mask

Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Cut:
  """Which axes of the mesh cut which axes of the operands; none by default.

  Attributes:
    batch: of all operands; their sizes together divide B.
    length: of the queries (T), and of the keys where S = T.
    heads: of the query heads (N). Where they do not divide the key heads, too,
      each device takes the one key head that its query heads share.
  """

  batch: Names = ()
  length: Names = ()
  heads: Names = ()


def sharded_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  mask: Mask,
  cut: Cut,
  **options: Any,
) -> Float[Array, "B T N Hv"]:
  """`flash_attention` under the mesh that is set, over all of its axes.

  No operand is gathered, but for keys and values along the sequence. What
  `cut` does not name, or cannot cut (`possible`), is computed alike by all
  devices along that axis, without communication.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    mask: Who sees whom; its arrays are cut like the queries and keys.
    cut: Axes of the mesh.
    **options: Of `flash_attention`: scale, softcap, backend, config, precision.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  cut = possible(cut, mask, q.shape, k.shape, sizes)
  if cut.length:
    mask = positioned(mask, q.shape[1], k.shape[1])
  own_keys = cut.length if q.shape[1] == k.shape[1] else ()
  shared = bool(cut.heads) and k.shape[2] % _size(cut.heads, sizes) != 0
  group = q.shape[2] // k.shape[2]

  def local(q, k, v, mask):
    if shared:
      first = jax.lax.axis_index(cut.heads) * q.shape[2] // group
      k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k, v))
    if own_keys:
      k, v = (
        jax.lax.all_gather(x, own_keys, axis=1, tiled=True) for x in (k, v)
      )
    elif cut.length:
      # All devices' gradients are added up behind the kernel, not in it.
      k, v = jax.lax.pcast((k, v), cut.length, to="varying")
    return flash_attention(q, k, v, mask=mask, **options)

  ours = P(cut.batch, cut.length, cut.heads)
  theirs = P(cut.batch, own_keys, () if shared else cut.heads)
  return jax.shard_map(
    local,
    in_specs=(ours, theirs, theirs, _specs(mask, cut)),
    out_specs=ours,
  )(q, k, v, mask)


def possible(
  cut: Cut,
  mask: Mask,
  queries: tuple[int, ...],
  keys: tuple[int, ...],
  sizes: Any,
) -> Cut:
  """What of `cut` leaves each device a problem of its own.

  Queries stay whole where a rule depends on their index: block diffusion, and
  more queries than keys. Heads stay whole where a device's query heads would
  share key heads only in part.

  Args:
    cut: Wanted.
    mask: Who sees whom.
    queries: Shape of q.
    keys: Shape of k.
    sizes: Of the mesh's axes, by name.
  """
  (_, T, N, _), (_, S, K, _) = queries, keys
  if mask.kind == "block_diffusion" or _level(mask, T, S) < 0:
    cut = dataclasses.replace(cut, length=())
  own = N // _size(cut.heads, sizes)
  if K % _size(cut.heads, sizes) and N // K % own:
    cut = dataclasses.replace(cut, heads=())
  return cut


def positioned(mask: Mask, T: int, S: int) -> Mask:
  """The same mask with its queries' positions as data, so that it can be cut.

  Args:
    mask: Any that `possible` lets be cut along the queries.
    T: Queries a row.
    S: Keys a row.
  """
  if mask.q_positions is not None:
    return mask
  positions = jnp.arange(T, dtype=jnp.int32)[None] + _level(mask, T, S)
  return dataclasses.replace(mask, q_positions=positions)


def _level(mask: Mask, T: int, S: int) -> int:
  """Index of the key that is level with query 0."""
  if mask.q_positions is not None:
    return 0
  return S - T if mask.offset is None else mask.offset


def _specs(mask: Mask, cut: Cut) -> Mask:
  """How each of a mask's arrays is cut; a batch axis of 1 stays whole."""

  def spec(name):
    leaf = getattr(mask, name)
    if leaf is None:
      return None
    along = (cut.length,) if name.startswith("q_") else ()
    return P(cut.batch if leaf.shape[0] > 1 else (), *along)

  names = ("q_positions", "kv_positions", "q_segments", "kv_segments", "prefix")
  return dataclasses.replace(mask, **{name: spec(name) for name in names})


def _size(names: Names, sizes: Any) -> int:
  return math.prod(sizes[name] for name in names)
