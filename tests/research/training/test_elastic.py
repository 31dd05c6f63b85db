"""A run goes on with the same command where there are other devices.

Rows of a batch, their order and their noise do not depend on the mesh, so only
sums are added in another order. What is bitwise: the order of the data, a state
that moves from one mesh to another, and all that the same mesh computes.
"""

import dataclasses

import chex
import jax
import numpy as np
import optax
import pytest

from research.optim import optim
from research.sharding import AXES, Layout
from research.training import loop, state
from research.training.checkpoints.workdir import claim_workdir
from research.typing import UserError
from tests.crash import kills, run

WHOLE, LEG = 12, 4  # steps of the run, and of a part of it
ROWS = 4


def layout(**sizes):
  return Layout(**sizes, axes=(*AXES, (r"(^|/)big$", (None, "width"))))


MESHES = {
  "4": layout(data=4),
  "2": layout(data=2),
  "1": None,
  "fsdp 4": layout(data=1, fsdp=4),
  "fsdp 2, tensor 2": layout(data=1, fsdp=2, tensor=2),
}


def start(mesh, where):
  """Returns the first state on a mesh, its optimizer."""
  tx = optim.adamw(optim.cosine(1e-2, WHOLE, 2), weight_decay=0.1)
  params = run.params(1)
  if mesh is not None:
    params = state.shard_params(params, where)
  return state.create(params, ".", tx, average=True, shardings=where), tx


def go_on(workdir, name, steps, **changes):
  """Begins or resumes the run on a mesh, until so many steps are done."""
  plan = dataclasses.replace(
    run.PLAN, steps=steps, eval_every=LEG, save_every=0, **changes
  )
  cut = MESHES[name]
  mesh = None if cut is None else cut.mesh()

  def fit(where, batch):
    first, tx = start(mesh, where)
    return loop.fit(
      run.Pairs(),
      tx,
      first,
      run.DATA.training(None),
      plan,
      workdir=claim_workdir(workdir, run.CONFIG),
      evaluations={"validation": run.DATA.evaluation(None, 2)},
      sharding=batch,
    )

  if mesh is None:
    return fit(None, None)
  with jax.set_mesh(mesh):
    return fit(lambda tree: cut.shardings(tree, mesh), cut.batch(mesh))


def curve(workdir, name):
  return [row[name] for row in run.numbers(workdir) if name in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The run on four devices throughout."""
  workdir = tmp_path_factory.mktemp("whole")
  return workdir, go_on(workdir, "4", WHOLE)


@pytest.mark.slow
@pytest.mark.parametrize(
  "legs",
  [
    ("4", "2", "1"),
    ("1", "2", "4"),
    ("4", "fsdp 4", "fsdp 2, tensor 2"),
  ],
)
def test_on_other_devices_the_curve_is_that_of_the_first(whole, tmp_path, legs):
  """To rounding: a loss of about 3.5 is a mean of some 60 terms in float32.

  Each sum of n terms errs by up to n / 2 ulp, 4e-6; Adam divides gradients by
  their own size, which passes on their relative error, not a multiple of it.
  """
  folder, expected = whole
  for i, name in enumerate(legs):
    found = go_on(tmp_path, name, LEG * (i + 1))
    assert found.start == LEG * i
  # Which tokens each step saw, in which places: sums of integers, exact.
  order = curve(tmp_path, "train/order")
  assert order == curve(folder, "train/order") and len(set(order)) == WHOLE
  for name in ("train/loss", "train/grad_norm", "validation/loss"):
    np.testing.assert_allclose(
      curve(tmp_path, name), curve(folder, name), rtol=4e-6, err_msg=name
    )
  if legs[0] == "4":
    first = [curve(x, "train/loss")[:LEG] for x in (tmp_path, folder)]
    assert first[0] == first[1]
  assert found.best[0] == expected.best[0]


def test_a_state_moves_between_meshes_bitwise(whole, tmp_path):
  """And a move there and back without a step changes nothing at all."""
  folder, expected = whole
  saved = go_on(tmp_path, "4", LEG).state
  for name in ("2", "fsdp 2, tensor 2"):
    moved = go_on(tmp_path, name, LEG)
    assert moved.start == LEG
    chex.assert_trees_all_equal(*jax.device_get((moved.state, saved)))
    embed = optax.tree.get(moved.state.opt_state, "mu")["embed"]
    cut, mesh = MESHES[name], MESHES[name].mesh()
    assert embed.sharding == cut.shardings({"embed": embed}, mesh)["embed"]
  found = go_on(tmp_path, "4", WHOLE)
  chex.assert_trees_all_equal(*jax.device_get((found.state, expected.state)))
  assert run.numbers(tmp_path) == run.numbers(folder)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mesh_that_does_not_divide_the_batch_is_refused(
  tmp_path, monkeypatch, accumulate
):
  """With the number of rows and of shards; the run goes on where it does."""
  go_on(tmp_path, "2", LEG, accumulate=accumulate)
  monkeypatch.setitem(MESHES, "8", layout(data=8))
  with pytest.raises(UserError, match=r"found 4 rows, expected a multiple of"):
    go_on(tmp_path, "8", WHOLE, accumulate=accumulate)
  assert kills.steps(tmp_path) == [LEG]
  found = go_on(tmp_path, "2", LEG + 1, accumulate=accumulate)
  assert found.start == LEG
