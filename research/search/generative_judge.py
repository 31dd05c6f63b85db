r"""A language model that writes a critique of each step, as a verifier.

GenPRM (Zhao et al. 2025, arXiv:2504.00891) analyses the newest step in a chat
and ends in \boxed{Yes} or \boxed{No}; ThinkPRM (Khalifa et al. 2025,
arXiv:2504.16828) verifies all steps in one chain, \boxed{correct} or
\boxed{incorrect} after each. A step's score is the mean over several critiques
of the chance that it is right: 0 or 1 by the verdict that was written (votes),
or what the model gives the two words there. Code in a critique is text, and so
is what it says that the code printed: nothing runs it.
"""

import bisect
import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from research.generation import generate
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.generation.stepwise import Stepwise
from research.nn.flops import Causal, ModelCost, model_cost
from research.nn.transformer import Transformer
from research.prm.formats import genprm, thinkprm
from research.prm.model import GenerativeReward
from research.ranges import PositiveInt, Ranged, Share
from research.rounding import next_power_of_two
from research.search import ledger as ledgers
from research.search.ledger import Ledger
from research.search.policy import Path, steps_of
from research.search.uncached_verifier import UncachedVerifier
from research.typing import Float, Int, Params

Conversation = Sequence[tuple[str, str]]
"""(role, text) of each turn; the judge writes the next one."""


class Decision(NamedTuple):
  """A verdict that was written.

  Attributes:
    right: what it says.
    at: index of its word in the critique.
  """

  right: bool
  at: int


@runtime_checkable
class JudgeFormat(Protocol):
  """What a judge is shown, and where it decides."""

  def conversation(
    self, problem: str, steps: Sequence[str], critiques: Sequence[str]
  ) -> Conversation:
    """Returns what asks for a critique of the last step.

    Args:
      steps: texts of the steps so far, at least one.
      critiques: one for each step but the last.
    """
    ...

  def decision(self, critique: str, steps: int) -> Decision | None:
    """Returns the verdict on the last of so many steps, or None for none."""
    ...


@dataclasses.dataclass(frozen=True)
class GenPRMChat:
  """A turn a step, each answered by its critique; `prm.formats.genprm`.

  Attributes:
    system: the system prompt.
  """

  system: str = genprm.SYSTEM

  def conversation(
    self, problem: str, steps: Sequence[str], critiques: Sequence[str]
  ) -> Conversation:
    """Returns the chat up to the last step; see `JudgeFormat`."""
    return genprm.turns(self.system, problem, steps, critiques)

  def decision(self, critique: str, steps: int) -> Decision | None:
    """Returns the last output's verdict; see `JudgeFormat`."""
    del steps
    verdict = genprm.decision(critique)
    return None if verdict is None else Decision(bool(verdict[0]), verdict[1])


@dataclasses.dataclass(frozen=True)
class ThinkPRMChain:
  """One chain over all steps, which stops at an error; `prm.formats.thinkprm`.

  Attributes:
    instruction: stands before the problem. Public judges expect their own.
  """

  instruction: str = (
    "Verify the solution below step by step. End your check of each step with"
    r" \boxed{correct} or \boxed{incorrect}, and stop at the first incorrect"
    " one."
  )

  def conversation(
    self, problem: str, steps: Sequence[str], critiques: Sequence[str]
  ) -> Conversation:
    """Returns one turn with problem and steps; see `JudgeFormat`."""
    del critiques
    numbered = [f"Step {i}: {step.strip()}" for i, step in enumerate(steps, 1)]
    parts = [self.instruction, f"Problem: {problem}", *numbered]
    return [("user", "\n\n".join(parts))]

  def decision(self, critique: str, steps: int) -> Decision | None:
    """Returns the first error's verdict, or else the last step's.

    A chain that found an error before the last step says that it follows a
    wrong one; a chain that ends earlier without an error says nothing.
    """
    decisions = thinkprm.decisions(critique)[:steps]
    for right, at in decisions:
      if not right:
        return Decision(False, at)
    return Decision(True, decisions[-1][1]) if len(decisions) == steps else None


class Judgement(NamedTuple):
  """Critiques of one step.

  Attributes:
    critiques: texts.
    chances: that the step is right, by each of them; None where it has no
      verdict.
    ledger: what they cost.
  """

  critiques: tuple[str, ...]
  chances: tuple[float | None, ...]
  ledger: Ledger


Decide = Callable[[str], Decision | None]
"""Reads a critique."""


@runtime_checkable
class Writer(Protocol):
  """Writes critiques of several steps at once."""

  def __call__(
    self,
    conversations: Sequence[Conversation],
    decide: Sequence[Decide],
    count: int,
  ) -> list[Judgement]:
    """Returns `count` critiques for each conversation.

    Args:
      conversations: at least one.
      decide: reads critiques of each of them.
    """
    ...


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LanguageModelWriter:
  """Critiques by a language model; a conversation is read once for all of them.

  Attributes:
    model: the Transformer.
    params: its parameters, preferably from `generate.prepare`.
    encode: conversation -> the model's token ids, its chat template included.
    decode: token ids -> text.
    sampling: several critiques differ only with a temperature.
    stop_tokens: end a critique.
    max_new_tokens: most tokens of a critique; one that is cut has no verdict,
      unless it came before.
    words: ids of the words for right and wrong at a verdict, each of which
      begins a token: the chance is then the softmax of the two. None: a verdict
      is a vote, 0 or 1.
    seed: random seed of the sampling.
  """

  model: Transformer
  params: Params
  encode: Callable[[Conversation], Sequence[int]]
  decode: Callable[[Sequence[int]], str]
  sampling: Sampling = GREEDY
  stop_tokens: Sequence[int] = ()
  max_new_tokens: int = 512
  words: tuple[int, int] | None = None
  seed: int = 0

  @functools.cached_property
  def _policy(self) -> Stepwise:
    return Stepwise(
      model=self.model,
      params=self.params,
      sampling=self.sampling,
      stop_tokens=self.stop_tokens,
    )

  @functools.cached_property
  def _cost(self) -> ModelCost:
    return model_cost(self.model, params=self.params)

  def __call__(
    self,
    conversations: Sequence[Conversation],
    decide: Sequence[Decide],
    count: int,
  ) -> list[Judgement]:
    """Returns critiques; see `Writer`."""
    prompts = [list(self.encode(x)) for x in conversations]
    # Numbers of rows are powers of two, so that few programs are compiled.
    padding = next_power_of_two(len(prompts)) - len(prompts)
    # By content: prompts of equal lengths would else share their noise.
    key = jax.random.fold_in(
      jax.random.key(self.seed), zlib.crc32(repr(prompts).encode())
    )
    _, drawn = self._policy.start(
      [*prompts, *prompts[:1] * padding], self.max_new_tokens, key, count
    )
    written = [row[row != NO_TOKEN].tolist() for row in drawn.tokens]
    judgements = []
    for i, prompt in enumerate(prompts):
      critiques = written[i * count : (i + 1) * count]
      texts = tuple(self.decode(self._text(tokens)) for tokens in critiques)
      verdicts = [decide[i](text) for text in texts]
      spent = ledgers.generation(
        self._cost, len(prompt), list(map(len, critiques))
      )
      ledger = Ledger(
        verifier_prefill_tokens=len(prompt),
        verifier_decode_tokens=spent.policy_decode_tokens,
        flops_verifier=spent.flops_policy,
      )
      chances, reading_cost = self._chances(prompt, critiques, verdicts)
      judgements.append(Judgement(texts, chances, ledger + reading_cost))
    return judgements

  def _text(self, tokens: Sequence[int]) -> Sequence[int]:
    ended = tokens[-1] in self.stop_tokens
    return tokens[:-1] if ended else tokens

  def _chances(
    self,
    prompt: Sequence[int],
    written: Sequence[Sequence[int]],
    verdicts: Sequence[Decision | None],
  ) -> tuple[tuple[float | None, ...], Ledger]:
    """Returns each critique's chance, and what reading it again costs."""
    if self.words is None:
      votes = (None if x is None else float(x.right) for x in verdicts)
      return tuple(votes), Ledger()
    texts = [
      [*prompt, *tokens[: self._tokens_before(tokens, verdict.at)]]
      for tokens, verdict in zip(written, verdicts, strict=True)
      if verdict is not None
    ]
    if not texts:
      return (None,) * len(verdicts), Ledger()
    right, wrong = self.words
    reward = GenerativeReward(backbone=self.model, right=right, wrong=wrong)
    # As many rows as critiques, whether or not each has a verdict.
    rows = [*texts, *texts[:1] * (len(verdicts) - len(texts))]
    tokens, lengths = generate.pad_prompts(rows)
    scores = np.asarray(
      reward.scores(self.params, tokens, lengths[:, None] - 1)
    )
    chances = iter(scores[:, 0].tolist())
    sizes = [len(text) for text in texts]
    return (
      tuple(None if x is None else next(chances) for x in verdicts),
      Ledger(
        verifier_new_tokens=sum(sizes),
        flops_verifier=sum(
          self._cost.forward(n, Causal(0, n), 1) for n in sizes
        ),
      ),
    )

  def _tokens_before(self, tokens: Sequence[int], at: int) -> int:
    """Returns how many tokens stand before a place of their text."""
    ends = range(1, len(tokens) + 1)
    return bisect.bisect_right(
      ends, at, key=lambda n: len(self.decode(tokens[:n]))
    )


@dataclasses.dataclass(frozen=True)
class JudgedRow:
  """What a judge knows of a path.

  Attributes:
    problem: tokens of its prompt.
    critiques: one of each step.
    spent: what the last step's critiques cost.
  """

  problem: tuple[int, ...]
  critiques: tuple[str, ...] = ()
  spent: Ledger = Ledger()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerativeJudge(UncachedVerifier, Ranged):
  """A verifier that writes; see `search.engine.WritingVerifier`.

  Attributes:
    writer: writes critiques.
    text: the policy's token ids -> text.
    format: what the judge is shown, and where it decides.
    count: critiques of each step.
    unparsed: what a critique without a verdict counts, 0 to 1: by default as
      much as one that says wrong, so that no text gains by confusing the judge.
  """

  KIND: ClassVar[str] = "a generative judge"

  writer: Writer
  text: Callable[[Sequence[int]], str]
  format: JudgeFormat = GenPRMChat()
  count: PositiveInt = 1
  unparsed: Share = 0.0

  def spent(self, state: Sequence[JudgedRow]) -> list[Ledger]:
    return [row.spent for row in state]

  def start(
    self, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int
  ) -> list[JudgedRow]:
    del max_new_tokens
    return [JudgedRow(tuple(x)) for x in prompts for _ in range(copies)]

  def read(
    self,
    state: Sequence[JudgedRow],
    paths: Sequence[Path],
    new: Int[np.ndarray, "R C"],
  ) -> tuple[list[JudgedRow], Float[np.ndarray, " R"]]:
    """Returns the state after the newest steps, and their scores.

    A path without text scores 0.
    """
    advanced = [i for i, row in enumerate(new) if (row != NO_TOKEN).any()]
    rows = [dataclasses.replace(row, spent=Ledger()) for row in state]
    scores = np.zeros(len(rows))
    conversations, decide, judged = [], [], []
    for i in advanced:
      steps = [step.text for step in steps_of(paths[i], self.text)[1]]
      if not steps:
        continue
      # A step without text has joined the one before, which is judged again.
      rows[i] = dataclasses.replace(
        rows[i], critiques=rows[i].critiques[: len(steps) - 1]
      )
      problem = self.text(rows[i].problem)
      conversations.append(
        self.format.conversation(problem, steps, rows[i].critiques)
      )
      judged.append(i)
      decide.append(functools.partial(self.format.decision, steps=len(steps)))
    if not judged:
      return rows, scores
    judgements = self.writer(conversations, decide, self.count)
    for i, judgement in zip(judged, judgements, strict=True):
      chances = [self.unparsed if x is None else x for x in judgement.chances]
      scores[i] = float(np.mean(chances))
      rows[i] = JudgedRow(
        problem=rows[i].problem,
        critiques=(*rows[i].critiques, judgement.critiques[0]),
        spent=judgement.ledger,
      )
    return rows, scores
