"""Groups of parameters by path, against optax's own and separate optimizers."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree
from research.optim import optim
from research.optim.by_path import by_path
from research.optim.low_rank import layerwise, subspace
from research.sharding import Layout
from research.training import loop, state, step
from research.training.reports.metrics import read_jsonl
from research.typing import UserError
from tests.support_lora import lora

STEPS = 5
PARAMS = {
  "vision": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)},
  "connector": {"w": jnp.full((3, 2), 0.5)},
  "text": {"w": jnp.arange(4.0), "b": jnp.zeros(())},
}
VISION = optim.cosine(1e-2, 8, warmup=3)
TEXT = optim.linear(2e-2, 6)


def gradients(count=STEPS):
  rng = np.random.default_rng(0)
  for _ in range(count):
    yield jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), PARAMS)


def follow(tx, params, grads):
  held, update = tx.init(params), jax.jit(tx.update)
  for g in grads:
    updates, held = update(g, held, params)
    params = optax.apply_updates(params, updates)
  return params, held


def test_it_is_optax_multi_transform_with_labels_by_hand():
  def parts():
    return optim.adamw(VISION), optax.sgd(0.1), optax.adamw(TEXT)

  a, b, c = parts()
  groups = by_path([("^vision/", a), ("^connector/w", b), (".", c)], clip=0.5)
  a, b, c = parts()
  labels = {
    "vision": {"w": "a", "b": "a"},
    "connector": {"w": "b"},
    "text": {"w": "c", "b": "c"},
  }
  theirs = optax.chain(
    optax.clip_by_global_norm(0.5),
    optax.multi_transform({"a": a, "b": b, "c": c}, labels),
  )
  one, _ = follow(groups, PARAMS, gradients())
  two, _ = follow(theirs, PARAMS, gradients())
  chex.assert_trees_all_equal(one, two)


def test_each_group_moves_as_in_a_run_of_its_own():
  """Rates make AdamW, clipped by the norm of the group, each its own steps."""
  both, _ = follow(
    by_path([("^text/", TEXT), (".", VISION)]), PARAMS, gradients()
  )
  for rate, names in ((TEXT, ["text"]), (VISION, ["vision", "connector"])):
    mine = {name: PARAMS[name] for name in names}
    grads = [{name: g[name] for name in names} for g in gradients()]
    alone, _ = follow(optim.adamw(rate), mine, grads)
    chex.assert_trees_all_equal({n: both[n] for n in names}, alone)


def test_what_is_frozen_has_no_state_and_no_share_of_the_norm():
  groups = [("^connector/", 1e-2), ("^text/", TEXT)]
  made = state.create(
    PARAMS,
    "^connector/|^text/",
    by_path(
      groups, clip=1.0, optimizer=functools.partial(optim.adamw, clip=None)
    ),
  )
  paths = [path for path, _ in tree.flatten_paths(made.opt_state)]
  assert not [path for path in paths if "vision" in path]
  moments = [path for path in paths if "/mu/" in path or "/nu/" in path]
  assert len(moments) == 2 * 3
  assert tree.count(made.opt_state) == 2 * (6 + 4 + 1) + 2 * 3
  trained = {name: PARAMS[name] for name in ("connector", "text")}
  grads = [{name: g[name] for name in trained} for g in gradients(1)]
  got, _ = follow(
    by_path(groups, clip=1.0, optimizer=optax.sgd), trained, grads
  )
  share = 1 / max(1.0, float(optax.tree.norm(grads[0])))
  assert share < 1
  moved = {"connector": 1e-2, "text": TEXT(0)}
  want = {
    name: jax.tree.map(
      lambda x, g, r=moved[name]: x - r * share * g,
      trained[name],
      grads[0][name],
    )
    for name in trained
  }
  chex.assert_trees_all_close(got, want, rtol=1e-6)


@pytest.mark.slow
def test_a_run_logs_each_rate_and_resumes_bitwise(line, tmp_path):
  objective, params, numbers = line
  tx = by_path([("w", VISION), ("base", TEXT)])
  batch = next(iter(numbers()))

  def fit(name, steps):
    return loop.fit(
      objective,
      tx,
      state.create(params, ".", tx),
      itertools.repeat(batch),
      loop.TrainConfig(steps=steps),
      workdir=tmp_path / name,
    ).state

  whole = fit("whole", 4)
  fit("parts", 2)
  chex.assert_trees_all_equal(fit("parts", 4), whole)
  records = read_jsonl(tmp_path / "whole" / "metrics.jsonl")
  for group, schedule in (("w", VISION), ("base", TEXT)):
    name = f"train/learning_rate/{group}"
    rates = [r[name] for r in records if name in r]
    want = [float(schedule(i)) for i in range(4)]
    np.testing.assert_allclose(rates, want, rtol=1e-6)


def test_one_group_s_rate_has_the_usual_name(line):
  objective, params, numbers = line
  tx = by_path([(".", 0.1)])
  update = step.make_train_step(objective, tx)
  start = state.create(params, "w", tx)
  _, metrics = update(start, next(iter(numbers())), jax.random.key(0))
  assert metrics["learning_rate"] == np.float32(0.1)


def test_patterns_may_have_names_alike():
  tx = by_path([("^vision/w", 0.1), ("^(vision/w)?", 0.2)])
  made = tx.init(PARAMS)
  rates = {k: float(x) for k, x in optim.learning_rates(made).items()}
  assert rates == pytest.approx(
    {"learning_rate/vision_w": 0.1, "learning_rate/vision_w_2": 0.2}
  )


@pytest.mark.parametrize(
  ("groups", "error"),
  [
    ([], "groups: found \\[\\], expected different patterns"),
    ([(".", 0.1), (".", 0.2)], "found \\['.', '.'\\], expected different"),
    ([("(", 0.1)], "'\\(' is no regular expression"),
    ([("^vision/", 0), (".", 0.1)], "'\\^vision/' has rate 0.*\n.*trainable"),
    ([(".", -0.1)], "by_path.\\.: found -0.1, expected"),
    ([("^vision/", 0.1)], "is found in 'connector/w', which is trained"),
    ([(".", 0.1), ("^text/", 0.2)], "'\\^text/' has no trained parameter"),
    ([("^visoin/", 0.1), (".", 0.2)], "'\\^visoin/' has no trained parameter"),
    (
      [(".", layerwise.galore(0.1, subspace.Projection(rank=1)))],
      "has a layerwise optimizer",
    ),
  ],
)
def test_groups_that_cannot_be(groups, error):
  with pytest.raises(UserError, match=error):
    by_path(groups).init(PARAMS)


def test_the_state_is_of_the_groups_own_arrays():
  """No zeros in place of the others."""
  made = by_path([("^vision/", 0.1), (".", 0.2)]).init(PARAMS)
  sizes = {name: tree.count(inner) for name, inner in made.groups.items()}
  assert sizes == {"vision": 2 * 9 + 3, "rest": 2 * 11 + 3}


def test_its_state_is_cut_as_the_parameters_are():
  """Also beside an adapter's base, which is in no group."""
  up = lora(jnp.zeros((2, 8, 16)), jnp.zeros((2, 4, 8)), jnp.zeros((2, 4, 16)))
  params = {
    "embed": jnp.zeros((32, 8)),
    "run0": {"layer0": {"mlp": {"up": up}}},
  }
  layout = Layout(fsdp=2)
  mesh = layout.mesh()
  tx = by_path([("/trained/", 0.1), ("^embed", 0.2)])
  made = jax.eval_shape(
    lambda params: state.create(params, "/trained/|^embed", tx), params
  )
  where = layout.shardings(made, mesh)
  specs = {p: x.spec for p, x in tree.flatten_paths(where)}
  moments = {p: x for p, x in specs.items() if "/mu/" in p}
  assert len(moments) == 3
  for path, spec in moments.items():
    assert spec == specs[f"trainable/{path.split('/mu/')[1]}"]
  assert [tuple(x) for x in moments.values()].count((None, "fsdp")) == 1
