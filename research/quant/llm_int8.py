"""LLM.int8: 8-bit products, with outlier inputs in full precision.

Dettmers et al. 2022 (arXiv:2208.07339). An input whose magnitude reaches
`threshold` for any token is multiplied in full precision, by decoded weights.
All others use 8 bits, with one scale per token and one per output. Outlier
inputs are found at run time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research import weights
from research.quant.activations import Op, integer_einsum, nearest_code
from research.quant.formats.affine import Affine
from research.quant.numerics import exact_division
from research.quant.numerics.integers import integer_codes, integer_product
from research.quant.qtensor import QTensor
from research.ranges import Ranged, Real
from research.typing import Array, Float

INT8 = Affine(
  block=0, bits=8, symmetric=True, rule="amax/qmax", scale_dtype="float32"
)
"""The weights' format: codes -127..127, one scale per output."""


_LARGEST = 65504.0
"""The largest number of float16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outliers(Ranged, Op):
  """Rounds activations to 8 bits, except inputs with outliers.

  Both products have full size, since the outlier inputs are not known at
  compile time. As in bitsandbytes, they are those of all rows of a call, so
  padding, other rows of the batch and chunks may change results.

  Attributes:
    threshold: magnitude of an outlier; 0 rounds all inputs to 8 bits.
  """

  threshold: Real(at_least=0, infinite=True) = 6.0

  def is_row_wise(self, scale: Any = None) -> bool:
    """Whether no row makes an input of other rows an outlier."""
    del scale
    return not self.threshold

  def __call__(self, x: Float[Array, "*B I"], scale: Any = None) -> Any:
    codes, scale, exact = self.parts(x, scale)
    return (codes * scale).astype(x.dtype) + exact

  def einsum(
    self,
    eq: str,
    x: Float[Array, "..."],
    w: weights.AnyWeight,
    scale: Any = None,
  ) -> Float[Array, "..."]:
    """Returns `einsum(eq, self(x), w)`; multiplies the rounded part as int8."""
    if integer_codes(w) is None:
      return weights.einsum(eq, self(x, scale), w)
    return integer_einsum(self, eq, x, w, scale)

  def integer_einsum(
    self, eq: str, x: Float[Array, "..."], w: QTensor, scale: Any
  ) -> Float[Array, "..."]:
    """Returns the sum of both products; see `activations.integer_einsum`."""
    codes, scale, exact = self.parts(x, scale)
    y = integer_product(codes.astype(jnp.int8), integer_codes(w)) * scale
    return y.astype(x.dtype) + weights.einsum(eq, exact, w)

  def parts(
    self, x: Float[Array, "*B I"], scale: Any = None
  ) -> tuple[Float[Array, "*B I"], Float[Array, "..."], Float[Array, "*B I"]]:
    """Returns (codes, their scale, the unrounded outlier inputs).

    A token's scale covers all its values below the threshold, also those of
    outlier inputs. As in bitsandbytes, what is rounded is float16 first.
    """
    del scale
    wide = x.astype(jnp.float32)
    half = jnp.clip(wide, -_LARGEST, _LARGEST).astype(jnp.float16)
    half = wide + jax.lax.stop_gradient(half.astype(jnp.float32) - wide)
    large = jnp.abs(half) >= (self.threshold or jnp.inf)
    apart = jnp.any(large, axis=tuple(range(x.ndim - 1)))
    small = jnp.where(large, 0, half)
    most = jnp.max(jnp.abs(small), axis=-1, keepdims=True)
    most = jnp.where(most > 0, most, 1.0)
    # Its order of products: of float16's numbers, many are half way.
    unit = small * (127 * exact_division.divide(jnp.ones_like(most), most))
    codes = nearest_code(unit, -127, 127)
    return jnp.where(apart, 0, codes), most / 127, jnp.where(apart, x, 0)
