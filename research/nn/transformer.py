"""The Transformer of all model families, configured by its blocks.

`research.nn.layers` runs its stack.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, tree, weights
from research.nn import attention_context, collectives, layers, zigzag
from research.nn import cache as caches
from research.nn import time_embedding as time_embeddings
from research.nn.block import Block
from research.nn.gemma4.per_layer import PerLayerInputs, of_run
from research.nn.norm import Norm, RMSNorm
from research.nn.stack import Stack
from research.typing import Array, Float, Int, Params, PRNGKey, UserError


class Transformer(nn.Module):
  """A Transformer over tokens: a decoder or, with a full mask, an encoder.

  Attributes:
    vocab_size, width: `V`, `D`.
    input_vocab: rows of the embedding, where the head has fewer outputs (tokens
      that are read and never written); None for `V`.
    stack: the layers.
    norm: the final norm.
    tied: whether the head is the transposed embedding.
    embed_scale: multiplies embeddings (Gemma's `sqrt(D)`), in the compute
      dtype.
    softcap: soft cap of the logits, or None.
    dtype: compute dtype; norms, softmax and loss always compute in fp32.
    remat: activations saved for the backward pass: all ("none"), those in
      `layers.SAVED` ("names"), or only each layer's input ("layer").
    max_positions: context length of training; not enforced here.
    time_embedding: configuration of the timestep conditioning, or None.
    per_layer: what each layer gets of each token besides, or None (Gemma 4).
  """

  vocab_size: int
  width: int
  stack: Stack
  norm: Norm = RMSNorm()
  tied: bool = True
  embed_scale: float = 1.0
  softcap: float | None = None
  dtype: str = "float32"
  remat: layers.Remat = "none"
  max_positions: int | None = None
  time_embedding: time_embeddings.TimeEmbedding | None = None
  per_layer: PerLayerInputs | None = None
  input_vocab: int | None = None

  def layer_kinds(self) -> tuple[Block, ...]:
    """Returns each layer's block, first to last."""
    return self.stack.kinds()

  @nn.compact
  def __call__(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    mask: Mask | None = None,
    cache: caches.Cache | None = None,
    lengths: Int[Array, "B"] | None = None,
    time: Float[Array, "B"] | Float[Array, "B T"] | None = None,
    keep: Int[Array, "B N"] | None = None,
    rotary: Int[Array, "B T A"] | None = None,
    injected: Float[Array, "B T J D"] | None = None,
  ) -> tuple[Float[Array, "B N D"], caches.Cache | None]:
    """Returns the final hidden states, after the last norm, and the cache.

    Args:
      inputs: token ids, or embeddings (already scaled).
      positions: of the tokens, -1 for padding. By default they continue from
        the cache's length, or start at 0. In a cache they are slots.
      mask: the attention mask. By default causal: by position if `positions`
        is given, else by index.
      cache: from `init_cache` or an earlier call.
      lengths: number of tokens in each right-padded row of `inputs`; by default
        `T`.
      time: diffusion timestep in [0, 1], per row or per token; only for a model
        with `time_embedding`.
      keep: indices in `inputs` of the tokens whose states are returned; None
        for all. If the last layer is a run of its own (`tree.unroll`), it
        computes outputs for these tokens only, and keys and values for all.
      rotary: the A coordinates by which each token is rotated, where they are
        not its position: time, row and column (`Rope.axes`).
      injected: activations that are added after the first J layers, at the
        tokens of images (DeepStack); zeros elsewhere.

    Without `rotary` and `injected`, both are those of the images in the
    parameters, if there are any (`research.nn.multimodal`).

    Raises:
      UserError: `time` is missing in a model with `time_embedding`, or given to
        one without; or `rotary` is given to a model without rotary axes.
    """
    hidden, cache, _ = self._forward(
      inputs, positions, mask, cache, lengths, time, keep, rotary, injected
    )
    return hidden, cache

  @nn.compact
  def with_router_loads(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    mask: Mask | None = None,
    cache: caches.Cache | None = None,
    lengths: Int[Array, "B"] | None = None,
    time: Float[Array, "B"] | Float[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], caches.Cache | None, dict[str, Any]]:
    """Returns what `__call__` does, and the router load of every MoE layer.

    The loads (`routing.Load`) come as a tree of runs and layers, stacked along
    each run, with None for layers without experts. They are ordinary outputs of
    the scans, so balance losses can differentiate through them. If they are
    unused, XLA removes them.
    """
    return self._forward(inputs, positions, mask, cache, lengths, time)

  def _forward(
    self,
    inputs,
    positions,
    mask,
    cache=None,
    lengths=None,
    time=None,
    keep=None,
    rotary=None,
    injected=None,
    last_feed_forward=True,
  ):
    x = sharding.constrain(self._embed(inputs), "batch", "length", None)
    vectors = self._vectors(inputs, x)
    batch, length = x.shape[:2]
    fresh = cache is None or cache.fresh
    if mask is None:
      mask = Mask.causal()
      if positions is not None:
        mask = attention_context.with_positions(mask, positions, positions)
    if not fresh and mask.kind == "intervals" and mask.kv_positions is not None:
      raise UserError(
        "mask of intervals: found kv_positions with a cache that is not empty, "
        "expected none: bounds are compared with positions in the cache"
      )
    if positions is None:
      step = jnp.broadcast_to(jnp.arange(length), (batch, length))
      start = 0 if cache is None else cache.length[:, None]
      positions = step + start
      if lengths is not None:
        positions = jnp.where(step < lengths[:, None], positions, -1)
    if rotary is None:
      rotary = self._rotary_of_images(positions, cache)
    if injected is None:
      injected = self._injected_at_images(inputs)
    self._check_rotary(rotary)
    new_length = None
    if cache is not None:
      new_length = cache.length + jnp.sum(positions >= 0, axis=-1)
    conditioning = self._conditioning(time, batch)
    per_token = conditioning is not None and conditioning.shape[1] > 1
    axes = ()
    if cache is None and not per_token and not self._needs_text_order(mask):
      axes = zigzag.zigzag_axes(mask, (batch, length))
    x, positions, mask, (rotary, injected, vectors) = zigzag.to_zigzag(
      axes, x, positions, mask, (rotary, injected, vectors)
    )
    context = positions, mask, cache, new_length, fresh, conditioning
    x, caches_out, loads = self._layers(
      x, context, keep, last_feed_forward, rotary, injected, vectors
    )
    if not last_feed_forward:
      return x, None, loads
    x = zigzag.from_zigzag(axes, x)
    if keep is not None and not x.shape[1] == keep.shape[1] < length:
      x = attention_context.take_tokens(x, keep)
    if per_token:
      conditioning = attention_context.take_tokens(conditioning, keep)
    x = self.norm.clone(name="final_norm", parent=self)(x)
    if conditioning is not None:
      change = time_embeddings.AdaLN(gated=False, name="final_modulation")
      x = time_embeddings.modulate(x, *change(conditioning, self.width))
    if not self.tied:
      self._head()
    if cache is None:
      return x, None, loads
    cache = caches.Cache(length=new_length, layers=caches_out, fresh=False)
    return x, cache, loads

  @nn.compact
  def before_feed_forward(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    mask: Mask | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns the input of the last layer's feed-forward; see `output_head`.

    Args:
      inputs, positions, mask: as for `__call__`.

    Raises:
      UserError: the last layer is scanned together with others.
    """
    return self._forward(inputs, positions, mask, last_feed_forward=False)[0]

  @nn.compact
  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns the logits of hidden states, in fp32."""
    hidden = hidden.astype(self.dtype)
    if self.tied:
      y = weights.einsum("...d,vd->...v", hidden, self._embedding())
    else:
      y = weights.einsum("...d,dv->...v", hidden, self._head())
    names = ("batch", "length", None)[: y.ndim - 1]
    y = sharding.constrain(y.astype(jnp.float32), *names, "vocab")
    if self.softcap is not None:
      y = self.softcap * jnp.tanh(y / self.softcap)
    return y

  def _embedding(self):
    init = nn.initializers.normal(0.02)
    rows = self.input_vocab or self.vocab_size
    if self.tied and rows != self.vocab_size:
      raise UserError(
        f"input_vocab: found {rows} for a tied head, expected None or"
        f" {self.vocab_size}, its outputs"
      )
    return weights.weight(self, "embed", init, (rows, self.width))

  def _conditioning(self, time, batch):
    """Returns the layers' conditioning vectors, `[B, 1 or T, C]`, or None."""
    if self.time_embedding is None:
      if time is not None:
        raise UserError("found a time, but the model has no time_embedding")
      return None
    if time is None and self.is_initializing():
      time = jnp.zeros(batch)
    if time is None:
      raise time_embeddings.missing_time()
    time = time[:, None] if time.ndim == 1 else time
    return time_embeddings.TimestepEmbedder(self.time_embedding, name="clock")(
      time, self.dtype
    )

  def _head(self):
    init = nn.initializers.lecun_normal()
    return weights.weight(self, "head", init, (self.width, self.vocab_size))

  def _embed(self, inputs):
    table = self._embedding()
    if jnp.issubdtype(inputs.dtype, jnp.floating):
      return inputs.astype(self.dtype)
    table = collectives.gather(table, "vocab", "width")
    x = weights.take(table, inputs).astype(self.dtype)
    if self.embed_scale != 1.0:
      x = x * jnp.asarray(self.embed_scale, self.dtype)
    return x

  def _vectors(self, inputs, x):
    """Returns what each layer gets of each token, or None."""
    if self.per_layer is None:
      return None
    if jnp.issubdtype(inputs.dtype, jnp.floating):
      raise UserError(
        "inputs: found embeddings, expected token ids: each layer gets a vector"
        " of each token (per_layer)"
      )
    return self.per_layer(inputs, x)

  def _init_layer(self, block: Block, key: PRNGKey) -> Params:
    conditioning = self.time_embedding and jnp.zeros(
      (1, 1, self.time_embedding.width), self.dtype
    )
    layer_inputs = {}
    if self.per_layer is not None:
      size = self.per_layer.size
      layer_inputs["vector"] = jnp.zeros((1, 1, size), self.dtype)
    if block.attention.kv == "borrowed":
      a = block.attention
      empty = jnp.zeros((1, 1, a.kv_heads, a.head_dim), self.dtype)
      layer_inputs["borrowed"] = attention_context.KeysValues(empty, empty)
    layer_inputs["conditioning"] = conditioning
    return layers.new_layer(block, key, self.width, self.dtype, **layer_inputs)

  def _rotations(self, positions: Array) -> dict[Any, tuple[Array, Array]]:
    """Returns cos and sin for each kind of rotary embedding in the stack."""
    rotations = {}
    for rope, dim in {
      (b.attention.rope, b.attention.head_dim) for b in self.stack.blocks
    }:
      if rope is not None:
        # Without the barrier, XLA recomputes sines and cosines in every layer.
        tables = rope.tables(positions, dim)
        rotations[rope, dim] = jax.lax.optimization_barrier(tables)
    return rotations

  def _rotary_of_images(self, positions, cache):
    """Returns the coordinates of a batch with images, or None."""
    if not self.has_variable("params", "rotary"):
      return None
    images = self.get_variable("params", "rotary")
    if cache is None:
      return images.of_row(positions.shape[1])
    return images.of_slots(positions)

  def _injected_at_images(self, inputs):
    """Returns the features of a batch with images for deeper layers, or None.

    A token that is generated alone is no placeholder (`sample_next`).
    """
    ids = inputs.ndim == 2 and inputs.shape[1] > 1
    if not ids or not self.has_variable("params", "injected"):
      return None
    features = weights.take(self.get_variable("params", "injected"), inputs)
    return features.astype(self.dtype)

  def _needs_text_order(self, mask):
    """Whether adapters or layers refer to tokens by their place in the text.

    Layers that see images causally do so if only keys have coordinates.
    """
    if zigzag.bound_to_tokens(self.variables.get("params", {})):
      return True
    if any(block.cross is not None for block in self.stack.blocks):
      return True
    by_index = mask.q_positions is None and mask.kv_positions is not None
    return by_index and any(
      block.attention.images == "causal" for block in self.stack.blocks
    )

  def _check_rotary(self, rotary):
    ropes = [block.attention.rope for block in self.stack.blocks]
    if rotary is not None and any(r is None or r.axes is None for r in ropes):
      raise UserError(
        "found rotary positions with several coordinates, but the model's"
        " rotary embedding has one; expected positions alone"
      )

  def _layers(
    self, x, context, keep, last_feed_forward, rotary, injected, vectors
  ):
    """Returns the output, each run's caches, and each run's router loads."""
    positions, mask, cache, length, fresh, conditioning = context
    runs = layers.stacked_runs(self, self.stack, self._init_layer)
    if not last_feed_forward and tree.run_length(runs[-1][0]) > 1:
      raise UserError(
        "the last layer is scanned with others, expected one that is a run"
        " of its own: tree.split_last_layer"
      )
    rotations = self._rotations(positions if rotary is None else rotary)

    def layer(block, layer_params, stream, state, last):
      (x, lent), (old, vector) = stream, state or (None, None)
      rotation = rotations.get((block.attention.rope, block.attention.head_dim))
      args = x, positions, mask, rotation, old, length, fresh, conditioning
      kind = str(block.attention.window)
      borrowed = lent.get(kind)
      if last and not last_feed_forward:
        variables, options = {"params": layer_params}, {"borrowed": borrowed}
        x, new = block.apply(variables, *args, **options, method="attend")
        return (x, lent), (new, None)
      if last and attention_context.can_select_tokens(
        keep, mask, old, x.shape, layer_params
      ):
        layer_params = block.select_tokens(layer_params, keep)
        args = *args, keep
      variables = {"params": layer_params}
      x, new, load = block.apply(
        variables, *args, borrowed=borrowed, vector=vector
      )
      if block.attention.kv == "lent":
        new, own_kv = new
        lent = {**lent, kind: own_kv}
      return (x, lent), (new, load)

    old = None if cache is None else cache.layers
    states = _states(runs, old, vectors)
    (x, _), out, _ = layers.run_layers(
      runs, (x, {}), layer, states, remat=self.remat, injected=injected
    )

    def part(i):
      return {
        run: {key: both[i] for key, both in made.items()}
        for run, made in out.items()
      }

    return x, part(0), part(1)


def _states(runs, old, vectors):
  """Returns each layer's cache and vectors, by run; None if there are none."""
  if old is None and vectors is None:
    return None
  states, start = {}, 0
  for i, (params, blocks) in enumerate(runs):
    name, repeats = f"run{i}", tree.run_length(params)
    layer_vectors = [None] * len(blocks)
    if vectors is not None:
      layer_vectors = of_run(vectors, start, repeats, len(blocks))
    states[name] = {
      f"layer{j}": (None if old is None else old[name][f"layer{j}"], vector)
      for j, vector in enumerate(layer_vectors)
    }
    start += repeats * len(blocks)
  return states


def init_cache(
  model: Transformer,
  params: Params,
  batch: int,
  capacity: int,
  dtype: str | None = None,
  kv: Any = None,
  rings: bool = True,
) -> caches.Cache:
  """Returns an empty key/value cache.

  Args:
    model: the Transformer.
    params: its parameters; the cache has the same runs.
    batch: number of rows.
    capacity: number of positions that layers without a window can store;
      windowed layers store at most their window, in a ring buffer.
    dtype: of keys and values; by default the model's.
    kv: quantizer of the cache (`research.quant.kv.kv_quantizer.KVQuantizer`),
      or None. Layers that borrow keys and values have none.
    rings: False: windowed layers store all positions, too, for callers that
      write positions again.
  """
  dtype = dtype or model.dtype
  made_layers, start = {}, 0
  for name, repeats, blocks in model.stack.runs(params):
    made_layers[name] = {}
    for j, block in enumerate(blocks):
      a = block.attention
      window = a.window if rings else None
      slots = min(capacity, window or capacity)
      lead = repeats, batch, a.kv_heads
      if a.kv == "borrowed":
        made = None
      elif kv is not None:
        first, period = start + j, len(blocks)
        numbers = range(first, first + repeats * period, period)
        quantizer = kv.for_layers(numbers)
        made = quantizer.empty(lead, slots, a.head_dim, dtype, slots < capacity)
      else:
        zeros = jnp.zeros((*lead, slots, a.head_dim), dtype)
        made = caches.LayerCache(zeros, zeros, rings)
      made_layers[name][f"layer{j}"] = made
    start += repeats * len(blocks)
  return caches.Cache(jnp.zeros((batch,), jnp.int32), made_layers)


def logits(
  model: Transformer,
  params: Params,
  tokens: Int[Any, "B T"],
  positions: Int[Any, "B T"] | None = None,
  mask: Mask | None = None,
  time: Float[Any, "B"] | Float[Any, "B T"] | None = None,
) -> Float[Array, "B T V"]:
  """Returns the logits at every token, in fp32; compiled once per shape.

  They are the model's whole output, so they take memory: losses and samplers
  compute them chunk by chunk, or for the last token alone.

  Args:
    model: the Transformer.
    params: its parameters, of whatever leaves.
    tokens: token ids.
    positions, mask, time: as for `Transformer.__call__`; by default causal, as
      a model that predicts the next token was trained.
  """
  return _logits(model, params, jnp.asarray(tokens), positions, mask, time)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens, positions, mask, time):
  params = weights.with_tokens(params, tokens)
  hidden, _ = model.apply(
    {"params": params}, tokens, positions, mask, time=time
  )
  return model.apply({"params": params}, hidden, method="logits")
