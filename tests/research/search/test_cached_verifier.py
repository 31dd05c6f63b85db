"""A search scores a step where training labelled it, with a cache or without.

The law: scores of a search are those of `prm.judge` on the finished texts, for
random policies, whatever ends steps and texts.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.generation.boundary import Boundary
from research.generation.sampling import Sampling
from research.generation.stepwise import Stepwise
from research.prm import judge
from research.prm.conventions import step_tokens
from research.prm.heads import LinearHead
from research.prm.labelled import LabelledSolution
from research.prm.model import RewardModel
from research.reasoning.words import EOS, PAD, word_tokenizer
from research.search.cached_verifier import CachedVerifier
from research.search.diffusion_policy import DiffusionPolicy
from research.search.engine import Engine
from research.search.policy import Path, steps_of
from research.search.reward_verifiers import PolicyProbe, StepScore, verifier_of
from research.search.step_search import Limits
from research.search.strategies.beam import Beam
from research.search.strategies.step_revision import StepRevision
from research.search.strategies.tree import TreeSearch
from research.text import separators
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests import support

LETTERS = ["a", "b", ".", ";", " ", "\n"]
MERGES = [("a", "b"), (".", "\n"), ("\n", "\n"), (" ", "a")]
"""A policy seldom writes the tokens that encoding gives its text."""
QUESTIONS = ("ab.", "b a;a", "aa")
NEW = 16


def byte_tokenizer(merges=()):
  """Returns one of bytes: a step may divide é, and blank steps exist."""
  marks = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  names = {x: marks.pre_tokenize_str(x)[0][0] for x in LETTERS}
  merges = [tuple(names[x] for x in pair) for pair in merges]
  # Bytes of é, and of what decoders write for half of it.
  others = marks.pre_tokenize_str("é\ufffd")[0][0]
  words = ["<eos>", "<mask>", *names.values(), *others]
  words += ["".join(pair) for pair in merges]
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE({x: i for i, x in enumerate(words)}, merges)
  )
  backend.pre_tokenizer = marks
  backend.decoder = tokenizers.decoders.ByteLevel()
  backend.add_special_tokens(["<eos>", "<mask>"])
  return Tokenizer(backend=backend, eos=0, stop=(0,))


PLAIN, MERGED = byte_tokenizer(), byte_tokenizer(MERGES)
VOCAB = MERGED.vocab_size
WORDS = word_tokenizer([EOS, PAD, *(f"w{i}" for i in range(2, VOCAB))])


@functools.cache
def reward():
  """Returns a reward model with a vocabulary, and its parameters."""
  backbone = support.model("llama", tied=False, vocab=VOCAB)
  model = RewardModel(backbone=backbone, head=LinearHead())
  params = model.with_new_head(support.params(backbone), jax.random.key(3))
  waves = jax.tree.map(
    lambda x: x + jnp.cos(jnp.arange(x.size)).reshape(x.shape), params["score"]
  )
  return model, params | {"score": waves}


def step_ends(text, most):
  """Returns where steps end: with a text, or after so many tokens."""
  texts = separators.token_texts(MERGED, VOCAB)
  table = separators.separator_automaton(texts, text.encode())
  return Boundary(*table, np.int32(most))


@functools.cache
def policy(text=";", most=4, stop=(0,)):
  model, params = reward()
  return Stepwise(
    model=model.backbone,
    params=params,
    sampling=Sampling(temperature=2.0),
    stop_tokens=stop,
    boundary=step_ends(text, most),
    log_probs=True,
  )


@functools.cache
def blocks():
  """Returns a masked diffusion policy, whose blocks are the steps."""
  model, params = reward()
  return DiffusionPolicy(
    denoiser=NoCache(model=model.backbone),
    params=params,
    config=SamplerConfig(mask_id=1, end=(0,), length=4, block=4, steps=2),
    sampling=Sampling(temperature=2.0),
  )


def questions(tokenizer):
  return ("w3 w4", "w9", "w2 w2 w2") if tokenizer is WORDS else QUESTIONS


def searched(policy, verifier, strategy, tokenizer, seed):
  stops = policy.stop_tokens
  silent = tuple(x for x in stops if not tokenizer.decode([x]))
  engine = Engine(policy=policy, verifier=verifier, silent=silent)
  limits = Limits(tokens=NEW, steps=NEW, key=jax.random.key(seed))
  prompts = [tokenizer.prompt(x) for x in questions(tokenizer)]
  return strategy(engine, prompts, limits)


def judged(texts, tokenizer, separator):
  """Returns scores of steps of texts that are read whole, without a cache."""
  model, params = reward()
  solutions = [
    LabelledSolution(prompt=prompt, steps=steps, labels=(None,) * len(steps))
    for prompt, steps in texts
  ]
  return judge.score_solutions(
    *(model, params, tokenizer, solutions, separator), batch_size=64
  )


def check_law(samples, tokenizer, separator):
  """Compares a search's scores with the judge's; returns their texts."""
  pairs = [
    (questions(tokenizer)[path.problem], steps_of(path, tokenizer.decode)[1])
    for one in samples
    for path in one.paths
  ]
  pairs = [(question, steps) for question, steps in pairs if steps]
  texts = [
    (question, tuple(x.text for x in steps)) for question, steps in pairs
  ]
  expected = judged(texts, tokenizer, separator)
  for (_, steps), scores in zip(pairs, expected, strict=True):
    np.testing.assert_allclose(
      [x.score for x in steps], scores, atol=1e-5, err_msg=repr(steps)
    )
  assert np.std(np.concatenate(expected)) > 1e-3
  return texts


STRATEGIES = {
  "beam": Beam(copies=8, width=2),
  "tree": TreeSearch(simulations=3, width=3),
  "revision": StepRevision(copies=4, rounds=1, threshold=0.4),
}


@pytest.mark.cover(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("separator", ["", ";", "\n\n", " .\n"])
@pytest.mark.parametrize("ends", [(";", 4), ("\n\n", 5), (";", 2)])
@pytest.mark.parametrize("name", ["plain", "merged"])
@pytest.mark.parametrize("stop", [(0,), (0, 5)])
def test_scores_are_those_of_the_finished_texts(
  strategy, separator, ends, name, stop
):
  """The stop token ;, of two, has a text, which training reads."""
  tokenizer = {"plain": PLAIN, "merged": MERGED}[name]
  verifier = verifier_of(*reward(), tokenizer=MERGED, separator=separator)
  if name == "plain":
    verifier = dataclasses.replace(verifier, tokenizer=PLAIN)
  samples = searched(
    policy(*ends, stop), verifier, STRATEGIES[strategy], tokenizer, 4
  )
  check_law(samples, tokenizer, separator)


@pytest.mark.parametrize("separator", ["", ";"])
def test_scores_of_blocks_are_those_of_the_finished_texts(separator):
  verifier = verifier_of(*reward(), tokenizer=MERGED, separator=separator)
  samples = searched(blocks(), verifier, Beam(copies=8, width=2), MERGED, 5)
  check_law(samples, MERGED, separator)


def test_a_probe_scores_where_training_labelled():
  """It reads the policy's own tokens: of words, those are the text's."""
  model, params = reward()
  probe = PolicyProbe(policy=policy(), head=StepScore(model), params=params)
  samples = searched(policy(), probe, Beam(copies=16, width=2), WORDS, 6)
  samples = [
    dataclasses.replace(x, paths=tuple(p for p in x.paths if 1 not in p.tokens))
    for x in samples
  ]
  check_law(samples, WORDS, "")
  paths = [path for one in samples for path in one.paths]
  assert any(len(path.steps[-1]) > 1 for path in paths if path.stopped)


def test_a_probe_of_a_quantized_cache_is_refused():
  model, params = reward()
  quantized = dataclasses.replace(policy(), kv="int8")
  with pytest.raises(UserError, match="found the quantized cache"):
    PolicyProbe(policy=quantized, head=StepScore(model), params=params)


@pytest.mark.parametrize(
  ("step", "separator", "text"),
  [
    ("ab", "", "ab"),
    ("ab\n\n", "", "ab\n\n"),
    ("ab", ";", "ab;"),
    ("ab;", ";", "ab;"),
    ("ab; \n", ";", "ab;"),
    ("ab\n\n\n", "\n", "ab\n"),
    (";", ";", ";"),
    (" \n", ";", ""),
  ],
)
def test_a_separator_takes_the_place_of_what_a_step_ends_in(
  step, separator, text
):
  assert PLAIN.decode(step_tokens(PLAIN, step, separator)) == text


def test_a_separator_needs_the_tokenizer():
  model, params = reward()
  with pytest.raises(UserError, match="without a tokenizer"):
    verifier_of(model, params, separator=";")


def test_a_context_that_is_too_short_is_refused():
  model = support.model("llama").clone(max_positions=8)
  it = CachedVerifier(model=model, params={}, head=len)
  with pytest.raises(UserError, match="up to 5 tokens and 9 new ones"):
    it.start([[1] * 5], 1, 9)


def path_of(text):
  return Path(problem=0, root=0, prompt=5, steps=(tuple(PLAIN.encode(text)),))


def test_a_row_that_waits_is_read_on_from_where_it_was():
  it = verifier_of(*reward(), tokenizer=MERGED)
  state = it.start([MERGED.prompt("ab.")], 1, 9)
  first, idle = path_of("a;"), np.array([[-1]])
  state, one = it.read(state, [first], np.array([first.tokens]))
  state, same = it.read(state, [first], idle)
  tokens = tuple(PLAIN.encode("b"))
  both = dataclasses.replace(first, steps=(*first.steps, tokens))
  _, two = it.read(state, [both], np.array([tokens]))
  [expected] = judged([("ab.", ("a;", "b"))], MERGED, "")
  np.testing.assert_allclose([one[0], two[0]], expected, atol=1e-5)
  assert same[0] == one[0]


def test_a_blank_step_is_read_with_the_one_that_it_joins():
  """Here both have a token in common, and the next one follows it."""
  it = verifier_of(*reward(), tokenizer=MERGED)
  question, steps = "ab.", ("a.", "\n", "b")
  state, path = it.start([MERGED.prompt(question)], 1, 9), path_of("")
  path = dataclasses.replace(path, steps=())
  scores = []
  for step in steps:
    tokens = PLAIN.encode(step)
    path = dataclasses.replace(path, steps=(*path.steps, tuple(tokens)))
    state, score = it.read(state, [path], np.array([tokens]))
    scores.append(score[0])
  [expected] = judged([(question, ("a.\n", "b"))], MERGED, "")
  np.testing.assert_allclose(scores[1:], expected, atol=1e-5)
  assert abs(scores[0] - scores[1]) > 1e-3


def test_separators_take_room_until_the_context_ends():
  """A cache grows, as texts may have more tokens than a policy writes."""
  model, params = reward()
  model = dataclasses.replace(
    model, backbone=model.backbone.clone(max_positions=40)
  )
  it = verifier_of(model, params, tokenizer=PLAIN, separator=";;;;;;")
  state = it.start([[1] * 5], 1, 2)
  capacity = state.cache.capacity
  state, _ = it.read(state, [path_of("a" * 20)], np.array([[2]]))
  assert state.cache.capacity > capacity
  assert it.spent(state)[0].verifier_new_tokens == 26
  with pytest.raises(UserError, match=r"found 47 tokens .* at most 40"):
    it.read(state, [path_of("a" * 30)], np.array([[2]]))
