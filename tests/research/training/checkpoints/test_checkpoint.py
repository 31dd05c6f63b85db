"""Checkpoints: round trips, errors, and retention."""

import dataclasses
import json
import resource

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from research import tree
from research.optim import optim
from research.training import state
from research.training.checkpoints import checksums, frozen_base
from research.training.checkpoints.checkpoint import Checkpoints, save_tree
from research.typing import UserError

ADAPTERS = r"/trained/"


def nbytes(folder):
  return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def start(adapted):
  tx = optim.adamw(optim.constant(1e-3), weight_decay=0.1)
  made = state.create(adapted, ADAPTERS, tx, average=True)
  return state.TrainState(
    jnp.int32(7),
    made.trainable,
    made.frozen,
    jax.tree.map(lambda x: x + 1, made.opt_state),
    made.ema,
  )


def test_round_trip(start, tmp_path):
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.latest is None and checkpoints.best is None
    checkpoints.save(start)
  target = jax.tree.map(jnp.zeros_like, start)
  with Checkpoints(tmp_path / "c") as checkpoints:
    assert checkpoints.steps == [7]
    found = checkpoints.restore(target)
  want = state.TrainState(
    start.step, start.trainable, target.frozen, start.opt_state, start.ema
  )
  chex.assert_trees_all_equal(found, want)
  assert jax.tree.structure(found) == jax.tree.structure(start)


def test_orbax_does_not_ask_jax_for_sync_points(monkeypatch, tmp_path):
  """By numbers of steps: the loop's own would be missed."""
  asked = []
  monkeypatch.setattr(
    multihost_utils, "reached_preemption_sync_point", asked.append
  )
  made = state.create({"a": jnp.ones(3)}, "a", optim.adamw(1e-3))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(made)
  assert not asked


def test_a_folder_may_have_a_strange_name(tmp_path):
  """Of characters that a shell or a URL reads in another way."""
  folder = tmp_path / "a b%20c {x} $HOME #é"
  made = state.create({"a": jnp.ones(3)}, "a", optim.adamw(1e-3))
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(made, metrics={"validation/loss": 1.0})
  with Checkpoints(folder, sweep=True) as checkpoints:
    assert checkpoints.best == (0, 1.0)
    found, step = checkpoints.restore_latest(made)
  chex.assert_trees_all_equal(found.trainable, made.trainable)
  assert step == 0


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?"])
def test_a_name_that_is_a_pattern_is_refused(tmp_path, name):
  """Orbax would not find what it has saved, after hours of training."""
  for use in (Checkpoints, lambda path: save_tree(path, {"a": jnp.ones(3)})):
    with pytest.raises(UserError, match="rename the folder"):
      use(tmp_path / name)
  assert not list(tmp_path.iterdir())


class Data:
  """What a checkpoint asks of an iterator that can be resumed."""

  def __init__(self, place):
    self.place = place

  def get_state(self):
    return {"place": self.place}

  def set_state(self, found):
    self.place = found["place"]


def test_the_place_in_the_data_comes_back(tmp_path):
  made = state.create({"a": jnp.ones(3)}, "a", optim.adamw(1e-3))
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(made, Data(5))
    for restore in (checkpoints.restore, checkpoints.restore_latest):
      restore(made, data := Data(0))
      assert data.place == 5


def test_a_step_holds_no_frozen_weight(line, tmp_path):
  params = {"big": jnp.ones((512, 1024)), "a": jnp.ones((4, 4))}
  start = state.create(params, "^a$", optim.adamw(1e-3))
  frozen_base.record_base(tmp_path, start.frozen, {"name": "somewhere"})
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(start)
  # 2 MiB are frozen; 192 bytes move, the rest is Orbax's book-keeping.
  assert nbytes(tmp_path) < 100_000


def test_difference_is_shown_path_by_path(start, adapted, tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(start)
    other = {**adapted, "extra": {"trained": {"a": jnp.ones(3)}}}
    del other["run0"]
    with pytest.raises(UserError) as caught:
      checkpoints.restore(
        state.create(other, ADAPTERS, optim.adamw(1e-3), average=True)
      )
    assert "extra/trained/a: found nothing, expected float32[3]" in str(
      caught.value
    )
    assert "more\n" in str(caught.value)
    assert str(caught.value).count("\n") == 2
    wider = jax.tree.map(
      lambda x: jnp.zeros((*x.shape, 2), jnp.bfloat16), start.trainable
    )
    bad = state.TrainState(
      start.step, wider, start.frozen, start.opt_state, start.ema
    )
    with pytest.raises(
      UserError, match=r"found float32\[2, 3, .*expected bflo"
    ):
      checkpoints.restore(bad)


def test_no_such_step(start, tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(UserError, match=r"no checkpoint; found \[\]"):
      checkpoints.restore(start)
    checkpoints.save(start)
    with pytest.raises(UserError, match=r"of step 3; found \[7\]"):
      checkpoints.restore(start, step=3)


@pytest.mark.parametrize(
  "better,best,kept", [("lower", 2, [2, 5, 6]), ("higher", 3, [3, 5, 6])]
)
def test_latest_and_best_are_kept(tmp_path, better, best, kept):
  tx = optim.adamw(1e-3)
  found = {1: 4.0, 2: 1.0, 3: 5.0, 4: float("nan"), 6: 2.0}
  with Checkpoints(
    tmp_path, keep=2, best="validation/loss", better=better
  ) as checkpoints:
    for step in range(1, 7):
      made = state.create({"a": jnp.full(3, float(step))}, "a", tx)
      made = state.TrainState(
        jnp.int32(step), made.trainable, made.frozen, made.opt_state
      )
      results = {"validation/loss": found[step]} if step in found else None
      checkpoints.save(made, metrics=results)
    assert checkpoints.best == (best, found[best])
  with Checkpoints(tmp_path, better=better) as checkpoints:
    assert checkpoints.steps == kept
    assert checkpoints.best == (best, found[best])
    restored = checkpoints.restore(made, step=best)
    chex.assert_trees_all_equal(
      restored.trainable["a"], jnp.full(3, best * 1.0)
    )


def test_every_so_many_are_kept_for_good(tmp_path):
  """Also checkpoints of earlier processes."""
  made = state.create({"a": jnp.ones(3)}, "a", optim.adamw(1e-3))
  for steps in (range(1, 6), range(6, 12)):
    with Checkpoints(tmp_path, keep=1, every=4) as checkpoints:
      for step in steps:
        checkpoints.save(dataclasses.replace(made, step=jnp.int32(step)))
  assert checkpoints.steps == [4, 8, 11]


def test_frozen_weights_are_recorded_once(start, tmp_path):
  frozen_base.record_base(tmp_path, start.frozen, None)
  note = json.loads((tmp_path / "base.json").read_text())
  assert note["source"] is None
  size = nbytes(tmp_path)
  frozen_base.record_base(tmp_path, start.frozen, None)
  assert nbytes(tmp_path) == size > tree.nbytes(start.frozen) / 2
  target = jax.tree.map(jnp.zeros_like, start.frozen)
  found = frozen_base.load_frozen(tmp_path, target)
  chex.assert_trees_all_equal(found, start.frozen)
  # A checksum that does not fit is the files' damage.
  note["sums"] = {k: v ^ 1 for k, v in checksums.sums(start.frozen).items()}
  (tmp_path / "base.json").write_text(json.dumps(note))
  with pytest.raises(UserError, match="differs from its checksum in"):
    frozen_base.load_frozen(tmp_path, target)


def test_only_the_writer_sweeps(start, tmp_path):
  draft = tmp_path / "9.orbax-checkpoint-tmp"
  draft.mkdir()
  (draft / "part").write_text("half")
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [] and draft.exists()
  with Checkpoints(tmp_path, sweep=True) as checkpoints:
    assert checkpoints.steps == []
    checkpoints.save(start)  # sweeping is over before anything is written
  assert not draft.exists()


def test_a_base_is_known_by_numbers_from_all_over_it():
  x = np.zeros((40, 50), np.float32)
  bases = [{"a": x}, {"b": x}, {"a": x.T}, {"a": x.astype(np.int32)}]
  for row in range(0, 40, 8):
    other = x.copy()
    other[row : row + 8] = 1
    bases.append({"a": other})
  found = {frozen_base.fingerprint(jax.device_put(base)) for base in bases}
  assert len(found) == len(bases)


def test_another_base_is_refused(start, tmp_path):
  frozen_base.record_base(tmp_path, start.frozen, {"name": "one"})
  other = jax.tree.map(lambda x: x + 1, start.frozen)
  with pytest.raises(UserError, match="came from {'name': 'one'}"):
    frozen_base.record_base(tmp_path, other, {"name": "two"})
  with pytest.raises(UserError, match="found no frozen weights"):
    frozen_base.load_frozen(tmp_path, start.frozen)
  (tmp_path / "base.json").write_text("[]")
  with pytest.raises(UserError, match="not a record of base weights"):
    frozen_base.record_base(tmp_path, start.frozen, None)


def test_a_file_that_cannot_grow_is_the_users_error(tmp_path):
  start = state.create(
    {"a": jax.random.normal(jax.random.key(0), (300_000,))},
    "a",
    optim.adamw(1e-3),
  )
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  try:
    with (
      pytest.raises(UserError, match="cannot be written"),
      Checkpoints(tmp_path) as checkpoints,
    ):
      checkpoints.save(start)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == []
    checkpoints.save(start)
    assert checkpoints.steps == [0]
