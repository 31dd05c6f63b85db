"""Tests ReLoRA: the authors' schedule, exact merges and resets."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.lora import allocate, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.c3a import C3A
from research.lora.methods.dora import DoRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.kasa import KaSA
from research.lora.methods.lora import LoRA
from research.lora.methods.svd_init import PiSSA
from research.lora.optim import relora
from research.optim import adam8bit, optim, schedule_free
from research.training import loop, state
from research.typing import UserError
from tests.research.lora.methods import test_methods as methods
from tests.support_lora import lora

RANK, IN, OUT = 2, 12, 10


def authors(step, total, warmup, every, rewarm, least):
  """The rate over its peak; Guitaricet/relora, training_utils.py."""
  if step < warmup:
    return step / max(1, warmup)
  since, number = step % every, step // every

  def cosine(progress):
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

  if since < rewarm and step >= every:
    end = (number * every + rewarm - warmup) / max(1, total - warmup)
    return since / max(1, rewarm) * cosine(end)
  return cosine((step - warmup) / max(1, total - warmup))


def test_schedule_is_the_authors():
  rate = jax.jit(jax.vmap(relora.schedule(2.0, 60, 20, 8, 5, final=0.2)))
  got = rate(jnp.arange(60))
  want = [2 * authors(i, 60, 8, 20, 5, 0.2) for i in range(60)]
  np.testing.assert_allclose(got, want, atol=1e-6)
  assert got[0] == got[20] == got[40] == 0


@pytest.mark.parametrize(
  "every,warmup,rewarm", [(7, 1, 1), (10, 11, 1), (10, 1, 11)]
)
def test_schedules_that_do_not_fit_are_refused(every, warmup, rewarm):
  with pytest.raises(UserError, match="Expected `every` to divide the steps"):
    relora.schedule(1.0, 60, every, warmup, rewarm)


@dataclasses.dataclass(frozen=True)
class Matrix:
  """Least squares to a matrix of full rank, through any weight."""

  def __call__(self, params, batch, key):
    w = params["run0"]["layer0"]["q"]
    error = 0.0
    for layer in range(2):
      one = jax.tree.map(lambda x, n=layer: x[n], w)
      y = weights.einsum("...d,df->...f", batch["x"], one)
      error += ((y - batch["y"]) ** 2).sum()
    return error, jnp.float32(len(batch["x"])), {}


class Batches:
  def __iter__(self):
    rng = np.random.default_rng(0)
    want = rng.normal(size=(IN, OUT))
    while True:
      x = rng.normal(size=(16, IN))
      yield {"x": np.float32(x), "y": np.float32(x @ want)}


def params(dtype=jnp.float32):
  rng = np.random.default_rng(1)
  w = jnp.asarray(rng.normal(size=(2, IN, OUT)), dtype)
  a = jnp.float32(rng.uniform(-1, 1, size=(2, RANK, IN)) / IN**0.5)
  q = lora(w, a, jnp.zeros((2, RANK, OUT)), scale=1.5)
  return {"run0": {"layer0": {"q": q}}, "bias": jnp.ones(3)}


def leaf(at):
  return at.params["run0"]["layer0"]["q"]


def fit(workdir, steps, restart, every=4, dtype=jnp.float32):
  tx = optim.adamw(relora.schedule(0.05, 12, every, 2, 1), clip=None)
  start = state.create(params(dtype), "/trained/", tx, transformed="/w$")
  plan = loop.TrainConfig(steps=steps)
  return loop.fit(
    Matrix(),
    tx,
    start,
    Batches(),
    plan,
    workdir=workdir,
    state_transforms=(restart,),
  ).state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  restart = relora.Restart(every=4, until=12)
  return fit(tmp_path_factory.mktemp("relora") / "whole", 12, restart)


@pytest.mark.slow
def test_rank_grows_with_every_restart(run):
  change = np.asarray(leaf(run).dense(), np.float64) - np.asarray(
    leaf(state_of(params())).w
  )
  for one in change:
    values = np.linalg.svd(one, compute_uv=False)
    # Two merges and what has been learned since: three times the rank; beyond
    # that rounding alone, 1e-7 of numbers of order 1.
    assert values[3 * RANK - 1] > 1e-3 > 1e-5 > values[3 * RANK]


def state_of(tree_):
  return state.create(tree_, "/trained/", optax.sgd(0.1), transformed="/w$")


def test_the_merged_base_is_in_the_checkpoint(run, tmp_path):
  """Three steps, then a merge after the fourth, by another process."""
  restart = relora.Restart(every=4, until=12)
  fit(tmp_path, 5, restart)
  with_base = fit(tmp_path, 5, restart)
  assert int(with_base.step) == 5
  moved = leaf(with_base).w != leaf(state_of(params())).w
  assert moved.mean() > 0.9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_restart_merges_and_reinitialises(dtype):
  tx = optim.adamw(0.1)
  start = state.create(params(dtype), "/trained/", tx, transformed="/w$")
  learned = jax.tree.map(lambda x: x + 0.25, start.trainable)
  opt_state = jax.tree.map(lambda x: x + 2, start.opt_state)
  at = dataclasses.replace(
    start, trainable=learned, opt_state=opt_state, step=jnp.int32(4)
  )
  restart = jax.jit(relora.Restart(every=4))
  after, _ = restart(at, {})
  base, p = leaf(at).w.astype(jnp.float32), leaf(at).trained
  want = base + 1.5 * jnp.swapaxes(p["a"], -1, -2) @ p["b"]
  # Exact but for the last rounding: eps / 2 of numbers up to 4.
  atol = 4 * float(jnp.finfo(dtype).eps)
  got = leaf(after)
  np.testing.assert_allclose(np.float32(got.dense()), want, atol=atol)
  assert got.w.dtype == dtype and not got.trained["b"].any()
  assert np.abs(got.trained["a"]).max() <= IN**-0.5
  assert got.trained["a"].std() > 0.4 * IN**-0.5
  assert (got.trained["a"][0] != got.trained["a"][1]).all()
  found = dict(tree.flatten_paths(after.opt_state))
  for path, x in found.items():
    assert (x == 0).all() == ("trained" in path), path
  assert after.frozen["bias"] is not None
  for number in (0, 3, 5):
    same, _ = restart(dataclasses.replace(at, step=jnp.int32(number)), {})
    chex.assert_trees_all_equal(same.trainable, at.trainable)
    chex.assert_trees_all_equal(same.transformed, at.transformed)


REFUSED = [
  m for m in methods.METHODS if type(m) in methods.SEEN or isinstance(m, KaSA)
]
RESTARTED = [m for m in methods.METHODS if m not in REFUSED]
HELD = "/w$|/fixed/"


FROM_BASE = [m for m in RESTARTED if isinstance(m, PiSSA | DoRA)]
"""Few methods whose new arrays depend on the base, trained and fixed ones."""


@pytest.mark.parametrize(
  "restarted",
  [
    FROM_BASE,
    *(
      pytest.param(RESTARTED[first::3], marks=pytest.mark.slow)
      for first in range(3)
    ),
  ],
  ids=["from base", "0", "1", "2"],
)
def test_a_restart_is_merged_and_changes_nothing(restarted):
  """Of every method: no array may depend on the old base."""
  before = {}
  for method in restarted:
    t = methods.moved(method)
    w = t.w + jnp.asarray(methods.waves(np.asarray(t.w)), jnp.float32)
    before[methods.label(method)] = dataclasses.replace(t, w=w)
  assert len(before) >= 3
  at = state.create(before, "/trained/", optax.sgd(0.1), transformed=HELD)

  @jax.jit
  def run(at):
    after = relora.Restart(every=3).restart(at, methods.KEY)
    return [
      {name: (t.w, weights.dense(t)) for name, t in x.params.items()}
      for x in (at, after)
    ]

  then, now = jax.device_get(run(at))
  for name, (w, want) in then.items():
    after, got = now[name]
    assert np.abs(want - w).max() > 1e-3, name
    methods.close(after, want)
    methods.close(got, want)


@pytest.mark.parametrize(
  "method",
  [*REFUSED, LoRA(rank=4, init="random"), C3A(block=4, init="xavier")],
  ids=methods.label,
)
def test_methods_that_cannot_restart_are_refused(method):
  t = methods.fresh(method, methods.base())
  at = state.create({"x": t}, "/trained/", optax.sgd(0.1), transformed=HELD)
  with pytest.raises(UserError, match="relora: x: "):
    relora.Restart(every=3).restart(at, methods.KEY)


def test_a_moving_average_restarts():
  """It averages adapters over the old base, which are all merged."""
  tx = optax.sgd(0.1)
  at = state.create(params(), "/trained/", tx, transformed="/w$", average=True)
  moved = jax.tree.map(lambda x: x + 0.25, at.trainable)
  at = dataclasses.replace(at, trainable=moved, ema=moved, step=jnp.int32(4))
  after, _ = jax.jit(relora.Restart(every=4))(at, {})
  chex.assert_trees_all_equal(after.ema, after.trainable)


def test_biases_that_are_scaled_are_merged():
  w = methods.draw(2, IN, OUT)
  b, l = methods.draw(2, OUT, seed=4), methods.draw(2, OUT, seed=5)
  tree_ = {"q": AdaptedTensor(w, {"l": l}, method=IA3()), "q_bias": b}
  at = state.create(
    tree_, "/trained/", optax.sgd(0.1), transformed="/w$|_bias$"
  )
  at = dataclasses.replace(at, step=jnp.int32(3))
  after, _ = jax.jit(relora.Restart(every=3))(at, {})
  want, got = (wrap.merge(x.params) for x in (at, after))
  chex.assert_trees_all_close(got, want, rtol=1e-6)
  chex.assert_trees_all_close(after.params["q_bias"], b * l, rtol=1e-6)
  untransformed = state.create(
    tree_, "/trained/", optax.sgd(0.1), transformed="/w$"
  )
  with pytest.raises(
    UserError, match="q_bias is neither trained nor transformed"
  ):
    relora.Restart(every=3).restart(untransformed, methods.KEY)


def test_until_and_after():
  tx = optax.sgd(0.1)
  start = state.create(params(), "/trained/", tx, transformed="/w$")
  learned = jax.tree.map(lambda x: x + 0.25, start.trainable)
  restart = jax.jit(relora.Restart(every=4, after=1, until=9))
  when = []
  for number in range(14):
    at = dataclasses.replace(start, trainable=learned, step=jnp.int32(number))
    after, _ = restart(at, {})
    if not leaf(after).trained["b"].any():
      when.append(number)
  assert when == [5]


@pytest.mark.parametrize(
  "counts,factors",
  [
    (None, {1: 3.162, 10: 6.53, 100: 3.24}),
    ("count$", {1: 1.0, 10: 1.0, 100: 1.0}),
  ],
)
def test_over_scale_after_a_reset(counts, factors):
  """Updates over the rate, for a gradient of one, k steps after a reset."""
  tx = optax.scale_by_adam(eps=1e-12)
  start = state.create(params(), "/trained/", tx, transformed="/w$")
  late = optax.tree.set(start.opt_state, count=jnp.int32(1_000_000))
  restart = relora.Restart(every=4, counts=counts)
  at = dataclasses.replace(start, opt_state=late, step=jnp.int32(4))
  after, _ = jax.jit(restart)(at, {})
  held, ones = after.opt_state, jax.tree.map(jnp.ones_like, at.trainable)
  update = jax.jit(tx.update)
  for k in range(1, 101):
    moved, held = update(ones, held)
    if k in factors:
      found = float(jax.tree.leaves(moved)[0].ravel()[0])
      # The factors are given to three digits.
      np.testing.assert_allclose(found, factors[k], rtol=2e-3)


def test_pruned_moments():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, 40)))
  kept = relora.MagnitudePruning(share=0.9)(x, jax.random.key(0))
  for before, after in zip(np.abs(x), np.asarray(kept), strict=True):
    assert (after != 0).sum() == 200
    assert before[after != 0].min() > before[after == 0].max()
  kept = relora.RandomPruning(share=0.75)(x, jax.random.key(0))
  # 4000 draws with chance 1/4: the deviation is 0.007.
  assert abs(float((kept != 0).mean()) - 0.25) < 0.035
  assert ((kept == 0) | (kept == x)).all()
  assert not relora.zero(x, jax.random.key(0)).any()


def test_moments_in_eight_bits_are_reset_and_never_pruned():
  """A pruned code would be that of minus a block's largest number."""
  tx = adam8bit.scale_by_adam8bit(least=1, full_precision="^$")
  at = state.create(params(), "/trained/", tx, transformed="/w$")
  ones = jax.tree.map(jnp.ones_like, at.trainable)
  _, held = tx.update(ones, at.opt_state)
  at = dataclasses.replace(at, opt_state=held, step=jnp.int32(4))
  after, _ = relora.Restart(every=4)(at, {})
  found = optax.tree.get(after.opt_state, "mean_top")
  assert not any(x.any() for x in jax.tree.leaves(found))
  for reset in (
    relora.MagnitudePruning(share=0.9),
    relora.RandomPruning(share=0.9),
  ):
    with pytest.raises(UserError, match="mean/.*/trained/a has quantized"):
      relora.Restart(every=4, reset=reset)(at, {})


def test_iterates_are_no_moments():
  """At z = 0, schedule-free's average would be y / 0.9."""
  tx = schedule_free.adamw(0.1)
  at = state.create(params(), "/trained/", tx, transformed="/w$")
  with pytest.raises(UserError, match="z/.*/trained/a is an iterate of sch"):
    relora.Restart(every=4)(at, {})


def test_masks_are_no_moments():
  """A mask of zeros would prune all of AdaLoRA's terms, for good."""
  tx = allocate.adalora_optimizer(
    optax.sgd(0.1), allocate.Budget(target=3, steps=10)
  )
  t = methods.fresh(AdaLoRA(rank=4), methods.base())
  start = {"run0": {"layer0": {"q": t}}}
  at = state.create(start, "/trained/", tx, transformed="/w$")
  with pytest.raises(UserError, match="kept/.*/trained/e is a mask"):
    relora.Restart(every=4)(at, {})


def test_stochastic_rounding_keeps_the_mean():
  x = jnp.full((40_000,), 1 + 2**-10, jnp.float32)  # an eighth of bf16's step
  key = jax.random.key(0)
  got = relora.stochastic(x, jnp.bfloat16, key)
  assert got.dtype == jnp.bfloat16
  assert set(np.unique(np.float32(got))) == {1.0, 1 + 2**-7}
  # Chance 1/8: the deviation of the share is 0.0017.
  assert abs(float((np.float32(got) > 1).mean()) - 1 / 8) < 0.008
  assert (relora.nearest(x, jnp.bfloat16, key) == 1).all()
  chex.assert_trees_all_equal(relora.stochastic(x, jnp.float32, key), x)
  odd = jnp.float32([np.inf, -np.inf, np.nan, -1.0, 0.0])
  np.testing.assert_array_equal(
    np.float32(relora.stochastic(odd, jnp.bfloat16, key)), odd
  )
  with pytest.raises(UserError, match="base of type float16"):
    relora.stochastic(x, jnp.float16, key)


def test_small_merges_add_up_by_stochastic_rounding_alone():
  at = state.create(
    params(jnp.bfloat16), "/trained/", optax.sgd(0.1), transformed="/w$"
  )
  begin = np.float32(leaf(at).w)
  ends = {}
  for rounding in (relora.nearest, relora.stochastic):
    restart = jax.jit(relora.Restart(every=1, rounding=rounding))
    now = at
    for number in range(1, 41):
      # A change of 2^-11 a merge: less than half a step of numbers near 1.
      learned = jax.tree.map(jnp.zeros_like, now.trainable)
      q = learned["run0"]["layer0"]["q"]
      q.trained["a"] = q.trained["a"].at[:, 0].set(2.0**-11 / 1.5)
      q.trained["b"] = q.trained["b"].at[:, 0].set(1.0)
      now = dataclasses.replace(now, trainable=learned, step=jnp.int32(number))
      now, _ = restart(now, {})
    near = (np.abs(begin) > 0.5) & (np.abs(begin) < 2)
    ends[rounding.__name__] = (np.float32(leaf(now).w) - begin)[near].mean()
  want = 40 * 2.0**-11
  assert abs(ends["stochastic"] / want - 1) < 0.3
  assert abs(ends["nearest"] / want) < 0.5


def test_bad_use():
  with pytest.raises(UserError, match="after: found 3, expected 0 to 2"):
    relora.Restart(every=3, after=3)
  restart, tx = relora.Restart(every=3), optax.sgd(0.1)
  untransformed = state.create(params(), "/trained/", tx)
  with pytest.raises(
    UserError, match="layer0/q/w is neither trained nor transformed"
  ):
    restart(untransformed, {})
  still = state.create(params(), "/trained/b", tx, transformed="/w$")
  with pytest.raises(UserError, match="q/trained/a is neither trained nor"):
    restart(still, {})
  plain = state.create(params(), "bias", tx, transformed="/w$")
  with pytest.raises(UserError, match="no weight has trainable adapters"):
    restart(plain, {})
