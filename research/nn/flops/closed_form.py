"""FLOPs of a forward pass, as closed forms of a model's configuration.

Of each token `2 N` for the matrices of every layer, of each pair of a query and
a key that it attends to `4 heads H`, and `2 D V` where logits are computed. N
has no embedding; a gated feed-forward has three matrices, grouped queries
shrink keys and values, and of a mixture's experts only the active ones count.
The sum of experts' outputs is not counted. Adapters count with what they
multiply each token by, but not with products of weights alone (DoRA's norms),
which a pass computes once.
"""

import collections
import dataclasses
import functools
import math
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
    capacity: slots of the cache; windowed layers have at most their window.
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
    keys: keys for each query.
  """

  tokens: int
  keys: int

  def pairs(self, window: int | None) -> int:
    """Returns `tokens * keys`; masked pairs are computed as well."""
    return self.tokens * self.keys


@dataclasses.dataclass(frozen=True)
class Blockwise:
  """Each token attends to its block and all before it.

  Attributes:
    tokens: places of a row, from its beginning.
    block: tokens of a block.
  """

  tokens: int
  block: int

  def pairs(self, window: int | None) -> int:
    """Returns the sum over tokens of where their blocks end."""
    del window
    blocks, rest = divmod(self.tokens, self.block)
    pairs = self.block**2 * blocks * (blocks + 1) // 2
    return pairs + rest * self.tokens


@dataclasses.dataclass(frozen=True)
class LayerCost:
  """One layer.

  Attributes:
    matrices: parameters of the products that a token takes part in.
    heads_width: `N H`, numbers of all query heads.
    cache: numbers that a token leaves in the cache.
    window: the attention's window in tokens, or None.
  """

  matrices: int
  heads_width: int
  cache: int
  window: int | None = None


@dataclasses.dataclass(frozen=True)
class CrossCost:
  """Cross-attention of one layer; its feed-forward is in `LayerCost`.

  Attributes:
    matrices: parameters of the projections of queries and outputs.
    heads_width: `N H`; an image token leaves twice that in the cache.
    media_matrices: parameters that make keys and values of an image token.
  """

  matrices: int
  heads_width: int
  media_matrices: int


@dataclasses.dataclass(frozen=True)
class ModelCost:
  """A model's cost.

  Attributes:
    layers: first to last.
    head: parameters of the head: `D V` of logits, `D` of a scalar.
    cross: layers of cross-attention to images.
    extra_matrices: parameters of products of each token outside these layers:
      those of adapters, and of embeddings per layer.
  """

  layers: tuple[LayerCost, ...]
  head: int
  cross: tuple[CrossCost, ...] = ()
  extra_matrices: int = 0

  # The sums over layers are taken once: a search asks for each path and step.
  @functools.cached_property
  def matrices(self) -> int:
    """N: active parameters of all layers' products, without the head."""
    return sum(x.matrices for x in self.layers) + self.extra_matrices

  @functools.cached_property
  def heads_widths(self) -> Mapping[int | None, int]:
    """The sum of `N H` over all layers with the same window."""
    widths = collections.Counter()
    for layer in self.layers:
      widths[layer.window] += layer.heads_width
    return dict(widths)

  def forward(
    self, tokens: int, context: Context, outputs: int, media: int = 0
  ) -> int:
    """Returns the FLOPs of a pass.

    Args:
      tokens: number of tokens that run through the layers.
      context: the pairs that attention computes.
      outputs: number of tokens whose logits or scores are computed.
      media: image tokens that each token sees in layers of cross-attention,
        whose keys and values are made in this pass; without any, these layers
        have a feed-forward alone.
    """
    attention = sum(
      4 * width * context.pairs(window)
      for window, width in self.heads_widths.items()
    )
    if media:
      attention += sum(
        2 * tokens * x.matrices
        + 2 * media * x.media_matrices
        + 4 * tokens * media * x.heads_width
        for x in self.cross
      )
    products = 2 * tokens * self.matrices
    return products + attention + 2 * outputs * self.head

  def cache(self, tokens: int, media: int = 0) -> int:
    """Returns how many numbers of keys and values are kept of a row.

    Args:
      tokens: number of tokens; layers with a window keep no more than it.
      media: image tokens that layers of cross-attention read.
    """
    return 2 * media * sum(x.heads_width for x in self.cross) + sum(
      x.cache * min(x.window or tokens, tokens) for x in self.layers
    )

  def two_n(self, tokens: int) -> int:
    """Returns the usual shortcut `2 N` a token: print it beside the ledger.

    N has the head here, as in a model's advertised size.
    """
    return 2 * tokens * (self.matrices + self.head)


def model_cost(
  model: Any, outputs: int | None = None, params: Any = None
) -> ModelCost:
  """Returns the cost of a `research.nn.transformer.Transformer`.

  Args:
    model: the model.
    outputs: width of the head: None for logits of the vocabulary, 1 for a
      scalar score, 2 for two classes.
    params: its parameters or their shapes, whose adapters count; None for a
      model without adapters.

  Raises:
    UserError: a layer has products that this has no formula for.
  """
  width, blocks = model.width, model.layer_kinds()
  layers, head = _adapters(model, params)
  head += width * model.vocab_size
  if model.per_layer is not None:
    # A projection for each layer of the input, and two matrices within it.
    layers += 3 * width * model.per_layer.size * model.per_layer.depth
  return ModelCost(
    layers=tuple(layer_cost(block, width) for block in blocks),
    head=head if outputs is None else width * outputs,
    cross=tuple(_cross(x.cross, width) for x in blocks if x.cross is not None),
    extra_matrices=layers,
  )


def layer_cost(block: Any, width: int) -> LayerCost:
  """Returns the cost of a `research.nn.block.Block`, also of an encoder's.

  Args:
    block: the layer.
    width: the model's width.

  Raises:
    UserError: it has products that this has no formula for.
  """
  if block.modulation is not None:
    raise UserError(
      "layer_cost: found a layer with time conditioning, expected none; count"
      " its FLOPs with nn.flops.count_flops"
    )
  attention = block.attention
  heads = attention.heads * attention.head_dim
  shared = attention.kv_heads * attention.head_dim
  projected = 2 if attention.values == "projected" else 1
  if attention.kv == "borrowed":
    projected = shared = 0
  products = width * (2 * heads + projected * shared)
  products += _feed_forward(block.mlp, width)
  if block.cross is not None:
    products += _feed_forward(block.cross.mlp, width)
  return LayerCost(products, heads, 2 * shared, attention.window)


def _cross(layer: Any, width: int) -> CrossCost:
  size = layer.attention.heads * layer.attention.head_dim
  return CrossCost(2 * size * width, size, 2 * size * layer.media_width)


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
      f"layer_cost: found the feed-forward {type(mlp).__name__}, expected Mlp,"
      " PlainMlp or Moe"
    )
  return matrices * width * mlp.hidden


def _adapters(model: Any, params: Any) -> tuple[int, int]:
  """Returns what adapters multiply a token by: in the layers, in the head."""
  if params is None:
    return 0, 0
  from research import weights
  from research.nn.moe import Moe

  layers = head = 0
  for path, w in weights.named_weights(params):
    *folders, name = path.split("/")
    if not weights.is_adapter(w):
      continue
    if name == "embed":
      layers += _products(w, weights.take)
      if model.tied:
        head += _products(w, weights.einsum, "td,vd->tv")
      continue
    products = _products(w, weights.einsum, "td,df->tf")
    if name == "head":
      head += products
    elif "experts" in folders:
      mixtures = (block.mlp for block in model.layer_kinds())
      routing = next(x.routing for x in mixtures if isinstance(x, Moe))
      layers += products * routing.active // routing.experts
    else:
      layers += products
  return layers, head


def _products(w: Any, multiply: Any, eq: str | None = None) -> int:
  """Returns the parameters by which an adapter multiplies a token.

  Args:
    w: an adapted weight; the adapters of all its matrices count.
    multiply: `weights.einsum`, or `weights.take` of a table.
    eq: the equation of the former.
  """
  import jax
  import jax.numpy as jnp

  from research import weights
  from research.nn.flops.traced import count_flops

  *lead, rows, columns = w.shape

  def unpacked(w: Any) -> Any:
    if not weights.is_adapter(w):
      return jax.ShapeDtypeStruct(w.shape, jnp.float32)
    return dataclasses.replace(w, w=unpacked(weights.unwrap(w)))

  matrix = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape[len(lead) :], x.dtype), unpacked(w)
  )

  def flops(tokens: int) -> float:
    if eq is None:
      ids = jax.ShapeDtypeStruct((tokens,), jnp.int32)
      return count_flops(multiply, matrix, ids)
    x = jax.ShapeDtypeStruct(
      (tokens, columns if eq.startswith("td,v") else rows), jnp.float32
    )
    return count_flops(lambda x, w: multiply(eq, x, w), x, matrix)

  # Products of weights alone cancel.
  added = (flops(3) - flops(2)) / 2 - (rows * columns if eq else 0)
  return round(added) * math.prod(lead)
