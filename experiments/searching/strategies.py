"""Searches whose settings are texts, or which read answers.

A run's task and tokenizer make one of `research.search.strategies` of them; all
others stand in a configuration as they are.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from experiments.searching.context import Context
from research.prm.scores.aggregate import Aggregate
from research.search.engine import Path
from research.search.step_search import Strategy
from research.search.strategies.adaptive import Adaptive
from research.search.strategies.allocation import (
  AdaptiveAllocation,
  Agreement,
  MeanScore,
)
from research.search.strategies.budget_forcing import BudgetForcing
from research.search.strategies.rounds import HistorySelector, LastTries, Rounds
from research.typing import UserError


@runtime_checkable
class TextStrategy(Protocol):
  """A search of texts."""

  def of_tokens(self, context: Context) -> Strategy:
    """Returns the search of tokens."""
    ...


SearchStrategy = Strategy | TextStrategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveVotes:
  """`strategies.Adaptive` over the answers that the task's verifier extracts.

  Attributes:
    round: samples of a round.
    max_samples: samples of a problem, a multiple of `round`.
    confidence: probability at which a vote is decided.
  """

  round: int = 4
  max_samples: int = 32
  confidence: float | int = 0.95

  def of_tokens(self, context: Context) -> Strategy:
    return Adaptive(
      answer=context.answer,
      round=self.round,
      max_samples=self.max_samples,
      confidence=self.confidence,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocatedSamples:
  """`strategies.AdaptiveAllocation` over the problems of a batch.

  Attributes:
    copies: mean samples of a problem.
    first: samples of each problem from which its difficulty is predicted.
    scores: makes one score of the verifier's for a solution, whose mean
      predicts it; None: the agreement of answers does.
  """

  copies: int = 16
  first: int = 4
  scores: Aggregate | None = None

  @property
  def needs_scores(self) -> bool:
    """Whether the verifier's scores predict difficulty."""
    return self.scores is not None

  def of_tokens(self, context: Context) -> Strategy:
    predictor = (
      Agreement(context.answer)
      if self.scores is None
      else MeanScore(self.scores)
    )
    return AdaptiveAllocation(
      predictor=predictor, copies=self.copies, first=self.first
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetForcedText:
  """`strategies.BudgetForcing` by texts.

  Attributes:
    copies: paths of a problem.
    min_tokens, max_tokens: tokens that a path thinks at least and at most.
    wait: in place of an end that comes too early.
    max_waits: how often an end is replaced, at most.
    answer: leads to the answer after `max_tokens` tokens.
  """

  copies: int = 1
  min_tokens: int = 0
  max_tokens: int = 2**30
  wait: str = ""
  max_waits: int = 2
  answer: str = ""

  def of_tokens(self, context: Context) -> Strategy:
    encode = context.tokenizer.encode
    return BudgetForcing(
      copies=self.copies,
      min_tokens=self.min_tokens,
      max_tokens=self.max_tokens,
      wait=encode(self.wait) if self.wait else (),
      max_waits=self.max_waits,
      answer=encode(self.answer) if self.answer else (),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundsOfText:
  """`strategies.Rounds` whose prompts show solutions in a template.

  Attributes:
    template: prompt that asks the question again, with `{question}` and
      `{solutions}` in it.
    solution: template of each solution, with `{solution}` in it.
    shown: `LastTries()` for revision, `Subsets()` for RSA.
    width, rounds, every, seed: see `strategies.Rounds`.
  """

  template: str = (
    "{question}\n\nEarlier solutions, which may be wrong:\n{solutions}\nSolve"
    " it again."
  )
  solution: str = "{solution}\n"
  shown: HistorySelector = LastTries()
  width: int = 4
  rounds: int = 4
  every: bool = True
  seed: int = 0

  def __post_init__(self):
    for name, words in (
      ("template", ("question", "solutions")),
      ("solution", ("solution",)),
    ):
      text = getattr(self, name)
      if missing := [word for word in words if f"{{{word}}}" not in text]:
        raise UserError(
          f"RoundsOfText.{name}: found {text!r:.60} without {{{missing[0]}}}."
        )

  def of_tokens(self, context: Context) -> Strategy:
    def rewrite(prompt: Sequence[int], shown: Sequence[Path]) -> Sequence[int]:
      del prompt
      texts = [
        filled(self.solution, solution=context.text(path)) for path in shown
      ]
      question = context.problems[shown[0].problem].prompt
      asked = filled(self.template, question=question, solutions="".join(texts))
      return context.prompting(context.tokenizer, asked)

    return Rounds(
      rewrite=rewrite,
      shown=self.shown,
      width=self.width,
      rounds=self.rounds,
      every=self.every,
      seed=self.seed,
    )


def filled(template: str, **texts: str) -> str:
  """Returns a template with texts in place of `{name}`.

  Texts are not searched for names in turn: a model may write them.
  """
  names = "|".join(texts)
  return re.sub(rf"\{{({names})\}}", lambda match: texts[match[1]], template)
