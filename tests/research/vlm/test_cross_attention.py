"""Gated cross-attention: transformers' Idefics, and what Flamingo promises."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research import sharding, tree, weights
from research.data import packing
from research.data.examples import Example
from research.generation import generate, generate_paged
from research.generation.paging import Paging
from research.interop.loaded import Loaded
from research.interop.vision import source
from research.lora import Adapt
from research.lora.methods.alora import ALoRA
from research.nn import logits
from research.nn.attention import CrossAttention
from research.nn.cross_attention import GatedCrossAttention, Media
from research.nn.mlp import Mlp, PlainMlp
from research.nn.norm import RMSNorm
from research.typing import UserError
from research.vlm import WithImages, cross_attention
from research.vlm.connectors import PerceiverResampler
from research.vlm.data import row_of
from tests import support, support_connectors, support_vlm

IMAGE, WIDTH, LATENTS = 60, 20, 3
LAYER = GatedCrossAttention(
  attention=CrossAttention(heads=2, head_dim=5),
  mlp=PlainMlp(hidden=28, bias=False),
  media_width=WIDTH,
)
BARE = support.model("llama", depth=4)
MODEL = cross_attention.interleave(BARE, LAYER, every=2, first=1)
# Row 0: words, an image, words, an image, words. Row 1: an image at once.
TOKENS = jnp.array(
  [[5, 6, IMAGE, 7, 8, IMAGE, 9, 10], [IMAGE, 4, 3, 12, 13, 14, 15, 16]]
)
SIZES = jnp.array([[LATENTS, LATENTS], [LATENTS, 0]])


def media(seed=0):
  drawn = np.random.default_rng(seed).normal(size=(2, 2 * LATENTS, WIDTH))
  return jnp.asarray(drawn, jnp.float32)


@functools.cache
def params():
  """Returns weights whose gates are open."""
  new = cross_attention.add_layers(
    MODEL, support.params(BARE), jax.random.key(0)
  )
  return tree.map_paths(
    lambda path, x: x + 0.7 if path.endswith("_gate") else x, new
  )


@jax.jit
def hidden_of(params, tokens, images, segments=None, sizes=SIZES):
  bound = cross_attention.with_media(MODEL, params, images, sizes, IMAGE)
  bound = weights.with_tokens(bound, tokens, segments)
  mask = Mask.causal(segments=segments)
  return MODEL.apply({"params": bound}, tokens, None, mask)[0]


def without_layers(params):
  """Returns the language model's own parameters."""
  layers = [
    {k: v for k, v in layer.items() if k != "cross"}
    for layer in tree.layers(params)
  ]
  return tree.stack(tree.outer_params(params), layers, BARE.layer_kinds())


def test_a_layer_is_transformers_idefics():
  tensors, golden = support_connectors.golden("gated")
  layer = GatedCrossAttention(
    attention=CrossAttention(heads=3, head_dim=8),
    mlp=Mlp(hidden=28),
    media_width=WIDTH,
    norm=RMSNorm(eps=1e-5),
  )
  linear = functools.partial(support_connectors.linear, tensors)
  attention = {}
  for x in "qkvo":
    attention |= linear(f"cross_attn.{x}_proj", x)
  own = dict(
    attention=attention,
    mlp=linear("mlp.gate_proj", "gate")
    | linear("mlp.up_proj", "up")
    | linear("mlp.down_proj", "down"),
    attention_norm=support_connectors.norm(tensors, "input_layernorm"),
    mlp_norm=support_connectors.norm(tensors, "post_attention_layernorm"),
    attention_gate=tensors["alpha_cross_attn"][0],
    mlp_gate=tensors["alpha_dense"][0],
  )
  keys, values = layer.attention.apply(
    {"params": attention}, golden["media"], method="keys_and_values"
  )
  images = golden["images"]
  bounds = jnp.stack([images * 3, jnp.where(images < 0, 0, images + 1) * 3], 1)
  own["media"] = Media(keys, values, jnp.full((2, 2), 3), IMAGE, bounds)
  found = layer.apply({"params": own}, golden["x"])
  support_connectors.assert_close(found, golden["y"])


def test_tokens_see_the_latest_image_of_their_document():
  """By a loop over tokens."""
  tokens = np.array([[IMAGE, 3, IMAGE, 4, 5, 6, IMAGE, 7, 0]])
  documents = np.array([[0, 0, 0, 0, 1, 1, 1, 1, -1]])
  sizes = jnp.array([[2, 3, 1]])
  given = jnp.zeros((1, 6, 1, 1))
  edges = [0, 2, 5, 6]
  for segments in (None, documents):
    bound = Media(given, given, sizes, IMAGE).with_tokens(
      jnp.asarray(tokens), None if segments is None else jnp.asarray(segments)
    )
    for t in range(9):
      last, number = None, -1
      for s in range(t + 1):
        same = segments is None or segments[0, s] == segments[0, t] >= 0
        if tokens[0, s] == IMAGE:
          number += 1
          last = number if same else last
      lo, hi = (0, 0) if last is None else edges[last : last + 2]
      assert set(range(*bound.bounds[0, :, t])) == set(range(lo, hi)), (t, last)


def test_closed_gates_leave_the_language_models_logits_bitwise():
  bare = support.params(BARE)
  closed = cross_attention.add_layers(MODEL, bare, jax.random.key(0))
  bound = cross_attention.with_media(MODEL, closed, media(), SIZES, IMAGE)
  chex.assert_trees_all_equal(
    logits(MODEL, bound, TOKENS), logits(BARE, bare, TOKENS)
  )
  chex.assert_trees_all_equal(without_layers(closed), bare)


def test_images_change_only_the_tokens_after_them():
  base = hidden_of(params(), TOKENS, media())
  for image, (row, first) in enumerate([(0, 2), (0, 5), (1, 0)]):
    at = image % 2 * LATENTS
    moved = media().at[row, at : at + LATENTS].add(1.0)
    found = hidden_of(params(), TOKENS, moved)
    changed = np.any(np.asarray(found != base), axis=-1)
    expected = np.zeros((2, 8), bool)
    expected[row, first:] = True
    np.testing.assert_array_equal(changed, expected)
  # Row 1 has no second image: what stands there is never seen.
  moved = media().at[1, LATENTS:].add(1.0)
  np.testing.assert_array_equal(hidden_of(params(), TOKENS, moved), base)


def test_attention_adds_exactly_nothing_before_the_first_image():
  layer = MODEL.layer_kinds()[1].cross
  own = params()["run0"]["layer1"]["cross"]
  own = jax.tree.map(lambda x: x[0], own)
  x = jax.random.normal(jax.random.key(1), (2, 8, 32))
  blind = layer.apply({"params": own}, x)
  keys, values = layer.attention.apply(
    {"params": own["attention"]}, media(), method="keys_and_values"
  )
  shown = Media(keys, values, SIZES, IMAGE).with_tokens(TOKENS, None)
  found = layer.apply({"params": {**own, "media": shown}}, x)
  same = np.all(np.asarray(found == blind), axis=-1)
  expected = np.zeros((2, 8), bool)
  expected[0, :2] = True
  np.testing.assert_array_equal(same, expected)


def test_generated_tokens_are_those_of_full_forward_passes():
  # Loud enough for each token to depend on what it sees.
  images = 30 * media()
  bound = cross_attention.with_media(MODEL, params(), images, SIZES, IMAGE)
  prompts = [[5, 6, IMAGE, 7], [IMAGE, 4, 3, 12, 13]]
  found = generate.generate(MODEL, bound, prompts, 3).tokens
  for row, prompt in enumerate(prompts):
    ids = list(prompt)
    for _ in range(3):
      padded = (
        jnp.zeros((2, 8), jnp.int32).at[row, : len(ids)].set(jnp.array(ids))
      )
      scores = logits(MODEL, bound, padded)[row, len(ids) - 1]
      ids.append(int(scores.argmax()))
    assert found[row] == ids[len(prompt) :]
  # One row at a time, so that the second prompt gets another's place.
  pages = functools.partial(generate_paged.chunks, layout=Paging(rows=1))
  paged = generate.generate(MODEL, bound, prompts, 3, source=pages)
  assert paged.tokens == found


def test_documents_packed_in_a_row_are_those_alone():
  """Row 0 has both, rows 1 and 2 one each: rotary positions are relative."""
  tokens = jnp.array(
    [
      [5, IMAGE, 7, 8, IMAGE, 9, 10, 11],
      [5, IMAGE, 7, 0, 0, 0, 0, 0],
      [8, IMAGE, 9, 10, 11, 0, 0, 0],
    ]
  )
  segments = jnp.array(
    [
      [0, 0, 0, 1, 1, 1, 1, 1],
      [0, 0, 0, -1, -1, -1, -1, -1],
      [0, 0, 0, 0, 0, -1, -1, -1],
    ]
  )
  both, nothing = media()[:1], jnp.zeros((1, LATENTS, WIDTH))
  one = jnp.concatenate([both[:, :LATENTS], nothing], axis=1)
  two = jnp.concatenate([both[:, LATENTS:], nothing], axis=1)
  sizes = LATENTS * jnp.array([[1, 1], [1, 0], [1, 0]])
  images = jnp.concatenate([both, one, two])
  packed, first, second = hidden_of(params(), tokens, images, segments, sizes)
  # Rotations by other positions, in fp32.
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
  close(packed[:3], first[:3])
  close(packed[3:], second[:5])


@functools.cache
def adapted():
  """Returns weights whose new layers have adapters, active after a 7."""
  method = ALoRA(rank=2, invocation=(7,))
  transform = Adapt(
    method=method, targets=r"layers/\d+/cross/(attention/q|mlp/.*)"
  )
  made = transform(params(), jax.random.key(1))
  return tree.map_paths(
    lambda path, x: x + 0.3 if "/trained/" in path else x, made
  )


@pytest.mark.parametrize("made", [params, adapted])
def test_selected_tokens_are_those_of_all(made):
  single = tree.split_last_layer(made())
  bound = cross_attention.with_media(MODEL, single, media(), SIZES, IMAGE)
  bound = weights.with_tokens(bound, TOKENS)
  keep = jnp.array([[3, 7], [1, 6]])
  apply = jax.jit(MODEL.apply)
  found, _ = apply({"params": bound}, TOKENS, keep=keep)
  every = hidden_of(made(), TOKENS, media())
  expected = jnp.take_along_axis(every, keep[..., None], axis=1)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@functools.cache
def seeing():
  """Returns a model with images beside its text, its weights, and its loss."""
  connector = PerceiverResampler(
    WIDTH, queries=LATENTS, depth=1, heads=2, head_dim=5
  )
  model = dataclasses.replace(
    support_vlm.model(),
    connector=connector,
    language=MODEL,
    image_token=IMAGE,
    placement=cross_attention.LatestImage(),
  )
  towers = model.new_towers(jax.random.key(2))

  @jax.jit
  @jax.value_and_grad
  def loss(params, batch):
    return WithImages(model)(params, batch, None)[0]

  return model, towers | {"language": params()}, loss


@pytest.mark.slow
def test_a_vision_language_model_with_images_beside_its_text():
  """Pixels of an image change the loss of its own row; all towers learn."""
  _, given, loss = seeing()
  pixels = jnp.asarray(support_vlm.pixels(2, 2))
  batch = dict(
    tokens=TOKENS,
    targets=TOKENS,
    segments=jnp.zeros_like(TOKENS),
    positions=jnp.broadcast_to(jnp.arange(8), TOKENS.shape),
    weights=jnp.zeros(TOKENS.shape).at[0].set(1.0),
    pixels=pixels,
  )
  expected, gradients = loss(given, batch)
  for path, x in tree.flatten_paths(gradients):
    # A bias of all keys alike changes no softmax.
    assert path.endswith("k_bias") or np.abs(x).max() > 0, path
  found, _ = loss(given, batch | dict(pixels=pixels.at[1].set(0)))
  assert found == expected
  found, _ = loss(given, batch | dict(pixels=pixels.at[0, 1].set(0)))
  assert abs(found - expected) > 1e-4


@pytest.mark.slow
def test_packed_samples_have_the_gradient_of_those_alone():
  """A row of two samples and their two images; rows do not share images."""
  model, given, loss = seeing()
  pixels = jnp.asarray(support_vlm.pixels(2, 2))
  examples = [
    Example(np.array(ids, np.int32), np.array(ids) < 50)
    for ids in ([5, IMAGE, 7, 8], [IMAGE, 9, 10])
  ]
  both = row_of(examples, 8), packing.padding_row(8)
  alone = [row_of([example], 8) for example in examples]
  batches = [
    {k: jnp.stack([row[k] for row in rows]) for k in rows[0]}
    for rows in (both, alone)
  ]
  shown = pixels[:1].at[0, 1].set(0), pixels[:1, ::-1].at[0, 1].set(0)
  found, moved = loss(given, batches[0] | dict(pixels=pixels))
  pixels = pixels.at[0].set(shown[0][0]).at[1].set(shown[1][0])
  expected, gradients = loss(given, batches[1] | dict(pixels=pixels))
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  for (path, x), (_, y) in zip(
    tree.flatten_paths(moved), tree.flatten_paths(gradients), strict=True
  ):
    atol = 1e-5 + 1e-4 * np.abs(y).max()
    np.testing.assert_allclose(x, y, rtol=0, atol=atol, err_msg=path)
  pooled = batches[0] | dict(pixels=pixels[:1])
  with pytest.raises(UserError, match="views that 2 rows share"):
    WithImages(model)(given, pooled, None)


class Language:
  """A source of the bare model."""

  def load(self, shardings=None):
    del shardings
    return Loaded(BARE, support.params(BARE), None, {})


@pytest.mark.slow
def test_a_run_file_assembles_one_from_a_pretrained_language_model():
  base = support_vlm.model()
  loaded = source.Assembled(
    language=source.Interleaved(
      language=Language(), layer=LAYER, every=2, first=1
    ),
    vision=base.vision,
    connector=PerceiverResampler(WIDTH, queries=LATENTS, depth=1),
    image_token=IMAGE,
    preprocessor=support_vlm.PREPROCESSOR,
    placement=cross_attention.LatestImage(),
  ).load()
  assert loaded.model.language == MODEL
  assert loaded.model.placement == cross_attention.LatestImage()
  language = loaded.params["language"]
  chex.assert_trees_all_equal(without_layers(language), support.params(BARE))
  assert not language["run0"]["layer1"]["cross"]["attention_gate"].any()


def test_every_new_parameter_has_a_sharding_rule():
  for path, _ in tree.flatten_paths(params()):
    assert sharding.logical_axes(path) is not None, path
  assert sharding.head_counts(MODEL) == {"heads": 2, "kv_heads": 2}


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(token=67), "image_token: found 67"),
    (dict(model=BARE), "without cross-attention"),
  ],
)
def test_what_cannot_be_bound_is_refused(change, message):
  given = dict(model=MODEL, params=params(), media=media(), sizes=SIZES)
  with pytest.raises(UserError, match=message):
    cross_attention.with_media(**given | dict(token=IMAGE) | change)


def test_unknown_tokens_are_refused():
  bound = cross_attention.with_media(MODEL, params(), media(), SIZES, IMAGE)
  with pytest.raises(UserError, match="weights.with_tokens"):
    MODEL.apply({"params": bound}, TOKENS)
  with pytest.raises(UserError, match="every 2 and first 2"):
    cross_attention.interleave(BARE, LAYER, every=2, first=2)
