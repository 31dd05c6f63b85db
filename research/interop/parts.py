"""A model's parameters one by one, unread: what exporters walk over.

Whatever a model is stored in (a tree in memory, safetensors, GGUF), its
parameters are addressed by layer and read when their turn comes, so that a
conversion holds one of them at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from research import tree, weights
from research.interop.names import Address
from research.lora import wrap
from research.typing import Params


@dataclasses.dataclass(frozen=True)
class Part:
  """One parameter.

  Attributes:
    shape: the logical one.
    kind: how it is stored: a dtype's name, or the type of a packed weight.
    read: returns it, a weight of any kind, in our orientation.
  """

  shape: tuple[int, ...]
  kind: str
  read: Callable[[], Any] = dataclasses.field(repr=False)

  @property
  def packed(self) -> bool:
    """Whether it is stored as anything but plain numbers."""
    return self.kind not in PLAIN


Parts = Mapping[Address, Part]

PLAIN = ("float64", "float32", "bfloat16", "float16")


def kind_of(weight: Any) -> str:
  """Returns how a weight is stored; an adapted one like its base."""
  if (inner := weights.wrapped(weight)) is not None:
    return kind_of(inner)
  if weights.is_packed(weight):
    return weight.format.name
  return str(weight.dtype)


def _row(leaf: Any, k: tuple[int, ...]) -> Any:
  # Slicing in NumPy shares the memory; in JAX each slice would be compiled.
  return jax.tree.map(lambda x: np.asarray(x)[k], leaf)


def from_params(params: Params) -> dict[Address, Part]:
  """Returns the parameters of a tree; it stays in memory and is shared."""
  out, scaled = {}, wrap.biases(params)
  for path, leaf in weights.named(tree.outer_params(params)):
    out[Address(None, path)] = Part(
      tuple(leaf.shape), kind_of(leaf), lambda leaf=leaf: leaf
    )
  for prefix, rows in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in weights.named(params[run][layer]):
      leaf = scaled.get(f"{prefix}/{path}", leaf)
      # Matrices of experts have their layer and their number in front.
      lead = len(leaf.shape) - 2 if len(leaf.shape) > 3 else 1
      for k in np.ndindex(*leaf.shape[:lead]):
        out[Address(rows[k[0]], path, *k[1:])] = Part(
          tuple(leaf.shape[lead:]),
          kind_of(leaf),
          lambda leaf=leaf, k=k: _row(leaf, k),
        )
  return out


def ordered(parts: Parts) -> list[Address]:
  """Returns the addresses in the order that files have: embedding first."""

  def place(address: Address):
    if address.layer is None:
      return (0 if address.path == "embed" else 2, 0, address.path)
    return (1, address.layer, "")

  return sorted(parts, key=place)
