"""SmolLM2, converted to fill in masks, and taught to follow instructions.

A real next-token model gets a mask (`convert.converted`). First it has to learn
that all tokens see each other: it fills in masks of plain text (adapted). Then
it is fine-tuned as LLaDA is, prompts clean, answers masked (tuned): questions
about the Python reference, whose held-out answers have a loss, and lists of
words to be said backwards, which are right or wrong. Beside the second step
the model that it was learns the same rows by next tokens: as many parameters,
tokens and FLOPs.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import above, below, mean, paired
from experiments.studies import pictures
from experiments.studies.diffusion import bounds
from experiments.studies.diffusion.policies import fill
from experiments.studies.diffusion.study import (
  OfSeeds,
  Tiny,
  over_seeds,
)
from experiments.studies.lora.lora_verdicts import CLOSE
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data import examples, packing
from research.data.examples import Example
from research.data.sources import PydocTopics, Split, pydoc
from research.data.sources.synthetic import rng_of
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.diffusion.schedule import Linear
from research.diffusion.variants import AnyOrder
from research.generation.sampling import GREEDY
from research.interop import load
from research.interop.diffusion import from_autoregressive
from research.text import special_tokens
from research.training.objectives.objective import Batch, NextToken
from research.typing import Int, Params, UserError

CONVERTED, ADAPTED, TUNED = "converted", "adapted", "tuned"
STAGES = (CONVERTED, ADAPTED, TUNED)
AR, DIFFUSION = "next token", "diffusion"

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
    before = special_tokens.from_tokenizer(tokenizer).prompt(
      tokenizer.encode("Words:")
    )
    middle = tokenizer.encode(". Backwards:")
    rng, out = rng_of(self.seed, split), []
    while len(out) < count:
      chosen = rng.choice(known, self.words, replace=False).tolist()
      # A list's own sum says which split it is in.
      if (sum(chosen) % 5 == 0) == (split == "heldout"):
        parts = [(before + chosen + middle, False), (chosen[::-1], True)]
        out.append(examples.join(parts))
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructed(OfSeeds):
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
    passes: over what is held out, each with masks of its own.
    seeds: of the order of rows and of masks.
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

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns what each stage is worth, and plain text by two kinds."""
    del before, shared
    seed = self.seed(arm)
    loaded = load.load_model(self.name)
    words = loaded.tokenizer
    plain, unseen = self._plain(words), self._unseen(words)
    text = {AR: self._next_token(loaded, plain, unseen, seed)}

    model, params, spec = from_autoregressive.to_diffusion(
      loaded.model, loaded.params
    )
    common = dict(
      model=model,
      mask_id=spec.mask_id,
      noise="learned",
      spread="even",
      shift=True,
      rows=256,
    )
    objective = MaskedDiffusion(**common, schedule=Linear(high=1e-3))
    exact = AnyOrder(**common)
    heldout = self._heldout(words)
    lists = self.task.examples(words, "heldout", self.graded)

    def judged(params):
      return self._judged(exact, params, heldout, lists)

    # Without prompts all of a text is learned; so all pools are of one kind.
    out = {CONVERTED: judged(params)}
    text[DIFFUSION] = [self._loss(exact, params, unseen)[0]]
    pairs = ((plain, self.adapt), (self._instruction_batch(words), self.tune))
    for i, (stage, (pool, steps)) in enumerate(
      zip((ADAPTED, TUNED), pairs, strict=True)
    ):
      key = 2 * seed + i
      params = self.train.trained(objective, params, pool, steps, key)
      out[stage] = judged(params)
      if stage == ADAPTED:
        text[DIFFUSION].append(self._loss(exact, params, unseen)[0])
    return out | {"text": text}

  def _next_token(
    self, loaded: Any, plain: Batch, unseen: Sequence[Batch], seed: int
  ) -> list[float]:
    """Returns nats a token of plain text, before and after learning it."""
    objective = NextToken(model=loaded.model, rows=256)
    params = loaded.params
    out = [bounds.passes(objective, params, unseen, [None])[0]]
    params = self.train.trained(objective, params, plain, self.adapt, 2 * seed)
    out.append(bounds.passes(objective, params, unseen, [None])[0])
    return out

  def _plain(self, tokenizer: Any) -> Batch:
    found = examples.read(PydocTopics("train"), tokenizer)
    return self._pool([(found, 2 * self.pool)])

  def _unseen(self, tokenizer: Any) -> list[Batch]:
    """Returns rows of plain text of topics that no stage reads."""
    found = examples.read(PydocTopics("heldout"), tokenizer)
    return self._batches(self._packed(found))

  def _instruction_batch(self, tokenizer: Any) -> Batch:
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
      [e.loss_mask for e in found],
    )

  def _heldout(self, tokenizer: Any) -> list[Batch]:
    """Returns held-out answers, the last batch filled with nothing."""
    return self._batches(
      self._packed(self._questions("heldout").examples(tokenizer))
    )

  def _batches(self, examples: Any) -> list[Batch]:
    rows = [examples[i] for i in range(min(len(examples), self.heldout))]
    size = self.train.batch
    rows += [packing.padding_like(rows[0])] * (-len(rows) % size)
    return [_stacked(rows[i : i + size]) for i in range(0, len(rows), size)]

  def _judged(
    self,
    objective: Any,
    params: Params,
    batches: Sequence[Batch],
    lists: Sequence[Example],
  ) -> Row:
    """Returns the answers' loss, its error, and what is right."""
    loss, error = self._loss(objective, params, batches)
    got = self._answers(objective, params, lists)
    want = np.stack([e.tokens for e in lists])
    asked = lists[0].loss_mask
    return {
      "loss": loss,
      "error": error,
      "token": float((got == want)[:, asked].mean()),
      "right": float((got == want)[:, asked].all(1).mean()),
    }

  def _loss(
    self, objective: Any, params: Params, batches: Sequence[Batch]
  ) -> tuple[float, float]:
    keys = list(jax.random.split(jax.random.key(5), self.passes))
    return bounds.passes(objective, params, batches, keys)

  def _answers(
    self, objective: Any, params: Params, lists: Sequence[Example]
  ) -> Int[np.ndarray, "N T"]:
    """Returns the lists, what is asked filled in greedily, a place a call."""
    mask, asked = objective.mask_id, lists[0].loss_mask
    rows = np.stack([e.tokens for e in lists])
    noisy = np.where(asked, mask, rows).astype(np.int32)
    length = noisy.shape[1]
    options = SamplerConfig(mask_id=mask, length=length, block=length)
    denoiser = NoCache(model=objective.model, shift=True)
    return fill(denoiser, params, noisy, mask, options, GREEDY)[0]

  # --- what the rows say ---

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each stage, and for plain text by each kind."""
    lines = []
    for stage in STAGES:
      loss = self.mean_of(rows, stage, "loss")
      lines.append(
        {
          "stage": stage,
          "loss": loss,
          "words right %": 100 * self.mean_of(rows, stage, "token").value,
          "lists right %": 100 * self.mean_of(rows, stage, "right").value,
        }
      )
    for kind in (AR, DIFFUSION):
      for i, when in enumerate(("before", "after")):
        loss = self.mean_of(rows, "text", kind, i)
        lines.append({"stage": f"plain text by {kind}, {when}", "loss": loss})
    return lines

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D1 and D3, on a real model."""

    def lower(a, b):
      first, last = (over_seeds(rows, self.arms, s, "loss") for s in (a, b))
      said = f"{mean(first)}, then {mean(last)}"
      return said, above(paired(first, last))

    learned, tuned = lower(CONVERTED, ADAPTED), lower(ADAPTED, TUNED)
    first, last = (
      over_seeds(rows, self.arms, s, "right") for s in (ADAPTED, TUNED)
    )
    gain = paired(last, first)
    ar, bound = (
      over_seeds(rows, self.arms, "text", kind, 1) for kind in (AR, DIFFUSION)
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
        f"{mean(first)}, then {mean(last)} of {self.graded}",
        above(gain),
      ),
      Verdict(
        "half of the lists are right",
        f"{mean(last).times(100)}%",
        above(mean(last), 0.5),
      ),
      Verdict(
        "on plain text, after as many steps, it is within 2% of the next-token"
        " model that it was",
        f"{mean(bound)} against {mean(ar)} nats a token",
        below(paired(bound, [(1 + CLOSE) * x for x in ar])),
      ),
    ]

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves smollm2.png: loss and right words, by stage."""
    panels = {
      label: {stage: self.mean_of(rows, stage, name) for stage in STAGES}
      for name, label in (
        ("loss", "loss of held-out answers, nats a token"),
        ("token", "share of right words"),
      )
    }
    pictures.bar_panels(folder / "smollm2.png", title, panels, (9.0, 2.8))


def _stacked(rows: Sequence[Any]) -> Batch:
  return {k: jnp.asarray(np.stack([r[k] for r in rows])) for k in rows[0]}
