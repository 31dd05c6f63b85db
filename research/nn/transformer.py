"""One Transformer: what differs between families is a value in its blocks.

The stack is a list of scanned runs (see `research.tree`). At initialisation
the runs follow from the blocks; afterwards from the tree that `apply` is
given, so a stack whose layers have different leaf types, or one that is
unrolled, needs no other model.
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
from research.nn import time_embedding as clocks
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
"""What `remat="names"` keeps of a layer; norms, rotations, probabilities and
the gated product are computed again. `unscaled` is a product that an adapter
multiplies by trained numbers, whose gradient needs it; `thin` is what stands
between an adapter's two factors."""


def _rematerialised(f, remat: Remat):
  if remat == "none" and not sharding.is_cut():
    return f
  policy = None
  if remat == "none":
    # What was gathered for a layer is gathered again, never kept for all.
    policy = _unless_gathered
  if remat == "names":
    policy = jax.checkpoint_policies.save_only_these_names(*SAVED)
  return jax.checkpoint(f, prevent_cse=False, policy=policy)


def _unless_gathered(primitive, *_, **params) -> bool:
  """Whether to keep a value: not one that `collectives.gather` made whole.

  Its constraint alone leaves axes to XLA.
  """
  constrained = primitive.name == "sharding_constraint"
  return not (constrained and params["unconstrained_dims"])


class Transformer(nn.Module):
  """A decoder (or, with a full mask, an encoder) over tokens.

  Attributes:
    vocab_size, width: `V`, `D`.
    stack: the layers.
    norm: the final norm.
    tied: whether the head is the embedding, transposed.
    embed_scale: multiplies embeddings (Gemma's `sqrt(D)`), in the compute
      dtype.
    softcap: of the logits, or None.
    dtype: compute dtype; norms, softmax and loss are in fp32 whatever it is.
    remat: what the backward pass computes again.
    max_positions: context length the weights were trained for; stated, not
      enforced here.
    clock: how the model is told the time, or None if it is not.
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
  clock: clocks.TimeEmbedding | None = None

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
    """Returns final hidden states, after the last norm, and the cache.

    Args:
      inputs: token ids, or embeddings as the first layer takes them.
      positions: of the tokens, -1 for padding. By default they follow the
        cache's length, or start at 0.
      mask: what may see what; by default causal, by index where `positions`
        is not given.
      cache: from `init_cache` or an earlier call.
      lengths: tokens in each right-padded row of `inputs`; by default `T`.
      time: in [0, 1], of rows or of tokens; only for a model with a clock.
      keep: the tokens whose states are returned, by their index in `inputs`;
        None for all. A last layer that is a run of its own (`tree.unroll`)
        computes those alone, and keys and values of all.

    Raises:
      UserError: a model with a clock got no time, or one without got one.
    """
    hidden, cache, _ = self._forward(
      inputs, positions, mask, cache, lengths, time, keep
    )
    return hidden, cache

  @nn.compact
  def routed(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    mask: Mask | None = None,
    cache: caches.Cache | None = None,
    lengths: Int[Array, "B"] | None = None,
    time: Float[Array, "B"] | Float[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], caches.Cache | None, dict[str, Any]]:
    """Returns what a call does, and what its experts were used for.

    The loads (`routing.Load`) stand in the tree of the runs, the run's layers
    in front, None where a layer has no experts. They are plain outputs of the
    scans, so balance losses differentiate through them, and a caller who does
    not ask for them pays nothing: unused outputs are compiled away.
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
        mask = attention_context.at(mask, positions, positions)
    if positions is None:
      step = jnp.broadcast_to(jnp.arange(length), (batch, length))
      start = 0 if cache is None else cache.length[:, None]
      positions = step + start
      if lengths is not None:
        positions = jnp.where(step < lengths[:, None], positions, -1)
    held = None
    if cache is not None:
      held = cache.length + jnp.sum(positions >= 0, axis=-1)
    told = self._told(time, batch)
    # Times of tokens stay where their tokens are.
    still = cache is not None or (told is not None and told.shape[1] > 1)
    axes = () if still else zigzag.balanced(mask, (batch, length))
    x, positions, mask = zigzag.spread(axes, x, positions, mask)
    x, layers, loads = self._layers(
      x, positions, mask, cache, held, fresh, told, keep, whole
    )
    if not whole:
      return x, None, loads
    x = zigzag.restored(axes, x)
    if keep is not None and not x.shape[1] == keep.shape[1] < length:
      x = attention_context.take(x, keep)
    if told is not None and told.shape[1] > 1:
      told = attention_context.take(told, keep)
    x = self.norm.clone(name="final_norm", parent=self)(x)
    if told is not None:
      change = clocks.AdaLN(gated=False, name="final_modulation")
      x = clocks.modulated(x, *change(told, self.width))
    if not self.tied:
      self._head()
    if cache is None:
      return x, None, loads
    cache = caches.Cache(length=held, layers=layers, fresh=False)
    return x, cache, loads

  @nn.compact
  def before_feed_forward(
    self,
    inputs: Int[Array, "B T"] | Float[Array, "B T D"],
    positions: Int[Array, "B T"] | None = None,
    mask: Mask | None = None,
  ) -> Float[Array, "B T D"]:
    """Returns what goes into the last layer's feed-forward, see `tail`.

    Args:
      inputs, positions, mask: as in a call.

    Raises:
      UserError: that layer is scanned with others.
    """
    return self._forward(
      inputs, positions, mask, None, None, None, whole=False
    )[0]

  @nn.compact
  def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Returns next-token logits in fp32, only where they are asked for."""
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

  def _told(self, time, batch):
    """Returns what layers are told of the time, `[B, 1 or T, C]`, or None."""
    if self.clock is None:
      if time is not None:
        raise UserError("a time was given to a model that has no clock")
      return None
    if time is None and self.is_initializing():
      time = jnp.zeros(batch)
    if time is None:
      raise clocks.missing()
    time = time[:, None] if time.ndim == 1 else time
    return clocks.TimestepEmbedder(self.clock, name="clock")(time, self.dtype)

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
    told = self.clock and jnp.zeros((1, 1, self.clock.width), self.dtype)

    def one(block, key):
      return block.init(key, x, positions, Mask.causal(), told=told)["params"]

    def init(j, block):
      keys = jax.random.split(jax.random.fold_in(key, j), repeats)
      return jax.vmap(lambda k: one(block, k))(keys)

    return {f"layer{j}": init(j, block) for j, block in enumerate(blocks)}

  def _layers(
    self, x, positions, mask, cache, length, fresh, told, keep, whole
  ):
    rotations = {}
    for rope, dim in {
      (b.attention.rope, b.attention.head_dim) for b in self.stack.blocks
    }:
      if rope is not None:
        # XLA would put sines and cosines into what every layer does with them.
        tables = rope.tables(positions, dim)
        rotations[rope, dim] = jax.lax.optimization_barrier(tables)
    caches_out, loads_out, runs = {}, {}, self._runs()
    for i, (params, blocks) in enumerate(runs):
      old = None if cache is None else cache.layers[f"run{i}"]
      last = i == len(runs) - 1
      alone = last and tree.run_length(params) == 1
      few = (
        keep
        if alone and attention_context.may_keep(keep, mask, old, x.shape)
        else None
      )
      if last and not (whole or alone):
        raise UserError(
          "the last layer is scanned with others, expected one that is a run"
          " of its own: tree.last_apart"
        )
      # Layers of a period that are computed as all others are.
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
            told,
          )
          if j < most:
            x, new[key], loads[key] = block.apply({"params": own}, x, *given)
          elif whole:
            own = block.of_tokens(own, few)
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
  """Returns an empty cache for `params`' runs.

  Args:
    model: the Transformer.
    params: its parameters; the cache follows their runs.
    batch: rows.
    capacity: positions that layers without a window can hold; windowed ones
      hold at most their window, as a ring.
    dtype: of keys and values; by default the model's.
    kv: how they are packed (`research.quant.kv.kv_quantizer.KVQuantizer`), or
      None.
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
        own = kv.of(range(first, first + repeats * period, period))
        made = own.empty(lead, slots, a.head_dim, dtype, slots < capacity)
      else:
        zeros = jnp.zeros((*lead, slots, a.head_dim), dtype)
        made = caches.LayerCache(zeros, zeros)
      layers[name][f"layer{j}"] = made
    start += repeats * len(blocks)
  return caches.Cache(jnp.zeros((batch,), jnp.int32), layers)
