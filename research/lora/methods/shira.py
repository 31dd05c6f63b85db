"""SHiRA: trains a sparse update at random positions of the matrix.

Bhardwaj et al. 2024 (arXiv:2406.13175), section 3, with random masks.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.lora.method import DenseDelta, dense_fp32, zeros
from research.lora.torch_rng import randperm_prefix
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(DenseDelta):
  """`r (in + out)` trained entries, as many as LoRA of that rank; no scale.

  Attributes:
    seed: seed of the positions, which equal PEFT's for the same seed; -1 draws
      different positions for each matrix.
  """

  rank: int = 32
  seed: int = 0

  PEFT: ClassVar = "SHIRA"
  PER_MODULE: ClassVar = ("alpha",)
  PEFT_DEFAULTS: ClassVar = dict(r=32)

  def init_arrays(self, key, spec, w, stats=None):
    n = self.rank * (spec.size_in + spec.size_out)
    total = spec.size_in * spec.size_out
    if n > total:
      raise UserError(
        f"SHiRA: rank {self.rank} means {n} entries of a matrix of {total}"
      )
    if self.seed >= 0:
      chosen = jnp.asarray(_peft_places(self.seed, spec, n))
    else:
      chosen = jnp.sort(jax.random.choice(key, total, (n,), replace=False))
    return {"values": zeros(n)}, {"places": chosen}

  def delta(self, p, w):
    size_in, size_out = w.shape[-2:]
    flat = jnp.zeros(size_in * size_out, p["values"].dtype)
    # Positions are flat row-major indices of [in, out].
    flat = flat.at[p["places"]].add(dense_fp32(p["values"]))
    return flat.reshape(size_in, size_out)

  def axes(self, names):
    return {"values": (None,), "places": (None,)}

  def is_noop(self, p):
    return not p["values"].any()

  def to_peft(self, p, spec):
    places = p["places"].astype(jnp.int32)
    inputs, outputs = places // spec.size_out, places % spec.size_out
    both = (np if isinstance(places, np.ndarray) else jnp).stack
    return {
      "shira_weight": p["values"],
      "shira_indices": both([outputs, inputs]),
    }

  def from_peft(self, tensors, spec, w):
    outputs, inputs = indices = tensors["shira_indices"].astype(np.int64)
    sizes = np.array([[spec.size_out], [spec.size_in]])
    if (indices < 0).any() or (indices >= sizes).any():
      raise UserError(
        f"SHiRA: shira_indices has a position outside [{spec.size_out}, "
        f"{spec.size_in}], out and in of the matrix"
      )
    places = (inputs * spec.size_out + outputs).astype(np.int32)
    return {"values": tensors["shira_weight"]}, {"places": places}

  def peft_fields(self, methods):
    return dict(
      r=self.rank,
      mask_type="random",
      random_seed=self.seed if self.seed >= 0 else None,
      fan_in_fan_out=False,
    )

  @classmethod
  def from_fields(cls, fields):
    seed = fields.get("random_seed")
    if seed is not None:
      seed = fields.integer("random_seed", least=0, most=2**32 - 1)
    return cls(rank=fields.integer("r"), seed=-1 if seed is None else seed)


def _peft_places(seed, spec, count):
  """Returns PEFT's positions as flat indices of [in, out], in PEFT's order.

  PEFT orders them as row-major entries of a mask [out, in].
  """
  total = spec.size_in * spec.size_out
  theirs = np.sort(randperm_prefix(seed, total, count))
  out, inputs = np.divmod(theirs, spec.size_in)
  return (inputs * spec.size_out + out).astype(np.int32)
