"""Optimizers' configurations: every one builds and moves weights."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.core import config
from research import weights
from research.optim import optim
from research.training import aot, state, step
from research.typing import UserError
from tests.support_lora import lora

HEAD = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'models/smollm2_135m.gin'
include 'data/pydoc.gin'
include 'optim/{name}.gin'
from experiments.core import experiment
STEPS = 6
LEARNING_RATE = 1e-2
WARMUP = 1
"""
NAMES = sorted(p.stem for p in config.CONFIGS.glob("optim/*.gin"))
GIVEN = {
  "adamw_stages": ["LATER_RATE=5e-3", "LATER_STEP=3"],
  "by_tower": ["VISION_RATE=1e-2"],
  "rsqrt_by_tower": ["VISION_WARMUP=1"],
  "qgalore_cosine": ["GROUP=8"],
  "relora": ["RESTART=2", "REWARM=1"],
}


FINITE = [
  name
  for name in NAMES
  if "WARMUP = " in (text := (config.CONFIGS / f"optim/{name}.gin").read_text())
  and "STEPS" in text
  # A rate without an end, and those whose parts are required.
  and name not in ("schedule_free", "adamw_stages", "relora")
]


def _short(name, steps, extra=(), own=""):
  text = HEAD.format(name=name).replace("STEPS = 6", f"STEPS = {steps}")
  text = text.replace("WARMUP = 1\n", own)
  rank = ["RANK=2"] if "RANK" in text_of(name) else []
  return text, [*GIVEN.get(name, []), *rank, *extra]


@pytest.mark.parametrize("steps", [1, 2, 5, 7])
@pytest.mark.parametrize("name", FINITE)
@pytest.mark.cover(1)
def test_a_default_warm_up_fits_into_a_short_run(name, steps, tmp_path, capsys):
  text, bindings = _short(name, steps)
  default = int(re.search(r"WARMUP = (\d+)", text_of(name)).group(1))
  read = config.parse(text, bindings)
  warned = f"WARMUP: {steps // 2} steps instead of {default}"
  assert (warned in capsys.readouterr().err) == (steps <= default)
  # The run's own text is that of the shorter one.
  kept = steps // 2 if steps <= default else default
  assert re.search(rf"^WARMUP = {kept}$", read.text, re.MULTILINE)
  assert config.parse(read.text).text == read.text
  if steps > default:
    return
  # What the user has set stays, on the command line and in a file.
  with pytest.raises(UserError, match="steps of warm-up"):
    config.parse(text, [*bindings, f"WARMUP={default}"])
  file = tmp_path / "mine.gin"
  file.write_text(_short(name, steps, own=f"WARMUP = {default}\n")[0])
  with pytest.raises(UserError, match="steps of warm-up"):
    config.read(str(file), bindings)


def test_decay_and_warm_up_share_a_short_run(capsys):
  text, bindings = _short("adamw_wsd", 40)
  text = text.replace("STEPS = 40", "STEPS = 40\nDECAY_STEPS = 30")
  read = config.parse(text, bindings)
  assert "WARMUP = 12\n" in read.text  # 50 * 20 / 80
  assert "DECAY_STEPS = 7\n" in read.text  # 30 * 20 / 80
  assert capsys.readouterr().err.count("instead of") == 2


class Product:
  """Squared errors of a stack of two adapted matrices, and an embedding."""

  def __call__(self, params, batch, key):
    w = params["run0"]["layer0"]["attention"]["q"]
    x = batch["x"]
    for layer in range(2):
      one = jax.tree.map(lambda leaf, n=layer: leaf[n], w)
      x = jnp.tanh(x @ weights.dense(one))
    tower = params.get("vision", params)
    error = ((x @ tower["embed"].T - batch["y"]) ** 2).sum()
    return error, jnp.float32(len(x)), {}


def params(adapted, towers=False):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.float32(rng.normal(size=shape))

  q = draw(2, 8, 8)
  if adapted:
    q = lora(q, draw(2, 2, 8) / 3, jnp.zeros((2, 2, 8)), 2.0)
  embed = {"embed": draw(5, 8)}
  layers = {"run0": {"layer0": {"attention": {"q": q}}}}
  return layers | ({"vision": embed} if towers else embed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(18)
def test_optimizers_lower_a_loss(name):
  text = HEAD.format(name=name)
  rank = ["RANK=2"] if "RANK" in text_of(name) else []
  made = config.parse(text, [*GIVEN.get(name, []), *rank]).experiment
  alone = ("lora", "riemannian", "relora")
  adapted = name.startswith(alone)
  start = state.create(
    params(adapted, towers=name.endswith("by_tower")),
    "/trained/" if adapted else ".",
    made.optimizer,
    transformed=made.transformed,
  )
  rng = np.random.default_rng(1)
  batch = {"x": np.float32(rng.normal(size=(4, 8)))}
  batch["y"] = np.float32(rng.normal(size=(4, 5)))
  update, _ = aot.compile_steps(
    step.make_train_step(Product(), made.optimizer),
    start,
    [batch],
    jax.random.key(0),
    made.state_transforms,
  )
  moving, frozen, losses = start, start.frozen, []
  for _ in range(6):
    moving, metrics = update(
      without_frozen(moving), frozen, batch, jax.random.key(0)
    )
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  assert np.isfinite(losses).all()
  assert any(x.split("/")[0] == "learning_rate" for x in metrics)


PLAIN = [
  "experiment.Experiment.optimizer=@optim.adamw()",
  "optim.adamw.learning_rate={schedule}",
]
"""Of a stage that trains one tower: an optimizer without groups."""


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
  "name, given, schedule, rate, decay",
  [
    (
      "by_tower",
      "VISION_RATE = 1e-2\nWEIGHT_DECAY = 0.5\n",
      "@optim.cosine()",
      optim.cosine(1e-2, 6, warmup=1, final=0.0),
      0.5,
    ),
    (
      "rsqrt_by_tower",
      "VISION_WARMUP = 1\n",
      "@optim.rsqrt()",
      optim.rsqrt(1e-2, warmup=1),
      0.0,
    ),
  ],
  ids=["by_tower", "rsqrt_by_tower"],
)
def test_towers_decay_and_are_clipped_together(
  name, given, schedule, rate, decay, plain
):
  """As optax' AdamW behind one norm, of towers at the same rate."""
  lines = [x.format(schedule=schedule) for x in PLAIN] if plain else []
  made = config.parse(HEAD.format(name=name) + given, lines).experiment
  want = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=decay)
  )
  start = params(False, towers=True)
  found = []
  for tx in (made.optimizer, want):
    now, moments = start, tx.init(start)
    for size in (1.0, 100.0, 1.0):
      grads = jax.tree.map(lambda x, n=size: n * jnp.cos(x), start)
      updates, moments = tx.update(grads, moments, now)
      now = optax.apply_updates(now, updates)
    found.append(now)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), *found
  )


def without_frozen(at):
  return state.TrainState(
    at.step, at.trainable, None, at.opt_state, at.ema, at.transformed
  )


def text_of(name):
  found = (config.CONFIGS / "optim" / f"{name}.gin").read_text()
  included = [x for x in NAMES if f"include 'optim/{x}.gin'" in found]
  return found + "".join(map(text_of, included))
