"""Adapters of any method as factors that one row of a batch can have alone.

Those are plain LoRA's, with the scale in `b`. What adds a matrix of low rank
has them exactly; what does not is an error, never an approximation.
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
from research.lora.wrap import biases, leaves
from research.typing import Array, Float, Int, Params, UserError

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""By address: fp32 `a [r, in]` and `b [r, out]`, which add `aᵀ b`."""

_ROUNDING = 1e-5
"""Share of an update that may be lost: what fp32 loses of a sum of products."""

_MORE = 8
"""Columns of a sketch beyond the rank; Halko et al. 2011, section 4.2."""


def of(params: Params, rank: int) -> dict[str, Any]:
  """Returns the `Factors` of every adapter of a tree, in host memory.

  Args:
    params: with adapters of any method.
    rank: the largest.

  Raises:
    UserError: an adapter's rank is larger, or its update no matrix of that
      rank (as DoRA's and (IA)^3's, which rescale the whole base), or it is an
      expert's, or scales a bias, or holds NaN.
  """
  for path, bias in biases(params).items():
    raise UserError(
      f"{path}: {type(bias.matrix.method).__name__} scales this bias, which "
      "rows of a batch share.\nUse the adapter alone, or merge it."
    )
  found = {}
  for path, leaf in _adapted(tree.outer_params(params)):
    found[path] = _factored(path, leaf, rank)
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in _adapted(params[run][layer]):
      first = f"layers/{layers[0]}/{path}"
      if leaf.ndim > 3:
        raise UserError(f"{first}: adapters of experts cannot share a batch")
      a, b = _factored(first, leaf, rank)
      for k, i in enumerate(layers):
        found[f"layers/{i}/{path}"] = a[k], b[k]
  for path, pair in found.items():
    if not all(np.isfinite(x).all() for x in pair):
      raise UserError(f"{path}: its adapter holds NaN or infinity")
  return found


def _adapted(part):
  return [(p, w) for p, w in leaves(part) if isinstance(w, AdaptedTensor)]


def _factored(path, leaf, rank):
  """Returns (a, b) as NumPy arrays, leading axes in front."""
  name = type(leaf.method).__name__
  if isinstance(leaf.w, AdaptedTensor):
    raise UserError(f"{path}: is adapted twice; merge one of the two first")
  method, arrays = leaf.method.exported(leaf.arrays)
  if type(method) is not LoRA:
    return _exactly(path, leaf, rank)
  a, b = np.asarray(arrays["a"]), np.asarray(arrays["b"])
  if a.shape[-2] > rank:
    raise UserError(
      f"{path}: {name} of rank {a.shape[-2]}, expected at most {rank}, which "
      "there is room for"
    )
  return a, b * np.float32(method.scale)


def _exactly(path, leaf, rank):
  a, b, lost, needed = jax.tree.map(np.asarray, _sketched(leaf, rank))
  if not lost.max() <= _ROUNDING:
    raise UserError(
      f"{path}: what {type(leaf.method).__name__} adds is no matrix of rank "
      f"{rank}: that would lose {lost.max():.2g} of it.\nTake a larger rank, "
      "convert the adapter to LoRA, or use it alone."
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
  """Returns (a, b, the share of the update that they lose, its own rank).

  A sketch sees all of an update of that rank; of another it need not be the
  nearest, only far enough.
  """
  *lead, size_in, size_out = leaf.shape
  deltas = leaf.delta().reshape(-1, size_in, size_out)
  rank = min(rank, size_in, size_out)
  columns = min(rank + _MORE, size_in, size_out)
  seen = jax.random.normal(jax.random.key(0), (size_out, columns))

  def one(delta):
    q, _ = jnp.linalg.qr(delta @ seen)
    u, s, v = jnp.linalg.svd(q.T @ delta, full_matrices=False)
    a, b = (q @ u[:, :rank]).T, s[:rank, None] * v[:rank]
    norm = jnp.maximum(jnp.linalg.norm(delta), jnp.finfo(delta.dtype).tiny)
    lost = jnp.linalg.norm(delta - a.T @ b) / norm
    return a, b, lost, jnp.sum(s[:rank] > 0.1 * _ROUNDING * s[0])

  out = jax.lax.map(one, deltas)
  return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), out)
