"""Attention weights: values weighted by them are what the kernels return."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research import tree, weights
from research.typing import UserError
from research.vlm import attention_maps, data, splice
from research.vlm.images.plan import Plan
from research.vlm.masks import BidirectionalImages
from tests import support, support_qwen, support_vlm


@functools.partial(jax.jit, static_argnums=(0, 3))
def _both(model, params, tokens, layer, mask, found):
  """Returns a layer's attention: the kernels', and values weighted by these."""
  x = weights.take(params["embed"], tokens)
  x = x * jnp.asarray(model.embed_scale, x.dtype)
  positions = jnp.arange(x.shape[1])[None]
  blocks = list(zip(model.layer_kinds(), tree.layers(params), strict=True))
  for block, own in blocks[:layer]:
    rotation = block.attention.rope.tables(positions, block.attention.head_dim)
    x, *_ = block.apply({"params": own}, x, positions, mask, rotation)
  block, own = blocks[layer]
  a, matrices = block.attention, {"params": own["attention"]}
  normed = block.norm.apply({"params": own["attention_norm"]}, x)
  rotation = a.rope.tables(positions, a.head_dim)
  want, _ = a.apply(matrices, normed, positions, mask, rotation)
  _, _, v = a.apply(matrices, normed, rotation, method="heads_of")
  v = jnp.repeat(v, a.heads // a.kv_heads, axis=2)
  y = jnp.einsum("bnts,bsnh->btnh", found, v).reshape(*x.shape[:2], -1)
  return want, y @ own["attention"]["o"]


def test_weighted_values_are_the_layers_attention():
  """Gemma 2's, behind an image: windowed, capped, and heads share keys."""
  model = support.model("gemma2")
  soft = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)
  params = splice.with_features(support.params(model), jnp.asarray(soft), 60)
  tokens, layer, mask = jnp.asarray([[*[60] * 4, 5, 6, 7, 8]]), 2, Mask.causal()
  found = attention_maps.attention_weights(model, params, tokens, layer)
  want, got = _both(model, params, tokens, layer, mask, found)
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
  a = model.layer_kinds()[layer].attention
  assert a.softcap and a.window < 8
  seen = np.asarray(Mask.causal((a.window - 1, None)).visible(8, 8))
  assert ((np.asarray(found) > 0) == seen[:, None]).all()


@pytest.mark.parametrize("images", ["as_masked", "causal"])
def test_a_layer_s_own_view_of_images(images):
  """Images are read both ways, in Gemma 4 by its local layers alone."""
  model = support.model("gemma2")
  stack = model.stack
  blocks = [
    x.clone(attention=x.attention.clone(images=images)) for x in stack.blocks
  ]
  model = model.clone(stack=dataclasses.replace(stack, blocks=tuple(blocks)))
  soft = np.random.default_rng(0).normal(size=(1, 4, 32)).astype(np.float32)
  params = splice.with_features(support.params(model), jnp.asarray(soft), 60)
  tokens = jnp.asarray([[5, *[60] * 4, 6, 7, 8]])
  mask = BidirectionalImages(image_token=60)(tokens, jnp.array([8]))
  given = model, params, tokens, 1, mask
  found = attention_maps.attention_weights(*given)
  want, got = _both(*given, found)
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)
  later = np.triu(np.ones((8, 8), bool), 1)
  assert (np.asarray(found)[0, :, later] > 0).any() == (images == "as_masked")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_images_that_turn_and_are_added_deeper(name, tmp_path):
  """The last layer's attention, by the model with and without its output:
  tokens have rows and columns, and Qwen3-VL's images reach deeper layers."""
  model, params = support_qwen.opened(name, tmp_path)
  images = data.batch_images(support_qwen.prompts(model, name)[:1], 2)
  seeing = model.with_images_compiled(params, images)
  tokens = jnp.asarray(support_qwen.rows(name)[:1])
  language, last = model.language, len(model.language.layer_kinds()) - 1
  found = attention_maps.attention_weights(language, seeing, tokens, last)
  whole = tree.split_last_layer(weights.with_tokens(seeing, tokens))
  run = tree.runs(whole)[-1]
  own = whole[run]["layer0"]
  attention = {**own["attention"], "o": jnp.zeros_like(own["attention"]["o"])}
  without = {**whole, run: {"layer0": {**own, "attention": attention}}}

  def before(params):
    given = {"params": params}, tokens
    return language.apply(*given, method="before_feed_forward")

  x = before(without)
  block, own = language.layer_kinds()[last], list(tree.layers(whole))[last]
  normed = block.norm.apply({"params": own["attention_norm"]}, x)
  a = block.attention
  *_, v = a.apply({"params": own["attention"]}, normed, method="heads_of")
  v = jnp.repeat(v, a.heads // a.kv_heads, axis=2)
  y = jnp.einsum("bnts,bsnh->btnh", found, v).reshape(*x.shape[:2], -1)
  np.testing.assert_allclose(
    y @ own["attention"]["o"], before(whole) - x, rtol=1e-3, atol=1e-4
  )


def test_weights_lie_on_the_images_grids():
  """Two images: one of two grids, and one whose rows have learned ends."""

  def plan(grids, row_ends=0):
    return Plan(
      size=(8, 8), content=(8, 8), canvas=(8, 8), rows=0, columns=0,
      views=len(grids), view=(8, 8), patches=(2, 2), grids=grids,
      row_ends=row_ends,
    )  # fmt: skip

  plans = [plan(((2, 3), (1, 2))), plan(((1, 1), (2, 2)), row_ends=2)]
  tokens = np.array([9, *[7] * 8, 9, 9, *[7] * 7, 9])
  row = np.arange(len(tokens), dtype=np.float32)
  first, second = attention_maps.over_images(row, tokens, 7, plans)
  np.testing.assert_array_equal(first[0], [[1, 2, 3], [4, 5, 6]])
  np.testing.assert_array_equal(first[1], [[7, 8]])
  np.testing.assert_array_equal(second[0], [[11]])
  np.testing.assert_array_equal(second[1], [[12, 13], [15, 16]])
  with pytest.raises(UserError, match="found 15 placeholders, expected 8"):
    attention_maps.over_images(row, tokens, 7, plans[:1])


def test_a_layer_that_is_not_there():
  model, params = support_vlm.model(), support_vlm.params()
  with pytest.raises(UserError, match="layer 3, expected one of 3"):
    attention_maps.attention_weights(
      model.language, params["language"], jnp.zeros((1, 2), jnp.int32), 3
    )
