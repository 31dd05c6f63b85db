"""LoKr: a Kronecker product whose larger factor has low rank.

LyCORIS (Yeh et al. 2023, arXiv:2309.14859), section 3: with `in = m n` and
`out = l k`, the update is `s w1 x w2`, `w1 [m, l]`, `w2 [n, k]`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.lora.method import (
  DenseDelta,
  Method,
  contracts_output,
  dense_fp32,
  uniform,
  zeros,
)
from research.typing import UserError

FEW_ROWS = 16
"""Number of rows up to which a product applies the factors one by one.

As in decoding. More rows are faster with the full matrix, since factors with
sides of about 24 do not fill matrix units."""


def factors(size: int, factor: int) -> tuple[int, int]:
  """Splits `size` into a product of two integers.

  Args:
    factor: the first integer, if it divides `size`; otherwise the result is
      the pair of closest divisors, smaller first, at most `factor` unless -1.
  """
  if factor > 0 and size % factor == 0:
    return factor, size // factor
  most = size if factor == -1 else factor
  small = [m for m in range(1, int(size**0.5) + 1) if size % m == 0]
  first = max(m for m in small if m <= most)
  return first, size // first


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(DenseDelta):
  """`s = alpha / r`, even if no factor has low rank.

  Attributes:
    factor: splits both sizes, see `factors`.
    both: whether w1 may have low rank, too.
    window: size `kh kw` of a convolution kernel with matrix `[in kh kw, out]`;
      only the second factor covers the window, as in PEFT.
  """

  alpha: float = 8.0
  factor: int = -1
  both: bool = False
  window: int = 1

  PEFT: ClassVar = "LOKR"
  PEFT_PATTERNS: ClassVar = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
  PEFT_DEFAULTS: ClassVar = dict(
    r=8, alpha=8, decompose_factor=-1, decompose_both=False
  )

  def _sizes(self, size_in, size_out):
    """Returns (in, out) of w1, and of w2 without the kernel's window."""
    if size_in % self.window:
      raise UserError(
        f"LoKr.window: {self.window} does not divide the {size_in} inputs of a"
        " kernel's matrix; expected kh kw"
      )
    m, n = factors(size_in // self.window, self.factor)
    l, k = factors(size_out, self.factor)
    return (m, l), (n, k)

  def init_arrays(self, key, spec, w, stats=None):
    first, second = self._sizes(spec.size_in, spec.size_out)
    r, out = self.rank, {}
    undecomposed = dict(
      w1=not (self.both and r < max(first) / 2), w2=not r < max(second) / 2
    )
    # w1 (or w1_b) is zero, the others are Kaiming uniform.
    n, k = second
    second = n * self.window, k
    for i, (name, (n, k)) in enumerate((("w1", first), ("w2", second))):
      key_a, key_b = jax.random.split(jax.random.fold_in(key, i))
      if undecomposed[name]:
        out[name] = zeros(n, k) if i == 0 else uniform(key_a, (n, k), n**-0.5)
      else:
        out[f"{name}_a"] = uniform(key_a, (r, n), n**-0.5)
        b = zeros(r, k) if i == 0 else uniform(key_b, (r, k), r**-0.5)
        out[f"{name}_b"] = b
    return out, {}

  def _factor(self, p, name):
    if name in p:
      return dense_fp32(p[name])
    return dense_fp32(p[f"{name}_a"]).T @ dense_fp32(p[f"{name}_b"])

  def delta(self, p, w):
    w1, w2 = self._factor(p, "w1"), self._factor(p, "w2")
    return self.alpha / self.rank * jnp.kron(w1, w2)

  def einsum(self, eq, x, dropped, p, w):
    if _is_small(x):
      return Method.einsum(self, eq, x, dropped, p, w)
    return super().einsum(eq, x, dropped, p, w)

  def branch(self, eq, x, p, w):
    if not _is_small(x):
      return super().branch(eq, x, p, w)
    w1, w2 = (self._factor(p, n).astype(x.dtype) for n in ("w1", "w2"))
    if contracts_output(eq):
      w1, w2 = w1.T, w2.T
    x = x.reshape(*x.shape[:-1], w1.shape[0], w2.shape[0])
    y = jnp.einsum("...mn,nk,ml->...lk", x, w2, w1)
    return (self.alpha / self.rank * y).reshape(*y.shape[:-2], -1)

  def axes(self, names):
    # Not sharded: a factor's side is about the square root of a side of w.
    every = ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")
    return dict.fromkeys(every, (None, None))

  def to_peft(self, p, spec):
    # PEFT's matrices are [out, in], so our `b [r, out]` is PEFT's `a`.
    swap = {"w1": "w1", "w2": "w2"} | {
      f"{w}_{x}": f"{w}_{y}" for w in ("w1", "w2") for x, y in ("ab", "ba")
    }
    return {
      f"lokr_{swap[name]}": x if name.endswith("_a") else x.T
      for name, x in p.items()
    }

  def from_peft(self, tensors, spec, w):
    turn = {"_a": "_b", "_b": "_a"}
    out = {}
    for key, x in tensors.items():
      name = key.removeprefix("lokr_")
      out[name[:2] + turn.get(name[2:], "")] = x if name[2:] == "_b" else x.T
    return out, {}

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      alpha=self.alpha,
      decompose_factor=self.factor,
      decompose_both=self.both,
      rank_dropout=0.0,
      module_dropout=0.0,
    )

  @classmethod
  def from_fields(cls, fields):
    fields.neutral(dict(rank_dropout=(None, 0), module_dropout=(None, 0)))
    return cls(
      rank=fields.integer("r"),
      alpha=fields.number("alpha"),
      factor=fields.integer("decompose_factor", least=-1),
      both=fields.flag("decompose_both"),
    )


def _is_small(x):
  return x.size < FEW_ROWS * x.shape[-1]
