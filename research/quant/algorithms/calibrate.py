"""Calibration: a text, and a walk through a model whose layers change.

What is measured of a layer depends on the layers before it, which may have
been rounded by then. `walk` gives each layer's inputs to a visitor that returns
the layer's new parameters, and goes on with what those put out:

  params = walk(model, params, tokens, visit)

`Inputs.seen` measures through `research.taps`, one matrix or a few at a time;
what does not lead to these is never computed, and what led to those seen before
is not computed again (`research.quant.activation_cache`).
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
from research import taps, tree, weights
from research.data.sources import Documents, PydocTopics
from research.nn.block import Block
from research.nn.transformer import Transformer
from research.quant import activation_cache
from research.quant.algorithms import error_propagation
from research.taps.statistics import Gradient, Statistic
from research.text import special_tokens
from research.typing import Array, Float, Int, Params, UserError

InputStats = dict[str, dict[str, Array]]
"""path of a weight in its layer -> its statistic's arrays."""


class OfModel:
  """A transform with the fields `model` and `tokenizer`, given to it later."""

  def of(self, loaded: Any) -> Any:
    """Returns itself for `loaded.model`."""
    return dataclasses.replace(
      self, model=loaded.model, tokenizer=loaded.tokenizer
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """Windows of a text, drawn without replacement.

  Attributes:
    source: documents, read one after the other.
    windows: how many are drawn.
    length: tokens of each; documents and windows begin as the tokenizer says
      (`research.text.special_tokens`).
    batch: windows that are computed at a time.
    seed: of the draw.
  """

  source: Documents = PydocTopics("train")
  windows: int = 24
  length: int = 512
  batch: int = 4
  seed: int = 0

  def __post_init__(self):
    for name in ("windows", "length", "batch"):
      if getattr(self, name) < 1:
        raise UserError(
          f"Calibration.{name}: found {getattr(self, name)}, expected at "
          "least 1"
        )

  def read(self, tokenizer: Any) -> "Windows":
    """Returns the windows.

    Args:
      tokenizer: has `encode(text)`.

    Raises:
      UserError: there is too little text.
    """
    if tokenizer is None:
      raise UserError("Calibration: the model has no tokenizer, expected one")
    special, found = special_tokens.of_tokenizer(tokenizer), list[int]()
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
  """What `Calibration` read.

  Attributes:
    tokens: int32 `[N, T]`.
    indices: which of the text's windows these are, `[N]`.
  """

  tokens: np.ndarray
  indices: np.ndarray

  def record(self) -> dict[str, Any]:
    """Returns what tells the windows from others, as plain values."""
    return {
      "indices": self.indices.tolist(),
      "shape": list(self.tokens.shape),
      "sha256": hashlib.sha256(self.tokens.astype("<i4").tobytes()).hexdigest(),
    }


@dataclasses.dataclass(frozen=True)
class Inputs:
  """What a layer is given, in batches.

  It remembers what `attention/o` and `mlp/down` were given when they are seen,
  `N T` rows of each in the layer's dtype, until the layer is done.

  Attributes:
    block: the layer's module.
    x: `[N, T, D]`.
    batch: rows that are computed at a time.
    memory: path -> what a matrix was given that has been seen.
  """

  block: Block
  x: Float[Array, "N T D"]
  batch: int
  memory: dict[str, activation_cache.Held] = dataclasses.field(
    default_factory=dict, init=False, compare=False, repr=False
  )

  def batches(self) -> list[Float[Array, "B T D"]]:
    """Returns the rows, some at a time."""
    return [
      self.x[i : i + self.batch] for i in range(0, len(self.x), self.batch)
    ]

  def outputs(self, params: Params) -> Float[Array, "N T D"]:
    """Returns what the layer makes of all rows."""
    held = activation_cache.valid(self.memory, params)
    return jnp.concatenate(
      [
        outputs(self.block, activation_cache.replayed(params, held, k), x)
        for k, x in enumerate(self.batches())
      ]
    )

  def seen(
    self, params: Params, paths: Sequence[str], statistic: Statistic
  ) -> InputStats:
    """Returns a statistic of the inputs of some of the layer's weights.

    Args:
      params: the layer's.
      paths: of weights, such as `attention/q`.
      statistic: see `research.taps.statistics`.
    """
    # What is replayed leads back to nothing: gradients need all of it.
    held = activation_cache.valid(self.memory, params)
    held = {} if isinstance(statistic, Gradient) else held
    keep = tuple(
      p for p in activation_cache.keepable(params, paths) if p not in held
    )
    total: Any = None
    rows: list[dict[str, Array]] = []
    for k, x in enumerate(self.batches()):
      given = activation_cache.replayed(params, held, k)
      found, kept = seen(self.block, given, x, tuple(paths), statistic, keep)
      total = found if total is None else _joined(total, found, statistic)
      rows.append(kept)
    for path in keep:
      self.memory[path] = activation_cache.Held(
        params, [kept[path] for kept in rows]
      )
    return total


Visit = Callable[[int, Params, Inputs], Params]
"""(index, a layer's parameters, its inputs) -> the layer's new parameters."""


def walk(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "N T"] | np.ndarray,
  visit: Visit,
  batch: int = 4,
  follow: Literal["new", "old", "pairs"] = "new",
) -> dict[str, Any]:
  """Returns `params` with each layer as its visit left it.

  Args:
    model: any; its layers are visited first to last.
    params: its parameters.
    tokens: rows from position 0.
    visit: see `Visit`.
    batch: rows that are computed at a time.
    follow: whether a layer is given what the new layers before it put out,
      what the old ones would have, or, in each batch, both: first the old
      ones', then as many rows of the new ones', see `algorithms.drift`.
  """
  if not len(tokens):
    raise UserError("calibration: no tokens, expected at least one window")
  x, out = embedded(model, params, jnp.asarray(tokens)), []
  if follow == "pairs":
    parts = [x[i : i + batch] for i in range(0, len(x), batch)]
    x = jnp.concatenate([part for part in parts for _ in range(2)])
    batch *= 2
  kinds, layers = model.layer_kinds(), list(tree.layers(params))
  for i, (block, layer) in enumerate(zip(kinds, layers, strict=True)):
    inputs = Inputs(block, x, batch)
    new = visit(i, layer, inputs)
    out.append(new)
    if i + 1 < len(layers):
      used = {"new": new, "old": layer}.get(follow)
      x = inputs.outputs(
        error_propagation.paired(layer, new) if used is None else used
      )
  return tree.stack(tree.outer_params(params), out, kinds)


def embedded(
  model: Transformer, params: Params, tokens: Int[Array, "N T"]
) -> Float[Array, "N T D"]:
  """Returns what the first layer is given."""
  x = weights.take(params["embed"], tokens).astype(model.dtype)
  return x * jnp.asarray(model.embed_scale, model.dtype)


@functools.partial(jax.jit, static_argnames=("block",))
def outputs(
  block: Block, params: Params, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  """Returns a layer's outputs for rows from position 0, causally."""
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
def seen(
  block: Block,
  params: Params,
  x: Float[Array, "B T D"],
  paths: tuple[str, ...],
  statistic: Statistic,
  keep: tuple[str, ...] = (),
) -> tuple[InputStats, dict[str, Float[Array, "B T I"]]]:
  """Returns a statistic of what some weights of a layer multiply; `Inputs`.

  And, of those of them that are to be kept, this itself.
  """
  run = {"run0": {"layer0": jax.tree.map(lambda w: w[None], params)}}

  def loss(run):
    layer = jax.tree.map(lambda w: w[0], run["run0"]["layer0"])
    return outputs(block, layer, x).astype(jnp.float32).sum()

  addresses = {f"layers/0/{path}": path for path in paths}
  both = (
    activation_cache.WithRows(statistic, *x.shape[:2]) if keep else statistic
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
