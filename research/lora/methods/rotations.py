"""OFT, BOFT and HRA: orthogonal fine-tuning, `R w` with orthogonal `R`.

A rotation preserves the norms of the outputs' weight vectors and the angles
between them. OFT: Qiu et al. 2023 (arXiv:2306.07280), section 4; BOFT: Liu et
al. 2024 (arXiv:2311.06243), equation 5; HRA: Yuan et al. 2024
(arXiv:2405.17484), equation 4.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from research import weights
from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  normal,
  zeros,
)
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation(Method):
  """Base class: applies a rotation to activations without forming R."""

  SUPPORTS_DROPOUT: ClassVar = False

  def rotate(self, x, p):
    raise NotImplementedError

  def rotate_back(self, x, p):
    raise NotImplementedError

  def gain(self, p):
    """Returns the scale of the outputs, `[out]`, or 1."""
    return 1

  def delta(self, p, w):
    w = dense_fp32(w)
    return self.rotate_back(w.T, p).T * self.gain(p) - w

  def einsum(self, eq, x, dropped, p, w):
    p = {name: y.astype(x.dtype) for name, y in p.items()}
    if contracts_output(eq):
      return self.rotate_back(weights.einsum(eq, x * self.gain(p), w), p)
    return weights.einsum(eq, self.rotate(x, p), w) * self.gain(p)


def _blocks(name, size_in, block):
  if size_in % block:
    raise UserError(f"{name}: in {size_in} is not a multiple of block {block}")
  return size_in // block


def _rotate_blocks(x, r):
  """Returns `x R` for blocks `r [n, block, block]` on R's diagonal."""
  y = x.reshape(*x.shape[:-1], *r.shape[:2])
  return jnp.einsum("...nk,nkc->...nc", y, r).reshape(x.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Rotation):
  """Block-diagonal R, each block the Cayley transform of a skew matrix `q`.

  `v [in / block, block (block - 1) / 2]` are the entries of `q` above the
  diagonal, row by row.

  Attributes:
    form: 'exact' is `(1 - q) (1 + q)^-1`; 'neumann' is its Neumann series with
      the opposite sign of `q` (PEFT's default).
    terms: number of terms of the series.
  """

  block: int = 32
  form: Literal["exact", "neumann"] = "neumann"
  terms: int = 5

  PEFT: ClassVar = "OFT"
  PEFT_DEFAULTS: ClassVar = dict(
    oft_block_size=32, use_cayley_neumann=True, num_cayley_neumann_terms=5
  )
  PEFT_IGNORED: ClassVar = ("eps",)

  def init_arrays(self, key, spec, w, stats=None):
    n = _blocks("OFT", spec.size_in, self.block)
    return {"v": zeros(n, self.block * (self.block - 1) // 2)}, {}

  def _rotations(self, v):
    rows, columns = np.triu_indices(self.block, 1)
    q = jnp.zeros((len(v), self.block, self.block), v.dtype)
    q = q.at[:, rows, columns].set(v)
    q = q - q.swapaxes(1, 2)
    identity = jnp.broadcast_to(jnp.eye(self.block, dtype=v.dtype), q.shape)
    if self.form == "exact":
      return _cayley(q)
    # Powers 1 to terms - 1 of q, with coefficient 2 except for the last.
    total, power = identity, identity
    terms = 4 if self.terms == 3 else self.terms  # as PEFT counts
    for i in range(1, terms):
      power = power @ q
      last = i == terms - 1 and i > 1
      total = total + (power if last else 2 * power)
    return total

  def rotate(self, x, p):
    return _rotate_blocks(x, self._rotations(p["v"]))

  def rotate_back(self, x, p):
    return _rotate_blocks(x, self._rotations(p["v"]).swapaxes(1, 2))

  def axes(self, names):
    return {"v": (None, None)}

  def is_noop(self, p):
    return not p["v"].any()

  def to_peft(self, p, spec):
    return {"oft_R.weight": p["v"]}

  def from_peft(self, tensors, spec, w):
    return {"v": tensors["oft_R.weight"]}, {}

  def peft_fields(self, methods):
    return dict(
      r=0,
      oft_block_size=self.block,
      use_cayley_neumann=self.form == "neumann",
      num_cayley_neumann_terms=self.terms,
      module_dropout=0.0,
      coft=False,
      block_share=False,
      fan_in_fan_out=False,
      init_weights=True,
    )

  @classmethod
  def from_fields(cls, fields):
    fields.neutral(dict(r=(None, 0), **_OFT_OFF))
    return cls(
      block=fields.integer("oft_block_size"),
      form="neumann" if fields.flag("use_cayley_neumann") else "exact",
      terms=fields.integer("num_cayley_neumann_terms", most=100),
    )


_OFT_OFF = dict(
  coft=(None, False), block_share=(None, False), module_dropout=(None, 0)
)


def _cayley(q):
  """Returns `(1 - q) (1 + q)^-1` of skew matrices; the two commute."""
  identity = jnp.eye(q.shape[-1], dtype=q.dtype)
  wide_q = q.astype(jnp.promote_types(q.dtype, jnp.float32))
  return jnp.linalg.solve(identity + wide_q, identity - wide_q).astype(q.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFT(Rotation):
  """Butterfly product of `factors` block rotations, and a scale of outputs.

  `r [factors, in / block, block, block]`, whose skew part is used, and
  `s [out]`.

  Attributes:
    block: side of the blocks; even if there are several factors.
    factors: 1 is OFT with an output scale; m factors mix `2^(m-1)` blocks.
  """

  block: int = 4
  factors: int = 1

  PEFT: ClassVar = "BOFT"
  PEFT_DEFAULTS: ClassVar = dict(boft_block_size=4, boft_n_butterfly_factor=1)

  def init_arrays(self, key, spec, w, stats=None):
    n = _blocks("BOFT", spec.size_in, self.block)
    mixed = 2 ** (self.factors - 1)
    if self.factors > 1 and (n % mixed or self.block % 2):
      raise UserError(
        f"BOFT: {n} blocks of {self.block} for {self.factors} factors, "
        f"expected even blocks, and a multiple of {mixed} of them"
      )
    r = zeros(self.factors, n, self.block, self.block)
    return {"r": r, "s": jnp.ones(spec.size_out, jnp.float32)}, {}

  def _factor(self, x, p, i, back):
    """Returns `x F` or `x Fᵀ` for factor i, `F = P blocks Pᵀ`."""
    r = p["r"][i]
    r = _cayley(0.5 * (r - r.swapaxes(1, 2)))
    order = _butterfly(x.shape[-1], self.block, i)
    inverse = np.argsort(order)
    y = x[..., inverse]
    return _rotate_blocks(y, r.swapaxes(1, 2) if back else r)[..., order]

  def rotate(self, x, p):
    # The last factor is the leftmost.
    for i in reversed(range(self.factors)):
      x = self._factor(x, p, i, back=False)
    return x

  def rotate_back(self, x, p):
    for i in range(self.factors):
      x = self._factor(x, p, i, back=True)
    return x

  def gain(self, p):
    return p["s"]

  def axes(self, names):
    return {"r": (None,) * 4, "s": (names[1],)}

  def is_noop(self, p):
    return not p["r"].any() and bool((p["s"] == 1).all())

  def to_peft(self, p, spec):
    return {"boft_R": p["r"], "boft_s": p["s"][:, None]}

  def from_peft(self, tensors, spec, w):
    return {"r": tensors["boft_R"], "s": tensors["boft_s"][:, 0]}, {}

  def peft_fields(self, methods):
    return dict(
      boft_block_size=self.block,
      boft_block_num=0,
      boft_n_butterfly_factor=self.factors,
      boft_dropout=0.0,
      fan_in_fan_out=False,
      init_weights=True,
    )

  @classmethod
  def from_fields(cls, fields):
    fields.neutral(dict(boft_block_num=(None, 0), boft_dropout=(None, 0)))
    return cls(
      block=fields.integer("boft_block_size"),
      factors=fields.integer("boft_n_butterfly_factor", most=24),
    )


def _butterfly(n, block, i):
  """Returns factor i's butterfly permutation of the inputs.

  Within each group of `2^i` blocks it puts even half-blocks first.
  """
  if i == 0:
    return np.arange(n)
  halves = np.arange(n).reshape(-1, 2 ** (i + 1), block // 2)
  return np.concatenate([halves[:, ::2], halves[:, 1::2]], 1).reshape(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRA(Rotation):
  """A product of `r` Householder reflections with vectors `u [r, in]`.

  The vectors need not be normalised. The rank must be even: initially each
  vector occurs twice, so that the reflections cancel.
  """

  PEFT: ClassVar = "HRA"
  PER_MODULE: ClassVar = ("alpha",)
  PEFT_DEFAULTS: ClassVar = dict(r=8)

  def init_arrays(self, key, spec, w, stats=None):
    if self.rank % 2:
      raise UserError(f"HRA: rank is {self.rank}, expected an even number")
    half = normal(key, (self.rank // 2, spec.size_in))
    return {"u": jnp.repeat(half, 2, axis=0)}, {}

  def _reflected(self, x, p, order):
    u = dense_fp32(p["u"])
    u = (u / jnp.linalg.norm(u, axis=1, keepdims=True)).astype(x.dtype)
    for i in order:
      x = x - 2 * jnp.einsum("...i,i->...", x, u[i])[..., None] * u[i]
    return x

  def rotate(self, x, p):
    return self._reflected(x, p, reversed(range(self.rank)))

  def rotate_back(self, x, p):
    return self._reflected(x, p, range(self.rank))

  def axes(self, names):
    return {"u": (None, names[0])}

  def to_peft(self, p, spec):
    return {"hra_u": p["u"].T}

  def from_peft(self, tensors, spec, w):
    return {"u": tensors["hra_u"].T}, {}

  def peft_fields(self, methods):
    return dict(r=self.rank, apply_GS=False, init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    fields.neutral(dict(apply_GS=(None, False)))
    return cls(rank=fields.integer("r"))
