"""Tests decoding of whole models with a quantized KV cache."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding, tree
from research.generation import generate
from research.nn.cache import LayerCache, SlotCache, write
from research.nn.transformer import init_cache
from research.quant.kv.kv_memory import memory, nbytes
from research.quant.kv.kv_quantizer import KVQuantizer, parse
from research.typing import UserError
from tests import support, support_mesh

KIVI = KVQuantizer(group=4, residual=8, bits_k=4, bits_v=4)
TIME = 26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AtOnce(SlotCache):
  """Stores all keys and values; packs and unpacks them when read."""

  k: Any
  v: Any
  kv: Any = dataclasses.field(default=KIVI, metadata=dict(static=True))

  @property
  def slots(self):
    return self.k.shape[-2]

  def extend(self, k, v, positions, length, *, fresh, window=None, bias=None):
    written = write(LayerCache(self.k, self.v), k, v, positions, length)
    written = AtOnce(written.k, written.v, self.kv)
    if fresh:
      return written, k, v, None
    before = (length - 1)[:, None]
    slot = jnp.arange(self.slots)
    packed = slot < before // 8 * 8, slot < before - 8
    keys, values = (
      jnp.where(m[:, None, :, None], grid.decode(grid.encode(x)), x)
      for x, m, grid in zip(
        (written.k, written.v), packed, self.kv.grids, strict=True
      )
    )
    held = jnp.where(slot < length[:, None], slot, -1)
    return written, keys.swapaxes(1, 2), values.swapaxes(1, 2), held


@dataclasses.dataclass(frozen=True)
class EmptyAtOnce:
  """Makes them, whatever the window."""

  slots: int

  def for_layers(self, layers):
    return self

  def empty(self, lead, slots, dim, dtype, windowed=False):
    zeros = jnp.zeros((*lead, self.slots, dim), dtype)
    return AtOnce(zeros, zeros)


@functools.partial(
  jax.jit, static_argnums=(0,), compiler_options=support_mesh.QUICKLY
)
def _step(model, params, tokens, cache):
  hidden, cache = model.apply({"params": params}, tokens, cache=cache)
  return model.apply({"params": params}, hidden, method="logits"), cache


def _whole(model, params, tokens):
  """Returns the logits of one forward pass without a cache."""
  return _step(model, params, tokens, None)[0]


def _decoded(model, params, tokens, kv, prompt=9):
  """Returns logits of a prefill and of single tokens."""
  cache = init_cache(model, params, tokens.shape[0], 32, kv=kv)
  pieces = [tokens[:, :prompt], *np.split(tokens[:, prompt:], TIME - prompt, 1)]
  out = []
  for piece in pieces:
    logits, cache = _step(model, params, piece, cache)
    out.append(logits)
  return jnp.concatenate(out, axis=1)


@pytest.mark.slow
def test_decoding_attends_to_what_was_packed():
  """As attention to all tokens, packed and unpacked at once when read."""
  model = support.model("gemma2", depth=4)
  params, tokens = support.params(model), support.tokens(2, TIME)
  before = _step._cache_size()
  got = _decoded(model, params, tokens, KIVI)
  assert _step._cache_size() <= before + 2  # a prefill and a step
  want = _decoded(model, params, tokens, EmptyAtOnce(32))
  # Sums of float32 in another order; codes at a tie may fall either way, once.
  close = np.abs(got - want) < 1e-4 * np.abs(want).max()
  assert close.mean() > 0.999
  whole = _whole(model, params, tokens)
  assert 1e-3 < np.linalg.norm(got - whole) / np.linalg.norm(whole) < 0.5


@pytest.mark.slow
def test_nothing_packed_is_the_whole_model():
  model = support.model("gemma2", depth=4)
  params, tokens = support.params(model), support.tokens(2, TIME)
  kv = KVQuantizer(bits_k=16, bits_v=16, residual=0, sink_tokens=2)
  got = _decoded(model, params, tokens, kv)
  want = _whole(model, params, tokens)
  chex.assert_trees_all_close(got, want, atol=1e-5 * float(abs(want).max()))


@pytest.mark.slow
def test_a_large_key_bias_is_subtracted():
  """Per token, Qwen 2's bias dominates the scale of its keys."""
  model = support.model("qwen2", depth=2)
  tokens = support.tokens(2, TIME)
  large = lambda p, x: x.at[..., 3].set(60.0) if p.endswith("k_bias") else x  # noqa: E731
  params = tree.map_paths(large, support.params(model))
  whole = _whole(model, params, tokens)
  plain = KVQuantizer("per_token", bits_v=16, group=8, residual=0)
  apart = dataclasses.replace(plain, less_bias=True)
  errors = [
    np.linalg.norm(_decoded(model, params, tokens, kv) - whole)
    for kv in (plain, apart)
  ]
  assert errors[1] < 0.3 * errors[0]


def test_a_missing_key_bias():
  model = support.model("llama")
  kv = KVQuantizer(group=4, less_bias=True)
  with pytest.raises(UserError, match="less_bias: found a model whose keys"):
    _decoded(model, support.params(model), support.tokens(2, TIME), kv)


@pytest.mark.slow
def test_generation_uses_it():
  model = support.model("llama", depth=2)
  params = support.params(model)
  kv, prompt = KVQuantizer(bits_k=2, bits_v=2, group=4, residual=0), [3, 1, 4]
  got = generate.generate(model, params, [prompt], 12, kv=kv).tokens[0]
  # The definition: prefill, then the likeliest token of each step.
  cache = init_cache(model, params, 1, 32, kv=kv)
  piece, want = jnp.array([prompt]), []
  for _ in range(12):
    logits, cache = _step(model, params, piece, cache)
    want.append(int(jnp.argmax(logits[0, -1])))
    piece = jnp.array([want[-1:]])
  assert got == want
  whole = _whole(model, params, jnp.array([[*prompt, *want]]))[0]
  assert want != jnp.argmax(whole[2:-1], axis=-1).tolist()


@pytest.mark.slow
def test_key_heads_over_devices_are_one_devices():
  kv = dataclasses.replace(KIVI, residual=4, sink_tokens=2)
  model = support.model("llama", vocab=64, depth=2)
  params, tokens = support.params(model), support.tokens(4, 16, 64)

  @functools.partial(jax.jit, compiler_options=support_mesh.QUICKLY)
  def run(params, tokens):
    cache = init_cache(model, params, 4, 16, kv=kv)
    variables = {"params": params}
    first, cache = model.apply(variables, tokens[:, :7], cache=cache)

    def step(cache, token):
      hidden, cache = model.apply(variables, token[:, None], cache=cache)
      return cache, hidden[:, 0]

    _, rest = jax.lax.scan(step, cache, tokens[:, 7:].T)
    return jnp.concatenate([first, rest.swapaxes(0, 1)], axis=1)

  want = run(params, tokens)
  plan = sharding.Layout(data=2, tensor=2, fsdp=2)
  mesh = plan.mesh()
  place = plan.shardings(params, mesh, sharding.head_counts(model))
  with jax.set_mesh(mesh):
    got = run(
      jax.device_put(params, place),
      jax.device_put(tokens, sharding.replicated(mesh)),
    )
  # Sums in another order; a code at a tie may fall either way, once.
  close = np.abs(got - want) <= 1e-4 + 1e-4 * np.abs(want)
  assert close.mean() > 0.99


def test_unrolled_layers_may_differ():
  model = support.model("llama", depth=2)
  params, kv = support.params(model), parse("k2v2,group=8;1=k8v16,group=8")
  with pytest.raises(UserError, match="layers 0 to 1 with different bits"):
    init_cache(model, params, 1, 32, kv=kv)
  layers = init_cache(model, tree.unroll(params), 1, 128, kv=kv).layers
  bits = [
    (run["layer0"].k.grid.bits, run["layer0"].v.grid.bits)
    for run in layers.values()
  ]
  assert bits == [(2, 2), (8, 16)]
  found = memory(model, tree.unroll(params), 1, 128, kv=kv)
  # 2 + 4 of 8 + 4 twice, 8 + 4 and the whole number.
  assert found.bits_per_number == (6 + 6 + 12 + 32) / 4


def test_memory_is_that_of_the_arrays():
  model = support.model("llama")
  params = support.params(model)
  kv = KVQuantizer(bits_k=8, bits_v=4, group=8, residual=16)
  found = memory(model, params, batch=2, capacity=64, kv=kv)
  cache = init_cache(model, params, 2, 64, kv=kv)
  assert found.cache_bytes == nbytes(cache.layers)
  # 3 layers, 2 heads of 8: a group of 8 has 32 bits beside its codes.
  assert found.bits_per_number == (8 + 4 + 2 * 4) / 2
  assert found.bytes_per_token == 3 * 2 * 8 * (8 + 4 + 2 * 4) / 8
  rings = 2 * 3 * 2 * 2 * 16 * 8 * 4
  assert found.cache_bytes == 2 * 64 * found.bytes_per_token + rings
  whole = memory(model, params, batch=2, capacity=64)
  assert whole.bits_per_number == whole.cache_bits_per_number == 32
