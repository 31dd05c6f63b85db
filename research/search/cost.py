"""FLOPs of a forward pass, as closed forms of a model's configuration.

Of each token `2 N` for the matrices of every layer, of each pair of a query and
a key that it attends to `4 heads H`, and `2 D V` where logits are computed. N
has no embedding; a gated feed-forward has three matrices, grouped queries
shrink keys and values, and of a mixture's experts only the active ones count.
Norms, rotations and softmax are left out, as everywhere.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from research.errors import UserError


@runtime_checkable
class Context(Protocol):
  """How many pairs of query and key a pass computes."""

  def pairs(self, window: int | None) -> int:
    """Returns the number of pairs in a layer with this window, or none."""
    ...


@dataclasses.dataclass(frozen=True)
class Causal:
  """Each token attends to those before it and itself: what is needed.

  Attributes:
    start: tokens that are in the cache already.
    tokens: new ones.
  """

  start: int
  tokens: int

  def pairs(self, window: int | None) -> int:
    """Returns the sum of `min(position + 1, window)`."""
    after = _pairs_up_to(self.start + self.tokens, window)
    return after - _pairs_up_to(self.start, window)


# Not within `pairs`, which a search calls for each path, step and layer: with
# type checks, a nested function is decorated anew in every call, 0.5 ms.
def _pairs_up_to(n: int, window: int | None) -> int:
  """Returns the pairs of the first `n` positions."""
  if window is None or n <= window:
    return n * (n + 1) // 2
  return window * (window + 1) // 2 + (n - window) * window


@dataclasses.dataclass(frozen=True)
class Cached:
  """Each token is multiplied with every slot of a cache: what decoding runs.

  Attributes:
    tokens: new ones.
    capacity: of the cache; windowed layers have at most their window.
  """

  tokens: int
  capacity: int

  def pairs(self, window: int | None) -> int:
    """Returns `tokens * min(capacity, window)`; empty slots are computed."""
    return self.tokens * min(self.capacity, window or self.capacity)


@dataclasses.dataclass(frozen=True)
class Dense:
  """Each token is multiplied with every key: what a short prefill runs.

  Attributes:
    tokens: queries.
    keys: of each of them.
  """

  tokens: int
  keys: int

  def pairs(self, window: int | None) -> int:
    """Returns `tokens * keys`; masked pairs are computed as well."""
    return self.tokens * self.keys


@dataclasses.dataclass(frozen=True)
class LayerCost:
  """One layer.

  Attributes:
    matrices: parameters of the products that a token takes part in.
    heads_width: `N H`, numbers of all query heads.
    cache: numbers that a token leaves in the cache.
    window: of the attention, or None.
  """

  matrices: int
  heads_width: int
  cache: int
  window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelCost:
  """A model's cost.

  Attributes:
    layers: first to last.
    head: parameters of the head: `D V` of logits, `D` of a scalar.
  """

  layers: tuple[LayerCost, ...]
  head: int

  # The sums over layers are taken once: a search asks for each path and step.
  @functools.cached_property
  def matrices(self) -> int:
    """N: active parameters of all layers' products, without the head."""
    return sum(layer.matrices for layer in self.layers)

  @functools.cached_property
  def heads_widths(self) -> Mapping[int | None, int]:
    """The sum of `N H` over all layers with the same window."""
    found = collections.Counter()
    for layer in self.layers:
      found[layer.window] += layer.heads_width
    return dict(found)

  def forward(self, tokens: int, context: Context, outputs: int) -> int:
    """Returns the FLOPs of a pass.

    Args:
      tokens: that run through the layers.
      context: the pairs that attention computes.
      outputs: tokens whose logits or scores are computed.
    """
    attention = sum(
      4 * width * context.pairs(window)
      for window, width in self.heads_widths.items()
    )
    products = 2 * tokens * self.matrices
    return products + attention + 2 * outputs * self.head

  def two_n(self, tokens: int) -> int:
    """Returns the usual shortcut `2 N` a token: print it beside the ledger.

    N has the head here, as in a model's advertised size.
    """
    return 2 * tokens * (self.matrices + self.head)


def model_cost(model: Any, outputs: int | None = None) -> ModelCost:
  """Returns the cost of a `research.nn.transformer.Transformer`.

  Args:
    model: the model.
    outputs: width of the head: None for logits of the vocabulary, 1 for a
      scalar score, 2 for two classes.

  Raises:
    UserError: a layer has products that this has no formula for.
  """
  width = model.width
  return ModelCost(
    layers=tuple(_layer(block, width) for block in model.layer_kinds()),
    head=width * (model.vocab_size if outputs is None else outputs),
  )


def _layer(block: Any, width: int) -> LayerCost:
  if block.cross is not None or block.modulation is not None:
    raise UserError(
      "model_cost: found a layer with cross-attention or conditioning, expected"
      " attention and feed-forward alone; count its FLOPs with planning.flops"
    )
  attention = block.attention
  own = attention.kv == "own" and attention.values == "projected"
  if block.per_layer is not None or not own:
    raise UserError(
      "model_cost: found a layer that shares keys and values, or with per-layer"
      " embeddings (Gemma 4), expected neither; count its FLOPs with"
      " planning.flops"
    )
  heads = attention.heads * attention.head_dim
  shared = attention.kv_heads * attention.head_dim
  products = width * (2 * heads + 2 * shared) + _feed_forward(block.mlp, width)
  return LayerCost(products, heads, 2 * shared, attention.window)


def _feed_forward(mlp: Any, width: int) -> int:
  # Imported late: a ledger is read and written without JAX.
  from research.nn.mlp import Mlp, PlainMlp
  from research.nn.moe import Moe

  if isinstance(mlp, Moe):
    expert = 3 * width * mlp.hidden
    rest = _feed_forward(mlp.shared, width) if mlp.shared is not None else 0
    return width * mlp.routing.experts + mlp.routing.active * expert + rest
  matrices = {Mlp: 3, PlainMlp: 2}.get(type(mlp))
  if matrices is None:
    raise UserError(
      f"model_cost: found the feed-forward {type(mlp).__name__}, expected Mlp,"
      " PlainMlp or Moe"
    )
  return matrices * width * mlp.hidden
