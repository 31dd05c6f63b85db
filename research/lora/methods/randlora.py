"""RandLoRA: a full-rank sum of fixed random low-rank matrices.

Albert et al. 2025 (arXiv:2502.00987), equation 4. Trains the scales of the
random factors, `l [r, n]` and `g [n, least]`.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  uniform,
  zeros,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
  """`s sum_j B_j diag(l_j) A diag(g_j)`, or its transpose, `s = alpha / r`.

  With `least` and `most` the smaller and larger side of the matrix there are
  `n = ceil(least / r)` bases: `a [r, least]` and `b [most, n, r]`, leading
  parts of arrays that all matrices share. Each adapter stores its own part, so
  that layers can be scanned.

  Attributes:
    widest: largest input and output of all matrices; set by `for_matrix`.
  """

  rank: int = 32
  alpha: float = 640.0
  seed: int = 0
  widest: tuple[int, int] = (0, 0)

  PER_MODULE: ClassVar = ()
  PEFT: ClassVar = "RANDLORA"
  PEFT_SHARED: ClassVar = ("randlora_A", "randlora_B")
  PEFT_DEFAULTS: ClassVar = dict(
    r=32, randlora_alpha=640, randlora_dropout=0.0, projection_prng_key=0
  )
  PEFT_IGNORED: ClassVar = ("sparse", "very_sparse")

  def for_matrix(self, name, sizes):
    widest = tuple(map(max, zip(*sizes.values(), strict=True)))
    return dataclasses.replace(self, widest=widest or (0, 0))

  def _bases(self, least):
    return -(-least // self.rank)

  def init_arrays(self, key, spec, w, stats=None):
    key_a, key_b = jax.random.split(jax.random.key(self.seed))
    least, most = sorted((spec.size_in, spec.size_out))
    r, n = self.rank, self._bases(least)
    # PEFT divides by the standard deviation, which `_rows` makes 1.
    a = _rows(key_a, least, (r,))
    b = jax.vmap(
      lambda j: _rows(jax.random.fold_in(key_b, j), most, (r,)), out_axes=1
    )(jnp.arange(n))
    g = jnp.full((n, least), 1 / max(n, least), jnp.float32)
    return {"l": zeros(r, n), "g": g}, {"a": a.T, "b": b}

  def _factors(self, p):
    """Returns `[q, least]` and `[q, most]`, q = n r, factors of the update."""
    l, g, a, b = (dense_fp32(p[name]) for name in "lgab")
    # PEFT flattens (base, rank) in different orders in the two factors, so it
    # pairs other columns of b with l than the equation. This follows PEFT.
    small = (l[:, :, None] * a[:, None] * g).reshape(-1, g.shape[-1])
    return small * (self.alpha / self.rank), b.reshape(len(b), -1).T

  def _product(self, p, w):
    small, large = self._factors(p)
    first = w.shape[-2] <= w.shape[-1]
    return (small, large) if first else (large, small)

  def delta(self, p, w):
    a, b = self._product(p, w)
    return a.T @ b

  def branch(self, eq, x, p, w):
    a, b = (f.astype(x.dtype) for f in self._product(p, w))
    if contracts_output(eq):
      a, b = b, a
    return jnp.einsum("...i,qi->...q", x, a) @ b

  def axes(self, names):
    return dict(l=(None, None), g=(None, None), a=(None, None), b=(None,) * 3)

  def is_noop(self, p):
    return not (p["l"].any() and p["g"].any())

  def shared_shapes(self):
    least, most = sorted(self.widest)
    n = self._bases(least)
    return dict(
      randlora_A=(self.rank, 1, least), randlora_B=(most, n, self.rank)
    )

  def to_peft(self, p, spec):
    return dict(
      randlora_lambda=p["l"],
      randlora_gamma=p["g"],
      randlora_A=p["a"][:, None],
      randlora_B=p["b"],
    )

  def from_peft(self, tensors, spec, w):
    least, most = sorted((spec.size_in, spec.size_out))
    fixed = {
      "a": tensors["randlora_A"][:, 0, :least],
      "b": tensors["randlora_B"][:most, : self._bases(least)],
    }
    trained = {"l": tensors["randlora_lambda"], "g": tensors["randlora_gamma"]}
    return trained, fixed

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      randlora_alpha=self.alpha,
      randlora_dropout=self.dropout,
      projection_prng_key=self.seed,
      save_projection=True,
      init_weights=True,
      fan_in_fan_out=False,
    )

  @classmethod
  def from_fields(cls, fields):
    return cls(
      rank=fields.integer("r"),
      alpha=fields.number("randlora_alpha"),
      dropout=fields.rate("randlora_dropout"),
      seed=fields.integer("projection_prng_key", least=0),
    )


def _rows(key, n, shape):
  """Returns `[n, *shape]` whose rows do not depend on `n`."""
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
  return jax.vmap(lambda k: uniform(k, shape, 3**0.5))(keys)
