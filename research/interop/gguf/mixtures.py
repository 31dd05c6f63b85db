"""Mixtures of ggml's types, as `llama-quantize` makes them: more where it pays.

A mixture has a type for most matrices, and others for values, for the ends of
feed-forward blocks and for the output, of all layers or of some. Any family
but Falcon; experts' matrices are those of feed-forward blocks, all alike.
"""

import dataclasses
from collections.abc import Mapping

from research.quant.formats import ggml
from research.typing import UserError

OUTPUT, EMBED = "head", "embed"
VALUE, MIX, DOWN = "attention/v", "attention/o", "mlp/down"
KEY = "attention/k"


@dataclasses.dataclass(frozen=True)
class Mixture:
  """One of llama.cpp's file types.

  Attributes:
    base: ggml's type of most matrices.
    file_type: its number in `general.file_type`.
  """

  base: str
  file_type: int


MIXTURES: Mapping[str, Mixture] = {
  "Q2_K": Mixture("Q2_K", 10),
  "Q2_K_S": Mixture("Q2_K", 21),
  "Q3_K_S": Mixture("Q3_K", 11),
  "Q3_K_M": Mixture("Q3_K", 12),
  "Q3_K_L": Mixture("Q3_K", 13),
  "Q4_K_S": Mixture("Q4_K", 14),
  "Q4_K_M": Mixture("Q4_K", 15),
  "Q5_K_S": Mixture("Q5_K", 16),
  "Q5_K_M": Mixture("Q5_K", 17),
  "Q6_K": Mixture("Q6_K", 18),
  "IQ4_NL": Mixture("IQ4_NL", 25),
  "IQ4_XS": Mixture("IQ4_XS", 30),
  "TQ1_0": Mixture("TQ1_0", 36),
  "TQ2_0": Mixture("TQ2_0", 37),
}

FALLBACKS = {
  **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
  "Q4_K": "Q5_0",
  "Q5_K": "Q5_1",
  "Q6_K": "Q8_0",
  "IQ4_XS": "IQ4_NL",
}
"""Type -> what llama.cpp takes for rows that its block does not divide."""


_MIX_OF_EIGHT = (
  *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"),
  *("IQ4_NL", "IQ4_XS"),
)
"""Mixtures that keep the output of attention better where experts are eight."""


@dataclasses.dataclass(frozen=True)
class Shape:
  """What mixtures ask of a model.

  Attributes:
    depth: layers.
    group: query heads a key head.
    tied: whether the embedding is the output.
    weighed: whether importances are given.
    experts: of a layer, or 0.
  """

  depth: int
  group: int
  tied: bool
  weighed: bool = False
  experts: int = 0


def more_bits(layer: int, depth: int) -> bool:
  """Whether a layer is one of the first or last eighth, or a third between."""
  eighth = depth // 8
  inside = (layer - eighth) % 3 == 2
  return layer < eighth or layer >= 7 * depth // 8 or inside


def target_type(name: str, path: str, layer: int | None, shape: Shape) -> str:
  """Returns ggml's type of a matrix, were its rows whole blocks.

  Args:
    name: of the mixture, one of `MIXTURES`.
  """
  base = MIXTURES[name].base
  if path == OUTPUT or (path == EMBED and shape.tied):
    return "Q6_K"
  if path == EMBED:
    return "Q4_K" if base.startswith("TQ") else base
  layer = layer or 0
  if shape.experts == 8 and path in (VALUE, KEY):
    # Mixtral's: next to nothing of a model whose experts are large.
    return "Q8_0"
  if path == VALUE:
    found = _value(name, layer, shape) or base
    # 70B models: eight heads share what is then a small matrix.
    if shape.depth == 80 and shape.group > 1 and found in ("Q3_K", "Q4_K"):
      return "Q5_K"
    return found
  if path == DOWN:
    return _down(name, layer, shape) or base
  if path == MIX and shape.experts == 8:
    return "Q5_K" if name in _MIX_OF_EIGHT else base
  if path == MIX:
    mix = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
    return mix.get(name, base)
  return base


def _value(name: str, layer: int, shape: Shape) -> str | None:
  many = shape.group >= 4
  match name:
    case "Q2_K":
      return "Q4_K" if many else "Q3_K"
    case "Q2_K_S" if many:
      return "Q4_K"
    case "Q3_K_M":
      return "Q5_K" if layer < 2 else "Q4_K"
    case "Q3_K_L":
      return "Q5_K"
    case "IQ4_NL" | "IQ4_XS" if many:
      return "Q5_K"
    case "Q4_K_M" | "Q5_K_M" if more_bits(layer, shape.depth):
      return "Q6_K"
    case "Q4_K_S" if layer < 4:
      return "Q5_K"
  return None


def _down(name: str, layer: int, shape: Shape) -> str | None:
  early = layer < shape.depth // 8
  match name:
    case "Q2_K":
      return "Q3_K"
    case "Q2_K_S" if early:
      return "Q4_K"
    case "Q3_K_M":
      return "Q5_K" if layer < shape.depth // 16 else "Q4_K"
    case "Q3_K_L":
      return "Q5_K"
    case "IQ4_NL" | "IQ4_XS" if early and not shape.weighed:
      return "Q5_K"
    case "Q4_K_M" | "Q5_K_M" if more_bits(layer, shape.depth):
      return "Q6_K"
    case "Q4_K_S" if early:
      return "Q5_K"
  return None


def stored_type(where: str, kind: str, columns: int, fallback: bool) -> str:
  """Returns the type that rows of `columns` weights are stored in.

  Args:
    where: the tensor's name, for the message.

  Raises:
    UserError: blocks do not divide rows, and nothing else may be taken.
  """

  def divides(kind):
    return kind not in ggml.TYPES or columns % ggml.TYPES[kind].block == 0

  if divides(kind):
    return kind
  other = FALLBACKS.get(kind, "F16")
  other = other if divides(other) else "F16"
  if not fallback:
    raise UserError(
      f"{where} has rows of {columns} weights, which {kind} cannot hold: "
      f"expected a multiple of {ggml.TYPES[kind].block}.\n"
      f"Take another type, such as F16, or --fallback, for {other} there as "
      "llama.cpp has it."
    )
  return other
