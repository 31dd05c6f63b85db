"""Optimizers against numpy written from the papers, schedules by hand."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.lora.optim import loraplus, lorapro, relora, riemannian
from research.optim import adam8bit, muon, optim, rates, schedule_free, stages
from research.optim.low_rank import apollo, galore, layerwise, subspace
from research.training.objectives import experts
from research.typing import UserError


@pytest.mark.parametrize(
  "schedule,want",
  [
    (optim.constant(2.0, warmup=4), [0.5, 1, 1.5, 2, 2, 2]),
    (optim.linear(2.0, 6, warmup=2, final=0.5), [1, 2, 2, 1.75, 1.5, 1.25, 1]),
    (optim.cosine(2.0, 4, final=0.0), [2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5, 0]),
    (optim.wsd(2.0, 8, warmup=2, decay=4), [1, 2, 2, 2, 2, 1.5, 1, 0.5, 0]),
    (optim.wsd(2.0, 3), [2, 2, 2]),
    # Three steps after the warm-up it is a root of 2 lower.
    (
      optim.rsqrt(2.0, warmup=2, timescale=3),
      [1, 2, 2, 3**0.5, 2 * 0.6**0.5, 2**0.5],
    ),
  ],
)
def test_schedules(schedule, want):
  got = [float(schedule(jnp.int32(i))) for i in range(len(want))]
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_warm_up_is_exact_where_optax_s_is_rounded():
  """Why it is by hand: theirs comes down from the peak by subtraction."""
  peak, warmup = 0.02, 1000
  theirs = optax.linear_schedule(peak / warmup, peak, warmup - 1)
  count = np.arange(warmup)
  want = peak * (count + 1) / warmup
  off = [
    np.abs(np.asarray(jax.jit(f)(jnp.int32(count)), np.float64) / want - 1)
    for f in (optim.constant(peak, warmup), theirs)
  ]
  assert off[0].max() < 2e-7
  assert 1e-5 < off[1].max() < 1e-4


def test_injected_rates_move_alike_and_are_saved_elsewhere():
  """Why the rate is kept by hand: checkpoints, and rates of bfloat16."""
  schedule = optim.cosine(0.1, 8, warmup=2)
  inject = optax.inject_hyperparams(optax.scale_by_learning_rate)
  both = optim.scale_by_rate(schedule), inject(learning_rate=schedule)
  params = {"w": jnp.arange(4.0)}
  states = [tx.init(params) for tx in both]
  for _ in range(4):
    pairs = zip(both, states, strict=True)
    moved = [tx.update(params, s, params) for tx, s in pairs]
    updates, states = zip(*moved, strict=True)
    chex.assert_trees_all_close(*updates, rtol=1e-6)
    ours, theirs = states
    rate = float(theirs.hyperparams["learning_rate"])
    assert float(ours.learning_rate) == pytest.approx(rate, rel=1e-6)
  # What the training step asks for.
  assert optax.tree.get(ours, "learning_rate") is ours.learning_rate
  with pytest.raises(KeyError, match="multiple values"):
    optax.tree.get(theirs, "learning_rate")
  half = jax.tree.map(jnp.bfloat16, params)
  assert both[0].init(half).learning_rate.dtype == jnp.float32
  assert both[1].init(half).hyperparams["learning_rate"].dtype == jnp.bfloat16


def test_factors_of_paths_move_as_optax_s_partition_does():
  params = {"a": jnp.arange(3.0), "b": {"c": jnp.ones(2), "d": jnp.ones(1)}}
  factor = rates.table([("a", 2.0), ("c", 0.25)])
  tx = rates.scale_by_path(factor)
  label = {"a": "2", "b": {"c": "0.25", "d": "1"}}
  scales = {text: optax.scale(float(text)) for text in ("2", "0.25", "1")}
  theirs = optax.partition(scales, label)
  found, want = (t.update(params, t.init(params))[0] for t in (tx, theirs))
  chex.assert_trees_all_equal(found, want)
  # Nothing is saved for a rate; a label for each factor would be, as a node.
  assert tx.init(params) == optax.EmptyState()


@pytest.mark.parametrize("make", [optim.cosine, optim.linear, optim.wsd])
def test_no_room_for_the_schedule(make):
  with pytest.raises(UserError, match="10 steps of warm-up and decay in a run"):
    make(1.0, 10, 10)


RANKED = subspace.Projection(rank=2)
RANGES = [
  *[(optim.constant, dict(peak=x)) for x in (-1, -1e-9, math.inf, math.nan)],
  (optim.constant, dict(peak=1, warmup=-1)),
  *[
    (make, dict(peak=1, steps=9) | wrong)
    for make in (optim.cosine, optim.linear, optim.wsd)
    for wrong in (dict(peak=-1), dict(warmup=-1), dict(final=-0.1))
  ],
  (optim.wsd, dict(peak=1, steps=9, decay=-1)),
  (stages.stages, dict(peak=1, later=-1, at=2, steps=9)),
  (stages.stages, dict(peak=1, later=1, at=2, steps=9, final=-1)),
  (relora.schedule, dict(peak=-1, steps=4, every=2, warmup=1, rewarm=1)),
  (relora.schedule, dict(peak=1, steps=4, every=0, warmup=0, rewarm=0)),
  *[
    (make, dict(learning_rate=1e-3, **fixed) | wrong)
    for make, fixed in (
      (optim.adamw, {}),
      (lambda **x: rates.adamw(factor=rates.table([]), **x), {}),
      (adam8bit.adamw8bit, {}),
      (apollo.apollo, dict(projection=RANKED)),
      (apollo.fira, dict(projection=RANKED)),
      (schedule_free.adamw, {}),
      (loraplus.loraplus, {}),
      (lorapro.lorapro, {}),
      (riemannian.riemannian, {}),
    )
    for wrong in (
      dict(learning_rate=-1.0),
      dict(learning_rate=math.nan),
      dict(b1=1.0),
      dict(b2=-0.1),
      dict(eps=-1e-8),
      dict(weight_decay=-0.1),
      dict(clip=0.0),
      dict(clip=-1),
    )
  ],
  (riemannian.lora_fa, dict(learning_rate=-1)),
  (riemannian.lora_fa, dict(learning_rate=1, damping=-1)),
  (riemannian.riemannian, dict(learning_rate=1, damping=-1)),
  (lorapro.lorapro, dict(learning_rate=1, damping=-1)),
  (loraplus.loraplus, dict(learning_rate=1, ratio=-1)),
  (loraplus.peft_groups, dict(learning_rate=1, embedding=-1)),
  *[
    (muon.muon, dict(learning_rate=1) | wrong)
    for wrong in (
      *(dict(learning_rate=-1), dict(momentum=1), dict(steps=0)),
      *(dict(adam=-1), dict(b1=1), dict(clip=0)),
    )
  ],
  *[
    (make, dict(learning_rate=1, projection=RANKED) | wrong)
    for make in (galore.galore, layerwise.galore)
    for wrong in (
      *(dict(learning_rate=-1), dict(scale=-1), dict(weight_decay=-1)),
      dict(clip=0),
    )
  ],
  (apollo.apollo, dict(learning_rate=1, projection=RANKED, scale=-1)),
  (experts.rebalance, dict(rate=-0.1)),
]


@pytest.mark.parametrize(("make", "wrong"), RANGES)
def test_numbers_that_make_no_sense_are_refused_at_once(make, wrong):
  words = r"\.\w+: found \S+, expected (a finite number, )?(at least|above) 0"
  with pytest.raises(UserError, match=words):
    make(**wrong)


def adamw_by_hand(params, grads, rates, decay, clip, b1, b2, eps):
  m = {k: 0.0 for k in params}
  v = {k: 0.0 for k in params}
  for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    for k in params:
      gk = g[k] * min(1.0, clip / norm)
      m[k] = b1 * m[k] + (1 - b1) * gk
      v[k] = b2 * v[k] + (1 - b2) * gk**2
      step = (m[k] / (1 - b1**t)) / (np.sqrt(v[k] / (1 - b2**t)) + eps)
      params = {**params, k: params[k] - rate * (step + decay[k] * params[k])}
  return params


def test_adamw_is_the_papers():
  rng = np.random.default_rng(0)
  params = {"w": rng.normal(size=(4, 3)), "norm": rng.normal(size=3)}
  grads = [
    {k: rng.normal(size=v.shape) * 2 for k, v in params.items()}
    for _ in range(5)
  ]
  schedule = optim.linear(0.1, 5, warmup=2)
  tx = optim.adamw(
    schedule, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3, decayed="w", clip=1.5
  )
  got = jax.tree.map(jnp.float32, params)
  state, rates = tx.init(got), []
  for g in grads:
    updates, state = tx.update(jax.tree.map(jnp.float32, g), state, got)
    got = optax.apply_updates(got, updates)
    rates.append(float(optax.tree.get(state, "learning_rate")))
  np.testing.assert_allclose(rates, [0.05, 0.1, 0.1, 0.2 / 3, 0.1 / 3], 1e-6)
  want = adamw_by_hand(
    params, grads, rates, {"w": 0.3, "norm": 0.0}, 1.5, 0.8, 0.9, 1e-6
  )
  chex.assert_trees_all_close(got, want, rtol=2e-5, atol=1e-6)


def test_decay_mask_keeps_holes():
  mask = optim.decay_mask(r"^(?!.*(norm|bias))")
  tree = {"q": jnp.ones(1), "q_norm": jnp.ones(1), "gone": None}
  assert mask(tree) == {"q": True, "q_norm": False, "gone": None}
