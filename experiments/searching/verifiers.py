"""Where scores of steps come from."""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from experiments.core.experiment import Source
from experiments.searching.context import Context
from experiments.searching.trained import Which, restore
from research import tree
from research.generation.stepwise import Stepwise
from research.prm.heads import SCORE, Head, LinearHead
from research.prm.model import (
  GenerativeReward,
  Readout,
  RewardModel,
  probability,
)
from research.search.engine import StateVerifier, Verifier
from research.search.reward_verifiers import (
  PolicyProbe,
  StepScore,
  verifier_of,
)
from research.typing import Params, UserError
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
class TrainedReward:
  """A reward model that a run has trained, which reads all that is written.

  Attributes:
    workdir: of the run.
    which: of its checkpoints.
    separator: text that it reads after a step, where the policy writes none.
    readout: logits -> score, from 0 to 1.
  """

  workdir: str
  which: Which = "best"
  separator: str = ""
  readout: Readout = probability

  def load(self, context: Context) -> Verifier:
    """Returns the verifier."""
    found = reward_of(self.workdir, self.which)
    _check_vocabulary(found.model, context, self.workdir)
    words, reader = self.separator, None
    if found.sees is not None:
      reader = ImageReader.of_prompts(*found.sees, context.prompts)
    return verifier_of(
      found.model,
      found.params if reader is None else reader.text_params,
      tuple(context.tokenizer.encode(words)) if words else (),
      self.readout,
      context.prompt_room,
      reader,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedProbe:
  """A reward model that a run has trained on top of the frozen policy.

  Its backbone is the policy, whose states are scored: it costs a token a step.

  Attributes:
    workdir: of the run.
    which: of its checkpoints.
    readout: logits -> score, from 0 to 1.
  """

  workdir: str
  which: Which = "best"
  readout: Readout = probability

  def load(self, context: Context) -> StateVerifier:
    """Returns the verifier.

    Raises:
      UserError: its backbone is not the policy.
    """
    model, params, _ = reward_of(self.workdir, self.which)
    _check_vocabulary(model, context, self.workdir)
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
    head: of hidden states.
    seed: of its parameters.
  """

  model: Source
  head: Head = LinearHead()
  seed: int = 0

  def load(self, context: Context) -> Verifier:
    """Returns the verifier."""
    loaded = self.model.load()
    model = RewardModel(backbone=loaded.model, head=self.head)
    _check_vocabulary(model, context, "NewReward")
    params = model.with_new_head(loaded.params, jax.random.key(self.seed))
    room = context.prompt_room
    return verifier_of(model, params, prompt_room=room)


class TrainedModel(NamedTuple):
  """A reward model that a run has trained.

  Attributes:
    model: the reward model.
    params: its parameters.
    sees: model and parameters of all towers, if it sees images; else None.
  """

  model: Reward
  params: Params
  sees: tuple[VisionLanguageModel, Params] | None = None


def reward_of(workdir: str, which: Which = "best") -> TrainedModel:
  """Returns the reward model that a run has trained.

  Raises:
    UserError: the run trained another model, or what `restore` raises.
  """
  built, params = restore(workdir, which)
  for model in (built.objective.model, built.loaded.model):
    if isinstance(model, Reward):
      return TrainedModel(model, params)
    sees = isinstance(model, VisionLanguageModel)
    if sees and isinstance(model.language, Reward):
      own = model.language, params["language"]
      return TrainedModel(*own, (model, params))
  raise UserError(
    f"{workdir}: found a {type(built.loaded.model).__name__}, expected a run"
    " that trained a reward model: prm.RewardModel or prm.GenerativeReward."
  )


def _check_vocabulary(model: Reward, context: Context, where: str) -> None:
  found = model.backbone.vocab_size
  own = context.vocab_size
  if found != own:
    raise UserError(
      f"{where}: found a verifier with {found} ids, expected {own}, as many as"
      " the policy, whose tokens it reads."
    )


def _first_difference(params: Params, policy: Params) -> str | None:
  """Returns the path of a backbone's weight that is not the policy's, or None.

  A reward model may lack the policy's head of words.
  """
  own = dict(tree.flatten_paths(policy))
  for path, leaf in tree.flatten_paths(params):
    if path.split("/")[0] == SCORE:
      continue
    other = own.get(path)
    same = other is not None and other.shape == leaf.shape
    if not same or not np.array_equal(np.asarray(other), np.asarray(leaf)):
      return path
  return None
