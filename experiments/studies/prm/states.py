"""A frozen model's states at the ends of steps, computed once."""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core import cli
from experiments.core.experiment import Source
from research.interop.loaded import Loaded
from research.prm import rows
from research.prm.labelled import LabelledSolution
from research.rounding import next_power_of_two
from research.training.checkpoints import frozen_base
from research.typing import Array, Float, Int, Params, UserError

States = list[Float[np.ndarray, "_ D"]]
"""Of each solution a row a step: the state after the final norm, at the step's
last token. It is what a `search.PolicyProbe` reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrozenStates:
  """A language model that reads solutions.

  Attributes:
    model: the language model.
    between: text between a problem and its solution.
    tokens: of a batch, about; a longer solution is a batch of its own.
  """

  model: Source
  between: str = "\n\n"
  tokens: int = 2048

  def compute(
    self, solutions: Sequence[LabelledSolution], folder: pathlib.Path
  ) -> States:
    """Returns the states, from the folder if they are there.

    Args:
      solutions: read whole, each after its problem.
      folder: where they are stored, by what is read and the model's weights.

    Raises:
      UserError: the model has no tokenizer, or a solution is longer than its
        context.
    """
    loaded = self.model.load()
    # What a path names may have been trained on.
    weights = frozen_base.fingerprint(loaded.params)
    text = repr([self, weights, *((x.prompt, x.steps) for x in solutions)])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    path = folder / f"states_{digest}.npz"
    if not path.exists():
      found = self._computed(loaded, solutions)
      folder.mkdir(parents=True, exist_ok=True)
      part = path.with_suffix(".part.npz")
      np.savez(part, states=np.concatenate(found))
      part.replace(path)
    with np.load(path) as stored:
      every = stored["states"]
    return np.split(every, np.cumsum([len(x.steps) for x in solutions])[:-1])

  def _computed(
    self, loaded: Loaded, solutions: Sequence[LabelledSolution]
  ) -> States:
    encoded = self._encoded(loaded, solutions)
    most = max(len(x.ends) for x in encoded)
    found: list[np.ndarray | None] = [None] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].tokens))
    while order:
      # The longest ones first, so that too little memory shows at once.
      length = _rounded(len(encoded[order[-1]].tokens))
      size = max(1, self.tokens // length)
      batch = [order.pop() for _ in range(min(size, len(order)))]
      tokens = np.zeros((size, length), np.int32)
      ends = np.zeros((size, most), np.int32)
      for row, i in enumerate(batch):
        ids, at = encoded[i]
        tokens[row, : len(ids)], ends[row, : len(at)] = ids, at
      made = np.asarray(_hidden(loaded.model, loaded.params, tokens, ends))
      for row, i in enumerate(batch):
        found[i] = made[row, : len(encoded[i].ends)]
      cli.say(f"states of {len(encoded) - len(order)} of {len(encoded)}")
    return [x for x in found if x is not None]

  def _encoded(
    self, loaded: Loaded, solutions: Sequence[LabelledSolution]
  ) -> list[rows.Encoded]:
    if loaded.tokenizer is None:
      raise UserError("FrozenStates.model: found no tokenizer in it")
    room, encoded = loaded.model.max_positions, []
    for one in solutions:
      whole = dataclasses.replace(one, prompt=one.prompt + self.between)
      encoded.append(rows.encode(whole, loaded.tokenizer))
      count = len(encoded[-1].tokens)
      if room is not None and count > room:
        raise UserError(
          f"FrozenStates: found a solution of {one.problem_id} with {count}"
          f" tokens, expected at most {room}, the model's context"
        )
    return encoded


def _rounded(n: int) -> int:
  """Returns `n` rounded up by at most a half, so that few programs compile."""
  step = max(64, next_power_of_two(n) // 4)
  return -(-n // step) * step


@functools.partial(jax.jit, static_argnums=0)
def _hidden(
  model, params: Params, tokens: Int[Array, "B T"], ends: Int[Array, "B S"]
) -> Float[Array, "B S D"]:
  # Padding is no part of a text, by whose length `rope.Dynamic` rotates it.
  hidden, _ = model.apply(
    {"params": params}, tokens, lengths=ends.max(1) + 1, keep=ends
  )
  return hidden.astype(jnp.float32)
