"""The training loop on a mesh, and on stop requests."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import sharding
from research.sharding import Layout
from research.training import global_batch, loop, preemption, state
from research.training.reports.metrics import read_jsonl
from research.typing import UserError
from tests.research.training import conftest

LAYOUT = Layout(data=2, fsdp=2, sequence=2, axes=((r"(^|/)w$", ("width",)),))
TX = optax.adam(0.05)
PARAMS = {"w": jnp.zeros(4), "base": jnp.float32(0.5)}


class Wide(conftest.Numbers):
  """Four numbers per row, so that two devices share `w`; resumable."""

  def __iter__(self):
    return _Wide(self)


class _Wide(conftest._Iterator):
  def __next__(self):
    batch = super().__next__()
    return batch | {"x": np.pad(batch["x"], ((0, 0), (0, 1)), mode="wrap")}

  def get_state(self):
    return {"next_index": self.next_index}

  def set_state(self, place):
    self.next_index = place["next_index"]


def run(workdir, layout=None, steps=6, objective=None, plan=None, **more):
  """Runs on one device, or on the mesh of `layout`."""

  def fit(start, cut=None):
    return loop.fit(
      objective or conftest.Line(),
      TX,
      start,
      Wide(),
      plan or loop.TrainConfig(steps=steps, accumulate=2, save_every=2),
      workdir=workdir,
      sharding=cut,
      **{"evaluations": {"validation": [next(iter(Wide()))]}, **more},
    )

  if layout is None:
    return fit(state.create(PARAMS, "w", TX))
  mesh = layout.mesh()

  def where(tree):
    return layout.shardings(tree, mesh)

  with jax.set_mesh(mesh):
    params = state.shard_params(PARAMS, where)
    start = state.create(params, "w", TX, shardings=where)
    assert start.opt_state[0].mu["w"].sharding == where(PARAMS)["w"]
    return fit(start, layout.batch(mesh))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone")
  return workdir, run(workdir)


def losses(workdir):
  records = read_jsonl(workdir / "metrics.jsonl")
  return [r["train/loss"] for r in records if "train/loss" in r]


def test_a_mesh_changes_where_not_what(alone, tmp_path):
  """Microbatches also contain the same rows as on one device."""
  workdir, one = alone
  many = run(tmp_path, LAYOUT)
  chex.assert_trees_all_close(
    losses(tmp_path), losses(workdir), rtol=1e-5, atol=1e-6
  )
  chex.assert_trees_all_close(
    jax.device_get(many.state.params),
    jax.device_get(one.state.params),
    atol=1e-5,
  )
  assert many.evaluation == pytest.approx(one.evaluation, rel=1e-5)
  w = many.state.trainable["w"]
  assert w.sharding.spec == jax.P("fsdp") and len(w.devices()) == 8
  assert w.addressable_shards[0].data.shape == (2,)
  assert many.state.step.sharding.is_fully_replicated


@pytest.mark.slow
def test_the_update_keeps_each_array_where_it_was(tmp_path):
  """Two consecutive runs: the checkpoint is restored with its sharding."""
  run(tmp_path, LAYOUT, steps=2)
  out = run(tmp_path, LAYOUT, steps=4)
  assert out.start == 2
  specs = jax.tree.map(lambda x: x.sharding.spec, out.state.opt_state)
  assert specs[0].mu["w"] == jax.P("fsdp") and specs[0].count == jax.P()


@pytest.mark.parametrize("rows", [4, 8])
def test_batches_are_cut_where_the_mesh_divides_them(rows):
  """Other axes stay unsharded if the mesh does not divide them."""
  mesh, spec = LAYOUT.mesh(), ("data", "fsdp", "expert")
  tokens = ("sequence", "ring", "ulysses")
  batch = {
    "even": np.zeros((rows, 4)),
    "odd": np.zeros((rows, 3)),
    "flat": np.zeros(rows),
    "more": np.zeros((rows, 2, 5)),
  }
  placed = global_batch.to_global(batch, LAYOUT.batch(mesh))
  found = {name: x.sharding.spec for name, x in placed.items()}
  assert found["even"] == jax.P(spec, tokens)
  assert found["odd"][0] == spec and found["odd"][1] is None
  assert found["flat"] == jax.P(spec)
  assert found["more"] == jax.P(spec, tokens, None)
  assert global_batch.share(LAYOUT.batch(mesh)) == (0, 1)  # one process


@pytest.mark.parametrize(
  ("held", "pieces", "want"),
  [
    ({0, 1}, 4, (0, 2)),
    ({2, 3}, 4, (1, 2)),
    ({2}, 3, (2, 3)),
    ({0, 1, 2, 3}, 4, (0, 1)),
    ({0, 2}, 4, (0, 1)),  # scattered
    ({1, 2}, 4, (0, 1)),  # across two parts
    ({0, 1}, 5, (0, 1)),  # no equal parts
  ],
)
def test_which_part_of_the_rows_is_held(held, pieces, want):
  assert global_batch.equal_part(held, pieces) == want


def test_rows_that_the_mesh_does_not_divide():
  mesh = LAYOUT.mesh()
  with pytest.raises(UserError, match="found 6 rows, expected a multiple of 4"):
    global_batch.to_global({"x": np.zeros((6, 4))}, LAYOUT.batch(mesh))


class Asking:
  """Requests a stop at the n-th stop point."""

  def __init__(self, left):
    self.left = left

  def reached(self):
    self.left -= 1
    return self.left <= 0

  def unsaved(self, whether):
    pass


@pytest.mark.slow
def test_asked_to_stop_it_saves_and_says_so(tmp_path, monkeypatch):
  """At any stop point; the resumed run equals an uninterrupted one."""
  plan = loop.TrainConfig(steps=6, accumulate=2, save_every=2, eval_every=3)
  batches = [next(iter(Wide())), next(iter(Wide()))]
  more = dict(plan=plan, evaluations={"validation": batches})
  lives = [
    (1, "no step was taken"),  # after it has compiled
    (2, "step 1 is saved"),  # after a step
    (3, "step 2 is saved"),  # after a checkpoint that was due
    (4, "step 3 is saved, but for its evaluation"),  # within that
    (1, "step 3 is saved, but for its evaluation"),  # and again
    (7, "step 6 is saved, but for its evaluation"),  # which was due
  ]
  for number, (left, words) in enumerate(lives):
    asking = Asking(left)
    monkeypatch.setattr(preemption, "StopPoints", lambda a=asking: a)
    with pytest.raises(preemption.Preempted, match=words) as caught:
      run(tmp_path / "left", **more)
    assert words + ".\n" in str(caught.value), number
    assert caught.value.exit_status == 42
  monkeypatch.setattr(preemption, "StopPoints", lambda: Asking(99))
  out, whole = run(tmp_path / "left", **more), run(tmp_path / "whole", **more)
  assert (out.start, whole.start) == (6, 0)
  chex.assert_trees_all_equal(out.state, whole.state)
  assert (out.best, out.evaluation) == (whole.best, whole.evaluation)
  left, want = (numbers(tmp_path / name) for name in ("left", "whole"))
  assert left == want
  assert not (tmp_path / "left" / "unevaluated").exists()


def numbers(workdir):
  """Returns the metrics by step, and the steps that are kept."""
  rows = [
    (r["step"], name, value)
    for r in read_jsonl(workdir / "metrics.jsonl")
    for name, value in r.items()
    if name.startswith("validation/") or name == "train/loss"
  ]
  return rows, sorted(p.name for p in (workdir / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_a_damaged_unevaluated_step_is_not_used(tmp_path, monkeypatch, capsys):
  more = dict(plan=loop.TrainConfig(steps=4, accumulate=2, save_every=2))
  for left in (6, 3):  # the second time in place of the damaged one
    monkeypatch.setattr(preemption, "StopPoints", lambda n=left: Asking(n))
    with pytest.raises(preemption.Preempted, match="step 4 is saved, but for"):
      run(tmp_path, **more)
    (tmp_path / "unevaluated" / "4" / "data" / "place.json").write_text("{}")
  monkeypatch.setattr(preemption, "StopPoints", lambda: Asking(99))
  assert run(tmp_path, **more).start == 2
  assert "not used: " in capsys.readouterr().err


def test_nobody_asks_where_jax_is_not_distributed():
  assert not preemption.StopPoints().reached()


@dataclasses.dataclass(frozen=True)
class Talkative(conftest.Line):
  """Returns an array among its metrics."""

  def __call__(self, params, batch, key):
    loss, weight, sums = super().__call__(params, batch, key)
    return loss, weight, sums | {"vector": batch["weights"][:, None]}


@pytest.mark.slow
def test_arrays_among_the_metrics_are_for_rewrites_alone(tmp_path):
  """A state transform gets them after each step; the file does not."""

  def reset(trained, metrics):
    size = metrics["vector"].sum()
    now = trained.step % 3 == 0
    w = jnp.where(now, 0.0, trained.trainable["w"])
    trained = dataclasses.replace(trained, trainable={"w": w, "base": None})
    return trained, metrics | {"size": size}

  def evaluation_only(params, batch, key):
    loss, weight, sums = Talkative()(params, batch, key)
    return loss, weight, sums if key is not None else {}

  out = run(tmp_path, objective=evaluation_only, state_transforms=(reset,))
  np.testing.assert_array_equal(out.state.trainable["w"], jnp.zeros(4))
  records = read_jsonl(tmp_path / "metrics.jsonl")
  steps = [r for r in records if "train/loss" in r]
  assert all("train/size" in r and "train/vector" not in r for r in steps)
  # From 0 again after the third step: the fourth begins where the first did.
  first = run(tmp_path / "plain", steps=1, objective=evaluation_only)
  assert float(jnp.abs(first.state.trainable["w"]).max()) > 0


@pytest.mark.slow
def test_what_a_rewrite_makes_goes_where_it_belongs(tmp_path):
  """A constant has no sharding; the next step expects the right one."""

  def forget(trained, metrics):
    zeros = {"w": jnp.zeros(4), "base": None}
    return dataclasses.replace(trained, trainable=zeros), metrics

  out = run(tmp_path, LAYOUT, steps=2, state_transforms=(forget,))
  assert out.state.trainable["w"].sharding.spec == jax.P("fsdp")


def test_frozen_weights_cannot_be_rewritten(tmp_path):
  def thaw(trained, metrics):
    frozen = jax.tree.map(lambda x: x + 1, trained.frozen)
    return dataclasses.replace(trained, frozen=frozen), metrics

  with pytest.raises(UserError, match="changed frozen weights"):
    run(tmp_path, state_transforms=(thaw,))


def test_replicated_scalars(tmp_path):
  """The key of a run on a mesh is replicated, like the step."""
  mesh = LAYOUT.mesh()
  key = loop._key(3, LAYOUT.batch(mesh))
  assert key.sharding == sharding.replicated(mesh)
  chex.assert_trees_all_equal(
    jax.random.key_data(key), jax.random.key_data(jax.random.key(3))
  )
