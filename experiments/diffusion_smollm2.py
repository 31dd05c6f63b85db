"""SmolLM2, converted to fill in masks, and taught to follow instructions.

A real next-token model gets a mask (`convert.converted`). First it has to learn
that all tokens see each other: it fills in masks of plain text (adapted). Then
it is fine-tuned as LLaDA is, prompts clean, answers masked (tuned): questions
about the Python reference, whose held-out answers have a loss, and lists of
words to be said backwards, which are right or wrong.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import diffusion_bounds
from experiments.claims import Verdict
from experiments.diffusion_policies import fill
from experiments.diffusion_study import Row, Rows, Tiny
from research.data import examples, packing, pydoc
from research.data.examples import Example
from research.data.sources import PydocTopics, Split
from research.data.synthetic import rng_of
from research.diffusion import convert
from research.diffusion.candidates import Options
from research.diffusion.denoiser import Whole
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.schedule import Linear
from research.diffusion.variants import AnyOrder
from research.interop import load
from research.nn.sampling import GREEDY
from research.training import plots
from research.training.objective import Batch
from research.typing import Int, Params, UserError

CONVERTED, ADAPTED, TUNED = "converted", "adapted", "tuned"
STAGES = (CONVERTED, ADAPTED, TUNED)

WORDS = (
  *("time", "year", "people", "way", "day", "man", "thing", "woman", "life"),
  *("child", "world", "school", "state", "family", "student", "group"),
  *("country", "problem", "hand", "part", "place", "case", "week", "company"),
  *("system", "program", "question", "work", "government", "number", "night"),
  *("point", "home", "water", "room", "mother", "area", "money", "story"),
  *("fact", "month", "lot", "right", "study", "book", "eye", "job", "word"),
)
"""Common nouns; those that are one token of the model's are used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backwards:
  """`Words: a b c. Backwards: c b a`, of words that are one token each.

  Attributes:
    words: of a list.
    seed: of the lists; held-out ones are none of the others.
  """

  words: int = 3
  seed: int = 0

  def examples(self, tokenizer: Any, split: Split, count: int) -> list[Example]:
    """Returns so many different lists; what is said backwards counts.

    Raises:
      UserError: fewer than 20 of the words are one token.
    """
    ids = [tokenizer.encode(f" {w}") for w in WORDS]
    known = [i[0] for i in ids if len(i) == 1]
    if len(known) < 20:
      raise UserError(
        f"Backwards: {len(known)} words are one token of this model, expected"
        " at least 20"
      )
    before, middle = (
      tokenizer.encode(text) for text in ("Words:", ". Backwards:")
    )
    rng, out = rng_of(self.seed, split), []
    while len(out) < count:
      chosen = rng.choice(known, self.words, replace=False).tolist()
      # A list's own sum says which split it is in.
      if (sum(chosen) % 5 == 0) == (split == "heldout"):
        parts = [(before + chosen + middle, False), (chosen[::-1], True)]
        out.append(examples.join(parts))
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructed:
  """The three stages of one model.

  Attributes:
    name: of the model, whatever `--model=` takes.
    task: what is graded.
    train: batch, rate and so on; its sizes are not used.
    length: tokens of a row; examples share rows, and do not see each other.
    adapt, tune: steps of each stage.
    pool: rows to draw from, of each kind.
    answer: characters of an answer, at most.
    graded: held-out lists.
    heldout: rows of held-out answers, at most.
    passes: over the held-out answers, each with masks of its own.
  """

  name: str = "smollm2-135m"
  task: Backwards = Backwards()
  train: Tiny = Tiny(batch=4, rate=2e-4, warmup=10, average=0.8, every=10)
  length: int = 128
  adapt: int = 40
  tune: int = 80
  pool: int = 256
  answer: int = 250
  graded: int = 64
  heldout: int = 32
  passes: int = 3

  def __post_init__(self):
    if self.passes < 2:
      raise UserError(f"Instructed: passes is {self.passes}, expected >= 2")

  @property
  def arms(self) -> list[str]:
    """One: a stage begins where the one before it ends."""
    return [self.name]

  def row(self, arm: str, before: Rows) -> Row:
    """Returns what each stage is worth."""
    del arm, before
    loaded = load.load_model(self.name)
    words = loaded.tokenizer
    model, params, spec = convert.converted(loaded.model, loaded.params)
    common = dict(
      model=model,
      mask_id=spec.mask_id,
      noise="learned",
      spread="even",
      shift=True,
      rows=256,
    )
    objective = MaskedDiffusion(**common, schedule=Linear(high=1e-3))
    # Without prompts all of a text is learned; so all pools are of one kind.
    plain, told = self._plain(words), self._told(words)

    heldout = self._heldout(words)
    lists = self.task.examples(words, "heldout", self.graded)

    def judged(params):
      return self._judged(AnyOrder(**common), params, heldout, lists)

    out = {CONVERTED: judged(params)}
    params = self.train.trained(objective, params, plain, self.adapt, 0)
    out[ADAPTED] = judged(params)
    params = self.train.trained(objective, params, told, self.tune, 1)
    return out | {TUNED: judged(params)}

  def _plain(self, tokenizer: Any) -> Batch:
    found = examples.read(PydocTopics("train"), tokenizer)
    return self._pool([(found, 2 * self.pool)])

  def _told(self, tokenizer: Any) -> Batch:
    questions = self._questions("train").examples(tokenizer)
    lists = self.task.examples(tokenizer, "train", 8 * self.pool)
    return self._pool([(questions, self.pool), (lists, self.pool)])

  def _questions(self, split: Split) -> pydoc.Questions:
    return pydoc.Questions(split, size=self.answer)

  def _pool(self, parts: Sequence[tuple[Sequence[Example], int]]) -> Batch:
    """Returns so many rows of each part, over again where there are fewer."""
    rows, rng = [], np.random.default_rng(0)
    for found, count in parts:
      some = self._packed(found)
      # The longest come first.
      order = rng.permutation(len(some)).tolist()
      rows += [some[order[i % len(some)]] for i in range(count)]
    return _stacked(rows)

  def _packed(self, found: Sequence[Example]) -> Any:
    return packing.pack(
      [e.tokens for e in found],
      self.length,
      packing.best_fit,
      [e.learned for e in found],
    )

  def _heldout(self, tokenizer: Any) -> list[Batch]:
    """Returns held-out answers, the last batch filled with nothing."""
    held = self._packed(self._questions("heldout").examples(tokenizer))
    rows = [held[i] for i in range(min(len(held), self.heldout))]
    size = self.train.batch
    rows += [packing.blank_like(rows[0])] * (-len(rows) % size)
    return [_stacked(rows[i : i + size]) for i in range(0, len(rows), size)]

  def _judged(
    self,
    objective: Any,
    params: Params,
    batches: Sequence[Batch],
    lists: Sequence[Example],
  ) -> Row:
    """Returns the answers' loss, its error, and what is right."""
    keys = list(jax.random.split(jax.random.key(5), self.passes))
    loss, error = diffusion_bounds.passes(objective, params, batches, keys)
    got = self._answers(objective, params, lists)
    want = np.stack([e.tokens for e in lists])
    asked = lists[0].learned
    return {
      "loss": loss,
      "error": error,
      "token": float((got == want)[:, asked].mean()),
      "right": float((got == want)[:, asked].all(1).mean()),
    }

  def _answers(
    self, objective: Any, params: Params, lists: Sequence[Example]
  ) -> Int[np.ndarray, "N T"]:
    """Returns the lists, what is asked filled in greedily, a place a call."""
    mask, asked = objective.mask_id, lists[0].learned
    rows = np.stack([e.tokens for e in lists])
    noisy = np.where(asked, mask, rows).astype(np.int32)
    length = noisy.shape[1]
    options = Options(mask_id=mask, length=length, block=length)
    denoiser = Whole(model=objective.model, shift=True)
    return fill(denoiser, params, noisy, mask, options, GREEDY)[0]

  # --- what the rows say ---

  def table(self, rows: Rows) -> list[dict[str, Any]]:
    """Returns a line for each stage."""
    row = rows[self.name]
    return [
      {
        "stage": stage,
        "loss": row[stage]["loss"],
        "+- (1 s.e.)": row[stage]["error"],
        "words right %": 100 * row[stage]["token"],
        "lists right %": 100 * row[stage]["right"],
      }
      for stage in STAGES
    ]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D3, on a real model."""
    row = rows[self.name]

    def lower(a, b):
      gain = row[a]["loss"] - row[b]["loss"]
      error = math.hypot(row[a]["error"], row[b]["error"])
      said = f"{row[a]['loss']:.3f}, then {row[b]['loss']:.3f} ± {error:.3f}"
      return said + " (1 s.e.)", gain > 2 * error

    learned, tuned = lower(CONVERTED, ADAPTED), lower(ADAPTED, TUNED)
    first, last = row[ADAPTED]["right"], row[TUNED]["right"]
    apart = math.sqrt(
      (first * (1 - first) + last * (1 - last) + 0.25 / self.graded)
      / self.graded
    )
    return [
      Verdict(
        "some plain text teaches a converted model to fill in masks: the loss"
        " of held-out answers, nats a token",
        *learned,
      ),
      Verdict("fine-tuning lowers it further", *tuned),
      Verdict(
        "fine-tuning makes it follow instructions: more lists are right",
        f"{first:.0%}, then {last:.0%} of {self.graded}",
        last - first > 2 * apart,
      ),
      Verdict("half of the lists are right", f"{last:.0%}", last >= 0.5),
    ]

  def draw(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves smollm2.png: loss and right words, by stage."""
    drawn, row = plots.figure(9, 2.8), rows[self.name]
    for axes, name, label in zip(
      drawn.subplots(1, 2),
      ("loss", "token"),
      ("loss of held-out answers, nats a token", "share of right words"),
      strict=True,
    ):
      axes.barh(
        STAGES,
        [row[stage][name] for stage in STAGES],
        color=plots.style(0)["color"],
      )
      axes.invert_yaxis()
      axes.set(xlabel=label)
    drawn.suptitle(title)
    plots.save(drawn, folder / "smollm2.png")


def _stacked(rows: Sequence[Any]) -> Batch:
  return {k: jnp.asarray(np.stack([r[k] for r in rows])) for k in rows[0]}
