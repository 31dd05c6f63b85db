"""What every backend of decoding is asked: static values and arrays."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the work is cut; results do not depend on it, but for rounding.

  Attributes:
    queries: Tokens of one row that share a reading of its keys; None is 1
      where there is a token a row, else as many as fill 128 rows of a matmul
      with their heads.
    keys: Keys that are fetched at a time, at most (at least a page; on GPUs
      64 at most).
    splits: Parts that each row's keys are cut into, to be read in parallel
      and combined (Dao et al. 2023, "Flash-Decoding"). None is 2 on TPUs of
      two cores, which share each row, as many as fill a GPU, else 1.
  """

  queries: int | None = None
  keys: int = 512
  splits: int | None = None

  def __post_init__(self):
    if min(self.queries or 1, self.keys) < 1 or (
      self.splits is not None and self.splits < 1
    ):
      raise ValueError(f"blocks: found {self}, expected at least 1 of each")


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of a call.

  Attributes:
    scale: Factor on q.k.
    softcap: c of c tanh(t / c), or None.
    window: Keys that a query sees at most, itself included, or None.
    precision: Of all matmuls, as in `jax.lax.dot`.
  """

  scale: float
  softcap: float | None = None
  window: int | None = None
  precision: Any = None


def capped(spec: Spec, t: jax.Array) -> jax.Array:
  """Logits from scaled products."""
  if spec.softcap is None:
    return t
  return spec.softcap * jnp.tanh(t / spec.softcap)
