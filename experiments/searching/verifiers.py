"""Where scores of steps come from."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from experiments.core.experiment import Source
from experiments.searching.context import Context
from experiments.searching.trained import CheckpointChoice, restore
from research import tree
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import Stepwise
from research.nn.flops import Causal, ModelCost, model_cost
from research.prm.conventions import Convention, Encoded
from research.prm.heads import SCORE, Head, LinearHead
from research.prm.model import (
  GenerativeReward,
  Readout,
  RewardModel,
  probability,
)
from research.prm.rows import LabelledRows
from research.reasoning.problem import Problem
from research.rounding import next_power_of_two
from research.search.engine import Path, StateVerifier, Verifier
from research.search.ledger import Ledger
from research.search.policy import steps_of
from research.search.reward_verifiers import (
  PolicyProbe,
  StepScore,
  verifier_of,
)
from research.search.uncached_verifier import UncachedVerifier
from research.text.tokenizer import Tokenizer
from research.typing import Float, Int, Params, UserError
from research.vlm.model import VisionLanguageModel
from research.vlm.prompts.reader import ImageReader

Reward = RewardModel | GenerativeReward


@runtime_checkable
class VerifierSource(Protocol):
  """Makes a verifier of a policy's steps."""

  def load(self, context: Context) -> Verifier | StateVerifier:
    """Returns the verifier; the context has no problems yet."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfRun:
  """A reward model that a run has trained.

  Attributes:
    workdir: the run's directory, whose data say what it reads of a solution.
    checkpoint: which of its checkpoints.
    readout: logits -> score, from 0 to 1.
  """

  workdir: str
  checkpoint: CheckpointChoice = "best"
  readout: Readout = probability


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedReward(_OfRun):
  """A reward model that a run has trained, which reads all that is written."""

  def load(self, context: Context) -> Verifier:
    """Returns the verifier.

    Raises:
      UserError: it has another vocabulary or prompt than the policy.
    """
    trained = reward_of(self.workdir, self.checkpoint)
    data = trained.data
    if data is not None and data.convention is not None:
      return TextVerifier(
        model=dataclasses.replace(trained.model, readout=self.readout),
        params=jax.device_put(trained.params),
        tokenizer=trained.tokenizer,
        convention=data.convention,
        context=context,
      )
    trained.check_reads(context, self.workdir)
    reader = None
    if trained.vision is not None:
      reader = ImageReader.of_prompts(*trained.vision, context.prompts)
    return verifier_of(
      trained.model,
      trained.params if reader is None else reader.text_params,
      tokenizer=context.tokenizer,
      separator="" if data is None else data.separator,
      readout=self.readout,
      prompt_room=context.prompt_room,
      reader=reader,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedProbe(_OfRun):
  """A reward model that a run has trained on top of the frozen policy.

  Its backbone is the policy, whose states are scored: it costs a token a step.
  """

  def load(self, context: Context) -> StateVerifier:
    """Returns the verifier.

    Raises:
      UserError: its backbone is not the policy, or it reads what the policy
        does not write.
    """
    trained = reward_of(self.workdir, self.checkpoint)
    trained.check_reads(context, self.workdir)
    model, params, data = trained.model, trained.params, trained.data
    if data is not None and (data.separator or data.convention is not None):
      raise UserError(
        f"{self.workdir}: was trained with LabelledRows.separator ="
        f" {data.separator!r} and convention = {data.convention}, expected"
        " neither: a probe reads the policy's own tokens, which have none"
      )
    if not isinstance(context.policy, Stepwise):
      raise UserError(
        f"{self.workdir}: found a {type(context.policy).__name__}, expected a"
        " policy that writes token by token: a probe reads its states"
      )
    if path := _first_difference(params, context.params):
      raise UserError(
        f"{self.workdir}: {path} is not the policy's, expected a head that was"
        " trained on the states of this policy, frozen.\nA reward model with"
        " weights of its own is a verifiers.TrainedReward."
      )
    return PolicyProbe(
      policy=context.policy,
      head=StepScore(model, self.readout),
      params=params,
      outputs=model.outputs,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewReward:
  """A reward model with a new head: scores without meaning, at full cost.

  Attributes:
    model: source of the backbone.
    head: hidden states -> scores.
  """

  model: Source
  head: Head = LinearHead()
  seed: int = 0

  def load(self, context: Context) -> Verifier:
    loaded = self.model.load()
    model = RewardModel(backbone=loaded.model, head=self.head)
    params = model.with_new_head(loaded.params, jax.random.key(self.seed))
    untrained = TrainedModel(model, params, loaded.tokenizer)
    untrained.check_reads(context, "NewReward")
    return verifier_of(
      model,
      params,
      tokenizer=context.tokenizer,
      prompt_room=context.prompt_room,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicReward:
  """A reward model with a tokenizer and a convention of its own.

  It reads each solution's text anew at every step, which the ledger counts: of
  another tokenizer's tokens no cache is worth anything.

  Attributes:
    model: source of the reward model: `rewards.PretrainedReward`, or
      `rewards.WithWords` for those that answer with a word.
    convention: what it reads of a solution, of `prm.conventions`.
  """

  model: Source
  convention: Convention

  def load(self, context: Context) -> Verifier:
    """Returns the verifier.

    Raises:
      UserError: it is no reward model, or has no tokenizer.
    """
    loaded = self.model.load()
    if not isinstance(loaded.model, Reward) or loaded.tokenizer is None:
      raise UserError(
        f"PublicReward.model: found a {type(loaded.model).__name__} with the"
        f" tokenizer {type(loaded.tokenizer).__name__}, expected a reward model"
        " and its tokenizer, such as of rewards.PretrainedReward"
      )
    return TextVerifier(
      model=loaded.model,
      params=jax.device_put(loaded.params),
      tokenizer=loaded.tokenizer,
      convention=self.convention,
      context=context,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextVerifier(UncachedVerifier):
  """Scores the newest step of texts; see `search.engine.WritingVerifier`.

  Its state is what the last `read` has cost, of each row.

  Attributes:
    convention: what it reads.
    context: turns the policy's tokens into texts.
    problems: the batch's problems, by `Path.problem`.
  """

  KIND: ClassVar[str] = "a verifier of texts"

  model: Reward
  params: Params
  tokenizer: Any
  convention: Convention
  context: Context
  problems: tuple[Problem, ...] = ()

  @functools.cached_property
  def _cost(self) -> ModelCost:
    return model_cost(self.model.backbone, self.model.outputs, self.params)

  def with_problems(self, problems: Sequence[Problem]) -> "TextVerifier":
    return dataclasses.replace(self, problems=tuple(problems))

  def spent(self, state: Sequence[Ledger]) -> list[Ledger]:
    return list(state)

  def start(
    self, prompts: Sequence[Sequence[int]], copies: int, max_new_tokens: int
  ) -> list[Ledger]:
    del max_new_tokens
    return [Ledger()] * (len(prompts) * copies)

  def read(
    self,
    state: Sequence[Ledger],
    paths: Sequence[Path],
    new: Int[np.ndarray, "R C"],
  ) -> tuple[list[Ledger], Float[np.ndarray, " R"]]:
    """Returns the state, and the newest steps' scores; 0 without a text.

    Raises:
      UserError: a text is longer than the reward model's context.
    """
    spent, scores = [Ledger()] * len(state), np.zeros(len(state))
    encoded_by_row = {
      i: encoded
      for i, row in enumerate(new)
      if (row != NO_TOKEN).any() and (encoded := self._encoded(paths[i]))
    }
    if not encoded_by_row:
      return spent, scores
    longest = max(len(x.tokens) for x in encoded_by_row.values())
    room = self.model.max_positions
    if room is not None and longest > room:
      raise UserError(
        f"PublicReward: found a solution of {longest} tokens with its question,"
        f" expected at most {room}, the reward model's context"
      )
    tokens = np.zeros((len(paths), next_power_of_two(longest)), np.int32)
    ends = np.full((len(paths), 1), -1, np.int32)
    for i, (ids, step_ends) in encoded_by_row.items():
      tokens[i, : len(ids)], ends[i] = ids, step_ends[-1]
      spent[i] = Ledger(
        verifier_new_tokens=len(ids),
        flops_verifier=self._cost.forward(len(ids), Causal(0, len(ids)), 1),
      )
    last_scores = np.asarray(self.model.scores(self.params, tokens, ends))[:, 0]
    return spent, np.where(ends[:, 0] >= 0, last_scores, 0.0)

  def _encoded(self, path: Path) -> Encoded | None:
    """Returns what the model reads of a path, or None of one without text."""
    steps = steps_of(path, self.context.tokenizer.decode)[1]
    if not steps:
      return None
    if path.problem >= len(self.problems):
      raise UserError(
        f"PublicReward: found the prompt {path.problem} of"
        f" {len(self.problems)} problems, expected a search that asks each"
        " problem once a round; RoundsOfText asks `width` times"
      )
    question = self.problems[path.problem].prompt
    words = [step.text for step in steps]
    return self.convention.encode(self.tokenizer, question, words)


class TrainedModel(NamedTuple):
  """A reward model that a run has trained.

  Attributes:
    model: the reward model.
    params: its parameters.
    tokenizer: the run's; None for a model of ids.
    data: labelled solutions that it was trained on; None for other data.
    vision: model and parameters of all towers, if it takes images; else None.
  """

  model: Reward
  params: Params
  tokenizer: Any = None
  data: LabelledRows | None = None
  vision: tuple[VisionLanguageModel, Params] | None = None

  def check_reads(self, context: Context, where: str) -> None:
    """Raises UserError if its tokens or prompts are not the policy's."""
    size, policy_size = self.model.backbone.vocab_size, context.vocab_size
    if size != policy_size:
      raise UserError(
        f"{where}: found a verifier with a vocabulary of {size}, expected"
        f" {policy_size}, the policy's, whose tokens it reads."
      )
    differing = _first_other_token(self.tokenizer, context.tokenizer)
    if differing is not None:
      raise UserError(
        f"{where}: found a verifier whose token {differing[0]} is"
        f" {differing[1]!r}, expected {differing[2]!r}, the policy's: it has"
        " another tokenizer.\nA verifiers.PublicReward reads texts instead."
      )
    if self.data is None or not context.questions:
      return
    question = context.questions[0]
    trained = list(self.data.prompting(self.tokenizer, question))
    searched = list(context.prompting(context.tokenizer, question))
    if trained != searched:
      trained, searched = (
        context.tokenizer.decode(x, False) for x in (trained, searched)
      )
      raise UserError(
        f"{where}: was trained on prompts such as {trained[:200]!r}, found"
        f" {searched[:200]!r} in this search, expected the same.\nSet"
        f" SearchRun.prompting to its LabelledRows.prompting,"
        f" {self.data.prompting}, or train it with the search's."
      )


def reward_of(
  workdir: str, checkpoint: CheckpointChoice = "best"
) -> TrainedModel:
  """Returns the reward model that a run has trained.

  Raises:
    UserError: the run trained another model, or what `restore` raises.
  """
  built, params, experiment = restore(workdir, checkpoint)
  tokenizer = built.loaded.tokenizer
  data = experiment.data if isinstance(experiment.data, LabelledRows) else None
  for model in (built.objective.model, built.loaded.model):
    if isinstance(model, Reward):
      return TrainedModel(model, params, tokenizer, data)
    with_images = isinstance(model, VisionLanguageModel)
    if with_images and isinstance(model.language, Reward):
      return TrainedModel(
        model.language, params["language"], tokenizer, data, (model, params)
      )
  raise UserError(
    f"{workdir}: found a {type(built.loaded.model).__name__}, expected a run"
    " that trained a reward model: prm.RewardModel or prm.GenerativeReward."
  )


def _first_other_token(
  tokenizer: Any, policy: Any
) -> tuple[int, str | None, str | None] | None:
  """Returns the first id whose token is another one, and both tokens.

  None where all are equal, or where a model without a tokenizer has only ids.
  """
  if not (isinstance(tokenizer, Tokenizer) and isinstance(policy, Tokenizer)):
    return None
  size = max(tokenizer.vocab_size, policy.vocab_size)
  for i in range(size):
    pair = [x.backend.id_to_token(i) for x in (tokenizer, policy)]
    if pair[0] != pair[1]:
      return i, *pair
  return None


def _first_difference(params: Params, policy: Params) -> str | None:
  """Returns the path of a backbone's weight that is not the policy's, or None.

  A reward model may lack the policy's head of words.
  """
  policy_leaves = dict(tree.flatten_paths(policy))
  for path, leaf in tree.flatten_paths(params):
    if path.split("/")[0] == SCORE:
      continue
    other = policy_leaves.get(path)
    same = other is not None and other.shape == leaf.shape
    if not same or not np.array_equal(np.asarray(other), np.asarray(leaf)):
      return path
  return None
