"""Zig-zag token order inside of the layers, text order outside."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask, bidirectional_tokens, image_blocks
from research import sharding, tree, weights
from research.lora import adapt
from research.lora.methods.alora import ALoRA
from research.nn import attention_context, zigzag
from research.nn.transformer import init_cache
from research.typing import UserError
from tests import support, support_mesh

BATCH, TIME = 4, 16
KEY = jax.random.key(0)


def padded():
  steps = np.broadcast_to(np.arange(TIME, dtype=np.int32), (BATCH, TIME))
  return np.where(steps < np.array([[16], [3], [9], [12]]), steps, -1)


def images():
  ids = np.random.default_rng(0).integers(-1, 2, (BATCH, TIME))
  return image_blocks(jnp.asarray(np.sort(ids, axis=1), jnp.int32))


def prefix():
  return Mask.prefix_lm(jnp.array([5, 0, 16, 9], jnp.int32))


CASES = {  # family, layout, arguments of the call
  "nothing given": ("llama", "ring", {}),
  "padding": ("llama", "ring", {"positions": padded()}),
  "prefix": ("llama", "sequence", {"mask": prefix()}),
  "windows": ("gemma2", "ring", {}),
  "full": ("llama", "ring", {"mask": Mask.full()}),
  "exchanged": ("llama", "ulysses", {"mask": prefix()}),
  "cache": ("llama", "ring", {}),
  "images": ("gemma2", "ring", {"mask": images()}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.sample(7)
def test_hidden_states_are_one_devices(name):
  family, layout, given = CASES[name]
  model = support.model(family, vocab=64)
  params, tokens = support.params(model), support.tokens(BATCH, TIME, 64)

  @jax.jit
  def run(params, tokens):
    more = {k: jax.tree.map(jnp.asarray, x) for k, x in given.items()}
    if name == "cache":
      more["cache"] = init_cache(model, params, BATCH, capacity=20)
    return model.apply({"params": params}, tokens, **more)[0]

  want = run(params, tokens)
  layout = support_mesh.LAYOUTS[layout]
  mesh = layout.mesh()
  place = layout.shardings(params, mesh, sharding.head_counts(model))
  with jax.set_mesh(mesh):
    got = run(
      jax.device_put(params, place), jax.device_put(tokens, layout.batch(mesh))
    )
  live = given.get("positions", np.zeros((BATCH, TIME))) >= 0
  # Sums of up to 64 float32 terms through three layers; normed, so near 1.
  chex.assert_trees_all_close(got[live], want[live], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["sequence", "ring"])
def test_adapters_act_where_tokens_activate_them(layout):
  """Their gates are in text order, so layers must be as well."""
  model, at = support.model("llama", vocab=64, depth=1), [3, 9, 15, 6]
  tokens = support.tokens(BATCH, TIME, 63)
  tokens = tokens.at[jnp.arange(BATCH), jnp.array(at)].set(63)
  method = ALoRA(rank=2, invocation=(63,))
  adapted = adapt.Adapt(method=method)(support.params(model), KEY)
  params = tree.map_paths(
    lambda path, x: jnp.full_like(x, 0.3) if path.endswith("/b") else x, adapted
  )

  @jax.jit
  def run(params, tokens):
    params = weights.with_tokens(params, tokens)
    return model.apply({"params": params}, tokens)[0]

  want = run(params, tokens)
  changed = jnp.any(jnp.abs(run(adapted, tokens) - want) > 1e-3, axis=-1)
  np.testing.assert_array_equal(
    changed, np.arange(TIME) >= np.array(at)[:, None]
  )
  layout = support_mesh.LAYOUTS[layout]
  with jax.set_mesh(layout.mesh()):
    got = run(params, tokens)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_layers_that_see_images_causally_go_by_the_text():
  """Beside coordinates that are no positions, their order is all there is."""
  model = support.gemma4(vocab=32, kinds=("global",), global_images="causal")
  params, tokens = support.params(model), support.tokens(BATCH, TIME, 32)
  run = jax.jit(
    lambda mask: model.apply({"params": params}, tokens, None, mask)
  )
  want = run(Mask.causal())[0]
  with jax.set_mesh(support_mesh.LAYOUTS["ring"].mesh()):
    got = run(bidirectional_tokens(tokens < 16))[0]
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)


def test_tokens_are_reordered_only_where_that_spreads_work():
  mesh = sharding.Layout(data=2, ring=4).mesh()
  causal = Mask.causal()
  assert zigzag.zigzag_axes(causal, (4, 16)) == ()
  with jax.set_mesh(mesh):
    assert zigzag.zigzag_axes(causal, (4, 16)) == ("ring",)
    assert zigzag.zigzag_axes(prefix(), (4, 16)) == ("ring",)
    assert zigzag.zigzag_axes(images(), (4, 16)) == ("ring",)
    assert zigzag.zigzag_axes(causal, (4, 12)) == ()  # halves of shards of 3
    assert zigzag.zigzag_axes(causal, (4, 15)) == ()
    assert zigzag.zigzag_axes(Mask.full(), (4, 16)) == ()
    assert zigzag.zigzag_axes(Mask.block_diffusion(8, 4), (4, 16)) == ()
  with jax.set_mesh(sharding.Layout(ulysses=2).mesh()):
    assert zigzag.zigzag_axes(causal, (4, 16)) == ()


def test_layouts_that_attention_cannot_cross_are_refused():
  with pytest.raises(UserError, match="sequence 2 and ring 4"):
    sharding.Layout(sequence=2, ring=4)
  q = jnp.zeros((4, 16, 3, 8))
  refused = pytest.raises(UserError, match="found 8 for 3 heads over 1 devices")
  with jax.set_mesh(sharding.Layout(data=1, ulysses=8).mesh()), refused:
    attention_context.attend(q, q, q, mask=Mask.causal())
