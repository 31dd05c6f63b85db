"""C3A: blocks that are circulant, so that one product is a convolution.

Chen et al. 2024 (arXiv:2407.19342), equations 4 and 5.
"""

import dataclasses
import functools
from typing import ClassVar

import jax.numpy as jnp

from research import sharding
from research.lora.method import Method, contracts_output, uniform, zeros
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3A(Method):
  """`kernel [out/b, in/b, b]`; the update is divided by `in`, as PEFT does.

  Attributes:
    block: `b`; divides both sizes.
    init: 'zero', or uniform by Glorot's rule (PEFT's default, no zero start).
  """

  block: int = 256
  init: str = "zero"

  PEFT: ClassVar = "C3A"
  PEFT_DEFAULTS: ClassVar = dict(block_size=256)

  @property
  def starts_as_base(self):
    return self.init == "zero"

  def start(self, key, place, w, seen=None):
    b = self.block
    for name, n in (("in", place.size_in), ("out", place.size_out)):
      if n % b:
        raise UserError(f"C3A: {name} {n} is not a multiple of block {b}")
    shape = (place.size_out // b, place.size_in // b, b)
    if self.init == "zero":
      return {"kernel": zeros(*shape)}, {}
    bound = (6 / (place.size_in + place.size_out)) ** 0.5
    return {"kernel": uniform(key, shape, bound)}, {}

  def delta(self, p, w):
    return self._product(jnp.eye(w.shape[-2]), p["kernel"])

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    # There is no transform of 16-bit numbers.
    return self._product(x.astype(p["kernel"].dtype), p["kernel"]).astype(
      x.dtype
    )

  def _product(self, x, kernel):
    # Outputs that are cut would have XLA cut transforms along frequencies,
    # which its CPU backend cannot run.
    whole = functools.partial(sharding.whole, last=2)
    x = whole(x.reshape(*x.shape[:-1], -1, self.block))
    spectrum = jnp.einsum(
      "...nb,mnb->...mb", jnp.fft.ifft(x), jnp.fft.fft(whole(kernel))
    )
    y = whole(jnp.fft.fft(whole(spectrum)).real).astype(kernel.dtype)
    size_in = x.shape[-2] * x.shape[-1]
    return y.reshape(*y.shape[:-2], -1) / size_in

  def axes(self, names):
    return {"kernel": (None, None, None)}

  def idle(self, p):
    return not p["kernel"].any()

  def to_peft(self, p, place):
    return {"c3a_kernel": p["kernel"]}

  def from_peft(self, tensors, place, w):
    return {"kernel": tensors["c3a_kernel"]}, {}

  def peft_fields(self, methods):
    return dict(block_size=self.block, init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    return cls(block=fields.integer("block_size"))
