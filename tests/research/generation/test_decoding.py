"""Rows that pause, branch and end: as if nothing had happened to the others."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.generation import decoding, generate
from research.generation.boundary import Boundary
from research.generation.generated import NO_TOKEN
from research.generation.sampling import GREEDY, Sampling
from research.generation.stepwise import Stepwise
from research.lora import Adapt
from research.lora.methods.alora import ALoRA
from research.nn.cache import take_rows
from research.quant.kv.kv_quantizer import KVQuantizer
from research.text import separators
from research.typing import UserError
from research.vlm.splice import with_features
from tests import support

PROMPTS = [[5, 6, 7], [9] * 11]
NEW = 17
RULES = Sampling(temperature=1.3, repetition_penalty=1.1)
KEY = jax.random.key(3)


@functools.cache
def case(family="llama"):
  model = support.model(family, tied=False)
  return model, support.params(model)


def stepwise(family="llama", **fields):
  model, params = case(family)
  return Stepwise(
    model=model, params=params, sampling=RULES, log_probs=True, **fields
  )


def boundary(tokens=(), most=2**30):
  """Pauses after some tokens."""
  ends = np.zeros((1, case()[0].vocab_size), bool)
  ends[0, list(tokens)] = True
  return Boundary(np.zeros_like(ends, np.int32), ends, np.int32(most))


def rows_of(parts):
  """Returns each row's tokens and log-probabilities, of several parts."""
  tokens = np.concatenate([x.tokens for x in parts], axis=1)
  scores = np.concatenate([x.log_probs for x in parts], axis=1)
  there = tokens != NO_TOKEN
  assert not scores[~there].any()
  rows = zip(tokens, scores, there, strict=True)
  return [(t[w].tolist(), s[w].tolist()) for t, s, w in rows]


def run(engine, copies=1):
  """Returns the parts between pauses, and the state at the end."""
  state, drawn = engine.start(PROMPTS, NEW, KEY, copies)
  parts = [drawn]
  while not state.rows.done.all():
    state, drawn = engine.advance(state)
    parts.append(drawn)
  return parts, state


@pytest.mark.parametrize(
  "fields",
  [
    dict(family="gemma2"),  # has windows, which are rings in the cache
    pytest.param(
      dict(kv=KVQuantizer(group=2, residual=4)), marks=pytest.mark.slow
    ),
  ],
)
def test_rows_that_pause_are_those_that_do_not(fields):
  """Bitwise, each pausing at times of its own."""
  [whole], _ = run(stepwise(**fields))
  first, second = (tokens for tokens, _ in rows_of([whole]))
  ends = {first[2], first[9], second[5]}
  parts, _ = run(stepwise(**fields, boundary=boundary(ends)))
  assert rows_of(parts) == rows_of([whole])
  assert len(parts) > 2
  for part in parts[:-1]:
    for (tokens, _), done in zip(rows_of([part]), part.done, strict=True):
      assert done or not tokens or tokens[-1] in ends
      assert not ends & set(tokens[:-1])


@pytest.mark.slow
def test_rows_that_begin_without_a_token_draw_those_of_start():
  """They feed the prompt's last token again, into a ring of the cache, too."""
  engine = stepwise("gemma2", boundary=boundary(most=5))
  state = engine.begin(PROMPTS, NEW, KEY, 2)
  parts = []
  while not state.rows.done.all():
    state, drawn = engine.advance(state)
    parts.append(drawn)
  expected, _ = run(engine, copies=2)
  for (tokens, scores), (other, same) in zip(
    rows_of(parts), rows_of(expected), strict=True
  ):
    assert tokens == other
    np.testing.assert_allclose(scores, same, atol=1e-4)


def test_a_token_is_not_fed_again_into_a_quantized_cache():
  with pytest.raises(UserError, match="a quantized cache"):
    stepwise(kv=KVQuantizer(group=2, residual=4)).begin(PROMPTS, NEW)


def test_a_step_has_a_longest_length():
  parts, _ = run(stepwise(boundary=boundary(most=5)))
  assert [x.tokens.shape[1] for x in parts] == [5, 5, 5, 2]
  assert rows_of(parts) == rows_of(run(stepwise())[0])


def test_log_probs_are_those_of_a_full_forward_pass():
  [whole], _ = run(stepwise())
  model, params = case()
  for prompt, (tokens, found) in zip(PROMPTS, rows_of([whole]), strict=True):
    row = jnp.array([prompt + tokens])
    hidden, _ = model.apply({"params": params}, row)
    logits = model.apply({"params": params}, hidden, method="logits")[0]
    every = jax.nn.log_softmax(logits)[len(prompt) - 1 : -1]
    expected = jnp.take_along_axis(every, jnp.array(tokens)[:, None], axis=1)
    np.testing.assert_allclose(found, expected[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_copies_of_a_prompt_are_rows_with_that_prompt():
  """The prompt is processed once; texts are those of the whole batch."""
  parts, _ = run(stepwise(), copies=3)
  model, params = case()
  prompts = [p for p in PROMPTS for _ in range(3)]
  expected = generate.generate(model, params, prompts, NEW, RULES, KEY).tokens
  found = [tokens for tokens, _ in rows_of(parts)]
  assert found == expected
  assert len({tuple(x) for x in found[:3]}) == 3


def paused(most=6):
  engine = stepwise(boundary=boundary(most=most))
  return engine, *engine.start(PROMPTS, NEW, KEY)


def test_chosen_rows_go_on_and_their_copies_go_elsewhere():
  engine, state, _ = paused()
  chosen = engine.select(state, [1, 1, 0, 1], [0, 1, 0, 2])
  _, after = engine.advance(chosen)
  _, expected = engine.advance(state)
  found, alone = rows_of([after]), rows_of([expected])
  assert found[0] == alone[1] and found[2] == alone[0]
  assert len({tuple(tokens) for tokens, _ in found}) == 4


def test_branches_of_one_row_at_two_times_have_other_keys():
  engine, state, _ = paused()
  early = engine.select(state, [0], [1]).rows.keys
  state, _ = engine.advance(state)
  late = engine.select(state, [0], [1]).rows.keys
  drawn = jax.random.fold_in(state.rows.keys[0], 1)
  keys = [jax.random.key_data(k).tolist() for k in (early[0], late[0], drawn)]
  assert len({tuple(k) for k in keys}) == 3


@pytest.mark.parametrize("penalty", [None, 1.5, 1e9])
def test_tokens_that_were_not_drawn_count_as_if_they_had_been(penalty):
  """A row that ends too early goes on otherwise; one gets words to read."""
  engine = stepwise(boundary=boundary(most=4))
  rules = dataclasses.replace(GREEDY, repetition_penalty=penalty)
  engine = dataclasses.replace(engine, sampling=rules)
  _, drawn = engine.start(PROMPTS, 12)
  first, second = drawn.tokens.tolist()
  assert first[2] not in second
  # It ends the first row, and is replaced.
  first = first[: first.index(first[2]) + 1]
  ends = dataclasses.replace(engine, stop_tokens=(first[-1],))
  state, _ = ends.start(PROMPTS, 12)
  assert state.rows.done.tolist() == [True, False]
  state = engine.append(state, [[39], [3, 4, 5]], [True, False])
  assert state.rows.step.tolist() == [len(first), 7]
  _, after = engine.advance(state)
  model, params = case()
  texts = [PROMPTS[0] + first[:-1] + [39], PROMPTS[1] + second + [3, 4, 5]]
  expected = generate.generate(model, params, texts, 4, sampling=rules).tokens
  # What was replaced is no repetition: it comes next.
  assert expected[0][0] == first[-1]
  assert [row for row, _ in rows_of([after])] == expected


def test_no_row_gets_more_than_its_limit():
  engine, state, _ = paused()
  with pytest.raises(UserError, match="found 12 tokens after 6 of row 1"):
    engine.append(state, [[], [1] * 12])


def test_rows_that_ended_write_nothing():
  model, params = case()
  stop, tokens = generate.pad_stop_tokens(()), jnp.array(PROMPTS[1:] * 2)
  state, _ = decoding.prefill(
    *(model, params, tokens, jnp.array([11, 11]), GREEDY, KEY),
    *(jnp.arange(2), jnp.array([9, 2]), stop, 32),
  )
  state, drawn = decoding.decode(model, params, state, GREEDY, stop, 1)
  assert drawn.done.tolist() == [False, True]

  def second(state):
    cache = take_rows(state.cache, jnp.array([1]))
    return jax.tree.map(np.asarray, (cache, state.rows.token[1]))

  before = second(state)
  state, drawn = decoding.decode(model, params, state, GREEDY, stop, 4)
  assert (drawn.tokens[1] == NO_TOKEN).all()
  chex.assert_trees_all_equal(second(state), before)
  assert state.rows.step.tolist() == [6, 2]


@pytest.mark.parametrize(
  ("rows", "branch", "message"),
  [
    ([2], [0], "found row 2, expected one of 2"),
    ([0, 1, 0], [1, 0, 1], "row 0 twice as branch 1"),
  ],
)
def test_bad_choices_are_refused(rows, branch, message):
  engine, state, _ = paused()
  with pytest.raises(UserError, match=message):
    engine.select(state, rows, branch)


# --- separators --------------------------------------------------------------


@pytest.mark.parametrize("separator", [b"\n\n", b"aab", b";", b"abab"])
def test_separators_are_found_however_tokens_cut_them(separator):
  """Beside a search in the bytes, over texts of random tokens."""
  rng = np.random.default_rng(0)
  alphabet = sorted({*separator, *b"xa"})
  tokens = [b"", *(bytes([x]) for x in alphabet)] + [
    bytes(rng.choice(alphabet, size=n).tolist()) for n in (2, 2, 2, 3, 3, 5)
  ]
  following, ends = separators.separator_automaton(tokens, separator)
  state, begins, text, hits = 0, 0, b"", 0
  for token in rng.integers(len(tokens), size=3000):
    found = bool(ends[state, token])
    state = following[state, token]
    text += tokens[token]
    expected = False
    while (at := text.find(separator, begins)) >= 0:
      begins, expected = at + len(separator), True
    assert found == expected
    hits += found
  assert 20 < hits < 2900
  with pytest.raises(UserError, match="found no text"):
    separators.separator_automaton(tokens, b"")


def images(params):
  """Returns parameters that see images, one row's."""
  features = jnp.zeros((1, 2, params["embed"].shape[1]))
  return with_features(params, features, token=3)


def invoked(params):
  method = ALoRA(rank=2, invocation=(3,))
  return Adapt(method=method)(params, KEY)


@pytest.mark.parametrize("change", [images, invoked])
def test_weights_of_rows_are_not_copied(change):
  """Also where the placeholder of images is a token of the vocabulary."""
  model, params = case()
  with pytest.raises(UserError, match="found weights that depend on the"):
    Stepwise(model=model, params=change(params))
