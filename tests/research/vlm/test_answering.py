"""A model's answers to a data set: whose images they are, and what compiles."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research.diffusion.sampling.config import Dual, Prefix, SamplerConfig
from research.diffusion.token_source import DiffusionSource
from research.generation import decoding
from research.nn import logits
from research.typing import UserError
from research.vlm import answering, data
from research.vlm.answering import Answerer, Answers
from research.vlm.evaluation.report import Report
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.shapes import Shapes
from tests import support_vlm

LOADED = types.SimpleNamespace(
  model=support_vlm.model(),
  params=support_vlm.params(),
  tokenizer=support_vlm.tokenizer(),
  preprocessor=support_vlm.PREPROCESSOR,
)


def answerer(**fields):
  return Answerer(**vars(LOADED), **fields)


def questions(samples):
  return data.ImageQuestions(
    samples=samples,
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=support_vlm.IMAGE,
    length=16,
  )


@pytest.fixture(scope="module", name="samples")
def _samples():
  """Seven samples, of three questions."""
  images = support_vlm.pixels(7, 1)
  return [
    Sample(
      images=(images[i, 0],),
      question=f"w{5 + i % 3}",
      answer="w3",
      kind="read",
      stratum="all",
      program={},
      objects=(),
    )
    for i in range(7)
  ]


def test_images_are_made_as_the_questions_say(samples, monkeypatch):
  """As those of its rows are; a model may come without a preprocessor."""
  asked = []

  def evaluate(samples, answer, *args, **kwargs):
    asked.append(answer)
    return Report([], {}, {}, {})

  monkeypatch.setattr(answering.protocol, "evaluate", evaluate)
  blind = types.SimpleNamespace(**(vars(LOADED) | {"preprocessor": None}))
  Answers(questions=questions(samples))(blind)
  assert asked[0].preprocessor == support_vlm.PREPROCESSOR


def test_answers_are_to_real_blank_and_others_images(samples):
  """In batches of four, the last of which is padded, as one by one."""
  ask = answerer(max_new_tokens=2, rows=4)
  ask([samples[0].images], ["w5"])
  before = decoding.prefill._cache_size()
  report = Answers(questions=questions(samples), max_new_tokens=2, batch=4)(
    LOADED
  )
  # A question without images, next to one that has one.
  text, shown = ask([(), samples[1].images], ["w5", "w6"])
  assert decoding.prefill._cache_size() == before
  assert not {"majority"} & set(report.scores)

  def alone(images, sample):
    return ask([images], [sample.question])[0]

  for i, sample in enumerate(samples):
    blank = (np.zeros_like(sample.image),)
    assert report.texts["real"][i] == alone(sample.images, sample)
    assert report.texts["blind"][i] == alone(blank, sample)
    group = [x for x in samples if x.question == sample.question]
    others = {alone(x.images, sample) for x in group if x is not sample}
    assert report.texts["shuffled"][i] in others
  assert report.texts["real"] != report.texts["blind"]
  assert shown == alone(samples[1].images, samples[1])
  scores = logits(
    LOADED.model.language, LOADED.params["language"], jnp.array([[5]])
  )
  first = int(scores[0, -1].argmax())
  assert text.split()[0] == LOADED.tokenizer.decode([first]).strip()


def test_rows_of_no_one_and_three_images_are_answered_as_alone():
  """Alone, a row is repeated, so that nothing else is compiled."""
  pool = support_vlm.pixels(4, 1, seed=2)[:, 0]
  images = [(), (pool[0],), tuple(pool[1:])]
  texts = ["w5 w6 w9", "w7", "w8 w5"]
  ask = answerer(max_new_tokens=2, views=3, rows=3)
  found = ask(images, texts)
  for row, (own, text) in enumerate(zip(images, texts, strict=True)):
    assert ask([own], [text]) == found[row : row + 1]
  # The order of a row's images is the prompt's.
  turned = ask([*images[:2], images[2][::-1]], texts)
  assert turned[:2] == found[:2] and turned[2] != found[2]


def test_a_task_brings_its_rules_and_a_limit_cuts_it():
  task = Shapes(kinds=("count", "exists"), size=32, count=20, split="heldout")
  report = Answers(
    questions=questions(task), max_new_tokens=1, limit=6, batch=6
  )(LOADED)
  assert len(report.samples) == 6
  assert {*Shapes.RULES} < set(report.scores)
  shown = report.to_json()["exists"]["systems"]
  assert shown["real"]["n"] == 3 and "colour only" in shown


def test_answers_are_the_tokens_of_the_source():
  def count(model, params, prompts, most, *rest):
    yield np.array([[5 + len(prompt)] * most for prompt in prompts])

  ask = answerer(max_new_tokens=2, source=count)
  assert ask([(), ()], ["w5", "w6 w7 w8"]) == ["w6 w6", "w8 w8"]


HIDDEN = 2
"""The id that hides others, in tests of masked diffusion."""


def filled(image, words, most):
  """Returns tokens filled in one by one, the surest first, by full passes."""
  model, count = LOADED.model, 4 + len(words)
  spliced = model.with_images(LOADED.params, jnp.asarray(image)[None, None])
  ids = [support_vlm.IMAGE] * 4 + words + [HIDDEN] * most
  for _ in range(most):
    tokens = jnp.asarray([ids])
    positions = jnp.arange(len(ids))[None]
    scores = model.language.apply(
      {"params": spliced}, tokens, positions, Mask.full()
    )[0]
    scores = model.language.apply({"params": spliced}, scores, method="logits")[
      0
    ]
    chances = np.array(jax.nn.softmax(scores.at[:, HIDDEN].set(-jnp.inf)))
    chances *= np.asarray(ids)[:, None] == HIDDEN
    chances[:count] = 0
    at = np.unravel_index(chances.argmax(), chances.shape)
    ids[at[0]] = int(at[1])
  return ids[count:]


@pytest.mark.slow
@pytest.mark.parametrize(
  ("cache", "most"),
  [(None, 4), (Prefix(), 1)],
)
def test_a_diffusion_model_answers_about_images(cache, most):
  """Prompts of other lengths share a batch; nothing of them is masked."""
  source = DiffusionSource(mask_id=HIDDEN, config=SamplerConfig(cache=cache))
  ask = answerer(max_new_tokens=most, source=source)
  images, texts = support_vlm.pixels(3, 1)[:, 0], ["w5 w6 w9", "w7", "w7"]
  found = ask([(image,) for image in images], texts)
  for image, text, answer in zip(images, texts, found, strict=True):
    words = [int(word[1:]) for word in text.split()]
    new = filled(image, words, most)
    end = new.index(65) if 65 in new else most
    names = [LOADED.tokenizer.decode([i]).strip() for i in new[:end]]
    assert answer.split() == [name for name in names if name]
  # The same question about other pixels.
  assert most == 1 or found[1] != found[2]


def test_a_diffusion_model_stops_at_its_first_end():
  """Whatever fills the places behind it."""
  source = DiffusionSource(mask_id=HIDDEN)
  prompts = [[5, 6], [7]]
  model, params = LOADED.model.language, LOADED.params["language"]
  [whole] = source(model, params, prompts, 6)
  assert (whole >= 0).all()
  end = int(whole[0, 2])
  [cut] = source(model, params, prompts, 6, stop_tokens=(end,))
  parts = [*source(model, params, prompts, 6, stop_tokens=(end,), size=4)]
  assert [part.shape[1] for part in parts] == [4, 2]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), cut)
  row = cut[0][cut[0] >= 0].tolist()
  assert row.count(end) == 1 and row[-1] == end
  assert (cut[0, len(row) :] == -1).all()


def test_samplers_that_miscount_placeholders_are_refused():
  for config in (SamplerConfig(guidance=1.0), SamplerConfig(cache=Dual())):
    with pytest.raises(UserError, match="DiffusionSource: .*expected"):
      DiffusionSource(mask_id=HIDDEN, config=config)
  source = DiffusionSource(mask_id=HIDDEN)
  model, params = LOADED.model.language, LOADED.params["language"]
  with pytest.raises(UserError, match="room for 8 new tokens, expected 9"):
    next(source(model, params, [[5] * 120], 9))
