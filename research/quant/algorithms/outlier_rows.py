"""OWQ: keeps the few most sensitive rows of a matrix in higher precision.

OWQ (Lee et al. 2023, arXiv:2306.02272) does not round the inputs' rows whose
rounding errors affect the outputs most. The cost of row `j` is

    mean(x_j²) * sum_o (w - rounded w)[j, o]²,

the diagonal part of the layer's squared error (equation 3, with errors of
rounding to nearest). The rows are chosen before the others are packed and are
set to 0 in the packed matrix: they do not widen the range of their group, and
GPTQ, whose Hessian is 0 for them, does not use them to compensate errors.
Matrices with the same inputs keep the same rows, as the leaf's `outliers`.

LLM.int8 has outliers of another kind: inputs that are large at run time
(`research.quant.llm_int8`).
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
from research.ranges import PositiveInt, Ranged
from research.typing import Array, Float, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepOutlierRows(Ranged):
  """Rounding method that keeps the most sensitive rows unrounded.

  Attributes:
    method: rounding method of all other rows.
    rows: number of rows to keep; each also takes 4 bytes for its index.
  """

  method: Method = RoundToNearest()
  rows: PositiveInt = 4
  dtype: str = "float16"

  def __post_init__(self):
    super().__post_init__()
    if isinstance(self.method, GPTQMethod) and self.method.options.drift:
      raise UserError("KeepOutlierRows: GPTQ.drift moves rows, expected 0")

  @property
  def name(self) -> str:
    return f"{self.method.name}, {self.rows} rows apart"

  @property
  def weighted(self) -> bool:
    return self.method.weighted

  def check(self, format, inputs, calibrated):
    if self.rows >= inputs:
      raise UserError(
        f"KeepOutlierRows: rows is {self.rows}, expected fewer than the "
        f"matrix's {inputs} inputs"
      )
    self.method.check(format, inputs, calibrated)

  def parts(self, ws, stats, format, encoded):
    return self.method.parts(ws, stats, format, encoded)

  def split_outliers(
    self,
    ws: Sequence[Float[Array, "I O"]],
    stats: InputStats | None,
    format: Format,
  ) -> tuple[
    list[Float[Array, "I O"]], list[dict[str, Any]], InputStats | None
  ]:
    """Returns (matrices with these rows 0, the rows, remaining statistics)."""
    cost = sum(rounding_costs(w, stats, format) for w in ws)
    rows = jnp.sort(jax.lax.top_k(cost, self.rows)[1]).astype(jnp.int32)
    rest = [w.at[rows].set(0) for w in ws]
    values = [w[rows].astype(self.dtype) for w in ws]
    if stats is not None:
      xx = stats["xx"].at[rows].set(0).at[:, rows].set(0)
      stats = {**stats, "xx": xx}
    return rest, [{"rows": rows, "values": x} for x in values], stats


def rounding_costs(
  w: Float[Array, "I O"], stats: InputStats | None, format: Format
) -> Float[Array, " I"]:
  """Returns the cost of rounding each row; equal inputs if `stats` is None."""
  error = format.decode(format.encode_traced(w)) - w
  each = (error**2).sum(-1)
  return each if stats is None else each * methods.input_importance(stats)
