"""Contrastive losses: golden values, equal captions, padding, and the ring."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from research.vlm.contrastive import losses


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


def test_the_ring_is_the_dense_loss():
  images, texts = vectors(64, 16)
  ids = jnp.arange(64).at[-3:].set(-1)
  scale, bias = jnp.float32(math.log(10)), jnp.float32(-10)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  cut, whole = PartitionSpec("data"), PartitionSpec()

  def dense(images, texts, scale, bias):
    return losses.siglip_loss(images, texts, jnp.exp(scale), bias, ids)

  def ring(images, texts, scale, bias):
    loss = functools.partial(losses.siglip_ring_loss, axes="data")
    return jax.shard_map(
      loss,
      mesh=mesh,
      in_specs=(cut, cut, whole, whole, cut),
      out_specs=whole,
    )(images, texts, jnp.exp(scale), bias, ids)

  found, expected = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(
      images, texts, scale, bias
    )
    for f in (ring, dense)
  )
  # Sums of 64 x 64 terms in another order.
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale, expected", [(3.0, 3.0), (9.0, math.log(100))])
def test_the_scale_is_clipped(scale, expected):
  found = losses.clipped_scale(jnp.float32(scale))
  np.testing.assert_allclose(found, expected, rtol=1e-6)
