"""Tests that AdaLoRA's allocator keeps the terms that PEFT's keeps."""

import dataclasses
import functools
import json
import pathlib
import zlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.lora import allocate, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.method import MatrixSpec
from research.lora.methods.adalora import AdaLoRA
from research.typing import UserError
from tests import support

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "allocator.json"
RANK, STEPS = 4, 12
SIZES = {"one": (5, 4), "two": (4, 3)}
BUDGET = allocate.Budget(target=2, steps=STEPS, warmup=2, final=3, every=2)


def drawn(step):
  """Returns values (step -1) or gradients, as tests/golden drew them."""

  def one(matrix, array):
    size_in, size_out = SIZES[matrix]
    shape = dict(a=(RANK, size_in), b=(RANK, size_out), e=(RANK,))[array]
    seed = zlib.crc32(f"{matrix}/{array}/{step}".encode())
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(x, jnp.float32)

  return {
    matrix: {"trained": {array: one(matrix, array) for array in "abe"}}
    for matrix in SIZES
  }


def run(budget, steps=STEPS):
  """Returns all states of gradient descent: parameters and masks."""
  optimizer = allocate.adalora_optimizer(optax.sgd(0.1), budget)

  @jax.jit
  def step(params, state, grads):
    moves, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, moves), state

  params, out = drawn(-1), []
  state = optimizer.init(params)
  for i in range(steps):
    params, state = step(params, state, drawn(i))
    out.append((params, state))
  return out


def test_terms_are_those_that_peft_keeps():
  golden = json.loads(GOLDEN.read_text())
  got = np.array(
    [[p[m]["trained"]["e"] for m in SIZES] for p, _ in run(BUDGET)]
  )
  want = np.array(golden["e"])
  np.testing.assert_array_equal(got != 0, want != 0)
  # Twelve sums of numbers of size 1, each rounded.
  np.testing.assert_allclose(got, want, atol=12 * 2**-22)
  assert np.count_nonzero(want[-1]) == 4  # two a matrix
  params = {
    m: AdaptedTensor(
      jnp.zeros(SIZES[m]), x["trained"], method=AdaLoRA(rank=RANK)
    )
    for m, x in run(BUDGET)[-1][0].items()
  }
  off = jax.jit(allocate.orthogonality)(params)
  np.testing.assert_allclose(off, golden["regular"], rtol=1e-5)


@pytest.mark.parametrize("outside", [False, True])
def test_importance_is_of_the_gradient_that_the_wrapper_gets(outside):
  """PEFT's, of clipped gradients, if it is clipped before the wrapper."""
  clip, rate, norm = optax.clip_by_global_norm(0.5), optax.sgd(0.1), 0.5
  if outside:
    tx = optax.chain(clip, allocate.adalora_optimizer(rate, BUDGET))
  else:
    tx = allocate.adalora_optimizer(optax.chain(clip, rate), BUDGET)
  params, grads = drawn(-1), drawn(0)
  moves, state = tx.update(grads, tx.init(params), params)
  state = state[1] if outside else state
  new = optax.apply_updates(params, moves)
  share = norm / optax.tree.norm(grads)
  assert share < 0.5
  for path, p in tree.flatten_paths(new):
    g = dict(tree.flatten_paths(grads))[path]
    want = 0.15 * np.abs(p * g * (share if outside else 1.0))
    np.testing.assert_allclose(state.importance[path], want, rtol=1e-5)


def test_nothing_is_pruned_within_the_budget():
  """PEFT stops at such an allocation (its issue 2337)."""
  budget = allocate.Budget(target=RANK, steps=STEPS)
  for params, state in run(budget, 4):
    chex.assert_trees_all_equal(
      state.kept, jax.tree.map(jnp.ones_like, state.kept)
    )
    assert all((params[m]["trained"]["e"] != 0).all() for m in SIZES)


def test_budget_falls_by_a_cube():
  left = BUDGET.terms_at_steps(8, 2)
  assert left.tolist() == [8, 8, 8, 6, 5, 4, 4, 4, 4, 4]
  assert BUDGET.last_allocation == 9


def test_impossible_budgets_are_refused():
  with pytest.raises(UserError, match="some steps between"):
    allocate.Budget(target=2, steps=12, warmup=9, final=3)


def test_a_training_step_can_donate_the_first_state():
  """Training does: no buffer may be there twice."""
  state = allocate.adalora_optimizer(optax.sgd(0.1), BUDGET).init(drawn(-1))
  buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
  assert len({*buffers}) == len(buffers)


def test_other_adapters_are_refused():
  with pytest.raises(UserError, match="no AdaLoRA adapter"):
    allocate.adalora_optimizer(optax.sgd(0.1), BUDGET).init(
      {"q": {"a": jnp.ones(3)}}
    )
  with pytest.raises(UserError, match="no AdaLoRA adapter"):
    allocate.orthogonality({"q": jnp.ones(3)})


def test_the_regulariser_has_the_batchs_weight():
  params = {
    "w": AdaptedTensor(
      jnp.zeros((5, 4)),
      drawn(-1)["one"]["trained"],
      method=AdaLoRA(rank=RANK),
    )
  }

  def inner(params, batch, key):
    return jnp.float32(3.0), jnp.float32(7.0), {}

  goal = allocate.Orthogonal(inner, weight=0.25)
  assert goal(params, {}, None)[0] == 3.0  # what is reported
  loss, weight, _ = goal(params, {}, jax.random.key(0))
  want = 3.0 + 0.25 * 7.0 * float(allocate.orthogonality(params))
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  assert weight == 7.0


def test_an_experiment_sets_the_objectives_model():
  seen, model = [], support.model(width=32, head_dim=8)

  @dataclasses.dataclass(frozen=True)
  class Inner:
    model: Any = None

    def __call__(self, params, batch, key):
      seen.append(self.model)
      return jnp.float32(0.0), jnp.float32(1.0), {}

  goal = dataclasses.replace(allocate.Orthogonal(Inner()), model=model)
  w = AdaptedTensor(
    jnp.zeros((5, 4)), drawn(-1)["one"]["trained"], method=AdaLoRA(rank=RANK)
  )
  goal({"w": w}, {}, None)
  assert seen == [model]


DEPTH, SIDE = 4, 16


def through(layers, x):
  for name in sorted(layers):
    x = x + jnp.tanh(weights.einsum("td,df->tf", x, layers[name]))
  return x


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, 0, 0))
def terms_left(layers, x, y):
  """Returns the number of terms per layer after 300 steps towards `y`."""
  learned, frozen = tree.partition(layers, wrap.TRAINABLE)
  budget = allocate.Budget(target=2, steps=300, warmup=100, final=100)
  tx = allocate.adalora_optimizer(optax.adam(1e-2), budget)

  def loss(learned):
    whole = tree.combine(learned, frozen)
    error = jnp.mean(jnp.square(through(whole, x) - y))
    return error + 0.1 * allocate.orthogonality(whole)

  def one(carry, _):
    learned, state = carry
    moves, state = tx.update(jax.grad(loss)(learned), state, learned)
    return (optax.apply_updates(learned, moves), state), None

  begin = learned, tx.init(learned)
  (learned, _), _ = jax.lax.scan(one, begin, length=budget.steps)
  found = tree.combine(learned, frozen)
  return [jnp.count_nonzero(found[name].trained["e"]) for name in sorted(found)]


@functools.cache
def base_layers():
  rng = np.random.default_rng(0)
  draws = rng.standard_normal((DEPTH, SIDE, SIDE))
  return {
    str(i): jnp.asarray(1.5 * np.linalg.qr(x)[0], jnp.float32)
    for i, x in enumerate(draws)
  }


@pytest.mark.slow
def test_terms_gather_in_the_layer_whose_target_was_planted():
  """A change of rank 4 in one of four layers, with 8 terms for all of them.

  Twice in each layer. In seven of these eight it has more terms than any other,
  and 3.6 on average, where an even share is 2.
  """
  method, layers = AdaLoRA(rank=6, alpha=6.0), {}
  for name, w in base_layers().items():
    key = jax.random.key(int(name))
    trained, _ = method.init_arrays(key, MatrixSpec(SIDE, SIDE), w)
    layers[name] = AdaptedTensor(w, trained, method=method)
  planted = np.arange(2 * DEPTH) % DEPTH
  xs, ys = [], []
  for seed, place in enumerate(map(str, planted)):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((256, SIDE)), jnp.float32)
    one, other = rng.standard_normal((2, SIDE, 4))
    change = jnp.float32(one @ other.T / SIDE)
    goal = base_layers() | {place: base_layers()[place] + change}
    xs.append(x)
    ys.append(through(goal, x))
  left = np.stack(terms_left(layers, jnp.stack(xs), jnp.stack(ys)), 1)
  own = left[np.arange(len(left)), planted]
  assert (left.sum(1) == 8).all()
  assert ((left >= own[:, None]).sum(1) == 1).sum() >= 6, left
  assert own.mean() >= 3, left
