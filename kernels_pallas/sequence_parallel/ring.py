"""Ring attention: keys and values rotate around the devices, queries stay.

Each device holds one shard of the tokens. In each of n steps it attends to its
current shard of keys and values while sending that to its neighbour, and
combines the partial results by their log-sum-exps, in the accumulator dtype
(Liu et al. 2023, "Ring Attention with Blockwise Transformers",
arXiv:2310.01889). The backward pass rotates (k, v) again, and dk and dv with
them; each step's gradients need only the output and log-sum-exp over all keys.
Memory is that of one shard; a step without a visible pair does no work.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from kernels_pallas.common.target_platform import accumulator
from kernels_pallas.flash_attention import cotangents
from kernels_pallas.flash_attention.api import prepare
from kernels_pallas.flash_attention.spec import Backend, Operands, Spec
from kernels_pallas.masks import Mask, intervals
from kernels_pallas.sequence_parallel.combine import combine
from kernels_pallas.sequence_parallel.zigzag import MeshAxes, fit_half_shards


def ring_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  axis: MeshAxes,
  mask: Mask,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  **options: Any,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """`flash_attention` over the keys of all devices, under `jax.shard_map`.

  Args:
    q: This device's queries.
    k: This device's keys.
    v: This device's values.
    axis: Mesh axes that shard the tokens.
    mask: Mask of this device's queries and keys, with explicit positions unless
      everything is visible. Tokens may be in any order; zig-zag order
      (`zigzag.zigzag`) balances causal work over devices.
    sinks: As in `flash_attention`.
    return_lse: Also return the log-sum-exp.
    **options: Options of `flash_attention`: scale, softcap, backend, config,
      interpret, precision.

  Raises:
    ValueError: As in `flash_attention`; for a mask without positions; for a
      backend without gradients for a subset of the keys.
  """
  x = Operands(q, k, v, mask, sinks=sinks)
  backend, spec = prepare(x, **options)
  if backend.gradients is None:
    raise ValueError(
      f"ring attention: found backend {options['backend']!r}, expected one "
      "that has gradients for a part of the keys, such as xla_blockwise"
    )
  _check(mask)
  spec = dataclasses.replace(
    spec, blocks=fit_half_shards(spec.blocks, q.shape[1], k.shape[1])
  )
  o, lse = _ring(_Ring(backend, axis), spec, x)
  return (o, lse) if return_lse else o


@dataclasses.dataclass(frozen=True)
class _Ring:
  backend: Backend
  axis: MeshAxes

  @property
  def size(self) -> int:
    return jax.lax.axis_size(self.axis)

  def pass_on(self, x: Any) -> Any:
    """Sends `x` to the next device and returns the previous device's."""
    n = self.size
    pairs = [(r, (r + 1) % n) for r in range(n)]
    return jax.lax.ppermute(x, self.axis, pairs)


class _Keys(NamedTuple):
  """What rotates: k, v, and the keys' positions and segments."""

  k: Array
  v: Array
  positions: Array | None
  segments: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(ring: _Ring, spec: Spec, x: Operands):
  """Returns the output and log-sum-exp over all keys."""
  dtype = accumulator(x.q.dtype)
  partial = dataclasses.replace(spec, output=dtype)

  def accumulate(state, keys):
    def attend(step):
      new = ring.backend.attend(partial, step)
      return combine(*zip(state, new, strict=True))

    return _if_visible(x, keys, attend, state)

  def turn(carry, _):
    state, keys = carry
    following = ring.pass_on(keys)
    return (accumulate(state, keys), following), None

  carry = (_nothing(x, dtype), _keys(x))
  (state, keys), _ = jax.lax.scan(turn, carry, None, ring.size - 1)
  o, lse = accumulate(state, keys)
  if x.sinks is not None:
    # A sink acts as a key whose value is 0; it is added once, not per shard.
    sinks = jnp.broadcast_to(x.sinks.astype(dtype)[None, :, None], lse.shape)
    o, lse = combine((o, jnp.zeros_like(o)), (lse, sinks))
  return o.astype(x.q.dtype), lse


def _forward(ring, spec, x):
  o, lse = _ring.__wrapped__(ring, spec, x)
  o = checkpoint_name(o, "attn_out")
  lse = checkpoint_name(lse, "attn_lse")
  return (o, lse), (x, o, lse)


def _backward(ring, spec, saved, arrived):
  x, o, lse = saved
  rows = cotangents.query_cotangents(x, o, lse, *arrived)

  def accumulate(sums, keys):
    def attend(step):
      found = ring.backend.gradients(spec, step, rows)
      new = (found.q, found.k, found.v)
      return tuple(a + b for a, b in zip(sums, new, strict=True))

    return _if_visible(x, keys, attend, sums)

  def turn(carry, _):
    (dq, dk, dv), keys = carry
    following = ring.pass_on(keys)
    dq, *theirs = accumulate((dq, dk, dv), keys)
    return ((dq, *ring.pass_on(theirs)), following), None

  dtype = accumulator(x.q.dtype)
  sums = tuple(jnp.full_like(y, 0, dtype) for y in (x.q, x.k, x.v))
  (sums, keys), _ = jax.lax.scan(turn, (sums, _keys(x)), None, ring.size - 1)
  dq, *theirs = accumulate(sums, keys)
  dk, dv = ring.pass_on(theirs)
  found = Operands(dq, dk, dv, None)
  return (cotangents.cast_gradients(x, found, rows),)


_ring.defvjp(_forward, _backward)


def _keys(x: Operands) -> _Keys:
  return _Keys(x.k, x.v, x.mask.kv_positions, x.mask.kv_segments)


def _nothing(x: Operands, dtype: Any) -> tuple[Array, Array]:
  """Returns the output and log-sum-exp before the first key."""
  B, T, N, _ = x.q.shape
  return (
    jnp.full_like(x.q, 0, dtype, shape=(B, T, N, x.v.shape[-1])),
    jnp.full_like(x.q, -jnp.inf, dtype, shape=(B, N, T)),
  )


def _if_visible(x: Operands, keys: _Keys, attend, otherwise):
  """Attends to the current keys, or returns `otherwise` if none is visible."""
  mask = dataclasses.replace(
    x.mask, kv_positions=keys.positions, kv_segments=keys.segments
  )
  step = x._replace(k=keys.k, v=keys.v, mask=mask, sinks=None)
  T, S = x.q.shape[1], keys.k.shape[1]
  # In halves, since a shard in zig-zag order has early and late tokens.
  tiles = intervals.tile_classes(
    intervals.mask_intervals(mask, T, S), T, S, -(-T // 2), -(-S // 2)
  )
  if isinstance(tiles, np.ndarray):
    return attend(step)
  visible = jnp.any(tiles != intervals.EMPTY)
  return jax.lax.cond(visible, lambda: attend(step), lambda: otherwise)


def _check(mask: Mask) -> None:
  if mask.kind == "full" and mask.window == (None, None):
    return
  missing = mask.kv_positions is None
  missing |= mask.q_positions is None and mask.kind != "intervals"
  if mask.kind == "block_diffusion" or missing:
    raise ValueError(
      f"ring attention: found a {mask.kind} mask by index, expected "
      "q_positions and kv_positions: a shard does not know where it begins"
    )
