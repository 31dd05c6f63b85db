"""Runs over batches of several shapes: a program for each, and no other."""

import dataclasses
import json
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.data import bucketing
from research.data.bucketing import BucketRows
from research.training import loop, state
from research.training.step import make_train_step
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Units:
  """Units of `rows` rows; those with views share these."""

  rows: int
  length: int
  views: int

  def __len__(self):
    return 12

  def __getitem__(self, index):
    rng = np.random.default_rng([range(12)[index], self.length])
    tokens = rng.integers(0, 9, (self.rows, self.length)).astype(np.int32)
    used = np.arange(self.length) < rng.integers(1, self.length + 1)
    unit = {
      "tokens": tokens,
      "segments": np.where(used, 0, -1).astype(np.int32) + 0 * tokens,
      "weights": (used + 0 * tokens).astype(np.float32),
    }
    if self.views:
      shape = 1, self.views, 2, 2, 3
      unit["pixels"] = rng.integers(0, 256, shape, np.uint8)
    return unit


BUCKETS = (
  BucketRows(Units(1, 4, 0), 4),
  BucketRows(Units(2, 6, 3), 2),
  BucketRows(Units(1, 9, 2), 4),
)


@dataclasses.dataclass(frozen=True)
class Guess:
  """A token from the token and the rows' pixels; compiles quickly."""

  def __call__(self, params, batch, key):
    x = params["table"][batch["tokens"]]
    if "pixels" in batch:
      light = batch["pixels"].astype(jnp.float32).mean((1, 2, 3, 4)) / 255
      shared = jnp.repeat(light, len(x) // len(light))
      x = x + params["light"] * shared[:, None]
    error = (x - batch["tokens"]) ** 2 * batch["weights"]
    return error.sum(), batch["weights"].sum(), {}


PARAMS = {"table": jnp.zeros(9), "light": jnp.zeros(())}


def run(workdir, steps, objective=Guess(), training=None, **changes):
  tx = optax.adam(0.1)
  return loop.fit(
    objective,
    tx,
    state.create(PARAMS, ".", tx),
    bucketing.training(BUCKETS, seed=3) if training is None else training,
    loop.TrainConfig(steps=steps, accumulate=2, **changes),
    workdir=workdir,
    evaluations={"validation": bucketing.evaluation(BUCKETS)},
  )


def records(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def compilations(caplog, name):
  """Returns how often JAX says that it compiled a function."""
  return sum(
    record.getMessage().startswith(f"Compiling jit({name})")
    for record in caplog.records
  )


def test_as_many_programs_as_buckets(tmp_path, caplog):
  """Whatever the order and the number of steps, by JAX's own account."""
  with jax.log_compiles(), caplog.at_level(logging.INFO):
    run(tmp_path, 20)
  found = records(tmp_path)
  sizes = {r["train/tokens"] for r in found if "train/tokens" in r}
  assert len(sizes) > 3  # of tokens that are no padding
  assert compilations(caplog, "update") == len(BUCKETS)
  assert compilations(caplog, "step") == len(BUCKETS)  # of the evaluation
  (cost,) = [r for r in found if "compile/programs" in r]
  assert cost["compile/programs"] == len(BUCKETS)
  for rows in ("int32[4, 4]", "int32[4, 6]", "int32[4, 9]"):
    (line,) = [
      record.getMessage()
      for record in caplog.records
      if record.getMessage().startswith("Compiled the step for")
      and f"'tokens': '{rows}'" in record.getMessage()
    ]
    assert "flops" in line


@pytest.mark.slow
def test_tokens_are_those_without_padding(tmp_path):
  out = run(tmp_path, 8)
  batches = bucketing.training(BUCKETS, seed=3)
  expected = [
    (batch["segments"] >= 0).sum()
    for batch, _ in zip(batches, range(8), strict=False)
  ]
  found = [r["train/tokens"] for r in records(tmp_path) if "train/tokens" in r]
  assert found == expected
  steps = out.seconds["step"] + out.seconds["data"]
  assert out.tokens_per_s == pytest.approx(sum(expected) / steps)


@pytest.mark.slow
def test_eight_steps_are_three_and_five(tmp_path):
  """Bitwise: the schedule of buckets goes on where it was."""
  whole = run(tmp_path / "whole", 8, save_every=3)
  run(tmp_path / "parts", 3)
  parts = run(tmp_path / "parts", 8)
  chex.assert_trees_all_equal(whole.state, parts.state)
  losses = [
    [r["train/loss"] for r in records(tmp_path / name) if "train/loss" in r]
    for name in ("whole", "parts")
  ]
  assert losses[0] == losses[1] and len(losses[0]) == 8


class Undeclared:
  """Batches of which one has a shape that no bucket has."""

  shapes = bucketing.training(BUCKETS).shapes

  def __iter__(self):
    batches = iter(bucketing.training(BUCKETS, seed=3))
    yield next(batches)
    yield {k: x[:2] for k, x in next(batches).items()}


@pytest.mark.slow
def test_a_shape_of_no_bucket_is_an_error(tmp_path, caplog):
  with jax.log_compiles(), pytest.raises(UserError, match="found .*int32") as e:
    run(tmp_path, 5, training=Undeclared())
  assert "\nexpected one of\n{'segments': 'int32[4, 4]'" in str(e.value)
  assert compilations(caplog, "update") == len(BUCKETS)


def test_a_bucket_that_microbatches_do_not_divide_is_an_error(tmp_path):
  buckets = (BUCKETS[0], BucketRows(Units(2, 6, 3), 1))
  with pytest.raises(UserError, match="batch 'pixels' of 1 rows"):
    run(tmp_path, 2, training=bucketing.training(buckets))


def test_microbatches_are_rows_with_the_views_that_they_share():
  """The gradient is that of the whole batch."""
  (batch,) = bucketing.evaluation([BucketRows(Units(3, 6, 3), 12)])[:1]
  tx = optax.sgd(1.0)
  found = []
  for accumulate in (1, 2, 4):
    step = make_train_step(Guess(), tx, accumulate)
    after, metrics = jax.jit(step)(
      state.create(PARAMS, ".", tx), batch, jax.random.key(0)
    )
    found.append((after.trainable, metrics["loss"], metrics["tokens"]))
  for other in found[1:]:
    chex.assert_trees_all_close(other, found[0], rtol=1e-5)
