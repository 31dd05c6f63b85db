"""Zig-zag token order, which balances causal attention on a sequence mesh.

If a causal sequence is sharded in text order, the devices with the last tokens
do nearly all of the attention work. So the layers process tokens in zig-zag
order (`kernels_pallas.sequence_parallel.zigzag`). This costs two exchanges of
the residual stream per step, not one per layer. Embeddings, losses and callers
of the model only see text order.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels_pallas.flash_attention import sharded
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel import zigzag
from research import sharding, weights
from research.typing import Array, Float, Int, Params

CAUSAL = ("causal", "prefix", "block_causal", "intervals")
"""Kinds of mask under which late tokens attend to more keys than early ones.

Of intervals that is not known, but images and trees in causal text are so.
"""

_ARRAYS = ("q_positions", "kv_positions", "q_segments", "kv_segments")


def zigzag_axes(mask: Mask, shape: tuple[int, int]) -> tuple[str, ...]:
  """Returns the mesh axes over which to reorder tokens; () for none.

  There are none if the work is balanced anyway: rows are not sharded, the mask
  is not causal, or `ulysses` exchanges tokens for heads.

  Args:
    mask: the attention mask.
    shape: (B, T).
  """
  if not sharding.is_cut() or mask.kind not in CAUSAL or (mask.offset or 0) < 0:
    return ()
  axes = sharding.activation_axes(shape, "batch", "length")[1]
  pieces = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
  whole = not axes or "ulysses" in axes or shape[1] % (2 * pieces)
  return () if whole else axes


def bound_to_tokens(params: Params) -> bool:
  """Whether some weights are bound to tokens in text order, under a mesh.

  Args:
    params: any tree of weights, see `weights.with_tokens`.
  """
  if not sharding.is_cut():
    return False
  first_index = jnp.zeros((1, 1), jnp.int32)
  selected = jax.eval_shape(
    lambda x: weights.select_tokens(x, first_index), params
  )
  return [x.shape for x in jax.tree.leaves(selected)] != [
    x.shape for x in jax.tree.leaves(params)
  ]


def to_zigzag(
  axes: tuple[str, ...],
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  mask: Mask,
  more: Any = None,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"], Mask, Any]:
  """Returns its arguments in zig-zag order over `axes`.

  Args:
    axes: from `zigzag_axes`.
    x: activations.
    positions: of the tokens.
    mask: the attention mask.
    more: any tree of arrays `[B, T, ...]`.
  """
  if not axes:
    return x, positions, mask, more
  mask = sharded.with_positions(mask, x.shape[1], x.shape[1])
  arrays = {name: getattr(mask, name) for name in _ARRAYS}
  if mask.bounds is not None:
    arrays["bounds"] = jnp.swapaxes(mask.bounds, 1, 2)
  x, positions, arrays, more = _exchanged(
    zigzag.to_zigzag, axes, (x, positions, arrays, more)
  )
  if mask.bounds is not None:
    arrays["bounds"] = jnp.swapaxes(arrays["bounds"], 1, 2)
  return x, positions, dataclasses.replace(mask, **arrays), more


def from_zigzag(
  axes: tuple[str, ...], x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  """Returns activations in text order; the inverse of `to_zigzag`."""
  return _exchanged(zigzag.from_zigzag, axes, x) if axes else x


def _exchanged(move, axes, tree) -> Any:
  """Applies `move` to arrays `[B, T, ...]`; a batch axis of 1 is unsharded."""

  def spec(x):
    batch = sharding.activation_axes(x.shape[:1], "batch")[0]
    return PartitionSpec(batch if x.shape[0] > 1 else (), axes)

  specs = jax.tree.map(spec, tree)
  over = {a for s in jax.tree.leaves(specs, is_leaf=_is_spec) for a in _of(s)}
  return jax.shard_map(
    lambda tree: move(tree, axes),
    in_specs=(specs,),
    out_specs=specs,
    axis_names=over,
  )(tree)


def _is_spec(x) -> bool:
  return isinstance(x, PartitionSpec)


def _of(spec) -> tuple[str, ...]:
  return tuple(a for along in sharding.spec_axes(spec, 2) for a in along)
