"""What tokens see in next-token prediction, by enumeration of pairs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.data import batch_of
from research.nn import logits
from research.training.objectives import objective
from research.training.objectives.objective import NextToken
from tests import support

# Two documents in a row, each prompts (.) and answers (A) in turn; padding.
ROLES = "..AA.A" + "...A" + "  "
SEGMENTS = [0] * 6 + [1] * 4 + [-1] * 2


def packed():
  """Returns the batch; a weight is where the next token is an answer's."""
  learned = np.array([x == "A" for x in ROLES])
  weights = np.append(learned[1:], False).astype(np.float32)
  rows = dict(weights=weights, segments=np.array(SEGMENTS, np.int32))
  return {name: jnp.asarray(x)[None] for name, x in rows.items()}


def same_prompt(q, k):
  between = ROLES[min(q, k) : max(q, k) + 1]
  return set(between) == {"."}


@pytest.mark.parametrize(
  ("mask", "ahead"),
  [
    (objective.causal_mask, lambda q, k: False),
    (objective.prefix_mask, same_prompt),
  ],
)
def test_who_sees_whom(mask, ahead):
  size = len(ROLES)
  found = np.asarray(mask(packed()).visible(size, size))[0]
  for q, k in itertools.product(range(size), repeat=2):
    together = SEGMENTS[q] == SEGMENTS[k] >= 0
    assert found[q, k] == (together and (k <= q or ahead(q, k))), (q, k)


def test_the_loss_is_that_of_the_mask():
  """As the model's logits have it, with all prompts seen at once."""
  model = support.model("llama")
  params = support.params(model)
  given = batch_of([[5, 6, 7, 8, 9]], [[False] * 3 + [True] * 2])
  causal, prefix = (
    jax.jit(NextToken(model, mask=mask))(params, given, None)[0]
    for mask in (objective.causal_mask, objective.prefix_mask)
  )
  mask = Mask.prefix_lm(jnp.array([3]))
  scores = logits(model, params, given["tokens"], mask=mask)
  chosen = jax.nn.log_softmax(scores)[0, jnp.arange(2, 4), jnp.array([8, 9])]
  np.testing.assert_allclose(prefix, -chosen.sum(), rtol=1e-5)
  assert abs(causal - prefix) > 1e-3
