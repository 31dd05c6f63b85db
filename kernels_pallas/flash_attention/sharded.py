"""Flash attention on a mesh: each device runs the kernel on its own shard.

Batch rows and heads are independent, so sharding them needs no communication.
If tokens are sharded, attention communicates in one of three ways, each in a
module of `kernels_pallas.sequence_parallel`: all-gather of keys and values,
ring, or all-to-all between tokens and heads (Ulysses).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel.gather import gathered_attention
from kernels_pallas.sequence_parallel.ring import ring_attention
from kernels_pallas.sequence_parallel.ulysses import ulysses_attention
from kernels_pallas.sequence_parallel.zigzag import MeshAxes

OPTIONS = ("scale", "softcap", "backend", "config", "interpret", "precision")
"""Options of `flash_attention` that have the same meaning on every device."""


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
  """Which mesh axes shard which axes of the operands; none by default.

  Attributes:
    batch: Shard B of all operands; their sizes together divide B.
    length: Shard T of the queries, and of the keys if S = T, which are then
      gathered.
    heads: Shard the query heads N. If they do not divide the key heads, each
      device takes the one key head that its query heads share.
    ring: Shard T instead of `length`, with ring attention.
    ulysses: Shard what `length` or `ring` leave of T, with an all-to-all
      between tokens and heads.
  """

  batch: MeshAxes = ()
  length: MeshAxes = ()
  heads: MeshAxes = ()
  ring: MeshAxes = ()
  ulysses: MeshAxes = ()

  def __post_init__(self):
    if self.length and self.ring:
      raise ValueError(
        f"sharding: found length {self.length} and ring {self.ring}, expected "
        "one: keys are gathered or go around"
      )

  @property
  def tokens(self) -> MeshAxes:
    """All mesh axes that shard T, the fastest last."""
    return (*self.length, *self.ring, *self.ulysses)


def sharded_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  mask: Mask,
  sharding: AttentionSharding,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  **options: Any,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """`flash_attention` under the current mesh, over all of its axes.

  Nothing is gathered except keys and values along `sharding.length`. Along axes
  that `sharding` does not name, or that cannot be used (`supported_sharding`),
  all devices compute the same, without communication.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    mask: Which keys each query sees; its arrays are sharded like the operands.
    sharding: Mesh axes that shard the operands.
    sinks: As in `flash_attention`.
    return_lse: Also return the log-sum-exp.
    **options: Options of `flash_attention`: scale, softcap, backend, config,
      interpret, precision.

  Raises:
    ValueError: As in `flash_attention`; for other options, such as bias and
      dropout; or if `sharding.ulysses` or `sharding.heads` does not divide the
      heads.
  """
  if unknown := sorted(set(options) - set(OPTIONS)):
    raise ValueError(
      f"sharded attention: found {', '.join(unknown)}, expected only "
      f"{', '.join(OPTIONS)}; bias and dropout go by indices of the whole"
    )
  mask.check(q.shape[0], q.shape[1], k.shape[1])
  sizes = jax.sharding.get_abstract_mesh().shape
  sharding = supported_sharding(sharding, mask, q.shape, k.shape, sizes)
  if sharding.length or sharding.ring:
    mask = with_positions(mask, q.shape[1], k.shape[1])
  own_keys = sharding.tokens if q.shape[1] == k.shape[1] else ()
  shared = (
    bool(sharding.heads) and k.shape[2] % _size(sharding.heads, sizes) != 0
  )
  group = q.shape[2] // k.shape[2]
  attend = _crossing(sharding) if own_keys else flash_attention

  def local(q, k, v, mask, sinks):
    if shared:
      first = jax.lax.axis_index(sharding.heads) * q.shape[2] // group
      k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k, v))
    # Gradients are summed over devices outside of the kernel.
    if sharding.tokens and not own_keys:
      k, v = jax.lax.pcast((k, v), sharding.tokens, to="varying")
    if sinks is not None:
      sinks = sinks.astype(accumulator(q.dtype))
      sinks = jax.lax.pcast(
        sinks, sharding.batch + sharding.tokens, to="varying"
      )
    return attend(
      q, k, v, mask=mask, sinks=sinks, return_lse=return_lse, **options
    )

  ours = P(sharding.batch, sharding.tokens, sharding.heads)
  theirs = P(sharding.batch, own_keys, () if shared else sharding.heads)
  rows = P(sharding.batch, sharding.heads, sharding.tokens)
  of_sinks = None if sinks is None else P(sharding.heads)
  return jax.shard_map(
    local,
    in_specs=(ours, theirs, theirs, _specs(mask, sharding), of_sinks),
    out_specs=(ours, rows) if return_lse else ours,
    # The kernels' interpreter does not support types that vary over a mesh.
    check_vma=not options.get("interpret"),
  )(q, k, v, mask, sinks)


def supported_sharding(
  sharding: AttentionSharding,
  mask: Mask,
  queries: tuple[int, ...],
  keys: tuple[int, ...],
  sizes: Any,
) -> AttentionSharding:
  """Returns the part of `sharding` that keeps devices independent.

  Queries are not sharded where a rule depends on their index: block diffusion,
  and more queries than keys. Heads are not sharded where a device's query heads
  would straddle key heads. With more keys than queries, every device has all
  keys, and queries are sharded without communication.

  Args:
    sharding: Requested sharding.
    mask: Which keys each query sees.
    queries: Shape of q.
    keys: Shape of k.
    sizes: Sizes of the mesh's axes, by name.

  Raises:
    ValueError: Devices would have different numbers of query heads.
  """
  (_, T, N, _), (_, S, K, _) = queries, keys
  if T != S:
    sharding = dataclasses.replace(
      sharding, length=sharding.tokens, ring=(), ulysses=()
    )
  if mask.kind == "block_diffusion" or _resolve_offset(mask, T, S) < 0:
    sharding = dataclasses.replace(sharding, length=(), ring=())
  devices = _size(sharding.heads, sizes)
  own = N // devices
  if own and K % devices and N // K % own:
    return dataclasses.replace(sharding, heads=())
  if N % devices:
    raise ValueError(
      f"sharding.heads: found {N} query heads over {devices} devices of axes "
      f"{sharding.heads}, expected as many on each"
    )
  return sharding


def with_positions(mask: Mask, T: int, S: int) -> Mask:
  """Returns the mask with explicit positions, so that it can be sharded.

  Args:
    mask: A mask that `supported_sharding` lets be sharded along the queries.
    T: Queries per batch row.
    S: Keys per batch row.
  """
  if mask.kind == "full" and mask.window == (None, None):
    return mask
  offset = _resolve_offset(mask, T, S)
  ours, theirs = mask.q_positions, mask.kv_positions
  extent = mask.extent
  if mask.kind == "function":
    ours, theirs = (_below(x, extent) for x in (ours, theirs))
    extent = max(
      extent, T + offset if ours is None else 0, S if theirs is None else 0
    )
  # Coordinates of keys alone are no positions, and take no window.
  alone = mask.kind == "intervals" and theirs is not None
  if ours is None and not alone:
    ours = jnp.arange(T, dtype=jnp.int32)[None] + offset
  if theirs is None:
    theirs = jnp.arange(S, dtype=jnp.int32)[None]
  return dataclasses.replace(
    mask, q_positions=ours, kv_positions=theirs, extent=extent
  )


def _below(positions: Any, extent: int) -> Any:
  """Marks positions from `extent` on as padding."""
  if positions is None:
    return None
  return jnp.where(positions < extent, positions, -1)


def _crossing(sharding: AttentionSharding):
  """Returns attention across all devices that shard the tokens."""
  attend = flash_attention
  if sharding.ring:
    attend = functools.partial(ring_attention, axis=sharding.ring)
  elif sharding.length:
    attend = functools.partial(gathered_attention, axis=sharding.length)
  if sharding.ulysses:
    attend = functools.partial(
      ulysses_attention, axis=sharding.ulysses, attend=attend
    )
  return attend


def _resolve_offset(mask: Mask, T: int, S: int) -> int:
  """Returns the position of query 0, in key indices."""
  if mask.q_positions is not None:
    return 0
  return mask.resolve_offset(T, S)


def _specs(mask: Mask, sharding: AttentionSharding) -> Mask:
  """Returns the partition specs of a mask's arrays; a batch axis of 1 is whole.

  Arrays of keys that are gathered, and of tokens exchanged by Ulysses, are
  whole too.
  """
  tokens = {"q": sharding.length + sharding.ring, "kv": sharding.ring}

  def spec(name):
    leaf = getattr(mask, name)
    if leaf is None:
      return None
    along = tokens.get(name.split("_")[0])
    rest = () if along is None else (along,)
    if name == "bounds":
      rest = (None, tokens["q"])
    return P(sharding.batch if leaf.shape[0] > 1 else (), *rest)

  names = ("q_positions", "kv_positions", "q_segments", "kv_segments")
  names += ("prefix", "bounds")
  return dataclasses.replace(mask, **{name: spec(name) for name in names})


def _size(names: MeshAxes, sizes: Any) -> int:
  return math.prod(sizes[name] for name in names)
