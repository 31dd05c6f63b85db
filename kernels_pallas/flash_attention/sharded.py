"""Flash attention over a mesh: each device runs the kernel on its own part.

Rows and heads do not depend on each other, so no device needs another's. Where
tokens are cut, attention crosses the devices in one of three ways, each in a
file of `kernels_pallas.sequence_parallel`: keys and values are gathered, go
around in a ring, or are exchanged for other heads'.
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
from kernels_pallas.sequence_parallel.zigzag import Names

OPTIONS = ("scale", "softcap", "backend", "config", "interpret", "precision")
"""Of `flash_attention`, what means the same on every device."""


@dataclasses.dataclass(frozen=True)
class Cut:
  """Which axes of the mesh cut which axes of the operands; none by default.

  Attributes:
    batch: of all operands; their sizes together divide B.
    length: of the queries (T), and of the keys where S = T: these are
      gathered.
    heads: of the query heads (N). Where they do not divide the key heads, too,
      each device takes the one key head that its query heads share.
    ring: of T, instead of `length`: keys and values go around.
    ulysses: of what `length` or `ring` leaves of T: tokens are exchanged for
      heads.
  """

  batch: Names = ()
  length: Names = ()
  heads: Names = ()
  ring: Names = ()
  ulysses: Names = ()

  def __post_init__(self):
    if self.length and self.ring:
      raise ValueError(
        f"cut: found length {self.length} and ring {self.ring}, expected one: "
        "keys are gathered or go around"
      )

  @property
  def tokens(self) -> Names:
    """All axes that cut T, the fastest last."""
    return (*self.length, *self.ring, *self.ulysses)


def sharded_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  mask: Mask,
  cut: Cut,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  **options: Any,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """`flash_attention` under the mesh that is set, over all of its axes.

  No operand is gathered, but for keys and values along `cut.length`. What
  `cut` does not name, or cannot cut (`possible`), is computed alike by all
  devices along that axis, without communication.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    mask: Who sees whom; its arrays are cut like the queries and keys.
    cut: Axes of the mesh.
    sinks: As of `flash_attention`.
    return_lse: Also return the log-sum-exp.
    **options: Of `flash_attention`: scale, softcap, backend, config,
      interpret, precision.

  Raises:
    ValueError: As `flash_attention`; other options, bias and dropout among
      them; `cut.ulysses` does not divide the heads.
  """
  if unknown := sorted(set(options) - set(OPTIONS)):
    raise ValueError(
      f"sharded attention: found {', '.join(unknown)}, expected only "
      f"{', '.join(OPTIONS)}; bias and dropout go by indices of the whole"
    )
  sizes = jax.sharding.get_abstract_mesh().shape
  cut = possible(cut, mask, q.shape, k.shape, sizes)
  if cut.length or cut.ring:
    mask = positioned(mask, q.shape[1], k.shape[1])
  own_keys = cut.tokens if q.shape[1] == k.shape[1] else ()
  shared = bool(cut.heads) and k.shape[2] % _size(cut.heads, sizes) != 0
  group = q.shape[2] // k.shape[2]
  attend = _crossing(cut) if own_keys else flash_attention

  def local(q, k, v, mask, sinks):
    if shared:
      first = jax.lax.axis_index(cut.heads) * q.shape[2] // group
      k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k, v))
    # All devices' gradients are added up behind the kernel, not in it.
    if cut.tokens and not own_keys:
      k, v = jax.lax.pcast((k, v), cut.tokens, to="varying")
    if sinks is not None:
      sinks = sinks.astype(accumulator(q.dtype))
      sinks = jax.lax.pcast(sinks, cut.batch + cut.tokens, to="varying")
    return attend(
      q, k, v, mask=mask, sinks=sinks, return_lse=return_lse, **options
    )

  ours = P(cut.batch, cut.tokens, cut.heads)
  theirs = P(cut.batch, own_keys, () if shared else cut.heads)
  rows = P(cut.batch, cut.heads, cut.tokens)
  of_sinks = None if sinks is None else P(cut.heads)
  return jax.shard_map(
    local,
    in_specs=(ours, theirs, theirs, _specs(mask, cut), of_sinks),
    out_specs=(ours, rows) if return_lse else ours,
    # The interpreter of kernels knows no types that vary over a mesh.
    check_vma=not options.get("interpret"),
  )(q, k, v, mask, sinks)


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
  share key heads only in part. Where there are more keys than queries, every
  device has all of them, and queries are cut without any exchange.

  Args:
    cut: Wanted.
    mask: Who sees whom.
    queries: Shape of q.
    keys: Shape of k.
    sizes: Of the mesh's axes, by name.
  """
  (_, T, N, _), (_, S, K, _) = queries, keys
  if T != S:
    cut = dataclasses.replace(cut, length=cut.tokens, ring=(), ulysses=())
  if mask.kind == "block_diffusion" or _level(mask, T, S) < 0:
    cut = dataclasses.replace(cut, length=(), ring=())
  own = N // _size(cut.heads, sizes)
  if K % _size(cut.heads, sizes) and N // K % own:
    cut = dataclasses.replace(cut, heads=())
  return cut


def positioned(mask: Mask, T: int, S: int) -> Mask:
  """The same mask with positions as data, so that it can be cut.

  Args:
    mask: Any that `possible` lets be cut along the queries.
    T: Queries a row.
    S: Keys a row.
  """
  if mask.kind == "full" and mask.window == (None, None):
    return mask
  level = _level(mask, T, S)
  ours, theirs = mask.q_positions, mask.kv_positions
  extent = mask.extent
  if mask.kind == "function":
    ours, theirs = (_below(x, extent) for x in (ours, theirs))
    extent = max(
      extent, T + level if ours is None else 0, S if theirs is None else 0
    )
  if ours is None:
    ours = jnp.arange(T, dtype=jnp.int32)[None] + level
  if theirs is None:
    theirs = jnp.arange(S, dtype=jnp.int32)[None]
  return dataclasses.replace(
    mask, q_positions=ours, kv_positions=theirs, extent=extent
  )


def _below(positions: Any, extent: int) -> Any:
  """Positions, those from `extent` on as padding, which nothing sees."""
  if positions is None:
    return None
  return jnp.where(positions < extent, positions, -1)


def _crossing(cut: Cut):
  """Attention over all devices that `cut` cuts the tokens for."""
  attend = flash_attention
  if cut.ring:
    attend = functools.partial(ring_attention, axis=cut.ring)
  elif cut.length:
    attend = functools.partial(gathered_attention, axis=cut.length)
  if cut.ulysses:
    attend = functools.partial(
      ulysses_attention, axis=cut.ulysses, attend=attend
    )
  return attend


def _level(mask: Mask, T: int, S: int) -> int:
  """Index of the key that is level with query 0."""
  if mask.q_positions is not None:
    return 0
  return mask.level(T, S)


def _specs(mask: Mask, cut: Cut) -> Mask:
  """How each of a mask's arrays is cut; a batch axis of 1 stays whole.

  Keys that are gathered have theirs whole, and so have tokens that are
  exchanged.
  """
  tokens = {"q": cut.length + cut.ring, "kv": cut.ring}

  def spec(name):
    leaf = getattr(mask, name)
    if leaf is None:
      return None
    along = tokens.get(name.split("_")[0])
    rest = () if along is None else (along,)
    return P(cut.batch if leaf.shape[0] > 1 else (), *rest)

  names = ("q_positions", "kv_positions", "q_segments", "kv_segments", "prefix")
  return dataclasses.replace(mask, **{name: spec(name) for name in names})


def _size(names: Names, sizes: Any) -> int:
  return math.prod(sizes[name] for name in names)
