"""The run that is killed: tiny, but with everything that a run saves.

An embedding and a head with noise from the step's key, AdamW with a schedule,
a moving average, shuffled text, evaluations, and a checkpoint a step.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.data import pipeline
from research.data.sources import synthetic
from research.optim import optim
from research.training import loop, state
from research.training.checkpoints.workdir import claim_workdir
from research.training.reports import metrics

VOCAB, WIDTH, STEPS = 32, 8, 12
CONFIG = "# what a kill test runs\n"
DATA = pipeline.Pipeline(
  source=synthetic.Markov(vocab=VOCAB, length=24, count=32),
  length=16,
  batch_size=4,
  seed=3,
)
PLAN = loop.TrainConfig(
  steps=STEPS,
  seed=5,
  average=0.9,
  eval_every=3,
  save_every=1,
  keep=2,
  keep_every=5,
)


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Predicts a token from the one before, through noise."""

  def __call__(self, params, batch, key):
    tokens = batch["tokens"]
    x = params["embed"][tokens[:, :-1]]
    if key is not None:
      x = x * jax.random.bernoulli(key, 0.9, x.shape)
    logits = x @ params["head"] + params["big"][0, 0]
    found = jax.nn.log_softmax(logits)
    losses = -jnp.take_along_axis(found, tokens[:, 1:, None], -1)
    # Which tokens, in which places: tells the batches apart.
    order = (
      tokens * jnp.arange(1, tokens.size + 1).reshape(tokens.shape)
    ).sum()
    metrics = {"order": order.astype(jnp.float32)}
    return losses.sum(), jnp.float32(losses.size), metrics


def params(big: int) -> dict[str, Any]:
  """Returns first weights.

  Args:
    big: floats, in thousands, that are saved and hardly used.
  """
  rng = np.random.default_rng(0)
  sizes = dict(embed=(VOCAB, WIDTH), head=(WIDTH, VOCAB), big=(big, 1000))
  return {
    name: jnp.asarray(0.3 * rng.standard_normal(size), jnp.float32)
    for name, size in sizes.items()
  }


def fit(workdir: pathlib.Path, big: int = 1, **changes: Any) -> loop.Outcome:
  """Begins or resumes the run; returns its outcome.

  Args:
    workdir: of the run.
    big: see `params`.
    **changes: fields of `PLAN`.
  """
  tx = optim.adamw(optim.cosine(1e-2, STEPS, 2), weight_decay=0.1)
  start = state.create(params(big), ".", tx, average=True)
  return loop.fit(
    Pairs(),
    tx,
    start,
    DATA.training(None),
    dataclasses.replace(PLAN, **changes),
    workdir=claim_workdir(workdir, CONFIG),
    evaluations={"validation": DATA.evaluation(None, 2)},
  )


def digest(found: Any) -> str:
  """Returns a hash of every bit of a state."""
  out = hashlib.sha256()
  for path, x in jax.tree_util.tree_leaves_with_path(found):
    out.update(f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}".encode())
    out.update(np.asarray(x).tobytes())
  return out.hexdigest()


def numbers(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns what metrics.jsonl says, but for what is no function of the run."""
  rows = [
    {
      k: v
      for k, v in row.items()
      if k.split("/")[0] in ("step", "train", "validation")
      and k not in ("train/seconds", "train/slow_step")
    }
    for row in metrics.read_jsonl(workdir / "metrics.jsonl")
  ]
  return [row for row in rows if len(row) > 1]


def main(workdir: pathlib.Path, big: int) -> None:
  """Runs, and leaves what it came to in a file."""
  outcome = fit(workdir, big)
  result = dict(
    state=digest(outcome.state),
    numbers=numbers(workdir),
    best=outcome.best,
    steps=sorted(
      int(p.name)
      for p in (workdir / "checkpoints").iterdir()
      if p.name.isdigit()
    ),
  )
  (workdir / "done.json").write_text(json.dumps(result))
