"""Shared types: arrays with shapes, parameter trees, and the user's errors.

Dim letters, the same in annotations (upper case) and einsums (lower case):
`B` batch, `T` query length, `S` key length, `D` width, `N` query heads,
`K` key/value heads, `G` = N/K, `H` head dim, `F` feed-forward width,
`V` vocabulary, `L` layers, `R` rank, `E` experts, `P` patches, `C` channels,
`X` blocks of a quantized axis.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import (
  Array,
  Bool,
  Float,
  Float16,
  Float32,
  Int,
  Int8,
  Int32,
  PyTree,
  Shaped,
  UInt8,
)

from research.errors import UserError, WriteError

PRNGKey = jax.Array
"""A typed key from `jax.random.key`, or an array of such keys."""

Params = Mapping[str, Any]
"""A nested dict whose leaves are Weights (arrays or `research.weights`)."""

__all__ = [
  "Array",
  "Bool",
  "Float",
  "Float16",
  "Float32",
  "Int",
  "Int8",
  "Int32",
  "PRNGKey",
  "Params",
  "PyTree",
  "Shaped",
  "UInt8",
  "UserError",
  "WriteError",
]
