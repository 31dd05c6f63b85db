"""What the matrices of a GGUF file are to be stored in."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from research.interop.gguf import mixtures, tensor_types
from research.interop.gguf.container import DTYPES
from research.interop.gguf.names import ROUTER
from research.interop.parts import Address, Part
from research.nn.moe import Moe
from research.nn.transformer import Transformer
from research.typing import UserError

ACTIVATIONS = ("Q8_K",)
"""Types that ggml has for activations only."""

FILE_TYPES = {
  "F32": 0,
  "F16": 1,
  "Q4_0": 2,
  "Q4_1": 3,
  "Q8_0": 7,
  "Q5_0": 8,
  "Q5_1": 9,
  "Q3_K": 11,
  "Q4_K": 14,
  "Q5_K": 16,
  "BF16": 32,
  "MXFP4": 38,
  "NVFP4": 39,
} | {name: mixture.file_type for name, mixture in mixtures.MIXTURES.items()}
"""What to convert to -> `general.file_type`.

A mixture of `research.interop.gguf.mixtures`, or else a type for every matrix.
"""

_PLAIN = {"float64": "F32"} | {v: k for k, v in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How to store matrices.

  Attributes:
    kind: one of `FILE_TYPES`, or None to keep each one's own.
    fallback: whether rows that blocks do not divide may be stored otherwise.
    importances: name of a tensor -> weight of each column's errors; None for
      an encoding without.
  """

  kind: str | None = None
  fallback: bool = False
  importances: Mapping[str, np.ndarray] | None = None

  def __post_init__(self):
    if self.kind is not None and self.kind not in FILE_TYPES:
      raise UserError(
        f"--format=gguf:{self.kind}: expected one of {', '.join(FILE_TYPES)}"
      )

  def shape(self, model: Transformer) -> mixtures.Shape:
    kinds = model.layer_kinds()
    a = kinds[0].attention
    mlp = kinds[0].mlp
    return mixtures.Shape(
      depth=len(kinds),
      group=a.heads // a.kv_heads,
      tied=model.tied,
      weighed=self.importances is not None,
      experts=mlp.routing.experts if isinstance(mlp, Moe) else 0,
    )

  def types(
    self,
    name: str,
    address: Address,
    part: Part,
    columns: int,
    shape: mixtures.Shape,
  ) -> tuple[str, str]:
    """Returns (type that is wanted, type that is taken) of a tensor.

    Raises:
      UserError: blocks do not divide rows, or the type is none of weights.
    """
    if len(part.shape) == 1 or address.path == ROUTER:
      return "F32", "F32"
    if self.kind in mixtures.MIXTURES:
      path = address.path.replace("mlp/experts/", "mlp/")
      kind = mixtures.target_type(self.kind, path, address.layer, shape)
    else:
      kind = self.kind or _PLAIN.get(part.kind, part.kind)
    tensor_types.require(kind, f"GGUF: {name}")
    if kind in ACTIVATIONS:
      raise UserError(f"GGUF: {name} has type {kind}, which is no weight's")
    taken = mixtures.stored_type(f"GGUF: {name}", kind, columns, self.fallback)
    return kind, taken

  def importance(self, name: str, columns: int) -> np.ndarray | None:
    """Returns the importances of a tensor's columns, or None for none.

    Those of the embedding and the output may be missing, others may not.

    Raises:
      UserError: they are missing, or not of that size.
    """
    if self.importances is None:
      return None
    found = self.importances.get(name)
    if found is None:
      if not name.startswith("blk."):
        return None
      raise UserError(
        f"--imatrix: has no entry for {name} among its "
        f"{len(self.importances)} tensors. Was it made from this model?"
      )
    if found.shape != (columns,):
      raise UserError(
        f"--imatrix: {name} has importances of shape {list(found.shape)}, "
        f"expected [{columns}]. Was it made from this model?"
      )
    return found
