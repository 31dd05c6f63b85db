"""Adapter slots in a parameter tree: adds them and writes adapters into them.

`research.lora.serving.pool` decides which adapter gets which slot.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.lora import adapt, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.methods.lora import LoRA
from research.lora.optim.row_factors import Factors
from research.lora.serving.batched import BatchedTensor
from research.typing import Params, UserError


def add_slots(
  params: Params,
  *,
  slots: int,
  rank: int,
  dtype: str,
  targets: str | Sequence[str] = adapt.ALL_LINEAR,
) -> Any:
  """Returns `params` with empty adapter slots on its target weights.

  Args:
    targets: see `adapt.Adapt`.

  Raises:
    UserError: a target matches nothing, or it matches experts.
  """
  method = LoRA(rank=rank, alpha=float(rank))
  methods = adapt.Adapt(method=method, targets=targets).methods(params)
  if routed := sorted(set(methods) & set(wrap.experts(params))):
    raise UserError(f"{routed[0]}: adapters of experts cannot share a batch")

  def make(paths, method, w):
    *lead, size_in, size_out = w.shape
    shape = (*lead, slots, rank)
    a, b = (jnp.zeros((*shape, n), dtype) for n in (size_in, size_out))
    return {"a": a, "b": b}, {}

  def batched(w):
    if isinstance(w, AdaptedTensor):
      return BatchedTensor(w.w, w.trained["a"], w.trained["b"])
    return w

  wrapped = wrap.wrap(params, methods, make)
  return jax.tree.map(batched, wrapped, is_leaf=weights.is_weight)


def base(params: Params) -> Any:
  """Returns the tree without its slots; shares the base's arrays."""
  return jax.tree.map(
    lambda w: w.w if isinstance(w, BatchedTensor) else w,
    params,
    is_leaf=weights.is_weight,
  )


def sizes(params: Params) -> dict[str, tuple[int, int]]:
  """Returns (in, out) of every matrix that has slots, by address."""
  out = {}
  for name, leaf in wrap.leaves(params):
    if isinstance(leaf, BatchedTensor):
      out |= dict.fromkeys(_addresses(params, name), tuple(leaf.shape[-2:]))
  return out


def write(params: Params, adapter: Factors, slot: int) -> Any:
  """Returns the tree with an adapter written into a slot.

  Args:
    params: the tree; its slots' memory is donated.
    adapter: factors by address; other matrices get zeros in this slot.
    slot: index of the slot; all indices share one compiled program.
  """
  factors, new = {}, {}
  for name, leaf in wrap.leaves(params):
    if isinstance(leaf, BatchedTensor):
      pairs = [_padded(adapter.get(p), leaf) for p in _addresses(params, name)]
      factors[name] = leaf.a, leaf.b
      new[name] = tuple(
        np.stack(x).reshape(*leaf.shape[:-2], *x[0].shape)
        for x in zip(*pairs, strict=True)
      )
  factors = _set(factors, new, np.int32(slot))

  def filled(name, leaf):
    return leaf.with_factors(*factors[name]) if name in factors else leaf

  return tree.map_paths(filled, params, is_leaf=weights.is_weight)


def _addresses(params, name) -> list[str]:
  run, _, rest = name.partition("/")
  layer, _, inner = rest.partition("/")
  rows = tree.layer_indices(params).get(f"{run}/{layer}")
  return [name] if rows is None else [f"layers/{i}/{inner}" for i in rows]


def _padded(pair, leaf):
  """Returns one matrix's factors, zero-padded to the slots' rank."""
  rank, dtype = leaf.a.shape[-2], leaf.a.dtype
  sides = [np.zeros((rank, n), dtype) for n in leaf.shape[-2:]]
  for side, x in zip(sides, pair or (), strict=pair is not None):
    side[: len(x)] = x
  return sides


@functools.partial(jax.jit, donate_argnames="factors")
def _set(factors, new, slot):
  return jax.tree.map(lambda x, y: x.at[..., slot, :, :].set(y), factors, new)
