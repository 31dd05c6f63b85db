"""Calibration data, and layer-by-layer calibration of a model.

A layer's inputs depend on the layers before it, which may already be quantized.
`walk` passes each layer's inputs to a visitor that returns the layer's new
parameters, and continues with the outputs of those:

  params = walk(model, params, tokens, visit)

`LayerInputs.measure` collects statistics through `research.taps`, for one or a
few matrices at a time. It computes only what these depend on, and reuses cached
inputs (`research.quant.activation_cache`).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import progress, taps, tree, weights
from research.data.sources import Documents, PydocTopics
from research.nn.block import Block
from research.nn.transformer import Transformer
from research.quant import activation_cache
from research.quant.algorithms import error_propagation
from research.ranges import PositiveInt, Ranged
from research.taps.statistics import Gradient, Statistic
from research.text import special_tokens
from research.typing import Array, Float, Int, Params, UserError

InputStats = dict[str, dict[str, Array]]
"""Path of a weight in its layer -> name -> array of its statistic."""


class NeedsModel:
  """Mixin of transforms with fields `model` and `tokenizer` to be set later."""

  @property
  def calibrates(self) -> bool:
    """Whether the model reads text to measure something."""
    return True

  def with_model(self, loaded: Any) -> Any:
    """Returns a copy with `loaded.model` and `loaded.tokenizer`.

    Raises:
      UserError: a model of masked diffusion would have to read text causally.
    """
    if self.calibrates and not loaded.predicts_next_token:
      raise UserError(
        f"{type(self).__name__}: found a model of masked diffusion, expected"
        " one that predicts the next token: calibration reads texts causally"
        " and without masks, which are other inputs than this model's.\n"
        "Quantize it without calibration, e.g. to NF4."
      )
    return dataclasses.replace(
      self, model=loaded.model, tokenizer=loaded.tokenizer
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration(Ranged):
  """Calibration data: random windows of a text, without replacement.

  Attributes:
    source: documents, concatenated.
    length: tokens per window; documents and windows begin with the tokenizer's
      special tokens (`research.text.special_tokens`).
  """

  source: Documents = PydocTopics("train")
  windows: PositiveInt = 24
  length: PositiveInt = 512
  batch: PositiveInt = 4
  seed: int = 0

  def read(self, tokenizer: Any) -> "Windows":
    """Tokenizes the text and returns the chosen windows.

    Args:
      tokenizer: has a method `encode(text)`.

    Raises:
      UserError: the text is too short, or there is no tokenizer.
    """
    if tokenizer is None:
      raise UserError("Calibration: the model has no tokenizer, expected one")
    special, found = special_tokens.from_tokenizer(tokenizer), list[int]()
    for i in range(len(self.source)):
      found += special.document(tokenizer.encode(self.source[i]))
    whole = special.windows(found, self.length)
    have = len(whole)
    if have < self.windows:
      raise UserError(
        f"Calibration: the text has {len(found):,} tokens, {have} windows of "
        f"{self.length}; expected {self.windows}.\n"
        "Give more text, or ask for fewer or shorter windows."
      )
    rng = np.random.default_rng(self.seed)
    drawn = np.sort(rng.choice(have, self.windows, replace=False))
    return Windows(np.asarray([whole[i] for i in drawn], np.int32), drawn)


@dataclasses.dataclass(frozen=True)
class Windows:
  """The windows that `Calibration.read` returns.

  Attributes:
    tokens: int32 `[N, T]`.
    indices: indices of these windows in the text, `[N]`.
  """

  tokens: np.ndarray
  indices: np.ndarray

  def record(self) -> dict[str, Any]:
    """Returns indices, shape and hash of the windows, for reports."""
    return {
      "indices": self.indices.tolist(),
      "shape": list(self.tokens.shape),
      "sha256": hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest(),
    }


@dataclasses.dataclass(frozen=True)
class LayerInputs:
  """Inputs of a layer, in batches.

  Caches the inputs of `attention/o` and `mlp/down` once they are measured,
  `N T` rows of each in the layer's dtype, until the layer is done.

  Attributes:
    x: the inputs, `[N, T, D]`.
    memory: path -> cached inputs of a measured matrix.
  """

  block: Block
  x: Float[Array, "N T D"]
  batch: int
  memory: dict[str, activation_cache.CachedInputs] = dataclasses.field(
    default_factory=dict, init=False, compare=False, repr=False
  )

  def batches(self) -> list[Float[Array, "B T D"]]:
    return [
      self.x[i : i + self.batch] for i in range(0, len(self.x), self.batch)
    ]

  def outputs(self, params: Params) -> Float[Array, "N T D"]:
    held = activation_cache.still_valid(self.memory, params)
    return jnp.concatenate(
      [
        outputs(
          self.block, activation_cache.with_cached_inputs(params, held, k), x
        )
        for k, x in enumerate(self.batches())
      ]
    )

  def measure(
    self, params: Params, paths: Sequence[str], statistic: Statistic
  ) -> InputStats:
    # No cache for gradients: they do not pass through cached inputs.
    held = activation_cache.still_valid(self.memory, params)
    held = {} if isinstance(statistic, Gradient) else held
    keep = tuple(
      p for p in activation_cache.cacheable(params, paths) if p not in held
    )
    total: Any = None
    rows: list[dict[str, Array]] = []
    for k, x in enumerate(self.batches()):
      given = activation_cache.with_cached_inputs(params, held, k)
      found, kept = measure(self.block, given, x, tuple(paths), statistic, keep)
      total = found if total is None else _joined(total, found, statistic)
      rows.append(kept)
    for path in keep:
      self.memory[path] = activation_cache.CachedInputs(
        params, [kept[path] for kept in rows]
      )
    return total


Visit = Callable[[int, Params, LayerInputs], Params]
"""(index, a layer's parameters, its inputs) -> the layer's new parameters."""


def walk(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "N T"] | np.ndarray,
  visit: Visit,
  batch: int = 4,
  follow: Literal["new", "old", "pairs"] = "new",
) -> dict[str, Any]:
  """Returns `params` with each layer replaced by the result of its visit.

  Args:
    tokens: calibration rows, from position 0.
    visit: see `Visit`.
    follow: which layers compute the next layer's inputs: 'new' the visited
      ones, 'old' the original ones, 'pairs' both, in each batch first the old
      layers' rows, then the new layers', see `error_propagation`.
  """
  if not len(tokens):
    raise UserError("calibration: no tokens, expected at least one window")
  x, out = embed(model, params, jnp.asarray(tokens)), []
  if follow == "pairs":
    parts = [x[i : i + batch] for i in range(0, len(x), batch)]
    x = jnp.concatenate([part for part in parts for _ in range(2)])
    batch *= 2
  kinds, layers = model.layer_kinds(), list(tree.layers(params))
  pairs = list(zip(kinds, layers, strict=True))
  pairs = progress.track(pairs, "computing layers")
  for i, (block, layer) in enumerate(pairs):
    inputs = LayerInputs(block, x, batch)
    new = visit(i, layer, inputs)
    out.append(new)
    if i + 1 < len(layers):
      used = {"new": new, "old": layer}.get(follow)
      x = inputs.outputs(
        error_propagation.pair_weights(layer, new) if used is None else used
      )
  return tree.stack(tree.outer_params(params), out, kinds)


def embed(
  model: Transformer, params: Params, tokens: Int[Array, "N T"]
) -> Float[Array, "N T D"]:
  """Returns the inputs of the first layer."""
  x = weights.take(params["embed"], tokens).astype(model.dtype)
  return x * jnp.asarray(model.embed_scale, model.dtype)


@functools.partial(jax.jit, static_argnames=("block",))
def outputs(
  block: Block, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  """Returns a layer's outputs for rows from position 0, with a causal mask."""
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  a, rotation = block.attention, None
  if a.rope is not None:
    rotation = a.rope.tables(positions, a.head_dim)
  return block.apply({"params": params}, x, positions, Mask.causal(), rotation)[
    0
  ]


@functools.partial(
  jax.jit, static_argnames=("block", "paths", "statistic", "keep")
)
def measure(
  block: Block,
  params: Params,
  x: Float[Array, "B T D"],
  paths: tuple[str, ...],
  statistic: Statistic,
  keep: tuple[str, ...] = (),
) -> tuple[InputStats, dict[str, Float[Array, "B T I"]]]:
  """Returns a statistic of the inputs of some weights of a layer.

  Returns:
    (path -> statistic, path -> inputs for the paths in `keep`).
  """
  run = {"run0": {"layer0": jax.tree.map(lambda w: w[None], params)}}

  def loss(run):
    layer = jax.tree.map(lambda w: w[0], run["run0"]["layer0"])
    return outputs(block, layer, x).astype(jnp.float32).sum()

  addresses = {f"layers/0/{path}": path for path in paths}
  both = (
    activation_cache.StatisticAndRows(statistic, *x.shape[:2])
    if keep
    else statistic
  )
  found = taps.collect(loss, run, both, addresses=addresses)
  found = taps.by_address(run, found)
  if missing := addresses.keys() - found.keys():
    raise UserError(f"calibration: {sorted(missing)[0]} is no matrix")
  out = {path: dict(found[address]) for address, path in addresses.items()}
  rows = {
    path: arrays.pop(activation_cache.ROWS, None)
    for path, arrays in out.items()
  }
  return out, {path: rows[path].astype(x.dtype) for path in keep}


@functools.partial(jax.jit, static_argnames=("statistic",))
def _joined(a: InputStats, b: InputStats, statistic: Statistic) -> InputStats:
  return {path: statistic.join(a[path], b[path]) for path in a}
