"""The order of tokens on a mesh that cuts rows.

Cut in the order of the text, the devices with the last tokens of a causal
model have nearly all of attention's work. So the layers see them in zig-zag
order (`kernels_pallas.sequence_parallel.zigzag`), which costs two exchanges of
the residual stream a step, not one a layer; embeddings, losses and whoever
calls the model never see it.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import PartitionSpec

from kernels_pallas.flash_attention import sharded
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel import zigzag
from research import sharding
from research.typing import Array, Float, Int

CAUSAL = ("causal", "prefix", "block_causal")
"""Kinds of mask by which late tokens see more than early ones."""

_ARRAYS = ("q_positions", "kv_positions", "q_segments", "kv_segments")


def balanced(mask: Mask, shape: tuple[int, int]) -> tuple[str, ...]:
  """Returns the axes of the mesh to reorder tokens over; () for none.

  None where devices have the same work anyway: rows are whole, everything is
  visible, or tokens are exchanged for heads.

  Args:
    mask: of the tokens.
    shape: B and T.
  """
  if not sharding.is_cut() or mask.kind not in CAUSAL or (mask.offset or 0) < 0:
    return ()
  axes = sharding.cuts(shape, "batch", "length")[1]
  pieces = math.prod(jax.sharding.get_abstract_mesh().shape[a] for a in axes)
  whole = not axes or "ulysses" in axes or shape[1] % (2 * pieces)
  return () if whole else axes


def spread(
  axes: tuple[str, ...],
  x: Float[Array, "B T D"],
  positions: Int[Array, "B T"],
  mask: Mask,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"], Mask]:
  """Returns activations, positions and mask in zig-zag order over `axes`."""
  if not axes:
    return x, positions, mask
  mask = sharded.positioned(mask, x.shape[1], x.shape[1])
  arrays = {name: getattr(mask, name) for name in _ARRAYS}
  x, positions, arrays = _exchanged(
    zigzag.to_zigzag, axes, (x, positions, arrays)
  )
  return x, positions, dataclasses.replace(mask, **arrays)


def restored(
  axes: tuple[str, ...], x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  """Returns activations in the order of the text."""
  return _exchanged(zigzag.from_zigzag, axes, x) if axes else x


def _exchanged(move, axes, tree) -> Any:
  """Returns `move` of arrays `[B, T, ...]`; a batch axis of 1 stays whole."""

  def spec(x):
    batch = sharding.cuts(x.shape[:1], "batch")[0]
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
