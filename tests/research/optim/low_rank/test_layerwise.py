"""Layer-wise GaLore is GaLore, in less memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import sharding, tree, weights
from research.optim.low_rank import (
  galore,
  int8_weights,
  layerwise,
  projectors,
  subspace,
)
from research.quant import quantize
from research.quant.formats.affine import Affine
from research.training import loop, state, step
from research.training.objectives import objective
from research.typing import UserError
from tests import support


def batch(rows=4, length=12):
  tokens = support.tokens(rows, length)
  places = jnp.broadcast_to(jnp.arange(length), tokens.shape)
  ones = jnp.ones(tokens.shape, jnp.float32)
  return dict(
    tokens=tokens,
    targets=jnp.roll(tokens, -1, 1),
    segments=jnp.zeros_like(tokens),
    positions=places,
    weights=ones.at[0, :5].set(0),
  )


def follow(model, tx, parts=1, steps=4, start=None, rows=None):
  """Returns the last state, and each step's metrics."""
  params = support.params(model) if start is None else start
  held = state.create(params, ".", tx)
  loss = objective.NextToken(model)
  update = jax.jit(step.make_train_step(loss, tx, parts), donate_argnums=0)
  found = []
  rows = batch() if rows is None else rows
  for _ in range(steps):
    held, metrics = update(held, rows, jax.random.key(0))
    found.append(metrics)
  return held, found


@pytest.mark.slow
@pytest.mark.parametrize("family, parts", [("llama", 1), ("mixtral", 2)])
def test_it_is_galore(family, parts):
  """Two projectors of exact singular vectors, decay, and a bound if cut up."""
  model = support.model(family)
  projection = subspace.Projection(rank=4, every=3)
  clip = 1.0 if parts > 1 else None
  ends = [
    follow(model, make(0.01, projection, weight_decay=0.1, clip=clip), parts)
    for make in (galore.galore, layerwise.galore)
  ]
  (plain, metrics), (mine, others) = ends
  chex.assert_trees_all_close(mine.trainable, plain.trainable, atol=2e-5)
  metrics, others = metrics[-1], others[-1]
  np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-5)
  inner, want = mine.opt_state.inner, plain.opt_state[0].inner
  chex.assert_trees_all_close(inner, want, atol=2e-5, rtol=1e-3)
  moved = jax.tree.map(
    lambda x, y: float(jnp.abs(x - y).max()),
    mine.trainable,
    support.params(model),
  )
  # Clipped or not, Adam's first steps are as long as the rate.
  assert min(jax.tree.leaves(moved)) > 1e-3
  if parts > 1:
    np.testing.assert_allclose(
      others["grad_norm"], metrics["grad_norm"], rtol=1e-4
    )


@pytest.mark.slow
def test_a_masked_microbatch_makes_no_projector():
  """It counts as little as if its rows were not there."""
  tx = layerwise.galore(
    0.01, subspace.Projection(rank=4), pace=projectors.Lazy(), clip=1.0
  )
  whole = batch()
  masked = dict(whole, weights=whole["weights"].at[:2].set(0))
  rest = {name: x[2:] for name, x in whole.items()}
  model = support.model("llama")
  found, _ = follow(model, tx, 2, 2, rows=masked)
  want, _ = follow(model, tx, 1, 2, rows=rest)
  chex.assert_trees_all_close(found.trainable, want.trainable, atol=2e-5)
  chex.assert_trees_all_close(
    found.opt_state.pace, want.opt_state.pace, atol=1e-3
  )


def temporary(tx):
  """Returns a step's temporary memory over that of the layers' matrices."""
  model = support.model("llama", width=128, hidden=256, head_dim=32, depth=8)
  shapes = support.shapes(model)

  def begin():
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    return state.create(params, ".", tx)

  update = step.make_train_step(objective.NextToken(model), tx)
  program = jax.jit(update, donate_argnums=0)
  small = jax.eval_shape(lambda: batch(1, 8))
  lowered = program.lower(jax.eval_shape(begin), small, jax.random.key(0))
  used = lowered.compile().memory_analysis().temp_size_in_bytes
  return used / tree.nbytes(shapes["run0"])


@pytest.mark.slow
def test_no_gradient_of_the_stack_is_made():
  projection = subspace.Projection(rank=4, basis=subspace.Power())
  makes = (galore.galore, layerwise.galore)
  plain, mine = (temporary(make(0.01, projection)) for make in makes)
  # A whole gradient there; here one of an eighth of the stack, R, projectors,
  # and what activations and the embedding take in both.
  assert plain > 1.2 and mine < plain - 0.8, (plain, mine)


@pytest.mark.slow
def test_weights_in_eight_bits_learn():
  """Q-GaLore in a model: its loss falls about as that of whole weights."""
  model = support.model("llama")
  packed = int8_weights.Pack(group=16)(support.params(model))
  projection = subspace.Projection(rank=8, every=5)
  fields = dict(storage=projectors.Int4(group=16), pace=projectors.Lazy(last=2))
  losses = []
  for start, more in ((None, {}), (packed, fields)):
    tx = layerwise.galore(0.02, projection, **more)
    held, metrics = follow(model, tx, steps=12, start=start)
    losses.append([float(x["loss"]) for x in (metrics[0], metrics[-1])])
  (first, last), (begun, ended) = losses
  assert last < 0.8 * first
  np.testing.assert_allclose(begun, first, rtol=0.02)
  assert first - 1.2 * (first - last) < ended < first - 0.8 * (first - last)
  q = held.trainable["run0"]["layer0"]["attention"]["q"]
  assert isinstance(q, int8_weights.Int8Tensor)
  changed = packed["run0"]["layer0"]["attention"]["q"].codes != q.codes
  assert float(changed.mean()) > 0.1


@pytest.mark.slow
def test_meshes_agree():
  model = support.model("llama")
  tx = layerwise.galore(0.01, subspace.Projection(rank=4, every=1))
  layout = sharding.Layout(data=1, fsdp=4, tensor=2)
  mesh = layout.mesh()
  start = state.create(support.params(model), ".", tx)
  where = layout.shardings(start, mesh, sharding.head_counts(model))
  update = step.make_train_step(objective.NextToken(model), tx)
  key, data = jax.random.key(0), batch(8)
  with jax.set_mesh(mesh):
    placed = jax.device_put(start, where)
    held = jax.device_put(data, layout.batch(mesh))
    cut = jax.jit(update)(placed, held, key)[0].trainable
  want = jax.jit(update)(start, data, key)[0].trainable
  chex.assert_trees_all_close(jax.device_get(cut), want, atol=1e-4)


class Views:
  """Squares of a stack's product with each of some views, and of `more`."""

  def __init__(self, views, more=lambda params: 0.0):
    self.views, self.more = views, more

  def __call__(self, params, batch, key):
    del key

    def view(total, x):
      def layer(x, w):
        return weights.einsum("...d,df->...f", x, w), None

      y, _ = jax.lax.scan(layer, x, params["run0"]["layer0"]["up"])
      return total + (y**2).sum(), None

    x = batch["x"] + jnp.arange(self.views)[:, None, None]
    total, _ = jax.lax.scan(view, self.more(params), x)
    return total, jnp.float32(len(batch["x"])), {}


def squares(params):
  return (weights.dense(params["embed"]) ** 2).sum()


@pytest.mark.parametrize(
  "loss, misread",
  [
    (Views(1, squares), 0),
    # Two layers are read by each view, one embedding twice or not at all.
    (Views(2, squares), 2),
    (Views(1, lambda params: squares(params) + squares(params)), 1),
    (Views(1), 1),
    (Views(0), 3),
  ],
)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.cover(1)
def test_what_is_not_read_once_is_refused(loss, misread, parts):
  tx = layerwise.galore(0.1, subspace.Projection(rank=2), matrices="up|embed")
  params = {"run0": {"layer0": {"up": jnp.ones((2, 4, 4))}}}
  params["embed"] = jnp.ones((8, 4))
  update = jax.jit(step.make_train_step(loss, tx, parts))
  held = state.create(params, ".", tx)
  _, metrics = update(held, {"x": jnp.ones((6, 4))}, jax.random.key(0))
  assert float(metrics["misread"]) == misread
  assert bool(jnp.isnan(metrics["loss"])) == (misread > 0)
  assert float(metrics["nonfinite"]) == (misread > 0)


def test_the_trainer_says_what_was_read_twice(tmp_path):
  tx = layerwise.galore(0.1, subspace.Projection(rank=2), matrices="up")
  params = {"run0": {"layer0": {"up": jnp.ones((2, 4, 4))}}}
  data = [{"x": np.ones((6, 4), "f4"), "weights": np.ones((6, 1), "f4")}] * 4
  with pytest.raises(UserError) as e:
    plan, start = loop.TrainConfig(steps=2), state.create(params, ".", tx)
    loop.fit(Views(2), tx, start, data, plan, workdir=tmp_path)
  said = "train/loss is nan at step 1: of the projected matrices 2 were not"
  assert said in str(e.value)


def test_codes_are_trained_layer_by_layer_alone():
  params = {"run0": {"layer0": {"up": jnp.ones((1, 2, 2))}}}
  params["embed"] = jnp.ones((2, 2))
  packed = int8_weights.Pack(matrices="up|embed", group=4)(params)
  up, embed = (
    layerwise.galore(0.1, subspace.Projection(rank=1), matrices=name)
    for name in ("up", "embed")
  )
  # Of another optimizer codes would be numbers.
  with pytest.raises(UserError, match="trainable: .*/up/codes of type uint8"):
    state.create(packed, "run0", optax.sgd(0.1))
  with pytest.raises(UserError, match="transformed: .*/up/codes of type uint8"):
    state.create(packed, "embed", embed, transformed="run0")
  with pytest.raises(UserError, match="'up' does not match embed, a trainable"):
    state.create(packed, ".", up)
  # Those of a format that is not trained have no moves, either.
  frozen = quantize.Quantize(format=Affine(block=2))(params)
  with pytest.raises(UserError, match="trainable: .*/up/.*codes of type uint8"):
    state.create(frozen, "run0", up)


def test_bad_use():
  projection = subspace.Projection(rank=2)
  tx = layerwise.galore(0.1, projection, matrices="x")
  with pytest.raises(UserError, match="'x' matches no matrix among 1"):
    tx.init({"w": jnp.ones((2, 2))})
  params = {"run0": {"layer0": {"up": jnp.ones((1, 2, 2))}}}
  tx = layerwise.galore(0.1, projection, matrices="up")
  held = tx.init(params)
  with pytest.raises(UserError, match="found gradients of all layers"):
    tx.update(params, held, params)
  packed = int8_weights.Pack(matrices="up", group=4)(params)
  with pytest.raises(UserError, match="average: weights in codes have no"):
    state.create(packed, ".", tx, average=True)
  with pytest.raises(UserError, match="'up' matches up/codes of type uint8"):
    # A rewrite does not store anew.
    codes = {"up": {"codes": jnp.ones(3, jnp.uint8)}}
    state.create(codes, "up", optax.identity())
