"""AdaLoRA: LoRA as a sum of rank-one terms, pruned to a budget in training.

Zhang et al. 2023 (arXiv:2303.10512), equation 3. `research.lora.allocate`
prunes terms during training; a pruned term has e = 0.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.lora.low_rank import low_rank
from research.lora.method import (
  Method,
  contracts_output,
  dense_fp32,
  normal,
  zeros,
)
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
  """`s aᵀ diag(e) b`, `a [r, in]`, `b [r, out]`, `s = alpha / (r + 1e-5)`.

  Attributes:
    rank: initial number of terms, which also sets the scale.
    kept: mask of the terms stored in a PEFT file; () for all.
    pattern: masks by module's name; `for_matrix` selects one as `kept`.
  """

  rank: int = 12
  alpha: float = 8.0
  kept: tuple[bool, ...] = ()
  pattern: tuple[tuple[str, tuple[bool, ...]], ...] = ()

  PEFT: ClassVar = "ADALORA"
  PER_MODULE: ClassVar = ("kept", "pattern")
  PEFT_DEFAULTS: ClassVar = dict(init_r=12, lora_alpha=8, lora_dropout=0.0)
  PEFT_IGNORED: ClassVar = (
    *("r", "rank_pattern", "target_r", "tinit", "tfinal", "deltaT", "beta1"),
    *("beta2", "orth_reg_weight", "total_step"),
  )

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank + 1e-5)

  def for_matrix(self, name, sizes):
    kept = dict(self.pattern).get(name, ())
    if kept and len(kept) != self.rank:
      raise UserError(
        f"AdaLoRA: rank_pattern has {len(kept)} terms for {name}, expected "
        f"init_r, {self.rank}"
      )
    return dataclasses.replace(self, kept=kept, pattern=())

  def canonical(self):
    return dataclasses.replace(self, kept=(), pattern=())

  def init_arrays(self, key, spec, w, stats=None):
    a, b = jax.random.split(key)
    return dict(
      a=normal(a, (self.rank, spec.size_in), 0.02),
      b=normal(b, (self.rank, spec.size_out), 0.02),
      e=zeros(self.rank),
    ), {}

  def delta(self, p, w):
    return (
      self.scale
      * (dense_fp32(p["a"]).T * dense_fp32(p["e"]))
      @ dense_fp32(p["b"])
    )

  def branch(self, eq, x, p, w):
    first, second = (
      (p["b"], p["a"]) if contracts_output(eq) else (p["a"], p["b"])
    )
    return low_rank(x, first, second * (self.scale * p["e"])[:, None])

  def axes(self, names):
    return {"a": (None, names[0]), "b": (None, names[1]), "e": (None,)}

  def is_noop(self, p):
    return not p["e"].any()

  def exported(self, p):
    """Returns the method with the mask of its nonzero terms as `kept`."""
    if jnp.ndim(p["e"]) > 1:
      return self, p
    left = tuple(bool(x) for x in np.asarray(p["e"]) != 0)
    if all(left) or not any(left):
      return self.canonical(), p
    return dataclasses.replace(self, kept=left), p

  def _rows(self):
    return np.flatnonzero(self.kept or np.ones(self.rank, bool))

  def to_peft(self, p, spec):
    rows = self._rows()
    a, b, e = (p[name][rows] for name in "abe")
    return {"lora_A": a, "lora_B": b.T, "lora_E": e[:, None]}

  def from_peft(self, tensors, spec, w):
    rows = self._rows()

    def whole(x):
      out = np.zeros((self.rank, *x.shape[1:]), np.float32)
      out[rows] = x
      return out

    return dict(
      a=whole(tensors["lora_A"]),
      b=whole(tensors["lora_B"].T),
      e=whole(tensors["lora_E"][:, 0]),
    ), {}

  def peft_fields(self, methods):
    cut = {m: x.kept for m, x in methods.items() if x.kept}
    # PEFT requires `total_step` at loading; 1 is the smallest it accepts.
    out = dict(
      init_r=self.rank,
      lora_alpha=self.alpha,
      lora_dropout=self.dropout,
      total_step=1,
      fan_in_fan_out=False,
      init_lora_weights=True,
    )
    if not cut:
      return out
    every = {m: list(x.kept or (True,) * x.rank) for m, x in methods.items()}
    return out | dict(
      rank_pattern={f"{m}.lora_E": rows for m, rows in every.items()}
    )

  @classmethod
  def from_fields(cls, fields):
    rank_pattern, pattern = fields.object("rank_pattern"), []
    for key, rows in (rank_pattern.values if rank_pattern else {}).items():
      ok = isinstance(rows, list) and all(type(x) is bool for x in rows)
      if not ok or not any(rows):
        raise rank_pattern.wrong(
          key, "true or false for every term, one of them true"
        )
      pattern.append((key.removesuffix(".lora_E"), tuple(rows)))
    return cls(
      rank=fields.integer("init_r"),
      alpha=fields.number("lora_alpha"),
      dropout=fields.rate("lora_dropout"),
      pattern=tuple(pattern),
    )
