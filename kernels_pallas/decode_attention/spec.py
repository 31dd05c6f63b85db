"""Static options of decode attention, shared by all backends."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Block sizes of decode attention; they affect results only by rounding.

  Attributes:
    queries: Tokens of one row that share one read of its keys; None is 1 with
      one token per row, else as many as fill 128 rows of a matmul with their
      heads.
    keys: Most keys fetched at a time (at least a page; at most 64 on GPUs).
    splits: Parts that each row's keys are split into, processed in parallel and
      combined (Dao et al. 2023, "Flash-Decoding"). None is 2 on TPUs with two
      cores, which share each row, as many as fill a GPU, else 1.
  """

  queries: int | None = None
  keys: int = 512
  splits: int | None = None

  def __post_init__(self):
    given = (self.queries, self.keys, self.splits)
    if min(n for n in given if n is not None) < 1:
      raise ValueError(f"blocks: found {self}, expected at least 1 of each")


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call.

  Attributes:
    scale: Factor on q.k.
    softcap: c of c tanh(t / c), or None.
    window: Most keys that a query sees, including its own, or None.
    precision: Precision of all matmuls, as in `jax.lax.dot`.
  """

  scale: float
  softcap: float | None = None
  window: int | None = None
  precision: Any = None


def capped(spec: Spec, t: jax.Array) -> jax.Array:
  """Applies the soft cap to scaled products."""
  if spec.softcap is None:
    return t
  return spec.softcap * jnp.tanh(t / spec.softcap)
