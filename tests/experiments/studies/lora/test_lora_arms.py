"""Arms of `lora_arms.methods` run the methods that they are called after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import config
from experiments.studies import protocol
from experiments.studies.lora import lr_grid
from research import tree
from research.lora.wrap import adapters
from tests import support

STEPS = 6
TINY = (
  *("presets.Sizes.width=32", "presets.Sizes.depth=2", f"STEPS={STEPS}"),
  *("presets.Sizes.head_dim=8", "presets.Sizes.hidden=32"),
  *("study.Study.batch=4", "study.Study.seeds=1"),
)


@pytest.fixture(scope="module", name="made")
def _made():
  """Returns a tiny study, and the data of its arms."""
  read = config.read("runs/lora/claims_methods.gin", TINY, root=protocol.Run)
  made = read.experiment.study
  base = support.params(made.model.load().model)
  return made, lr_grid.study_data(made, base)


@pytest.fixture(name="arms")
def _arms(made):
  """Returns f(name) -> the arm, and what a run of it starts from."""
  tiny, data = made

  def start(name):
    arm = next(a for a in tiny.variants if a.name == name)
    return arm, lr_grid.adapted_params(tiny, arm, data, 0)

  return start


@pytest.fixture(name="ran")
def _ran(made):
  """Returns f(name) -> adapters before and after a run, and their count."""
  tiny, data = made

  def run(name):
    arm = next(a for a in tiny.variants if a.name == name)
    ends = lr_grid.one_run(tiny, arm, data, -3)
    parts = [adapters(params, lambda leaf: leaf) for params in ends]
    chosen, _ = tree.partition(ends[0], arm.trainable)
    return *parts, tree.count(chosen) - tiny._fixed(arm, data)

  return run


@pytest.mark.slow
def test_adalora_ends_with_its_budget(ran):
  before, after, _ = ran("AdaLoRA")
  assert {x.method.rank for x in before.values()} == {6}
  left = sum(np.count_nonzero(x.trained["e"]) for x in after.values())
  assert left == 4 * len(after)


@pytest.mark.slow
def test_eva_gives_ranks_to_where_inputs_need_them(ran):
  before, after, count = ran("EVA")
  ranks = {path: x.method.rank for path, x in before.items()}
  assert sum(ranks.values()) == 4 * 14  # matrices; some may have no adapter
  assert len(set(ranks.values())) > 1 and max(ranks.values()) <= 8
  assert {x.method.alpha / x.method.rank for x in before.values()} == {4.0}
  assert count == sum(
    sum(ranks[p] * x.shape[axis] for axis in (-2, -1))
    for p, x in before.items()
  )
  assert any(np.any(x.trained["b"]) for x in after.values())


@pytest.mark.slow
def test_lora_fa_moves_b_in_the_measure_of_a(ran):
  before, after, count = ran("LoRA-FA")
  assert count == 8 * sum(x.shape[-1] for x in before.values())
  for path, x in before.items():
    np.testing.assert_array_equal(x.fixed["a"], after[path].fixed["a"])
    assert np.any(after[path].trained["b"])


@pytest.mark.slow
@pytest.mark.parametrize("name, moved", [("KaSA", "d"), ("AdaLoRA", "a")])
@pytest.mark.sample(2)
def test_terms_move_without_a_gradient_of_the_data(arms, name, moved):
  """Adam alone leaves alone what has no gradient."""
  arm, params = arms(name)
  mine, _ = tree.partition(params, arm.trainable)
  zeros = jax.tree.map(jnp.zeros_like, mine)

  def moves(optimizer):
    tx = optimizer(lambda count: 1e-2)
    found, _ = jax.jit(tx.update)(zeros, tx.init(mine), mine)
    return {
      path for path, x in tree.flatten_paths(found) if np.abs(x).max() > 1e-3
    }

  found = moves(arm.optimizer)
  assert {path.rpartition("/")[2] for path in found} >= {moved}
  assert not moves(lr_grid.adam)
