"""The study of vision language models: arms that share towers and questions.

Every arm of a seed starts from the same encoder and the same language model
(`base`), with a new connector, and is judged by answers to scenes that nobody
has seen, beside those of the same model without images, with other scenes'
images, and of rules that read a part of the question.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.core import cli
from experiments.core.stats import mean
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from experiments.studies.vlm import base
from experiments.studies.vlm.arms import Arm, linear
from experiments.studies.vlm.base import Tiny
from research import tree, weights
from research.training.objectives.objective import Batch
from research.training.reports import plots
from research.typing import Params
from research.vlm.answering import Answers
from research.vlm.evaluation.report import BLIND, REAL, SHUFFLED
from research.vlm.objective import WithImages
from research.vlm.scenes.captions import ShapeCaptions
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.shapes import Shapes

COLUMNS = {
  "score": "mean",
  "blind": "blind",
  "shuffled": "shuffled",
  "margin": "above the best baseline",
}
"""Fields of a row, shares of right answers, and their titles in the table."""


@dataclasses.dataclass(frozen=True)
class Shared:
  """What arms share.

  Attributes:
    folder: of the study.
    tokenizer: of all models.
    samples: with their images.
    pools: rows of all samples, by the soft tokens of an image.
    towers: trained ones, by seed.
  """

  folder: pathlib.Path
  tokenizer: Any
  samples: list[Sample]
  pools: dict[int, Batch] = dataclasses.field(default_factory=dict)
  towers: dict[int, Params] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(protocol.Study):
  """Arms that learn to answer the same questions about shapes.

  Attributes:
    variants: how, an arm each for every seed.
    rule: rows by arm, seeds -> verdicts.
    tiny: the models.
    kinds: of questions.
    groups: kinds or strata ("exists/both") whose mean is an arm's score.
    rows: training samples, of questions and of captions.
    heldout: number of held-out samples.
    base_steps: that encoder (on captions) and language model (on texts) are
      trained before.
    seeds: of weights, order and towers.
  """

  variants: Sequence[Arm]
  rule: Callable[[Rows, int], list[Verdict]]
  tiny: Tiny = Tiny()
  kinds: tuple[str, ...] = ("count", "exists", "colour")
  groups: tuple[str, ...] = ("count", "exists/both", "colour")
  rows: int = 16_384
  heldout: int = 384
  base_steps: int = 2000
  seeds: int = 3

  def __post_init__(self):
    protocol.distinct([x.name for x in self.variants], "Study.variants")

  @property
  def arms(self) -> list[str]:
    """One for each seed and variant."""
    seeds = range(self.seeds)
    return [f"{x.name}, seed {s}" for s in seeds for x in self.variants]

  def settings(self, arm: str) -> str:
    """Returns the setup and one arm: others, and seeds, may come and go."""
    setup = protocol.describe(self, "variants", "rule", "seeds")
    return f"{setup}, {protocol.describe(self._variant(arm)[0])}"

  def _variant(self, arm: str) -> tuple[Arm, int]:
    name, seed = arm.rsplit(", seed ", 1)
    (found,) = (x for x in self.variants if x.name == name)
    return found, int(seed)

  def task(self, **changes: Any) -> Shapes:
    """Returns the task with some fields changed."""
    fields = dict(kinds=self.kinds, size=self.tiny.size, count=self.rows)
    return Shapes(**(fields | changes))

  def prepare(self, workdir: pathlib.Path) -> Shared:
    """Returns a tokenizer of the task's texts, and drawn samples."""
    return Shared(workdir, self.tiny.tokenizer(self.task()), self.task()[:])

  def run(self, arm: str, before: Rows, shared: Shared) -> Row:
    """Returns what the arm's answers are worth, and its losses by stage."""
    del before
    variant, seed = self._variant(arm)
    tiny, connector = self.tiny, variant.connector
    loaded = tiny.load(
      connector, shared.tokenizer, seed, variant.mask, variant.features
    )
    params = {**loaded.params, **self._towers(seed, shared)}
    pool = self.training_rows(variant, shared)
    objective = WithImages(model=loaded.model)
    losses = []
    for stage in variant.stages:
      params, loss = tiny.trained(objective, params, pool, stage, seed)
      losses.append(loss)
    asked = self.task(split="heldout", count=self.heldout)
    answers = Answers(questions=tiny.questions(connector, asked))
    report = answers(dataclasses.replace(loaded, params=params)).to_json()
    patterns = [stage.trainable for stage in variant.stages]
    trained, _ = tree.partition(params, "|".join(patterns))
    margins = [report[x]["margin"]["difference"] for x in self.groups]
    return {
      "answers": report,
      "losses": losses,
      "tokens": tiny.tokens(connector),
      "trained": weights.count(trained),
      "score": _mean(report, self.groups, REAL),
      "blind": _mean(report, self.groups, BLIND),
      "shuffled": _mean(report, self.groups, SHUFFLED),
      "margin": float(np.mean(margins)),
    }

  def training_rows(self, variant: Arm, shared: Shared) -> Batch:
    """Returns what an arm learns from, as one batch."""
    tokens = self.tiny.tokens(variant.connector)
    if tokens not in shared.pools:
      questions = self.tiny.questions(variant.connector, shared.samples)
      rows = questions.rows(shared.tokenizer)
      shared.pools[tokens] = base.pool_of([rows[i] for i in range(len(rows))])
    pool = shared.pools[tokens]
    return {**pool, "pixels": variant.images(pool["pixels"])}

  def _towers(self, seed: int, shared: Shared) -> Params:
    """Returns a seed's encoder and language model, from the folder if there."""
    if seed not in shared.towers:
      shared.towers[seed] = self._stored_towers(seed, shared)
    return shared.towers[seed]

  def _stored_towers(self, seed: int, shared: Shared) -> Params:
    path = shared.folder / f"base_{seed}.npz"
    without = ("variants", "rule", "seeds", "groups", "heldout")
    settings = protocol.describe(self, *without)
    connector = linear(1, self.tiny.width)
    if not path.exists():
      cli.say(f"training the towers of seed {seed}")
      captions = ShapeCaptions(size=self.tiny.size, count=self.rows)
      made, losses = base.base_towers(
        self.tiny,
        connector,
        self.task(),
        captions[:],
        shared.tokenizer,
        self.base_steps,
        seed,
      )
      cli.say(f"losses: {cli.plain(losses)}")
      found = dict(tree.flatten_paths(made))
      np.savez(path, **found, settings=np.array(settings))
    saved = np.load(path, allow_pickle=False)
    protocol.check_settings(path, str(saved["settings"]), settings)
    loaded = self.tiny.load(connector, shared.tokenizer, seed)
    like = {name: loaded.params[name] for name in ("vision", "language")}
    return tree.map_paths(lambda name, _: jnp.asarray(saved[name]), like)

  def summary(self, row: Row) -> str:
    """Returns the score, and how far above the best baseline it is."""
    return (
      f"{100 * row['score']:.1f}% right, {100 * row['margin']:.1f} points above"
      " the best baseline"
    )

  # --- what the rows say ---

  def _found(self, rows: Rows, variant: Arm) -> list[Row]:
    arms = [f"{variant.name}, seed {s}" for s in range(self.seeds)]
    return [rows[arm] for arm in arms if arm in rows]

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each arm, in per cent of right answers."""
    out = []
    for variant in self.variants:
      found = self._found(rows, variant)
      if not found:
        continue
      line = {
        "arm": variant.name,
        "soft tokens": found[0]["tokens"],
        "trained": found[0]["trained"],
      }
      for group in self.groups:
        scores = [_score(x["answers"], group, REAL) for x in found]
        line[group] = mean(scores).times(100)
      for field, title in COLUMNS.items():
        line[title] = mean([x[field] for x in found]).times(100)
      out.append(line)
    return out

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the rule says."""
    return self.rule(rows, self.seeds)

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves scores.png: each arm's score, and the same model's when blind."""
    drawn = plots.figure(8, 0.4 * len(self.variants) + 1.5)
    axes = drawn.add_subplot()
    for k, (field, name) in enumerate((("score", REAL), ("blind", BLIND))):
      points = [
        (100 * row[field], i)
        for i, variant in enumerate(self.variants)
        for row in self._found(rows, variant)
      ]
      axes.plot(*zip(*points, strict=True), "ox"[k], label=name, **_colour(k))
    axes.set_yticks(range(len(self.variants)), [x.name for x in self.variants])
    axes.invert_yaxis()
    axes.set(xlabel="right answers, %", title=title)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "scores.png")


def _score(report: Mapping[str, Any], group: str, system: str) -> float:
  return report[group]["systems"][system]["score"]


def _mean(
  report: Mapping[str, Any], groups: Sequence[str], system: str
) -> float:
  return float(np.mean([_score(report, x, system) for x in groups]))


def _colour(k: int) -> dict[str, Any]:
  return {"color": plots.style(k)["color"]}
