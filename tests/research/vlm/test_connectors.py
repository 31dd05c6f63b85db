"""Connectors as transformers computes them, or as a formula in fp64 says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn

from research import sharding, tree
from research.interop.vision import names
from research.interop.vision.tower_params import read_tower
from research.io import safetensors as files
from research.nn.norm import LayerNorm
from research.vlm.connectors import (
  AttentionPool,
  Linear,
  PerceiverResampler,
  ScaledNormal,
  SquareAttention,
)
from research.vlm.connectors.presets import CONNECTORS
from research.vlm.connectors.qformer import qformer
from tests import support_connectors
from tests.support_connectors import assert_close, golden


def test_soft_tokens_begin_with_a_given_rms():
  """Drawn as flax draws from a normal distribution; equal ones are equal."""
  made = ScaledNormal(rms=0.1356)
  key, shape = jax.random.key(3), (64, 576)
  scaling = nn.initializers.variance_scaling(0.1356**2, "fan_in", "normal")
  found = made(key, shape)
  np.testing.assert_allclose(found, scaling(key, shape), rtol=1e-6)
  assert Linear(size=576, kernel_init=made) == Linear(
    size=576, kernel_init=ScaledNormal(rms=0.1356)
  )


def _qformer_rows():
  """Rows of names of transformers' Blip2ForConditionalGeneration."""
  layer, theirs = names.LAYER, "qformer.encoder.layer.<i>."
  rows = [names.Row("latents", "query_tokens", names.FIRST_OF_ONE)]
  rows += names.norm("input_norm", "qformer.layernorm")
  rows += names.linear("projection", "language_projection")
  blocks = ("attention", "attention"), ("cross_attention", "crossattention")
  for ours, block in blocks:
    parts = zip("qkv", ("query", "key", "value"), strict=True)
    for x, part in parts:
      place = f"{theirs}{block}.attention.{part}"
      rows += names.linear(f"{layer}{ours}/{x}", place)
    output = f"{theirs}{block}.output"
    rows += names.linear(f"{layer}{ours}/o", f"{output}.dense")
    rows += names.norm(f"{layer}{ours}_norm", f"{output}.LayerNorm")
  enter, leave = f"{theirs}intermediate_query", f"{theirs}output_query"
  rows += names.linear(f"{layer}mlp/up", f"{enter}.dense")
  rows += names.linear(f"{layer}mlp/down", f"{leave}.dense")
  return rows + [*names.norm(f"{layer}mlp_norm", f"{leave}.LayerNorm")]


def test_blip2s_qformer(tmp_path):
  tensors, arrays = golden("qformer")
  safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
  shape = dict(width=24, depth=4, heads=3, hidden=28, queries=5)
  model = qformer(40, **shape)
  shapes = jax.eval_shape(
    lambda x: model.init(jax.random.key(0), x, (1, 5))["params"],
    arrays["features"],
  )
  params = read_tower(
    shapes,
    _qformer_rows(),
    files.open_directory(tmp_path),
    model,
    "float32",
    tmp_path,
  )
  found = model.apply({"params": params}, arrays["features"], (1, 5))
  assert_close(found, arrays["soft"])


def test_qwens_merger():
  tensors, arrays = golden("qwen_merger")
  linear = functools.partial(support_connectors.linear, tensors)
  params = dict(
    before=support_connectors.norm(tensors, "ln_q"),
    inner=linear("mlp.0", "up") | linear("mlp.2", "down"),
  )
  model = CONNECTORS["qwen2-vl"](20, 12)
  found = model.apply({"params": params}, arrays["x"], (4, 4))
  assert_close(found, arrays["soft"])


def test_molmos_attention_over_squares():
  tensors, arrays = golden("molmo")
  params, model = _molmo(tensors), SquareAttention(20, 18, heads=2, head_dim=6)
  apply = jax.jit(model.apply, static_argnums=2)
  found = apply({"params": params}, arrays["x"], (4, 4))
  assert_close(found, arrays["soft"])
  # Molmo 1 marks padding before: an addition, and zeros for absent crops.
  coverage = np.ones((2, 16), np.float32)
  coverage[0, :3], coverage[0, 5], coverage[1, 8:] = 0, 0.3, -1
  marked = np.array(arrays["x"])
  marked[0, :3] += params["padding"][0]
  marked[0, 5] += params["padding"][1]
  marked[1, 8:] = 0
  np.testing.assert_allclose(
    apply({"params": params}, arrays["x"], (4, 4), jnp.asarray(coverage)),
    apply({"params": params}, jnp.asarray(marked), (4, 4)),
    rtol=1e-5,
    atol=1e-6,
  )


def _molmo(tensors):
  linear = functools.partial(support_connectors.linear, tensors)
  attention = {}
  for x in "qkvo":
    attention |= linear(f"image_pooling_2d.{x}_proj", x)
  return (
    linear("image_projector.gate_proj", "gate")
    | linear("image_projector.up_proj", "up")
    | linear("image_projector.down_proj", "down")
    | dict(
      attention=attention,
      padding=np.random.default_rng(0).normal(size=(2, 24)).astype(np.float32),
    )
  )


def test_flamingos_resampler_is_idefics():
  """Its MLP has a ReLU; the last matrix is the identity here."""
  tensors, arrays = golden("resampler")
  linear = functools.partial(support_connectors.linear, tensors)
  norm = functools.partial(support_connectors.norm, tensors)
  params = dict(
    latents=tensors["latents"],
    final_norm=norm("layer_norm"),
    projection=np.eye(20, dtype=np.float32),
    projection_bias=np.zeros(20, np.float32),
  )
  for i in range(2):
    own, mlp = f"blocks.{i}.0", f"blocks.{i}.1"
    attention = linear(f"{own}.output_proj", "o")
    for x in "qkv":
      attention |= linear(f"{own}.{x}_proj", x)
    params[f"resampler{i}"] = dict(
      media_norm=norm(f"{own}.context_layer_norm"),
      attention_norm=norm(f"{own}.latents_layer_norm"),
      attention=attention,
      mlp_norm=norm(f"{mlp}.ln"),
      mlp=linear(f"{mlp}.fc", "up") | linear(f"{mlp}.c_proj", "down"),
    )
  model = PerceiverResampler(
    20, queries=3, depth=2, heads=3, head_dim=5, activation="relu"
  )
  apply = jax.jit(model.apply, static_argnums=2)
  assert_close(apply({"params": params}, arrays["x"], (1, 7)), arrays["soft"])


def test_attention_pool_by_its_formula():
  model = AttentionPool(6, queries=3, heads=2, norm=LayerNorm(eps=1e-6))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 8))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 5, 8)), (1, 5))
  )["params"]
  params = jax.tree.map(lambda s: rng.normal(size=s.shape), shapes)
  single = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
  found = model.apply({"params": single}, jnp.asarray(x, jnp.float32), (1, 5))

  centred = x - x.mean(-1, keepdims=True)
  normed = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
  own, heads = params["attention"], []
  for h in range(2):
    part = slice(4 * h, 4 * h + 4)
    q, k, v = (
      y @ own[name][:, part]
      for y, name in ((params["latents"], "q"), (normed, "k"), (normed, "v"))
    )
    logits = np.exp(q @ k.swapaxes(1, 2) / 2)
    heads.append(logits / logits.sum(-1, keepdims=True) @ v)
  y = np.concatenate(heads, axis=-1) @ own["o"]
  expected = y @ params["projection"] + params["projection_bias"]
  assert_close(found, expected)


TOKENS = {
  **dict.fromkeys(("llava", "llava-1.5", "paligemma"), 144),
  **dict.fromkeys(("internvl", "nanovlm", "molmo", "molmo2-4b"), 36),
  **dict.fromkeys(("qwen2-vl", "qwen2.5-vl", "qwen3-vl"), 36),
  **dict.fromkeys(("gemma4", "gemma4-31b"), 16),
  **{"smolvlm-256m": 9, "smolvlm-2.2b": 16, "gemma3": 9},
  **{"flamingo": 64, "blip-2": 32},
}


@pytest.mark.parametrize("name", CONNECTORS)
def test_rows_say_how_many_tokens_they_make(name):
  """Of 12 x 12 patches; and every parameter has a sharding rule."""
  model, grid = CONNECTORS[name](48, 96), (12, 12)

  def new(x):
    out, made = model.init_with_output(jax.random.key(0), x, grid)
    return out, made["params"]

  soft, params = jax.eval_shape(new, jnp.zeros((2, 144, 96)))
  # DeepStack's are as wide as several tokens, for as many layers.
  assert soft.shape[:2] == (2, TOKENS[name]) and soft.shape[2] % 48 == 0
  # Flamingo's are as wide as the features, for cross-attention.
  assert soft.shape[2] == 48 or name in ("qwen3-vl", "flamingo")
  assert model.tokens(grid) == TOKENS[name]
  for path, _ in tree.flatten_paths(params):
    assert sharding.logical_axes(f"connector/{path}") is not None, path


def test_parameters_are_as_many_as_published():
  """LLaVA-1.5 7B, PaliGemma, SmolVLM-256M; BLIP-2's Q-Former without texts.

  The last: 12 layers of BERT's (7,087,872), 6 cross-attentions (a norm, two
  matrices of 768 x 768 and two of 1,408 x 768), the queries and their norm.
  """

  def count(name, size, features):
    grid = (24, 24)
    shapes = jax.eval_shape(
      lambda: CONNECTORS[name](size, features).init(
        jax.random.key(0), jnp.zeros((1, 576, features)), grid
      )
    )
    return tree.count(shapes)

  assert count("llava-1.5", 4096, 1024) == 20_979_712
  assert count("paligemma", 2048, 1152) == 2_361_344
  assert count("smolvlm-256m", 576, 768) == 7_077_888
  cross = 2 * 768**2 + 2 * 1408 * 768 + 4 * 768 + 2 * 768
  expected = 12 * 7_087_872 + 6 * cross + 32 * 768 + 2 * 768
  assert count("blip-2", 2560, 1408) == expected + 768 * 2560 + 2560
