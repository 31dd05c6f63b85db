"""Contrastive losses: golden values, equal captions, padding, chunks."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.sharding import Layout
from research.vlm.contrastive import Contrastive, losses, sigmoid, softmax


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(count, size):
  rng = np.random.default_rng(0)
  images, texts = rng.normal(size=(count, size)), rng.normal(size=(count, size))
  return tuple(jnp.asarray(unit(x), jnp.float32) for x in (images, texts))


# Computed in fp64 by the papers' formulas.
def test_golden_values():
  images, texts = vectors(8, 16)
  found = [
    losses.siglip_loss(images, texts, jnp.float32(10), jnp.float32(-10)),
    losses.clip_loss(images, texts, jnp.float32(1 / 0.07)),
    losses.clip_loss(images, texts, jnp.float32(1)),
  ]
  expected = [9.932704082135789, 4.39914970725938, 2.0790687393228606]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def losses_of(images, texts, ids):
  args = images, texts, jnp.float32(10)
  return jnp.stack(
    [
      losses.clip_loss(*args, ids),
      losses.siglip_loss(*args, jnp.float32(-3), ids),
    ]
  )


def test_padded_rows_change_nothing():
  images, texts = vectors(8, 16)
  ids = jnp.arange(6)
  expected = losses_of(images[:6], texts[:6], ids)
  found = losses_of(images, texts, jnp.append(ids, jnp.array([-1, -1])))
  chex.assert_trees_all_close(found, expected, rtol=1e-6)


def test_equal_captions_are_no_negatives():
  """By hand, in fp64: captions 0 and 1 are one text."""
  images, texts = vectors(3, 4)
  texts = texts.at[1].set(texts[0])
  ids = jnp.array([0, 0, 2])
  products = 10 * np.asarray(images, np.float64) @ np.asarray(texts).T
  yes = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]], bool)
  signed = np.where(yes, products - 3, -(products - 3))
  siglip = np.log1p(np.exp(-signed)).sum() / 3

  def cross_entropy(x):
    log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return -(log_p * yes / yes.sum(-1, keepdims=True)).sum() / 3

  clip = (cross_entropy(products) + cross_entropy(products.T)) / 2
  np.testing.assert_allclose(
    losses_of(images, texts, ids), [clip, siglip], rtol=1e-5
  )


ROWS = 88
LAYOUTS = {
  "data": (Layout(data=8), 8),
  "mixed": (Layout(data=2, fsdp=2, tensor=2), 4),
}


def shared_captions():
  """Returns ids with equal captions near and far, and padding.

  The last device of eight has only padding.
  """
  ids = np.arange(ROWS)
  ids[[1, 40]], ids[70] = 0, 69
  ids[-12:] = -1
  return jnp.asarray(ids)


def largest_array(program):
  """Returns the elements of a compiled program's largest array."""
  shapes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", program.as_text())
  return max(math.prod(map(int, x.split(","))) for x in shapes)


@pytest.mark.parametrize("layout, devices", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("loss", [sigmoid, softmax])
def test_chunks_on_devices_are_the_dense_loss(loss, layout, devices):
  """Loss, accuracy and gradients, without all products on any device."""
  images, texts = vectors(ROWS, 4)
  # Some images lie near their texts, so that there is something to count.
  images = images.at[::3].set(texts[::3])
  args = images, texts, jnp.float32(math.log(10)), jnp.float32(-10)
  ids = shared_captions()

  def compare(images, texts, scale, bias):
    chunked = Contrastive(loss=loss)
    return chunked.compare(images, texts, jnp.exp(scale), bias, ids)

  step = jax.value_and_grad(compare, argnums=(0, 1, 2, 3), has_aux=True)
  expected = jax.jit(step)(*args)
  assert 76 / 3 <= expected[0][1] < 76
  mesh = layout.mesh()
  with jax.set_mesh(mesh):
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(args, (rows, rows, whole, whole))
    program = jax.jit(step).lower(*placed).compile()
  # Sums of 88 x 88 terms in another order.
  chex.assert_trees_all_close(program(*placed), expected, rtol=1e-5, atol=1e-6)
  own = ROWS // devices
  if loss is sigmoid:
    assert own**2 <= largest_array(program) < own * ROWS
  else:
    assert own * ROWS <= largest_array(program) < ROWS**2


@pytest.mark.parametrize("scale, expected", [(3.0, 3.0), (9.0, math.log(100))])
def test_the_scale_is_clipped(scale, expected):
  found = losses.clipped_scale(jnp.float32(scale))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
