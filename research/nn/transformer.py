"""The Transformer of all model families, configured by its blocks.

The layer stack is a list of scanned runs (see `research.tree`). At
initialisation, the blocks determine the runs; afterwards, the parameter tree
passed to `apply` does. So the same model can apply parameters whose layers have
different leaf types, or an unrolled stack.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from kernels_pallas.masks import Mask
from research import sharding, tree, weights
from research.nn import attention_context, collectives, zigzag
from research.nn import cache as caches
from research.nn import time_embedding as time_embeddings
from research.nn.block import Block
from research.nn.norm import RMSNorm
from research.nn.stack import Stack
from research.typing import Array, Float, Int, Params, UserError

Remat = Literal["none", "layer", "names"]

SAVED = (
  "qkv",
  "attn_out",
  "attn_lse",
  "middle",
  "gate",
  "up",
  "unscaled",
  "thin",
)
"""Activations that `remat="names"` saves. Norms, rotations, attention
probabilities and the gated product are recomputed. `unscaled` is a product that
an adapter multiplies by trained scales, needed for their gradient; `thin` is
the activation between the two factors of a low-rank adapter."""


def _rematerialised(f, remat: Remat):
  if remat == "none" and not sharding.is_cut():
    return f
  policy = None
  if remat == "none":
    # Weights gathered for FSDP are gathered again in the backward pass.
    policy = _unless_gathered
  if remat == "names":
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
  return jax.checkpoint(f, prevent_cse=False, policy=policy)


def _unless_gathered(primitive, *_, **params) -> bool:
  """Checkpoint policy: saves everything but the output of an FSDP gather.

  A gather is recognised by a sharding constraint that leaves some axes
  unconstrained.
  """
  constrained = primitive.name == "sharding_constraint"
  return not (constrained and params["unconstrained_dims"])


class Transformer(nn.Module):
  """A Transformer over tokens: a decoder or, with a full mask, an encoder.

  Attributes:
    vocab_size, width: `V`, `D`.
    stack: the layers.
    norm: the final norm.
    tied: whether the head is the transposed embedding.
    embed_scale: multiplies embeddings (Gemma's `sqrt(D)`), in the compute
      dtype.
    softcap: soft cap of the logits, or None.
    dtype: compute dtype; norms, softmax and loss always compute in fp32.
    remat: activations saved for the backward pass: all ("none"), those in
      `SAVED` ("names"), or only each layer's input ("layer").
    max_positions: context length of training; not enforced here.
    time_embedding: configuration of the timestep conditioning, or None.
  """

  vocab_size: int
  width: int
  stack: Stack
  norm: RMSNorm = RMSNorm()
  tied: bool = True
  embed_scale: float = 1.0
  softcap: float | None = None
  dtype: str = "float32"
  remat: Remat = "none"
  max_positions: int | None = None
  time_embedding: time_embeddings.TimeEmbedding | None = None

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
  ) -> tuple[Float[Array, "B N D"], caches.Cache | None]:
    """Returns the final hidden states, after the last norm, and the cache.

    Args:
      inputs: token ids, or embeddings (already scaled).
      positions: of the tokens, -1 for padding. By default they continue from
        the cache's length, or start at 0.
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

    Raises:
      UserError: `time` is missing in a model with `time_embedding`, or given to
        one without.
    """
    hidden, cache, _ = self._forward(
      inputs, positions, mask, cache, lengths, time, keep
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
    cache,
    lengths,
    time,
    keep=None,
    whole=True,
  ):
    x = sharding.constrain(self._embed(inputs), "batch", "length", None)
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
    new_length = None
    if cache is not None:
      new_length = cache.length + jnp.sum(positions >= 0, axis=-1)
    conditioning = self._conditioning(time, batch)
    # Per-token conditioning is not reordered, so neither are its tokens.
    still = cache is not None or (
      conditioning is not None and conditioning.shape[1] > 1
    )
    axes = () if still else zigzag.zigzag_axes(mask, (batch, length))
    x, positions, mask = zigzag.to_zigzag(axes, x, positions, mask)
    x, layers, loads = self._layers(
      x, positions, mask, cache, new_length, fresh, conditioning, keep, whole
    )
    if not whole:
      return x, None, loads
    x = zigzag.from_zigzag(axes, x)
    if keep is not None and not x.shape[1] == keep.shape[1] < length:
      x = attention_context.take_tokens(x, keep)
    if conditioning is not None and conditioning.shape[1] > 1:
      conditioning = attention_context.take_tokens(conditioning, keep)
    x = self.norm.clone(name="final_norm", parent=self)(x)
    if conditioning is not None:
      change = time_embeddings.AdaLN(gated=False, name="final_modulation")
      x = time_embeddings.modulate(x, *change(conditioning, self.width))
    if not self.tied:
      self._head()
    if cache is None:
      return x, None, loads
    cache = caches.Cache(length=new_length, layers=layers, fresh=False)
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
    return self._forward(
      inputs, positions, mask, None, None, None, whole=False
    )[0]

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
    return weights.weight(self, "embed", init, (self.vocab_size, self.width))

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

  def _runs(self) -> list[tuple[Params, tuple[Block, ...]]]:
    """Returns each run's parameters and period of blocks, stored or new."""
    out = []
    for name, repeats, blocks in self.stack.runs(
      self.variables.get("params", {})
    ):
      init = functools.partial(self._init_run, repeats=repeats, blocks=blocks)
      out.append((weights.weight(self, name, init), blocks))
    return out

  def _init_run(self, key, shape, *, repeats, blocks):
    x = jnp.zeros((1, 1, self.width), self.dtype)
    positions = jnp.zeros((1, 1), jnp.int32)
    conditioning = self.time_embedding and jnp.zeros(
      (1, 1, self.time_embedding.width), self.dtype
    )

    def one(block, key):
      return block.init(
        key, x, positions, Mask.causal(), conditioning=conditioning
      )["params"]

    def init(j, block):
      keys = jax.random.split(jax.random.fold_in(key, j), repeats)
      return jax.vmap(lambda k: one(block, k))(keys)

    return {f"layer{j}": init(j, block) for j, block in enumerate(blocks)}

  def _layers(
    self, x, positions, mask, cache, length, fresh, conditioning, keep, whole
  ):
    rotations = {}
    for rope, dim in {
      (b.attention.rope, b.attention.head_dim) for b in self.stack.blocks
    }:
      if rope is not None:
        # Without the barrier, XLA recomputes sines and cosines in every layer.
        tables = rope.tables(positions, dim)
        rotations[rope, dim] = jax.lax.optimization_barrier(tables)
    caches_out, loads_out, runs = {}, {}, self._runs()
    for i, (params, blocks) in enumerate(runs):
      old = None if cache is None else cache.layers[f"run{i}"]
      last = i == len(runs) - 1
      alone = last and tree.run_length(params) == 1
      few = (
        keep
        if alone
        and attention_context.can_select_tokens(keep, mask, old, x.shape)
        else None
      )
      if last and not (whole or alone):
        raise UserError(
          "the last layer is scanned with others, expected one that is a run"
          " of its own: tree.split_last_layer"
        )
      # Number of layers in the period that are computed in full.
      most = len(blocks) - (few is not None or (last and not whole))

      def period(x, params_and_cache, blocks=blocks, few=few, most=most):
        params, old = params_and_cache
        params = collectives.gather_parts(params)
        new, loads = {}, {}
        for j, block in enumerate(blocks):
          key = f"layer{j}"
          a, own = block.attention, params[key]
          given = (
            positions,
            mask,
            rotations.get((a.rope, a.head_dim)),
            None if old is None else old[key],
            length,
            fresh,
            conditioning,
          )
          if j < most:
            x, new[key], loads[key] = block.apply({"params": own}, x, *given)
          elif whole:
            own = block.select_tokens(own, few)
            x, new[key], loads[key] = block.apply(
              {"params": own}, x, *given, few
            )
          else:
            x, new[key] = block.apply(
              {"params": own}, x, *given, method="attend"
            )
            loads[key] = None
        return x, (None if old is None else new, loads)

      body = _rematerialised(period, self.remat)
      if tree.run_length(params) == 1:
        one = jax.tree.map(lambda a: a[0], (params, old))
        x, new = body(x, one)
        new = jax.tree.map(lambda a: a[None], new)
      else:
        x, new = jax.lax.scan(body, x, (params, old))
      caches_out[f"run{i}"], loads_out[f"run{i}"] = new
    return x, caches_out, loads_out


def init_cache(
  model: Transformer,
  params: Params,
  batch: int,
  capacity: int,
  dtype: str | None = None,
  kv: Any = None,
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
      or None.
  """
  dtype = dtype or model.dtype
  layers, start = {}, 0
  for name, repeats, blocks in model.stack.runs(params):
    layers[name] = {}
    for j, block in enumerate(blocks):
      a = block.attention
      slots = min(capacity, a.window or capacity)
      lead = repeats, batch, a.kv_heads
      if kv is not None:
        first, period = start + j, len(blocks)
        own = kv.for_layers(range(first, first + repeats * period, period))
        made = own.empty(lead, slots, a.head_dim, dtype, slots < capacity)
      else:
        zeros = jnp.zeros((*lead, slots, a.head_dim), dtype)
        made = caches.LayerCache(zeros, zeros)
      layers[name][f"layer{j}"] = made
    start += repeats * len(blocks)
  return caches.Cache(jnp.zeros((batch,), jnp.int32), layers)


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
