"""C3A: block-circulant updates, applied as circular convolutions by FFT.

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
    init: 'zero', or Glorot uniform (PEFT's default, a nonzero update).
  """

  block: int = 256
  init: str = "zero"

  PEFT: ClassVar = "C3A"
  PEFT_DEFAULTS: ClassVar = dict(block_size=256)

  @property
  def starts_as_base(self):
    return self.init == "zero"

  def init_arrays(self, key, spec, w, stats=None):
    b = self.block
    for name, n in (("in", spec.size_in), ("out", spec.size_out)):
      if n % b:
        raise UserError(f"C3A: {name} {n} is not a multiple of block {b}")
    shape = (spec.size_out // b, spec.size_in // b, b)
    if self.init == "zero":
      return {"kernel": zeros(*shape)}, {}
    bound = (6 / (spec.size_in + spec.size_out)) ** 0.5
    return {"kernel": uniform(key, shape, bound)}, {}

  def delta(self, p, w):
    return self._product(jnp.eye(w.shape[-2]), p["kernel"])

  def branch(self, eq, x, p, w):
    if contracts_output(eq):
      return super().branch(eq, x, p, w)
    # FFTs need at least 32 bits.
    return self._product(x.astype(p["kernel"].dtype), p["kernel"]).astype(
      x.dtype
    )

  def _product(self, x, kernel):
    # With sharded outputs XLA would shard FFTs along the frequencies, which its
    # CPU backend cannot run.
    whole = functools.partial(sharding.unsharded, last=2)
    x = whole(x.reshape(*x.shape[:-1], -1, self.block))
    spectrum = jnp.einsum(
      "...nb,mnb->...mb", jnp.fft.ifft(x), jnp.fft.fft(whole(kernel))
    )
    y = whole(jnp.fft.fft(whole(spectrum)).real).astype(kernel.dtype)
    size_in = x.shape[-2] * x.shape[-1]
    return y.reshape(*y.shape[:-2], -1) / size_in

  def axes(self, names):
    return {"kernel": (None, None, None)}

  def is_noop(self, p):
    return not p["kernel"].any()

  def to_peft(self, p, spec):
    return {"c3a_kernel": p["kernel"]}

  def from_peft(self, tensors, spec, w):
    return {"kernel": tensors["c3a_kernel"]}, {}

  def peft_fields(self, methods):
    return dict(block_size=self.block, init_weights=True)

  @classmethod
  def from_fields(cls, fields):
    return cls(block=fields.integer("block_size"))
