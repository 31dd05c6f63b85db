"""Where rows pause while they are decoded: at the end of a step of their text.

A step ends with a separator, such as a blank line. Tokenizers cut separators
in many ways (`.\\n\\n` may be one token, `\\n\\n` two), so an automaton over
tokens watches the text (`research.text.separators`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.typing import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepState:
  """Where rows are within a step of their text; arrays are `[B]`.

  Attributes:
    paused: whether the row waits at the end of a step.
    length: number of tokens of the step so far.
    matched: state of the automaton.
  """

  paused: Any
  length: Any
  matched: Any

  def resumed(self) -> "StepState":
    """Returns the state at the beginning of the next step of paused rows."""
    length = jnp.where(self.paused, 0, self.length)
    return StepState(jnp.zeros_like(self.paused), length, self.matched)

  def restarted(self, rows: Bool[Array, "B"]) -> "StepState":
    """Returns the state in which some rows begin a step."""
    return StepState(
      self.paused & ~rows,
      jnp.where(rows, 0, self.length),
      jnp.where(rows, 0, self.matched),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Boundary:
  """The automaton that finds ends of steps, and the longest step.

  Attributes:
    following: int32 `[S, V]`, state after each token, for each of S states;
      the first one is that of a new text.
    ends: bool `[S, V]`, whether that token completes a separator.
    max_tokens: maximum number of tokens of a step, which then pauses, too.
  """

  following: Any
  ends: Any
  max_tokens: Any = 2**30

  def start(self, rows: int) -> StepState:
    none = jnp.zeros(rows, jnp.int32)
    return StepState(jnp.zeros(rows, bool), none, none)

  def after_token(
    self,
    state: StepState,
    token: Int[Array, "B"],
    active: Bool[Array, "B"],
  ) -> StepState:
    """Returns the state after one more token of the active rows."""
    length = state.length + active
    ends = self.ends[state.matched, token] | (length >= self.max_tokens)
    matched = self.following[state.matched, token]
    return StepState(
      state.paused | (active & ends),
      length,
      jnp.where(active, matched, state.matched),
    )
