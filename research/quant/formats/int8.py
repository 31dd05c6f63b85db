"""Eight-bit integers over each output's largest magnitude, as LLM.int8 has it.

Dettmers et al. 2022 (arXiv:2208.07339): a code is `127 w / top`, rounded to
nearest even. The magnitudes are kept themselves, not over 127: so they leave
in bitsandbytes' tensors as they came.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.quant.format import Format, Parts, Plain
from research.typing import Array, Float, Shaped

STEP = 7.874015718698502e-3
"""1 / 127 in float32, which bitsandbytes multiplies by."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(Format):
  """Codes from -127 to 127 times a magnitude for each output.

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
    # What divides to infinity, and what XLA takes for zero, is nothing.
    some = top > 2.0**-114
    codes = jnp.round(w * jnp.where(some, 127 / jnp.where(some, top, 1.0), 0))
    return {"codes": codes.astype(jnp.int8), "top": top}

  def recoded(
    self, parts: Parts, codes: Shaped[Array, "I O"]
  ) -> dict[str, Any]:
    """Returns parts with other codes times the same magnitudes."""
    return dict(parts) | {"codes": codes}

  def plain(self, parts: Parts) -> Plain:
    return Plain(
      codes=parts["codes"],
      scale=(parts["top"] * jnp.float32(STEP))[..., None, :],
      group=parts["codes"].shape[-2],
      bits=8,
      ends=(-127, 127),
    )

  def decode(self, parts: Parts) -> Float[Array, "... I O"]:
    # In bitsandbytes' order, in which the last bit may differ from `plain`'s.
    codes = jnp.asarray(parts["codes"]).astype(jnp.float32)
    return codes * parts["top"][..., None, :] * jnp.float32(STEP)
