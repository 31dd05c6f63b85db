"""Converts adapters to low-rank factors per matrix (NumPy) and back.

Adapter arithmetic, conversion and file formats work on these factors: arrays
of one matrix each, independent of the scanned runs that hold the layers.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from research import weights
from research.lora import wrap
from research.lora.adapted import AdaptedTensor
from research.lora.merge import changes
from research.lora.methods.lora import LoRA
from research.nn.transformer import Transformer
from research.quant.algorithms import coordinates
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True)
class Factors:
  """Low-rank update `scale aᵀ b` of a matrix `[in, out]`.

  Attributes:
    a: `[..., r, in]`, with a leading axis for stacked experts.
    b: `[..., r, out]`.
    scale: alpha over the rank, or over its square root (rsLoRA).
  """

  a: Float[np.ndarray, "*E R I"]
  b: Float[np.ndarray, "*E R O"]
  scale: float = 1.0

  @property
  def rank(self) -> int:
    return self.a.shape[-2]

  def delta(self) -> Float[np.ndarray, "*E I O"]:
    return np.float32(self.scale) * (self.a.swapaxes(-1, -2) @ self.b)


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def thin_svd(
  a: Float[np.ndarray, "*E R I"], b: Float[np.ndarray, "*E R O"]
) -> Triple:
  """Returns the singular value decomposition (u, s, v) of `aᵀ b`, in fp64.

  Computed from QR of the factors, without forming the product.
  """
  left, x = np.linalg.qr(a.astype(np.float64).swapaxes(-1, -2))
  right, y = np.linalg.qr(b.astype(np.float64).swapaxes(-1, -2))
  u, s, v = np.linalg.svd(x @ y.swapaxes(-1, -2), full_matrices=False)
  return left @ u, s, v @ right.swapaxes(-1, -2)


def truncate(triple: Triple, rank: int) -> Factors:
  """Returns the best factors of a rank, singular values in b, as in PEFT."""
  u, s, v = (x.astype(np.float32) for x in triple)
  a = u[..., :rank].swapaxes(-1, -2)
  b = s[..., :rank, None] * v[..., :rank, :]
  return Factors(np.ascontiguousarray(a), b)


def adapters(params: Params) -> dict[str, AdaptedTensor]:
  """Returns each adapted matrix as an AdaptedTensor of NumPy, by address."""
  return wrap.adapters(
    params, lambda t: jax.tree.map(np.asarray, _without_dropout(t))
  )


def _without_dropout(t: AdaptedTensor) -> AdaptedTensor:
  if isinstance(t.w, AdaptedTensor):
    t = dataclasses.replace(t, w=_without_dropout(t.w))
  return dataclasses.replace(t, key=None)


_delta = jax.jit(AdaptedTensor.delta)


def update(t: AdaptedTensor) -> Float[np.ndarray, "*E I O"]:
  """Returns the update of an adapter, or of stacked adapters, in fp32."""
  if isinstance(t.w, AdaptedTensor):
    total, base = changes.in_float32(jax.tree.map(jnp.asarray, t))
    return total - base
  return np.asarray(_delta(t))


def base(t: AdaptedTensor) -> Float[np.ndarray, "*E I O"]:
  """Returns the matrix under all adapters, in fp32."""
  w = t.w
  while isinstance(w, AdaptedTensor):
    w = w.w
  dense = weights.dense(jax.tree.map(jnp.asarray, w))
  return np.asarray(dense).astype(np.float32)


def lora_factors_of(address: str, t: AdaptedTensor) -> Factors | None:
  """Returns an adapter's factors; None if it cannot be expressed as LoRA.

  Raises:
    UserError: the weight has two adapters.
  """
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
    UserError: there is no adapter, a weight has two, or one cannot be
      expressed as plain LoRA.
  """
  out = {}
  for address, t in adapters(params).items():
    lora = lora_factors_of(address, t)
    if lora is None:
      raise UserError(
        f"{address}: has an adapter of {type(t.method).__name__}, expected "
        "plain LoRA.\nConvert it first: experiments.adapters --op=lora"
      )
    out[address] = lora
  if not out:
    raise UserError("these parameters hold no adapter")
  return out


def over_original(
  model: Transformer, params: Params, base: Params
) -> dict[str, Any]:
  """Returns `base` with adapters that were trained over it rotated or scaled.

  Merged, both are the same model: with the base W as `L W R`, the update of W
  is `L⁻¹ aᵀ b R⁻¹`.

  Raises:
    UserError: the update is no product of two factors, or `params` are not
      this base, see `coordinates.changes`.
  """
  trained_factors = factors(params)
  changed = coordinates.changes(model, base, wrap.disable(params))
  unchanged = coordinates.Change()

  def restored(address, f):
    change = changed.get(address, unchanged)
    a, b = (np.swapaxes(x, -1, -2).astype(np.float64) for x in (f.a, f.b))
    a, b = change.rows(a) / change.gain, change.columns(b)
    a, b = (np.swapaxes(x, -1, -2).astype(np.float32) for x in (a, b))
    return Factors(a, b, f.scale)

  thin = wrap.adapters(params, lambda t: dataclasses.replace(t, w=None))
  return wrap_factors(
    base,
    {address: restored(address, f) for address, f in trained_factors.items()},
    {address: t.method.dropout for address, t in thin.items()},
  )


def wrap_factors(
  params: Params,
  adapter_factors: Mapping[str, Factors],
  dropout: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
  """Returns `params` with plain LoRA adapters of the given factors.

  Args:
    dropout: address -> rate, where not 0.
  """
  methods = {
    path: LoRA(
      rank=f.rank, alpha=f.scale * f.rank, dropout=dropout.get(path, 0.0)
    )
    for path, f in adapter_factors.items()
  }

  def make(paths, method, w):
    rows = {
      name: jnp.asarray(
        np.stack([getattr(adapter_factors[p], name) for p in paths])
      )
      for name in "ab"
    }
    return rows, {}

  return wrap.wrap(params, methods, make)
