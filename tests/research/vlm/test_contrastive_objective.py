"""The contrastive objective: its batch, its gradient, and what it refuses."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import sharding, training, tree
from research.training import global_batch
from research.typing import UserError
from research.vlm.contrastive import Contrastive, DualEncoder, sigmoid, softmax
from research.vlm.encoders import (
  EncoderSizes,
  clip,
  clip_text,
  siglip,
  siglip_text,
)
from tests import support_hlo, support_vlm

SIZES = EncoderSizes(width=16, depth=1, heads=2, hidden=20, patch=4, grid=4)
SIGLIP = DualEncoder(
  image=siglip(SIZES, head=True),
  text=siglip_text(SIZES, vocab=30, length=5),
  scale=10.0,
  bias=-2.71,
)
CLIP = DualEncoder(
  image=clip(SIZES, size=12),
  text=clip_text(SIZES, vocab=30, length=5, size=12),
)
CAPTIONS = np.array([[3, 4, 2, 0, 0], [5, 6, 7, 2, 0], [3, 4, 2, 0, 0]])
IDS = np.array([0, 1, 0])
BATCH = {
  "pixels": jnp.asarray(support_vlm.pixels(3, 1)),
  "captions": jnp.asarray(CAPTIONS, jnp.int32),
  "ids": jnp.asarray(IDS, jnp.int32),
}


def params_of(model):
  patches, at = jnp.zeros((1, 1, 48)), jnp.zeros((1, 1, 2), jnp.int32)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), patches, at, BATCH["captions"][:1])
  )["params"]
  rng = np.random.default_rng(0)
  return tree.map_paths(
    lambda path, x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    shapes,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  "model, loss", [(SIGLIP, sigmoid), (CLIP, softmax)], ids=["siglip", "clip"]
)
def test_a_step_learns_the_pairs_and_padding_changes_nothing(model, loss):
  objective = Contrastive(model, loss=loss)
  params, optimizer = params_of(model), optax.adam(1e-2)

  @jax.jit
  def of(params, batch):
    return objective(params, batch, None)

  total, weight, metrics = of(params, BATCH)
  padded = {k: jnp.concatenate([v, v[:1]]) for k, v in BATCH.items()}
  padded["ids"] = padded["ids"].at[3].set(-1)
  again, same, hits = of(params, padded)
  np.testing.assert_allclose((again, same), (total, weight), rtol=1e-5)
  assert weight == 3 and hits["accuracy"] == metrics["accuracy"]

  state = training.create(params, ".", optimizer)
  step = jax.jit(training.make_train_step(objective, optimizer))
  for _ in range(30):
    state, last = step(state, BATCH, jax.random.key(0))
  assert last["loss"] < 0.7 * total / weight
  for path, x in tree.flatten_paths(state.opt_state[0].mu):
    assert np.abs(x).max() > 0 or "bias" in path, path


@pytest.mark.parametrize(
  "model, loss",
  [
    (SIGLIP, sigmoid),
    pytest.param(CLIP, softmax, marks=pytest.mark.slow),
  ],
  ids=["siglip", "clip"],
)
def test_a_step_on_a_mesh_is_that_of_one_device(model, loss):
  """In chunks, without any setting; one row is padding, two are equal."""
  objective, params = Contrastive(model, loss=loss), params_of(model)
  batch = {k: jnp.concatenate([v, v[:1]]) for k, v in BATCH.items()}
  batch["ids"] = batch["ids"].at[3].set(-1)
  # An update without momentum shows the gradients themselves.
  optimizer = optax.sgd(1.0)
  state = training.create(params, ".", optimizer)
  step = training.make_train_step(objective, optimizer)
  key = jax.random.key(0)
  expected = jax.jit(step)(state, batch, key)
  layout = sharding.Layout(data=2, fsdp=2)
  mesh = layout.mesh()
  with jax.set_mesh(mesh):
    counts = sharding.head_counts(model)
    where = layout.shardings(state, mesh, counts), layout.batch(mesh)
    placed = (
      jax.device_put(state, where[0]),
      global_batch.to_global(batch, where[1]),
      key,
    )
    program = jax.jit(step).lower(*placed).compile()
    found = program(*placed)
  # Sums in another order, in gradients of up to about 10.
  chex.assert_trees_all_close(
    jax.device_get((found[0].trainable, found[1])),
    jax.device_get((expected[0].trainable, expected[1])),
    rtol=1e-4,
    atol=1e-5,
  )
  assert counts == {"heads": 2, "kv_heads": 2}
  kinds = {x.kind for x in support_hlo.collectives(program.as_text(), mesh)}
  if loss is sigmoid:
    assert "collective-permute" in kinds  # the ring


class AnyLoss(Contrastive):
  """The objective, but for its loss."""

  def __call__(self, params, batch, key):
    return sum(x.sum() for x in jax.tree.leaves(params)), jnp.ones(()), {}


def test_a_step_cannot_pass_clips_limit_of_the_scale():
  """Whatever the optimizer does: this one adds 5 to all parameters."""
  params = {"logit_scale": jnp.float32(4), "image": {"norm": jnp.ones(3)}}
  more = optax.stateless(
    lambda updates, _: jax.tree.map(lambda x: jnp.full_like(x, 5), updates)
  )
  state = training.create(params, ".", more)
  step = jax.jit(training.make_train_step(AnyLoss(CLIP), more))
  state, _ = step(state, BATCH, jax.random.key(0))
  scale = state.params["logit_scale"]
  np.testing.assert_allclose(scale, np.log(100), rtol=1e-6)
  # Other parameters have no limit.
  np.testing.assert_array_equal(state.params["image"]["norm"], 6)


def test_siglips_scale_has_no_limit():
  params = {"logit_scale": jnp.float32(9), "logit_bias": jnp.float32(-10)}
  assert Contrastive(SIGLIP).constrain(params) == params


@pytest.mark.parametrize("height, width", [(8, 16), (32, 32)])
def test_views_of_another_grid_than_the_positions_are_refused(height, width):
  pixels = jnp.zeros((3, 1, height, width, 3), jnp.uint8)
  words = f"found views of {height // 4} x {width // 4} patches"
  with pytest.raises(UserError, match=words):
    Contrastive(SIGLIP)({}, BATCH | {"pixels": pixels}, None)


def test_microbatches_are_refused():
  with pytest.raises(UserError, match="accumulate: found 2 microbatches"):
    training.make_train_step(Contrastive(CLIP), optax.sgd(0.1), accumulate=2)
