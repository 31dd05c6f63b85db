"""Verifiers of reward models: with a cache, or on the policy's own states.

A probe is a head that was trained on the states of the frozen policy. What it
costs beyond the policy is one pass of a step's last token, which the policy
feeds itself only when it goes on, and the head: a step of n tokens is verified
for about 1/n of what it took to write it, and no prompt is read.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.generation.decoding import State
from research.generation.generated import NO_TOKEN
from research.generation.stepwise import PromptReader, Stepwise
from research.nn.flops import Causal, ModelCost, model_cost
from research.nn.transformer import Transformer
from research.prm.model import (
  GenerativeReward,
  Readout,
  RewardModel,
  probability,
)
from research.search.cached_verifier import CachedVerifier, Head
from research.search.ledger import Ledger
from research.typing import Array, Float, Int, Params, UserError


@dataclasses.dataclass(frozen=True)
class StepScore:
  """Scores of a reward model's hidden states: a verifier's head.

  It equals that of an equal model, so that no program compiles twice.

  Attributes:
    model: whose head it is.
    readout: logits -> score; searches take scores from 0 to 1.
  """

  model: RewardModel | GenerativeReward
  readout: Readout = probability

  def __call__(
    self, params: Params, hidden: Float[Array, "B D"]
  ) -> Float[Array, "B"]:
    """Returns scores of steps' last tokens."""
    return self.readout(self.model.logits_of(params, hidden[:, None])[:, 0])


def verifier_of(
  model: RewardModel | GenerativeReward,
  params: Params,
  tokenizer: Any = None,
  separator: str = "",
  readout: Readout = probability,
  prompt_room: int = 1,
  reader: PromptReader | None = None,
) -> CachedVerifier:
  """Returns a reward model as a verifier that reads each new token once.

  Args:
    model: the reward model, which shares the policy's vocabulary.
    tokenizer: encodes the texts of steps, see `CachedVerifier`.
    separator: text that it reads after each step, see `CachedVerifier`.
    readout: see `StepScore`.
    prompt_room: as the policy's.
    reader: reads prompts with images, see `CachedVerifier`.
  """
  return CachedVerifier(
    model=model.backbone,
    params=params,
    head=StepScore(model, readout),
    outputs=model.outputs,
    tokenizer=tokenizer,
    separator=separator,
    prompt_room=prompt_room,
    reader=reader,
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PolicyProbe:
  """A head on the policy's own hidden states, a `StateVerifier`.

  Attributes:
    policy: whose states are scored; without pages or a quantized cache, into
      which no token can be written again.
    head: makes scores of hidden states.
    params: the head's parameters.
    outputs: numbers that the head computes for a token; for the ledger.
  """

  policy: Stepwise
  head: Head
  params: Params
  outputs: int = 1

  def __post_init__(self):
    if self.policy.kv is not None:
      raise UserError(
        f"PolicyProbe.policy: found the quantized cache {self.policy.kv!r:.60},"
        " expected a policy with kv=None: a token is written again to be scored"
      )

  @functools.cached_property
  def _cost(self) -> ModelCost:
    return model_cost(self.policy.model, self.outputs, self.policy.params)

  def prompt_cost(self, tokens: int) -> Ledger:
    """Returns no cost: the policy reads the prompt."""
    del tokens
    return Ledger()

  def step_cost(self, start: int, tokens: int) -> Ledger:
    """Returns the cost of the step's last token, and of the head."""
    last = start + tokens - 1
    return Ledger(
      verifier_new_tokens=1,
      flops_verifier=self._cost.forward(1, Causal(last, 1), 1),
    )

  def score(
    self, state: Any, last: Int[np.ndarray, " R"]
  ) -> Float[np.ndarray, " R"]:
    """Returns each row's score at a token; see `StateVerifier`.

    Raises:
      UserError: the policy has pages.
    """
    if not isinstance(state, State):
      raise UserError(
        f"PolicyProbe: found a policy's state {type(state).__name__}, expected"
        " that of generation.Stepwise; pages cannot be read without writing"
      )
    scores = _probe(
      self.policy.model,
      self.policy.params,
      self.params,
      state,
      last,
      self.head,
    )
    return np.asarray(scores)


@functools.partial(jax.jit, static_argnames=("model", "head"))
def _probe(
  model: Transformer,
  params: Params,
  probe_params: Params,
  state: State,
  last: Int[Array, " R"],
  head: Head,
) -> Float[Array, " R"]:
  # The cache with these tokens is dropped: the policy feeds them itself. What
  # stands before a stop token has been fed, and is written in its place again.
  again = (last != state.rows.token) & (last != NO_TOKEN)
  hidden, _ = model.apply(
    {"params": params},
    jnp.where(last == NO_TOKEN, 0, last)[:, None],
    cache=dataclasses.replace(state.cache, length=state.cache.length - again),
    lengths=(last != NO_TOKEN).astype(jnp.int32),
  )
  return head(probe_params, hidden[:, 0])
