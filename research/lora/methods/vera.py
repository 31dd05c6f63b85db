"""VeRA: shared random factors with trained scaling vectors.

Kopiczko et al. 2024 (arXiv:2310.11454), equation 2.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  uniform,
  zeros,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Method):
  """`(aᵀ * d) b * l`; only `d [r]` and `l [out]` are trained.

  All matrices use leading columns of the same `a [r, largest in]` and
  `b [r, largest out]`. Each adapter stores its own part, so that layers can be
  scanned.

  Attributes:
    widest: largest input of all adapted matrices; set by `for_matrix`.
  """

  rank: int = 256
  first: float = 0.1
  seed: int = 0
  widest: int = 0

  PEFT: ClassVar = "VERA"
  PER_MODULE: ClassVar = ("alpha", "widest")
  PEFT_SHARED: ClassVar = ("vera_A", "vera_B")
  PEFT_DEFAULTS: ClassVar = dict(
    r=256, d_initial=0.1, vera_dropout=0.0, projection_prng_key=0
  )

  def for_matrix(self, name, sizes):
    widest = max((size_in for size_in, _ in sizes.values()), default=0)
    return dataclasses.replace(self, widest=widest)

  def init_arrays(self, key, spec, w, stats=None):
    a, b = jax.random.split(jax.random.key(self.seed))
    r = self.rank
    # Kaiming uniform with gain sqrt(2).
    a = _columns(a, r, spec.size_in, (6 / (self.widest or spec.size_in)) ** 0.5)
    b = _columns(b, r, spec.size_out, (6 / r) ** 0.5)
    d = jnp.full((r,), self.first, jnp.float32)
    return {"d": d, "l": zeros(spec.size_out)}, {"a": a, "b": b}

  def delta(self, p, w):
    d, a, b = (dense_fp32(p[name]) for name in "dab")
    return (a.T * d) @ b * dense_fp32(p["l"])

  def branch(self, eq, x, p, w):
    d, l, a, b = (p[name].astype(x.dtype) for name in "dlab")
    if contracts_output(eq):
      return jnp.einsum("...o,ro->...r", x * l, b) * d @ a
    z = checkpoint_name(jnp.einsum("...i,ri->...r", x, a), "thin")
    return checkpoint_name(z * d @ b, "unscaled") * l

  def axes(self, names):
    return {
      "d": (None,),
      "l": (names[1],),
      "a": (None, names[0]),
      "b": (None, names[1]),
    }

  def is_noop(self, p):
    return not (p["d"].any() and p["l"].any())

  def to_peft(self, p, spec):
    return dict(
      vera_lambda_b=p["l"], vera_lambda_d=p["d"], vera_A=p["a"], vera_B=p["b"].T
    )

  def from_peft(self, tensors, spec, w):
    fixed = {
      "a": tensors["vera_A"][:, : spec.size_in],
      "b": tensors["vera_B"][: spec.size_out].T,
    }
    trained = {"d": tensors["vera_lambda_d"], "l": tensors["vera_lambda_b"]}
    return trained, fixed

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      d_initial=self.first,
      vera_dropout=self.dropout,
      projection_prng_key=self.seed,
      save_projection=True,
    )

  @classmethod
  def from_fields(cls, fields):
    return cls(
      rank=fields.integer("r"),
      first=fields.number("d_initial"),
      dropout=fields.rate("vera_dropout"),
      seed=fields.integer("projection_prng_key", least=0),
    )


def _columns(key, rank, n, bound):
  """Returns `[rank, n]` whose columns do not depend on `n`."""
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n))
  return jax.vmap(lambda k: uniform(k, (rank,), bound))(keys).T
