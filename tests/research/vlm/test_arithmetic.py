"""What images cost: the literature's figures, and what traced programs do."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from research import weights
from research.nn import flops
from research.nn.attention import CrossAttention
from research.nn.cross_attention import GatedCrossAttention
from research.nn.mlp import PlainMlp
from research.vlm import arithmetic, connectors
from research.vlm.connectors import qformer
from research.vlm.cross_attention import interleave, with_media
from research.vlm.encoders import EncoderSizes
from research.vlm.encoders.grouped import GroupedViews
from research.vlm.encoders.qwen import qwen2_5_vl
from research.vlm.encoders.vit import Features
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.presets import PRESETS
from tests import support, support_vlm


def test_smolvlm_spends_most_on_its_encoder():
  """17 views of 512 pixels: 3.65 TFLOP, and 0.24 for 1,127 tokens."""
  preset = PRESETS["smolvlm-256m"]
  cost = arithmetic.image_cost(preset, 386, 386)
  assert (cost.views, cost.patches) == (17, 1024)
  assert (cost.soft_tokens, cost.total_tokens) == (1088, 1127)
  assert cost.encoder_flops == pytest.approx(3.65e12, rel=0.01)
  scores = 4 * 30 * 9 * 64 * 1127 * 1128 / 2
  assert cost.language_flops - scores == pytest.approx(0.24e12, rel=0.01)
  # 23 KB a token in bfloat16.
  assert cost.kv_bytes == 1127 * 30 * 2 * 3 * 64 * 2
  text = arithmetic.describe_cost(preset, cost, "smolvlm-256m")
  assert "17 of 512 x 512" in text
  assert f"encoder         {cost.encoder_flops / 1e12:.3g} TFLOP" in text


def test_llava_spends_most_on_its_language_model():
  cost = arithmetic.image_cost(PRESETS["llava-1.5-7b"], 480, 640, text=50)
  assert (cost.views, cost.patches, cost.total_tokens) == (1, 576, 626)
  # 0.35 TFLOP of matrices in 24 layers, of which 23 run, and the scores.
  scores = 4 * 23 * 16 * 64 * 577**2
  linear = cost.encoder_flops - scores
  assert linear == pytest.approx(0.35e12 * 23 / 24, rel=0.01)
  assert cost.language_flops == pytest.approx(8.2e12, rel=0.02)
  assert cost.encoder_share < 0.05


SMALL = (
  "llava-1.5-7b",
  "nanovlm-222m",
  "paligemma-3b-224",
  "llava-onevision-1.5-4b",
  "blip-2-opt-2.7b",
  "qwen3-vl-4b",
)


@pytest.mark.parametrize("name", SMALL)
def test_products_are_those_of_the_traced_program(name):
  """Of towers whose scores fit one tile, which the trace counts."""
  preset = PRESETS[name].reduced(8)
  model = preset.model()
  plan = preset.preprocessor.plan(300, 200)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  pixels = jax.ShapeDtypeStruct((1, plan.views, *plan.view, 3), jnp.uint8)
  want = arithmetic.encoder_flops(model, plan)
  want += arithmetic.connector_flops(model, plan)
  got = flops.count_flops(model.encode, shapes, pixels)
  assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", [*SMALL, "gemma4-e2b"])
def test_a_language_models_products_are_those_of_the_traced_program(name):
  """Gemma 4's borrowed keys and embeddings per layer among them."""
  model = PRESETS[name].reduced(8).model()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)

  def hidden(params, tokens):
    return model.language.apply({"params": params}, tokens)[0]

  # A tile is computed whole, whatever of it a causal mask hides.
  cost = flops.model_cost(model.language)
  want = cost.forward(64, flops.Dense(64, 64), 0)
  got = flops.count_flops(hidden, shapes["language"], tokens)
  assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
  "connector",
  [
    connectors.SquareAttention(size=32, hidden=20, heads=2, head_dim=8),
    connectors.GroupAttention(
      size=32, hidden=20, width=16, heads=2, head_dim=8
    ),
  ],
)
def test_attention_within_groups_reads_each_patch(connector):
  """Molmo's: as in the traced program; tiles of Molmo 2 overlap."""
  model = dataclasses.replace(support_vlm.model(), connector=connector)
  tiling = Overlap(tile=16, max_tiles=4, margins=(1, 1), patch=4, pool=2)
  plan = tiling.plan(40, 24)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((1, plan.views, 16, 16, 3), jnp.uint8)
  if isinstance(connector, connectors.GroupAttention):
    groups = tiling.groups(plan)
    assert len(groups) < plan.views * connector.tokens(plan.patches)
    groups = jax.ShapeDtypeStruct((1, *groups.shape), jnp.int32)
    images = GroupedViews(images, groups)
  want = flops.count_flops(model.encode, shapes, images)
  found = arithmetic.encoder_flops(model, plan)
  found += arithmetic.connector_flops(model, plan)
  assert found == want


@pytest.mark.parametrize(
  "connector",
  [
    connectors.AttentionPool(size=32, queries=5, heads=2),
    connectors.PerceiverResampler(
      size=32, queries=5, depth=2, heads=2, head_dim=8
    ),
    qformer.qformer(32, width=16, depth=3, heads=2, hidden=20, queries=5),
  ],
  ids=["pool", "perceiver", "qformer"],
)
@pytest.mark.parametrize("class_token", [False, True])
def test_queries_read_every_patch(connector, class_token):
  """Keys and values are of patches, all else of queries, as traced."""
  model = support_vlm.model()
  model = dataclasses.replace(
    model,
    vision=model.vision.clone(class_token=class_token),
    features=Features(class_token=True),
    connector=connector,
  )
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  images = jax.ShapeDtypeStruct((1, 3, 16, 16, 3), jnp.uint8)
  want = flops.count_flops(model.encode, shapes, images)
  assert arithmetic.pixels_flops(model, (3, 16, 16, 3)) == want


def test_layers_of_cross_attention_read_the_media():
  """As traced, where a tile holds all of the tokens and of the media."""
  layer = GatedCrossAttention(
    attention=CrossAttention(heads=2, head_dim=8),
    mlp=PlainMlp(hidden=20, bias=False),
    media_width=24,
  )
  model = interleave(support.model("llama", depth=4), layer, every=2, first=1)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )["params"]
  media = jax.ShapeDtypeStruct((1, 6, 24), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)

  def hidden(params, media, tokens):
    sizes = jnp.full((1, 1), 6, jnp.int32)
    seen = with_media(model, params, media, sizes, 5)
    seen = weights.with_tokens(seen, tokens)
    return model.apply({"params": seen}, tokens)[0]

  found = flops.count_flops(hidden, shapes, media, tokens)
  cost = flops.model_cost(model)
  want = cost.forward(16, flops.Dense(16, 16), 0, media=6)
  assert found == pytest.approx(want, rel=1e-6)
  assert cost.cache(16, media=6) - cost.cache(16) == 2 * 2 * 16 * 6


@pytest.mark.parametrize("rows, columns", [(8, 8), (6, 10)])
def test_patches_of_windows_and_of_two_frames(rows, columns):
  """Qwen2.5-VL's encoder: two layers of windows and a whole one, counted."""
  sizes = EncoderSizes(width=32, depth=3, heads=2, hidden=48, patch=4)
  model = dataclasses.replace(
    support_vlm.model(),
    vision=qwen2_5_vl(sizes, window=4, full=(1,)),
    features=Features(normed=False),
  )
  plan = Native(patch=4, merge=2, min_pixels=1).plan(4 * rows, 4 * columns)
  own = [(i // 4, j // 4) for i in range(rows) for j in range(columns)]
  inside = sum(one == two for one in own for two in own)
  n = rows * columns
  scores = 4 * 32 * (2 * inside + n * n)
  patches, layer = 2 * 4 * 4 * 3 * 32, 4 * 32 * 32 + 3 * 32 * 48
  want = 2 * n * (patches + 3 * layer) + scores
  assert arithmetic.encoder_flops(model, plan) == want


def test_training_costs_three_passes_where_weights_are_trained():
  """A frozen tower is passed once, or twice where gradients go through it."""
  model = PRESETS["llava-1.5-7b"].model()
  plan = PRESETS["llava-1.5-7b"].preprocessor.plan(336, 336)
  once = arithmetic.encoder_flops(model, plan)
  found = [
    arithmetic.training_flops(model, plan, 2048, trained)
    for trained in (("connector",), ("connector", "language"))
  ]
  assert [x["vision"] for x in found] == [once, once]
  assert found[1]["language"] == pytest.approx(1.5 * found[0]["language"])
  assert found[0]["connector"] == 3 * arithmetic.connector_flops(model, plan)
