"""A trained reward model reads in a search what its run trained it on."""

import dataclasses

import numpy as np
import pytest

from experiments.core import config
from experiments.searching import sampling, search_run, verifiers
from experiments.searching.prompts import Plain
from research.prm import judge
from research.prm.conventions import TRL
from research.prm.labelled import LabelledSolution
from research.prm.rows import LabelledRows
from research.reasoning import words
from research.reasoning.tasks import chain
from research.typing import UserError
from tests.experiments.searching.test_search_command import REWARD, TINY

NAMES = chain.vocabulary(0, 18)
WORDS = words.word_tokenizer(NAMES)
OTHERS = words.word_tokenizer([*NAMES[:3], *NAMES[:2:-1]])
"""As many words, of which all but three have another id."""


def reward(monkeypatch, tokenizer=WORDS, **data):
  """Lets every run have a reward model with random weights."""
  run = read(REWARD)
  loaded = run.verifier.model.load()
  model = verifiers.RewardModel(backbone=loaded.model)
  params = model.with_new_head(loaded.params, sampling.jax.random.key(0))
  params["score"] = sampling.jax.tree.map(
    lambda x: x + np.cos(np.arange(x.size)).reshape(x.shape), params["score"]
  )
  trained = verifiers.TrainedModel(
    model, params, tokenizer, LabelledRows(paths="unread", **data)
  )
  monkeypatch.setattr(verifiers, "reward_of", lambda *_: trained)
  return trained


def read(*bindings):
  return config.read(TINY, bindings, root=search_run.SearchRun).experiment


def searched(verifier="TrainedReward", **changes):
  given = f"VERIFIER=@verifiers.{verifier}()", "PROBLEMS=(0, 2)"
  run = dataclasses.replace(
    read(*given, f"verifiers.{verifier}.workdir='run'"), **changes
  )
  return [one for batch in sampling.batches(run) for one in batch]


@pytest.mark.parametrize(
  "data",
  [{}, {"separator": " ;"}, {"convention": TRL(separator=" ;")}],
  ids=["own", "separator", "convention"],
)
def test_scores_are_those_of_the_runs_own_rows(monkeypatch, data):
  trained = reward(monkeypatch, **data)
  for one in searched():
    solutions = [
      LabelledSolution(
        prompt=one.problem.prompt,
        steps=tuple(x.text for x in sample.trace.steps),
        labels=(None,) * len(sample.trace.steps),
      )
      for sample in one.samples
    ]
    scores = judge.score_solutions(
      *(trained.model, trained.params, WORDS, solutions), **data
    )
    for sample, expected in zip(one.samples, scores, strict=True):
      np.testing.assert_allclose(sample.scores, expected, atol=1e-5)


@pytest.mark.parametrize("verifier", ["TrainedReward", "TrainedProbe"])
def test_another_tokenizer_of_the_same_size_is_refused(monkeypatch, verifier):
  assert OTHERS.vocab_size == WORDS.vocab_size
  reward(monkeypatch, OTHERS)
  message = f"run: found a verifier whose token 3 is '{NAMES[-1]}', expected"
  with pytest.raises(UserError, match=message):
    searched(verifier)


def test_another_tokenizer_of_a_new_head_is_refused():
  run = read(REWARD, "PROBLEMS=(0, 2)")
  source = dataclasses.replace(
    run.verifier.model,
    tokenizer=words.WordVocabulary(words=(*NAMES[:3], *NAMES[:2:-1])),
  )
  run = dataclasses.replace(run, verifier=verifiers.NewReward(model=source))
  with pytest.raises(UserError, match="NewReward: found a verifier whose tok"):
    next(sampling.batches(run))


def test_other_prompts_than_those_of_training_are_refused(monkeypatch):
  reward(monkeypatch, prompting=Plain(template="= {question}"))
  with pytest.raises(UserError, match=r"trained on prompts such as '= "):
    searched()


def test_a_probe_of_separators_is_refused(monkeypatch):
  reward(monkeypatch, separator=" ;")
  with pytest.raises(UserError, match="separator = ' ;' .* policy's own token"):
    searched("TrainedProbe")
