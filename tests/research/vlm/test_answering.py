"""A model's answers to a data set: whose images they are, and what compiles."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from research.generation import decoding
from research.nn import logits
from research.vlm import data
from research.vlm.answering import Answerer, Answers
from research.vlm.scenes.sample import Sample
from research.vlm.scenes.shapes import Shapes
from tests import support_vlm

LOADED = types.SimpleNamespace(
  model=support_vlm.model(),
  params=support_vlm.params(),
  tokenizer=support_vlm.tokenizer(),
  preprocessor=support_vlm.PREPROCESSOR,
)


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


def test_answers_are_to_real_blank_and_others_images(samples):
  """In batches of four, the last of which is padded, as one by one."""
  ask = Answerer(
    model=LOADED.model,
    params=LOADED.params,
    tokenizer=LOADED.tokenizer,
    preprocessor=LOADED.preprocessor,
    most=2,
    rows=4,
  )
  ask([samples[0].images], ["w5"])
  before = decoding.prefill._cache_size()
  report = Answers(questions=questions(samples), most=2, batch=4)(LOADED)
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


def test_a_task_brings_its_rules_and_a_limit_cuts_it():
  task = Shapes(kinds=("count", "exists"), size=32, count=20, split="heldout")
  report = Answers(questions=questions(task), most=1, limit=6, batch=6)(LOADED)
  assert len(report.samples) == 6
  assert {*Shapes.RULES} < set(report.scores)
  shown = report.to_json()["exists"]["systems"]
  assert shown["real"]["n"] == 3 and "colour only" in shown
