"""LLM.int8: integers, but for inputs with outliers.

Dettmers et al. 2022 (arXiv:2208.07339). An input that some token drives to
`threshold` or beyond is multiplied in full precision, by decoded weights; all
others in 8 bits, a scale a token and one an output. Which inputs those are is
decided as the model runs.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from research import weights
from research.quant.activations import Op, Round
from research.quant.formats.affine import Affine
from research.quant.numerics.integers import integer_product, integers
from research.typing import Array, Float, UserError

INT8 = Affine(
  block=0, bits=8, symmetric=True, rule="amax/qmax", scale_dtype="float32"
)
"""The format of its weights: codes -127..127, a scale for each output."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outliers(Op):
  """8 bits for all inputs without outliers, full precision for the rest.

  Both products have the size of the whole one: which inputs have outliers is
  not known when a program is compiled.

  Attributes:
    threshold: of magnitudes; 0 for none, all inputs in 8 bits.
  """

  threshold: float = 6.0

  def __post_init__(self):
    if not self.threshold >= 0:
      raise UserError(
        f"Outliers.threshold: found {self.threshold}, expected 0 or more."
      )

  def __call__(self, x: Float[Array, "*B I"], scale: Any = None) -> Any:
    """Returns `x`, rounded but for inputs with outliers."""
    codes, scale, exact = self.parts(x, scale)
    return (codes * scale).astype(x.dtype) + exact

  def einsum(
    self,
    eq: str,
    x: Float[Array, "..."],
    w: weights.AnyWeight,
    scale: Any = None,
  ) -> Float[Array, "..."]:
    """Returns `einsum(eq, self(x), w)`; the rounded part in integers."""
    codes, scale, exact = self.parts(x, scale)
    held = integers(w)
    if held is None:
      rounded = (codes * scale).astype(x.dtype)
      return weights.einsum(eq, rounded + exact, w)
    y = integer_product(codes.astype(jnp.int8), held) * scale
    return y.astype(x.dtype) + weights.einsum(eq, exact, w)

  def parts(
    self, x: Float[Array, "*B I"], scale: Any = None
  ) -> tuple[Float[Array, "*B I"], Float[Array, "..."], Float[Array, "*B I"]]:
    """Returns (codes, their scale, what is not rounded).

    A token's scale is that of all its values below the threshold, those of
    inputs with outliers, too, as in bitsandbytes.
    """
    large = jnp.abs(x) >= (self.threshold or jnp.inf)
    apart = jnp.any(large, axis=tuple(range(x.ndim - 1)))
    codes, scale, _ = Round().codes(jnp.where(large, 0, x), scale)
    codes, scale = codes[..., 0, :], scale[..., 0]
    return jnp.where(apart, 0, codes), scale, jnp.where(apart, x, 0)
