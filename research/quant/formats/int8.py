"""8-bit integers with a scale per output, in bitsandbytes' LLM.int8 format.

Dettmers et al. 2022 (arXiv:2208.07339): a code is `127 w / top`, rounded to
nearest even. The format stores the magnitudes `top`, not `top / 127`, so that
bitsandbytes' tensors convert back exactly.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, NormalForm, Parts
from research.typing import Array, Float, Shaped

STEP = 7.874015718698502e-3
"""1 / 127 in float32, bitsandbytes' factor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Format):
  """Codes from -127 to 127, with a magnitude per output.

  Parts: codes int8 `[..., I, O]`; top float32 `[..., O]`.

  Attributes:
    block: 1; all inputs of an output share its magnitude.
  """

  block: int = 1

  @property
  def name(self) -> str:
    return "int8-outputs"

  def layout(self) -> dict[str, str]:
    return {"codes": "xo", "top": "o"}

  def encode(
    self,
    w: Float[Array, "I O"] | np.ndarray,
    importance: Float[Array, " I"] | None = None,
  ) -> dict[str, Any]:
    del importance
    w = jnp.asarray(w).astype(jnp.float32)
    top = abs(w).max(0)
    # Smaller magnitudes count as 0: 127 / top could overflow, or XLA flush top.
    some = top > 2.0**-114
    codes = jnp.round(w * jnp.where(some, 127 / jnp.where(some, top, 1.0), 0))
    return {"codes": codes.astype(jnp.int8), "top": top}

  def with_codes(
    self, parts: Parts, codes: Shaped[Array, "I O"]
  ) -> dict[str, Any]:
    return dict(parts) | {"codes": codes}

  def normal_form(self, parts: Parts) -> NormalForm:
    return NormalForm(
      codes=parts["codes"],
      scale=(parts["top"] * jnp.float32(STEP))[..., None, :],
      group=parts["codes"].shape[-2],
      bits=8,
      code_range=(-127, 127),
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    # bitsandbytes' order of products, which may differ from the normal form's
    # in the last bit.
    codes = jnp.asarray(parts["codes"]).astype(jnp.float32)
    return codes * parts["top"][..., None, :] * jnp.float32(STEP)
