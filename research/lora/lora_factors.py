"""Adapters as plain factors by address, and as leaves again.

What arithmetic, conversion and files of one form work on: NumPy arrays of one
matrix each, whatever runs the layers are scanned in.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from research import weights
from research.lora import wrap
from research.lora.adapted import AdaptedTensor
from research.lora.merge import merged
from research.lora.methods.lora import LoRA
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Factors:
  """`scale aᵀ b`, which is added to a matrix `[in, out]`.

  Attributes:
    a: `[..., r, in]`; experts in front, if there are any.
    b: `[..., r, out]`.
    scale: alpha over rank, or over its root.
  """

  a: Float[np.ndarray, "*E R I"]
  b: Float[np.ndarray, "*E R O"]
  scale: float = 1.0

  @property
  def rank(self) -> int:
    return self.a.shape[-2]

  def delta(self) -> Float[np.ndarray, "*E I O"]:
    """Returns what is added."""
    return np.float32(self.scale) * (self.a.swapaxes(-1, -2) @ self.b)


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def decomposed(
  a: Float[np.ndarray, "*E R I"], b: Float[np.ndarray, "*E R O"]
) -> Triple:
  """Returns the singular value decomposition (u, s, v) of `aᵀ b`, in fp64.

  Of the thin factors: the product itself is never formed.
  """
  left, x = np.linalg.qr(a.astype(np.float64).swapaxes(-1, -2))
  right, y = np.linalg.qr(b.astype(np.float64).swapaxes(-1, -2))
  u, s, v = np.linalg.svd(x @ y.swapaxes(-1, -2), full_matrices=False)
  return left @ u, s, v @ right.swapaxes(-1, -2)


def truncated(triple: Triple, rank: int) -> Factors:
  """Returns the best factors of a rank, singular values in b, as PEFT's."""
  u, s, v = (x.astype(np.float32) for x in triple)
  a = u[..., :rank].swapaxes(-1, -2)
  b = s[..., :rank, None] * v[..., :rank, :]
  return Factors(np.ascontiguousarray(a), b)


def adapters(params: Params) -> dict[str, AdaptedTensor]:
  """Returns each matrix's adapter around its base, in NumPy, by address."""
  return wrap.adapters(params, lambda t: jax.tree.map(np.asarray, _still(t)))


def _still(t: AdaptedTensor) -> AdaptedTensor:
  """Returns the adapter without dropout keys."""
  if isinstance(t.w, AdaptedTensor):
    t = dataclasses.replace(t, w=_still(t.w))
  return dataclasses.replace(t, key=None)


_delta = jax.jit(AdaptedTensor.delta)


def update(t: AdaptedTensor) -> Float[np.ndarray, "*E I O"]:
  """Returns what an adapter, or one on another, adds to its base, in fp32."""
  if isinstance(t.w, AdaptedTensor):
    total, base = merged.in_float32(jax.tree.map(jnp.asarray, t))
    return total - base
  return np.asarray(_delta(t))


def base(t: AdaptedTensor) -> Float[np.ndarray, "*E I O"]:
  """Returns the matrix under all adapters, in fp32."""
  w = t.w
  while isinstance(w, AdaptedTensor):
    w = w.w
  dense = weights.dense(jax.tree.map(jnp.asarray, w))
  return np.asarray(dense).astype(np.float32)


def plain(address: str, t: AdaptedTensor) -> Factors | None:
  """Returns an adapter's factors; None where it is not LoRA by another name."""
  if isinstance(t.w, AdaptedTensor):
    raise UserError(f"{address}: two adapters on one weight; merge one first")
  method, arrays = t.method.exported(t.arrays)
  if type(method) is not LoRA:
    return None
  a, b = (np.asarray(arrays[name], np.float32) for name in "ab")
  return Factors(a, b, method.scale)


def factors(params: Params) -> dict[str, Factors]:
  """Returns the factors of every adapter, by address.

  Raises:
    UserError: there is none, two are on one weight, or one is of another
      method than plain LoRA and what is exported as such.
  """
  out = {}
  for address, t in adapters(params).items():
    found = plain(address, t)
    if found is None:
      raise UserError(
        f"{address}: has an adapter of {type(t.method).__name__}, expected "
        "plain LoRA.\nConvert it first: experiments.adapters --op=lora"
      )
    out[address] = found
  if not out:
    raise UserError("these parameters hold no adapter")
  return out


def wrapped(params: Params, found: Mapping[str, Factors]) -> dict[str, Any]:
  """Returns `params` with plain LoRA of those factors around its weights.

  Args:
    params: without adapters.
    found: by address.
  """
  methods = {
    path: LoRA(rank=f.rank, alpha=f.scale * f.rank) for path, f in found.items()
  }

  def make(paths, method, w):
    rows = {
      name: jnp.asarray(np.stack([getattr(found[p], name) for p in paths]))
      for name in "ab"
    }
    return rows, {}

  return wrap.wrap(params, methods, make)
