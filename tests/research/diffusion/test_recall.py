"""Questions about rows: what is asked, of whom, and what counts as right."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core.from_scratch import FromScratch
from research.data.sources.infilling import Question
from research.diffusion.recall import Recall
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.policies import Threshold
from research.nn import presets

MASK = 6
SIZES = presets.Sizes(
  vocab=7,
  width=16,
  depth=1,
  heads=2,
  kv_heads=2,
  head_dim=8,
  hidden=16,
  tied=False,
)


@dataclasses.dataclass(frozen=True)
class Fixed:
  """A task with the questions that it is made of."""

  found: dict

  def questions(self):
    return self.found


@pytest.fixture(scope="module")
def loaded():
  made = FromScratch(sizes=SIZES, embed_std=1.0).load()
  # The head of a fresh model is small: answers that differ.
  params = made.params | {"head": 8 * made.params["head"]}
  return dataclasses.replace(made, params=params)


def question(asked, hidden=()):
  rows = np.random.default_rng(0).integers(0, 6, (5, 6)).astype(np.int32)
  place = np.arange(6)
  asked = np.isin(place, asked)
  return Question(rows, ~asked & ~np.isin(place, hidden), asked)


def logits_of(loaded, rows, causal):
  from kernels_pallas.masks import Mask

  mask = None if causal else Mask.full()
  hidden, _ = loaded.model.apply(
    {"params": loaded.params}, jnp.asarray(rows), None, mask
  )
  return np.asarray(
    loaded.model.apply({"params": loaded.params}, hidden, method="logits")
  )


def test_masks_are_filled_the_surest_first_and_others_stay(loaded):
  one = question([1, 4], hidden=[5])
  answered = one.rows.copy()
  rows = np.where(one.visible, one.rows, MASK)
  left = np.broadcast_to(one.scored, rows.shape).copy()
  while left.any():
    logits = logits_of(loaded, rows, causal=False)[..., :MASK]
    chances = np.array(jax.nn.softmax(logits))
    best = np.where(left, chances.max(-1), -1).argmax(-1)
    for row, at in enumerate(best):
      rows[row, at] = chances[row, at].argmax()
      left[row, at] = False
  assert (rows[:, 5] == MASK).all()
  answered[:3, one.scored] = rows[:3, one.scored]  # three of five are right
  answered[3:, 1] = (rows[3:, 1] + 1) % 6
  task = Fixed({"both": one._replace(rows=answered)})
  found = Recall(source=task, mask_id=MASK)(loaded)
  assert found.right == {"both": 0.6} and found.wrong == pytest.approx(0.4)
  assert found.to_json()["tokens_per_call"] == {"both": 1.0}
  fast = SamplerConfig(policy=Threshold(threshold=1e-6))
  quick = Recall(source=task, mask_id=MASK, sampler=fast)(loaded)
  assert quick.tokens_per_call == {"both": 2.0}


def test_a_next_token_model_goes_on_with_what_is_before(loaded):
  one = question([3, 4], hidden=[5])
  rows = one.rows.copy()
  for at in (3, 4):
    rows[:, at] = logits_of(loaded, rows, causal=True)[:, at - 1].argmax(-1)
  rows[0, 3] = (rows[0, 3] + 1) % 6  # one is wrong
  front = question([0])
  task = Fixed({"end": one._replace(rows=rows), "front": front})
  found = Recall(source=task)(loaded)
  assert found.right == {"end": 0.8}  # nothing stands before the other
