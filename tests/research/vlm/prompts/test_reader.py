"""Rows that continue prompts with images, against whole rows with images.

Generation whose every pass has the images, and a forward pass over whole rows,
are the truth.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import nn
from research.generation import generate
from research.generation.boundary import Boundary
from research.generation.sampling import Sampling
from research.generation.stepwise import Stepwise
from research.prm.heads import LinearHead
from research.prm.model import RewardModel
from research.reasoning.prompting import PromptWithArrays
from research.search.engine import Engine
from research.search.reward_verifiers import verifier_of
from research.search.step_search import Limits
from research.search.strategies.independent import Independent
from research.typing import UserError
from research.vlm import cross_attention, masks
from research.vlm.prompts import ImageReader
from tests import support_vlm

SOFT = [support_vlm.IMAGE] * 4
NEW = 5


def prompts(seed: int = 0):
  """Returns three prompts of different lengths, each with an image."""
  return [
    PromptWithArrays((*SOFT, *text), {"pixels": pixels})
    for text, pixels in zip(
      ([7, 3], [9], [7, 3]), support_vlm.pixels(3, 1, seed), strict=True
    )
  ]


def reader(model=None, params=None):
  return ImageReader.of_prompts(
    support_vlm.model() if model is None else model,
    support_vlm.params() if params is None else params,
    prompts(),
  )


def stepwise(found, **settings):
  return Stepwise(
    model=support_vlm.model().language,
    params=found.text_params,
    reader=found,
    **settings,
  )


def every_pass(asked, model=None):
  """Returns greedy tokens of generation whose passes all have the images."""
  model = support_vlm.model() if model is None else model
  pixels = jnp.asarray(np.stack([x.arrays["pixels"] for x in asked]))
  return generate.generate(
    model.language,
    model.with_images_compiled(support_vlm.params(), pixels),
    asked,
    NEW,
    source=model.token_source(),
  ).tokens


@pytest.mark.parametrize("mask", [masks.Causal(), masks.BidirectionalPrompt()])
def test_rows_are_those_of_generation_with_images(mask):
  model = dataclasses.replace(support_vlm.model(), mask=mask)
  asked = prompts()
  policy = stepwise(reader(model))
  _, drawn = policy.start(asked, NEW, copies=2)
  expected = every_pass(asked, model)
  # Equal texts have different images, and so different rows.
  assert list(expected[0]) != list(expected[2])
  for row, tokens in enumerate(drawn.tokens):
    assert list(tokens) == list(expected[row // 2])


@pytest.mark.slow
def test_copied_rows_need_no_images():
  asked, vocab = prompts(), support_vlm.model().language.vocab_size
  none = np.zeros((1, vocab), bool)
  pairs = Boundary(np.zeros_like(none, np.int32), none, np.int32(2))
  policy = stepwise(reader(), log_probs=True, boundary=pairs)
  state, first = policy.start(asked, NEW)
  chosen = [2, 0, 2]
  state = policy.select(state, chosen, [0, 0, 1])
  _, drawn = policy.advance(state)
  expected = every_pass(asked)
  sees = reader()(asked)
  for i, row in enumerate(chosen):
    made = [*first.tokens[row], *drawn.tokens[i]]
    assert made == list(expected[row][: len(made)]) and len(made) == 4
    tokens = np.zeros((3, len(asked[row]) + 4), np.int32)
    tokens[row] = [*asked[row], *made]
    # The log-probabilities of a whole row, each pass with its image.
    logits = nn.logits(policy.model, sees, jnp.asarray(tokens))[row]
    given = jax.nn.log_softmax(logits)[len(asked[row]) - 1 :]
    each = [float(given[t, token]) for t, token in enumerate(made)]
    found = [*first.log_probs[row], *drawn.log_probs[i]]
    np.testing.assert_allclose(found, each, rtol=1e-4, atol=1e-4)


def test_a_search_with_a_reward_model_scores_whole_rows_with_images():
  vlm = support_vlm.model()
  backbone = vlm.language.clone(tied=True)
  reward = RewardModel(backbone=backbone, head=LinearHead())
  body = support_vlm.params()["language"]
  body = reward.with_new_head(body, jax.random.key(3))
  judge = dataclasses.replace(vlm, language=reward)
  params = {**support_vlm.params(), "language": body}
  asked, own = prompts(), reader(judge, params)
  engine = Engine(
    policy=stepwise(reader()),
    verifier=verifier_of(reward, own.text_params, reader=own),
  )
  limits = Limits(tokens=NEW, steps=4, key=jax.random.key(0))
  found = Independent(copies=1)(engine, asked, limits)
  for i, samples in enumerate(found):
    (path,) = samples.paths
    tokens = jnp.asarray([[*asked[i], *path.tokens]])
    ends = jnp.asarray([[tokens.shape[1] - 1]])
    pixels = jnp.asarray(asked[i].arrays["pixels"][None])
    sees = judge.with_images(params, pixels)
    expected = reward.scores(sees, tokens, ends)
    np.testing.assert_allclose(path.scores, expected[0], rtol=1e-4)
    blind = reward.scores(judge.with_images(params, 0 * pixels), tokens, ends)
    assert abs(float(blind[0, 0]) - path.scores[0]) > 1e-3
    cost = samples.ledger
    assert cost.flops_policy > own.flops and cost.flops_verifier > own.flops
  text = dataclasses.replace(
    engine, policy=dataclasses.replace(engine.policy, reader=None)
  )
  beside = engine.prompt_cost(6).flops_policy - text.prompt_cost(6).flops_policy
  assert beside == own.flops > 0


def test_a_placeholder_is_never_drawn():
  # An id of the vocabulary, as that of published models is.
  vlm = dataclasses.replace(support_vlm.model(), image_token=9)
  asked = [
    PromptWithArrays((*[9] * 4, 7), {"pixels": x})
    for x in support_vlm.pixels(2, 1)
  ]
  found = ImageReader.of_prompts(vlm, support_vlm.params(), asked)
  nearly_uniform = Sampling(temperature=1e3)
  policy = stepwise(found, sampling=nearly_uniform)
  _, drawn = policy.start(asked, 60, copies=8)
  # The chance that none of 960 is a certain one of 67 is below 1e-6.
  assert set(np.unique(drawn.tokens)) == set(range(67)) - {9}


def test_what_cannot_be_followed_is_an_error():
  vlm = support_vlm.model()
  latest = dataclasses.replace(vlm, placement=cross_attention.LatestImage())
  with pytest.raises(UserError, match="LatestImage"):
    reader(latest)
  with pytest.raises(UserError, match="tokens alone"):
    reader()([[1, 2], [3]])
