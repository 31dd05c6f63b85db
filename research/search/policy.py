"""What a search asks of a policy: rows that pause, and what they cost.

`Path` and `Frontier` are what a search knows of them between two steps.

`generation.Stepwise` is one, `search.DiffusionPolicy` another.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from research.generation.decoding import GeneratedTokens
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import PromptReader
from research.nn.flops import Causal, ModelCost
from research.search.ledger import Ledger
from research.typing import PRNGKey
from research.vlm.masks import prompt_context

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, without special tokens."""

_INCOMPLETE = "\ufffd"
"""What decoders write for the first bytes of a character."""


@dataclasses.dataclass(frozen=True)
class Path:
  """A solution on its way.

  Attributes:
    problem: index of its problem.
    root: index of the copy of the prompt from which it comes, from 0.
    prompt: number of tokens of the prompt.
    steps: tokens of each step.
    scores: the verifier's, of each step; empty without a verifier.
    log_prob: log-probability of all tokens under the policy, in nats; None if
      not asked for, or if some tokens were not drawn.
    done: whether it has ended.
    stopped: whether it ended by a stop token, rather than by its length.
    rereads: whether its first step feeds the prompt's last token once more
      (`Engine.begin`).
  """

  problem: int
  root: int
  prompt: int
  steps: tuple[tuple[int, ...], ...] = ()
  scores: tuple[float, ...] = ()
  log_prob: float | int | None = 0.0
  done: bool = False
  stopped: bool = False
  rereads: bool = False

  @property
  def tokens(self) -> tuple[int, ...]:
    """All new tokens."""
    return tuple(token for step in self.steps for token in step)

  def text(self, decode: Decode) -> str:
    """Returns the text so far, without a last character that is incomplete."""
    return decode(self.tokens).rstrip(_INCOMPLETE)


class StepText(NamedTuple):
  """A step that has a text.

  Attributes:
    text: joined with the others, that of the path.
    start, end: its tokens.
    score: the verifier's, or None.
  """

  text: str
  start: int
  end: int
  score: float | None


def steps_of(path: Path, decode: Decode) -> tuple[str, list[StepText]]:
  """Returns a path's text, and its steps.

  A step without text, such as a blank line, joins the one before it, whose
  score is then that of both; before the first one it joins the next.
  Characters whose bytes two steps share are the later one's.

  Args:
    path: with a score for each step, or for the first ones alone.
    decode: token ids -> text.
  """
  text = path.text(decode)
  # A verifier that is asked for the last step's score has those before it.
  scores = [*path.scores, *[None] * (len(path.steps) - len(path.scores))]
  steps: list[StepText] = []
  start = end = at = 0
  for tokens, score in zip(path.steps, scores, strict=True):
    end += len(tokens)
    if end < len(path.tokens):
      before = decode(path.tokens[:end]).rstrip(_INCOMPLETE)
      now = max(at, len(os.path.commonprefix([before, text])))
    else:
      now = len(text)
    step = text[at:now]
    if step.strip():
      steps.append(StepText(step, start, end, score))
    elif steps:
      last = steps[-1]
      if score is None:
        score = last.score
      steps[-1] = StepText(last.text + step, last.start, end, score)
    else:
      continue
    start, at = end, now
  return text, steps


@dataclasses.dataclass(frozen=True)
class Frontier:
  """The rows of all problems between two steps.

  Attributes:
    state: the policy's.
    verifier: the verifier's state, or None.
    paths: one for each row.
    advanced: whether each row got tokens in the last step; others are idle.
    ledgers: one for each problem.
    started: when, in seconds of a clock.
  """

  state: Any
  verifier: Any
  paths: tuple[Path, ...]
  advanced: tuple[bool, ...]
  ledgers: tuple[Ledger, ...]
  started: float


@runtime_checkable
class Policy(Protocol):
  """Rows that pause where a step ends: `Stepwise`, `DiffusionPolicy`.

  Any but a `Stepwise` is a `PolicyCost` as well.
  """

  @property
  def stop_tokens(self) -> Sequence[int]:
    """Those that end a row, and are its last token."""
    ...

  def begin(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> Any:
    """Returns `copies` rows for each prompt, before their first step."""
    ...

  def start(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    key: PRNGKey | None = None,
    copies: int = 1,
  ) -> tuple[Any, GeneratedTokens]:
    """Returns `copies` rows for each prompt, after their first step."""
    ...

  def advance(self, state: Any) -> tuple[Any, GeneratedTokens]:
    """Returns the rows after one more step; buffers of `state` are used up."""
    ...

  def select(
    self, state: Any, rows: Sequence[int], branch: Sequence[int]
  ) -> Any:
    """Returns chosen rows; arguments as for `decoding.select`."""
    ...

  def append(
    self, state: Any, tokens: Sequence[Sequence[int]], replace: Sequence[bool]
  ) -> Any:
    """Returns the rows after tokens that were not drawn."""
    ...

  def store(self, state: Any, new: Any, rows: Sequence[int]) -> Any:
    """Returns the rows with those of `new` in place of some."""
    ...

  def done(self, state: Any) -> Any:
    """Returns which rows have ended, bool `[R]`."""
    ...

  def end(self, state: Any, rows: Any) -> Any:
    """Returns the rows, some of which get no more tokens."""
    ...


@runtime_checkable
class PolicyCost(Protocol):
  """What a policy's passes cost, for the ledger."""

  def prompt(self, tokens: int) -> Ledger:
    """Returns the cost of reading a prompt, once for all of its paths.

    Its `peak_cache_tokens` are those that the paths share.
    """
    ...

  def steps(
    self, paths: Sequence[Path], drawn: GeneratedTokens
  ) -> list[Ledger]:
    """Returns the cost of one step of each path.

    Args:
      paths: before the step.
      drawn: what the policy drew; of rows without a token, only
        `peak_cache_tokens` count: what a path has in the cache by itself.
    """
    ...


@dataclasses.dataclass(frozen=True)
class AutoregressiveCost:
  """One pass a token, each token read once; a `PolicyCost`.

  Attributes:
    model: the policy's.
    reader: what reads prompts that are more than tokens, or None.
  """

  model: ModelCost
  reader: PromptReader | None = None

  def prompt(self, tokens: int) -> Ledger:
    """Returns the cost of a prompt and of its last token's logits."""
    reader = self.reader
    context = prompt_context(None if reader is None else reader.mask, tokens)
    flops = self.model.forward(tokens, context, 1)
    # Each path has its own cache, which its steps count.
    return Ledger(
      policy_prefill_tokens=tokens,
      flops_policy=flops + (0 if reader is None else reader.flops),
    )

  def steps(
    self, paths: Sequence[Path], drawn: GeneratedTokens
  ) -> list[Ledger]:
    """Returns the cost of each path's step; see `PolicyCost`.

    A path's first token is drawn from its prompt's last state, unless it
    `rereads`; the last one of each step is fed when the next step begins.
    """
    ledgers = []
    for path, row in zip(paths, np.asarray(drawn.tokens), strict=True):
      count, before = int((row != NO_TOKEN).sum()), len(path.tokens)
      ledger = Ledger(peak_cache_tokens=path.prompt + before + count)
      if count:
        again = bool(path.steps) or path.rereads
        fed = count if again else count - 1
        start = path.prompt + (before - 1 if again else 0)
        flops = self.model.forward(fed, Causal(start, fed), fed)
        ledger = dataclasses.replace(
          ledger, policy_decode_tokens=count, flops_policy=flops
        )
      ledgers.append(ledger)
    return ledgers
