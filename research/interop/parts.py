"""A model's parameters one by one, unread: what exporters walk over.

Whatever a model is stored in (a tree in memory, safetensors, GGUF), its
parameters are addressed by layer and read when their turn comes, so that a
conversion holds one of them at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.lora import wrap
from research.nn.transformer import Transformer
from research.quant.untied_embedding import Untied
from research.typing import Params


@dataclasses.dataclass(frozen=True)
class Address:
  """A parameter of ours: its layer (None outside of them) and its path.

  Files hold experts' matrices one by one, so the stacked weight of a layer
  `[E, in, out]` has an address for each `expert`.
  """

  layer: int | None
  path: str
  expert: int | None = None

  @classmethod
  def parse(cls, path: str) -> "Address":
    """Returns the address of a path such as `layers/3/mlp/up` or `embed`."""
    if not path.startswith("layers/"):
      return cls(None, path)
    _, index, inner = path.split("/", 2)
    return cls(int(index), inner)

  def __str__(self) -> str:
    path = self.path if self.expert is None else f"{self.path}[{self.expert}]"
    return path if self.layer is None else f"layers/{self.layer}/{path}"


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
    return self.kind not in PLAIN

  def equals(self, other: "Part") -> bool:
    mine, theirs = (jax.tree.flatten(x.read()) for x in (self, other))
    return mine[1] == theirs[1] and all(map(np.array_equal, mine[0], theirs[0]))


Parts = Mapping[Address, Part]

DTYPES = ("float32", "bfloat16", "float16")
"""Of parameters and of the computation."""

PLAIN = ("float64", *DTYPES)
"""What files may hold as plain numbers."""


UNTIED = "untied"
"""Kind of an embedding that holds another matrix for its tied head."""


def kind_of(weight: Any) -> str:
  """Returns how a weight is stored; an adapted one like its base."""
  if isinstance(weight, Untied):
    return UNTIED
  if (inner := weights.unwrap(weight)) is not None:
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
  for path, leaf in weights.named_weights(tree.outer_params(params)):
    out[Address(None, path)] = Part(
      tuple(leaf.shape), kind_of(leaf), lambda leaf=leaf: leaf
    )
  for prefix, rows in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in weights.named_weights(params[run][layer]):
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


@dataclasses.dataclass(frozen=True)
class Slot:
  """One array of the tree and what fills it.

  Attributes:
    path: in the tree.
    shape: of the whole array; a run's has its repeats in front.
    addresses: the parameters behind the leading axes (layers, experts), or
      the single one.
  """

  path: str
  shape: tuple[int, ...]
  addresses: tuple[Address, ...]

  @property
  def lead(self) -> tuple[int, ...]:
    """The axes over parameters: none, layers, or layers and experts."""
    first = self.addresses[0]
    return self.shape[: (first.layer is not None) + (first.expert is not None)]

  @property
  def one(self) -> tuple[int, ...]:
    return self.shape[len(self.lead) :]


def slots(model: Transformer) -> list[Slot]:
  """Returns every array of `model`'s parameters, and what belongs in it."""
  return list(_slots(model))


# One load asks several times, and each time the model would be traced.
@functools.lru_cache(maxsize=32)
def _slots(model: Transformer) -> tuple[Slot, ...]:
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )["params"]
  indices = tree.layer_indices(shapes)
  out = []
  for path, leaf in tree.flatten_paths(shapes):
    head, inner = "/".join(path.split("/")[:2]), path.split("/", 2)[2:]
    rows = [Address(None, path)]
    if head in indices:
      # Matrices of experts have their layer and their number in front.
      experts = range(leaf.shape[1]) if len(leaf.shape) == 4 else [None]
      rows = [Address(i, inner[0], e) for i in indices[head] for e in experts]
    out.append(Slot(path, tuple(leaf.shape), tuple(rows)))
  return tuple(out)
