"""Extracts LoRA factors from adapters of any method, for multi-adapter batches.

The scale is included in `b`. A method whose update has low rank converts
exactly, up to rounding; any other raises an error instead of an approximation.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.lora.adapted import AdaptedTensor
from research.lora.methods.lora import LoRA
from research.lora.wrap import adapted, biases
from research.typing import Array, Float, Int, Params, UserError

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Address -> fp32 `a [r, in]` and `b [r, out]` of the update `aᵀ b`."""

_ROUNDING = 1e-5
"""Largest relative error of the factors: fp32 rounding of a sum of products."""

_MORE = 8
"""Oversampling columns of a sketch; Halko et al. 2011, section 4.2."""


def extract(params: Params, rank: int) -> dict[str, Any]:
  """Returns the `Factors` of every adapter of a tree, in host memory.

  Raises:
    UserError: an adapter's rank is larger, its update has higher rank (DoRA's
      and (IA)^3's rescale the whole base), it belongs to an expert, it scales
      a bias, or it is not finite.
  """
  for path, bias in biases(params).items():
    raise UserError(
      f"{path}: {type(bias.matrix.method).__name__} scales this bias, which "
      "rows of a batch share.\nUse the adapter alone, or merge it."
    )
  factors = {}
  for path, leaf in adapted(tree.outer_params(params)):
    factors[path] = _factored(path, leaf, rank)
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in adapted(params[run][layer]):
      first = f"layers/{layers[0]}/{path}"
      if leaf.ndim > 3:
        raise UserError(f"{first}: adapters of experts cannot share a batch")
      a, b = _factored(first, leaf, rank)
      for k, i in enumerate(layers):
        factors[f"layers/{i}/{path}"] = a[k], b[k]
  for path, pair in factors.items():
    if not all(np.isfinite(x).all() for x in pair):
      raise UserError(f"{path}: its adapter holds NaN or infinity")
  return factors


def _factored(path, leaf, rank):
  """Returns (a, b) as NumPy arrays with the leaf's leading axes."""
  name = type(leaf.method).__name__
  if isinstance(leaf.w, AdaptedTensor):
    raise UserError(f"{path}: is adapted twice; merge one of the two first")
  method, arrays = leaf.method.exported(leaf.arrays)
  if type(method) is not LoRA:
    return _factor_exactly(path, leaf, rank)
  a, b = np.asarray(arrays["a"]), np.asarray(arrays["b"])
  if a.shape[-2] > rank:
    raise UserError(
      f"{path}: {name} of rank {a.shape[-2]}, expected at most {rank}, the "
      "rank of the slots"
    )
  return a, b * np.float32(method.scale)


def _factor_exactly(path, leaf, rank):
  a, b, lost, needed = jax.tree.map(np.asarray, _sketched(leaf, rank))
  if not lost.max() <= _ROUNDING:
    raise UserError(
      f"{path}: the update of {type(leaf.method).__name__} is no matrix of "
      f"rank {rank}: truncation would lose {lost.max():.2g} of it.\nUse a "
      "larger rank, convert the adapter to LoRA, or use it alone."
    )
  needed = max(1, int(needed.max()))
  return a[..., :needed, :], b[..., :needed, :]


@functools.partial(jax.jit, static_argnames="rank")
def _sketched(
  leaf: AdaptedTensor, rank: int
) -> tuple[
  Float[Array, "*L R I"],
  Float[Array, "*L R O"],
  Float[Array, "*L"],
  Int[Array, "*L"],
]:
  """Returns (a, b, relative error, numerical rank) by a randomised sketch.

  A sketch captures an update of at most this rank exactly. For one of higher
  rank the factors need not be the best, since the error then only has to show.
  """
  *lead, size_in, size_out = leaf.shape
  deltas = leaf.delta().reshape(-1, size_in, size_out)
  rank = min(rank, size_in, size_out)
  columns = min(rank + _MORE, size_in, size_out)
  test_matrix = jax.random.normal(jax.random.key(0), (size_out, columns))

  def one(delta):
    q, _ = jnp.linalg.qr(delta @ test_matrix)
    u, s, v = jnp.linalg.svd(q.T @ delta, full_matrices=False)
    a, b = (q @ u[:, :rank]).T, s[:rank, None] * v[:rank]
    norm = jnp.maximum(jnp.linalg.norm(delta), jnp.finfo(delta.dtype).tiny)
    lost = jnp.linalg.norm(delta - a.T @ b) / norm
    return a, b, lost, jnp.sum(s[:rank] > 0.1 * _ROUNDING * s[0])

  out = jax.lax.map(one, deltas)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)
