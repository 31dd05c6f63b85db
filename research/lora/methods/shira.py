"""SHiRA: a few entries of the matrix, at random places, are trained.

Bhardwaj et al. 2024 (arXiv:2406.13175), section 3, with random masks.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from research.lora.method import DenseDelta, dense_fp32, zeros
from research.lora.torch_rng import drawn_places
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(DenseDelta):
  """As many entries as LoRA of that rank has: `r (in + out)`; no scale.

  Attributes:
    seed: of the places, PEFT's for the same one; -1 for others in each
      matrix.
  """

  rank: int = 32
  seed: int = 0

  PEFT: ClassVar = "SHIRA"
  VARIES: ClassVar = ("alpha",)
  PEFT_DEFAULTS: ClassVar = dict(r=32)

  def start(self, key, place, w, seen=None):
    n = self.rank * (place.size_in + place.size_out)
    total = place.size_in * place.size_out
    if n > total:
      raise UserError(
        f"SHiRA: rank {self.rank} means {n} entries of a matrix of {total}"
      )
    if self.seed >= 0:
      chosen = jnp.asarray(_peft_places(self.seed, place, n))
    else:
      chosen = jnp.sort(jax.random.choice(key, total, (n,), replace=False))
    return {"values": zeros(n)}, {"places": chosen}

  def delta(self, p, w):
    size_in, size_out = w.shape[-2:]
    flat = jnp.zeros(size_in * size_out, p["values"].dtype)
    # Places count [in, out] row by row.
    flat = flat.at[p["places"]].add(dense_fp32(p["values"]))
    return flat.reshape(size_in, size_out)

  def axes(self, names):
    return {"values": (None,), "places": (None,)}

  def idle(self, p):
    return not p["values"].any()

  def to_peft(self, p, place):
    places = p["places"].astype(jnp.int32)
    inputs, outputs = places // place.size_out, places % place.size_out
    both = (np if isinstance(places, np.ndarray) else jnp).stack
    return {
      "shira_weight": p["values"],
      "shira_indices": both([outputs, inputs]),
    }

  def from_peft(self, tensors, place, w):
    outputs, inputs = indices = tensors["shira_indices"].astype(np.int64)
    sizes = np.array([[place.size_out], [place.size_in]])
    if (indices < 0).any() or (indices >= sizes).any():
      raise UserError(
        f"SHiRA: shira_indices has a place outside [{place.size_out}, "
        f"{place.size_in}], out and in of the matrix"
      )
    places = (inputs * place.size_out + outputs).astype(np.int32)
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


def _peft_places(seed, place, count):
  """Returns where PEFT's entries stand in ours, in PEFT's order.

  PEFT takes them out of a mask [out, in], row by row.
  """
  total = place.size_in * place.size_out
  theirs = np.sort(drawn_places(seed, total, count))
  out, inputs = np.divmod(theirs, place.size_in)
  return (inputs * place.size_out + out).astype(np.int32)
