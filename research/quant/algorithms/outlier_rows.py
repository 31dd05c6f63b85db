"""A few rows of a matrix in full precision, beside what is packed.

OWQ (Lee et al. 2023, arXiv:2306.02272): of the inputs, those few whose rounding
costs the outputs most are not rounded at all. What row `j` costs is

    mean(x_j²) * sum_o (w - rounded w)[j, o]²,

the diagonal's share of the layer's squared error (equation 3, with errors of
rounding to nearest). The rows are chosen before the others are packed, and are
0 in what is packed: they widen no group's grid, and GPTQ, told that they are
never used, makes nothing up by them. Matrices of the same inputs keep the same
rows. They are the leaf's `outliers`.

LLM.int8 has outliers of another kind: inputs that are large as the model runs,
which no stored matrix can know (`research.quant.llm_int8`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.quant import methods
from research.quant.format import Format
from research.quant.methods import (
  GPTQMethod,
  InputStats,
  Method,
  RoundToNearest,
)
from research.typing import Array, Float, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepOutlierRows:
  """A method that leaves some rows as they are.

  Attributes:
    method: of all other rows.
    rows: how many; 16 bits a number, and 4 bytes to say which.
    dtype: that they are stored in.
  """

  method: Method = RoundToNearest()
  rows: int = 4
  dtype: str = "float16"

  def __post_init__(self):
    if self.rows < 1:
      raise UserError(f"Apart: rows is {self.rows}, expected 1 or more")
    if isinstance(self.method, GPTQMethod) and self.method.options.drift:
      raise UserError("Apart: GPTQ.drift moves rows, expected 0")

  @property
  def name(self) -> str:
    return f"{self.method.name}, {self.rows} rows apart"

  @property
  def weighted(self) -> bool:
    return self.method.weighted

  def check(self, format, inputs, calibrated):
    if self.rows >= inputs:
      raise UserError(
        f"Apart: rows is {self.rows}, expected fewer than the matrix' "
        f"{inputs} inputs"
      )
    self.method.check(format, inputs, calibrated)

  def parts(self, ws, seen, format, starts):
    """Returns what the method makes of matrices whose rows are 0."""
    return self.method.parts(ws, seen, format, starts)

  def apart(
    self,
    ws: Sequence[Float[Array, "I O"]],
    seen: InputStats | None,
    format: Format,
  ) -> tuple[
    list[Float[Array, "I O"]], list[dict[str, Any]], InputStats | None
  ]:
    """Returns matrices with rows of 0, their outliers, inputs without them."""
    cost = sum(costs(w, seen, format) for w in ws)
    rows = jnp.sort(jax.lax.top_k(cost, self.rows)[1]).astype(jnp.int32)
    rest = [w.at[rows].set(0) for w in ws]
    values = [w[rows].astype(self.dtype) for w in ws]
    if seen is not None:
      xx = seen["xx"].at[rows].set(0).at[:, rows].set(0)
      seen = {**seen, "xx": xx}
    return rest, [{"rows": rows, "values": x} for x in values], seen


def costs(
  w: Float[Array, "I O"], seen: InputStats | None, format: Format
) -> Float[Array, " I"]:
  """Returns what rounding each row costs; without inputs, of equal ones."""
  error = format.decode(format.encoded(w)) - w
  each = (error**2).sum(-1)
  return each if seen is None else each * methods.importance_of(seen)
