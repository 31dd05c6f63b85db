"""FourierFT: trains a few entries of the update's 2D Fourier spectrum.

Gao et al. 2024 (arXiv:2405.03003), equations 2 to 4.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from research.lora.method import DenseDelta, dense_fp32, zeros
from research.lora.torch_rng import randperm_prefix
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(DenseDelta):
  """The real part of the inverse FFT of `spectrum`, times `scaling`.

  Attributes:
    seed: seed of their positions, which equal PEFT's for the same seed.
  """

  frequencies: int = 1000
  scaling: float = 150.0
  seed: int = 777

  PEFT: ClassVar = "FOURIERFT"
  PEFT_DEFAULTS: ClassVar = dict(
    n_frequency=1000, scaling=150.0, random_loc_seed=777
  )

  def init_arrays(self, key, spec, w, stats=None):
    return {"spectrum": zeros(self.frequencies)}, {}

  def delta(self, p, w):
    size_in, size_out = w.shape[-2:]
    if self.frequencies > size_in * size_out:
      raise UserError(
        f"FourierFT: frequencies is {self.frequencies}, expected at most "
        f"{size_in * size_out}, the entries of the matrix"
      )
    places = randperm_prefix(self.seed, size_in * size_out, self.frequencies)
    full = (
      jnp.zeros(size_out * size_in).at[places].set(dense_fp32(p["spectrum"]))
    )
    update = jnp.fft.ifft2(full.reshape(size_out, size_in)).real
    return self.scaling * update.T

  def axes(self, names):
    return {"spectrum": (None,)}

  def is_noop(self, p):
    return not p["spectrum"].any()

  def to_peft(self, p, spec):
    return {"fourierft_spectrum": p["spectrum"]}

  def from_peft(self, tensors, spec, w):
    return {"spectrum": tensors["fourierft_spectrum"]}, {}

  def peft_fields(self, methods):
    return dict(
      n_frequency=self.frequencies,
      scaling=self.scaling,
      random_loc_seed=self.seed,
      fan_in_fan_out=False,
    )

  @classmethod
  def from_fields(cls, fields):
    return cls(
      frequencies=fields.integer("n_frequency"),
      scaling=fields.number("scaling"),
      seed=fields.integer("random_loc_seed", least=0, most=2**32 - 1),
    )
