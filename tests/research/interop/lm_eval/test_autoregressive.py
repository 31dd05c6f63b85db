"""The harness's three questions, against definitions written out here.

The harness itself is an extra; where it is installed, a task of its own runs.
"""

import dataclasses
import functools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from scipy import special

from research.generation import generate
from research.interop import lm_eval
from research.interop.lm_eval import harness_requests
from research.interop.loaded import Loaded
from research.nn import rope
from research.text.special_tokens import SpecialTokens
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests import support

CONTEXT = 24
LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,?:\n"


def tokenizer():
  vocab = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}
  backend = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab | {"th": 62}, merges=[("t", "h")])
  )
  backend.decoder = tokenizers.decoders.Fuse()
  backend.add_special_tokens(["<s>", "</s>"])
  return Tokenizer(backend=backend, bos=0, eos=1, stop=(1,), add_bos=True)


@pytest.fixture(scope="module")
def loaded():
  model = support.model().clone(max_positions=CONTEXT)
  return Loaded(model, support.params(model), tokenizer(), {"format": "test"})


@pytest.fixture(scope="module")
def log_p(loaded):
  @functools.partial(jax.jit)
  def full(tokens):
    variables = {"params": loaded.params}
    hidden, _ = loaded.model.apply(variables, tokens)
    return loaded.model.apply(variables, hidden, method="logits")

  def log_p(ids):
    logits = np.asarray(full(jnp.asarray([ids], jnp.int32)), np.float64)[0]
    return special.log_softmax(logits, -1)

  return log_p


def by_definition(log_p, context, continuation):
  ids = [*context, *continuation]
  found = log_p(ids[:-1])[-len(continuation) :]
  value = found[np.arange(len(continuation)), continuation].sum()
  return value, bool((found.argmax(-1) == continuation).all())


def test_loglikelihood(loaded, log_p):
  encode = loaded.tokenizer.encode
  pairs = [("hello", " you"), ("a", "b"), ("what is", " th"), ("", "abc")]
  want = [
    by_definition(log_p, [0, *encode(a)], encode(b)) for a, b in pairs[:3]
  ]
  want.append(by_definition(log_p, [0], encode("abc")))
  got = lm_eval.loglikelihood(loaded, pairs, batch=3)
  for (value, greedy), (wanted, best) in zip(got, want, strict=True):
    assert value == pytest.approx(wanted, rel=1e-5) and greedy == best


def test_padding_does_not_change_how_a_text_is_rotated(loaded):
  """`rope.Dynamic` rotates by a text's length, from its fourth token on."""
  scaling = rope.Dynamic(factor=4.0, original=4)
  model = support.with_scaling(loaded.model, scaling)
  ids = [0, *range(9, 18)]
  variables = {"params": loaded.params}
  hidden, _ = model.apply(variables, jnp.asarray([ids[:-1]]))
  logits = model.apply(variables, hidden, method="logits")[0, -3:]
  chances = special.log_softmax(np.asarray(logits, np.float64), -1)
  want = chances[np.arange(3), ids[-3:]].sum()
  requests = [(ids[:-3], ids[-3:]), ([0] * 10, [3] * 10)]
  for asked in (requests[:1], requests):
    found = lm_eval.score(model, loaded.params, asked)
    assert found[0][0] == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_greedy_continuations_are_recognised(loaded):
  made = generate.generate(loaded.model, loaded.params, [[0, 9, 10]], 4)
  best = made.tokens[0]
  worse = [*best[:-1], (best[-1] + 1) % 60]
  found = lm_eval.score(
    loaded.model, loaded.params, [([0, 9, 10], best), ([0, 9, 10], worse)]
  )
  assert [greedy for _, greedy in found] == [True, False]
  assert found[0][0] > found[1][0]


def test_where_context_and_continuation_are_parted(loaded, log_p):
  """Trailing spaces move over; a token that straddles is not asked for."""
  encode = loaded.tokenizer.encode
  [spaced, moved] = lm_eval.loglikelihood(loaded, [("at ", "x"), ("at", " x")])
  assert spaced == pytest.approx(moved)
  # "t" and "h" merge; as in the harness, the model is given "a t" and asked
  # for what stands behind two tokens of the whole.
  [(value, _)] = lm_eval.loglikelihood(loaded, [("at", "hx")])
  assert len(encode("athx")) == 3 and len(encode("at")) == 2
  want, _ = by_definition(log_p, [0, *encode("at")], encode("x"))
  assert value == pytest.approx(want, rel=1e-5)


def test_long_contexts_lose_their_beginning(loaded, log_p):
  ids = np.random.default_rng(0).integers(2, 60, 40).tolist()
  [(value, _)] = lm_eval.score(
    loaded.model, loaded.params, [(ids[:35], ids[35:])]
  )
  want, _ = by_definition(log_p, ids[40 - CONTEXT - 1 : 35], ids[35:])
  assert value == pytest.approx(want, rel=1e-5)


def with_every_row(loaded, every_row):
  around = SpecialTokens(begin=(0,), every_row=every_row)
  words = dataclasses.replace(loaded.tokenizer, documents=around)
  return dataclasses.replace(loaded, tokenizer=words)


@pytest.mark.parametrize("length", [1, CONTEXT, CONTEXT + 1, 3 * CONTEXT - 4])
def test_rolling(loaded, log_p, length):
  """The windows are those of the harness's get_rolling_token_windows."""
  loaded = with_every_row(loaded, False)
  rng = np.random.default_rng(length)
  text = "".join(rng.choice(list("abc xyz"), length))
  ids = loaded.tokenizer.encode(text)
  assert len(ids) == length
  want, done = 0.0, 0
  while done < length:
    new = min(CONTEXT, length - done)
    end = done + new
    seen = (
      [0, *ids][max(0, end - CONTEXT) : end] if done else [0, *ids[: end - 1]]
    )
    found = log_p(seen)[-new:]
    want += found[np.arange(new), ids[done:end]].sum()
    done = end
  [got, again] = lm_eval.rolling(loaded, [text, text], batch=2)
  assert got == pytest.approx(want, rel=1e-5) and got == again


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 3 * CONTEXT - 4])
def test_rolling_where_every_row_begins_with_bos(loaded, log_p, length):
  """Token by token: each follows bos and what of its text fits behind it."""
  rng = np.random.default_rng(length)
  text = "".join(rng.choice(list("abc xyz"), length))
  ids = loaded.tokenizer.encode(text)
  starts = [0, *range(CONTEXT, length, CONTEXT - 1)]
  want = 0.0
  for start, stop in zip(starts, [*starts[1:], length], strict=True):
    # The last window is filled up with what is before it, as the harness does.
    first = max(0, stop - CONTEXT) if start else 0
    found = log_p([0, *ids[first : stop - 1]])
    for i in range(start, stop):
      want += found[i - first, ids[i]]
  [got] = lm_eval.rolling(loaded, [text])
  assert got == pytest.approx(want, rel=1e-5)


def test_long_contexts_keep_bos(loaded, log_p):
  """Of a continuation longer than the context, too, bos is not asked for."""
  around = loaded.tokenizer.special
  ids = np.random.default_rng(0).integers(2, 60, 40).tolist()
  for cut in (35, 3):
    [(value, _)] = lm_eval.score(
      loaded.model, loaded.params, [([0, *ids[:cut]], ids[cut:])], 8, around
    )
    count = min(40 - cut, CONTEXT)
    want, _ = by_definition(
      log_p, [0, *ids[40 - CONTEXT : 40 - count]], ids[40 - count :]
    )
    assert value == pytest.approx(want, rel=1e-5)
  options = {"until": [], "max_gen_toks": 4, "do_sample": False}
  text = loaded.tokenizer.decode(ids)
  [got] = lm_eval.generate_until(loaded, [(text, options)])
  made = generate.generate(
    loaded.model,
    loaded.params,
    [[0, *loaded.tokenizer.encode(text)[-(CONTEXT - 5) :]]],
    4,
    stop_tokens=(1,),
  )
  assert got == loaded.tokenizer.decode(made.tokens[0])


@pytest.mark.slow
def test_generate_until(loaded):
  contexts = ["what", "is th", "a"]
  tokenizer = loaded.tokenizer
  whole = []
  for text in contexts:
    prompt = tokenizer.encode(text, add_special=True)
    made = generate.generate(
      loaded.model, loaded.params, [prompt], 12, stop_tokens=(1,)
    )
    whole.append(tokenizer.decode(made.tokens[0]))
  options = {"until": [], "max_gen_toks": 12, "do_sample": False}
  requests = [(c, options) for c in contexts]
  assert lm_eval.generate_until(loaded, requests, batch=2) == whole
  stop = whole[0][5:7]
  cut = lm_eval.generate_until(
    loaded, [(contexts[0], {**options, "until": [stop, "@"]})]
  )
  assert cut == [whole[0][: whole[0].index(stop)]]


def test_a_special_token_among_until_ends_a_text(loaded):
  """As in the harness, which looks for strings in a text with such tokens."""
  own = tokenizer()
  own = dataclasses.replace(own, stop=())
  prompt = own.encode("what", add_special=True)
  made = generate.generate(loaded.model, loaded.params, [prompt], 12)
  ids = made.tokens[0]
  end = next(i for i in ids if i > 1 and i not in ids[:2])
  own.backend.add_special_tokens([own.backend.id_to_token(end)])
  options = {"until": [own.backend.id_to_token(end), "@"], "max_gen_toks": 12}
  [got] = lm_eval.generate_until(
    dataclasses.replace(loaded, tokenizer=own), [("what", options)]
  )
  assert got == own.decode(ids[: ids.index(end)])
  assert got not in ("", own.decode(ids))


@pytest.mark.slow
def test_samples_belong_to_their_request(loaded):
  options = {"max_gen_toks": 6, "do_sample": True, "temperature": 1.5}
  requests = [("abc", options), ("xyz", options), ("abc", options)]
  wide, slim = (
    lm_eval.generate_until(loaded, requests, batch=b) for b in (3, 1)
  )
  assert wide == slim and wide[0] != wide[2]
  assert wide != lm_eval.generate_until(loaded, requests, batch=3, seed=1)


def test_unknown_options_are_named(loaded):
  with pytest.raises(UserError, match="the option 'num_beams'"):
    lm_eval.generate_until(loaded, [("a", {"num_beams": 3})])


TASK = {
  "task": "letters",
  "dataset_path": "json",
  "test_split": "test",
  "output_type": "multiple_choice",
  "doc_to_text": "{{question}}",
  "doc_to_choice": "{{choices}}",
  "doc_to_target": "{{label}}",
  "metric_list": [{"metric": "acc"}],
}


def test_a_task_of_the_harness(loaded, tmp_path):
  harness = pytest.importorskip("lm_eval")
  from lm_eval.tasks import TaskManager

  rows = [
    {"question": f"{a} then", "choices": [" b", " c", " th"], "label": i % 3}
    for i, a in enumerate("abcdefgh")
  ]
  data = tmp_path / "data.jsonl"
  data.write_text("\n".join(map(json.dumps, rows)))
  task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
  found = harness.simple_evaluate(
    model=lm_eval.adapter(loaded), tasks=[task], task_manager=TaskManager()
  )
  scores = [
    # The harness puts a space between question and choice.
    lm_eval.loglikelihood(
      loaded, [(r["question"], f" {c}") for c in r["choices"]]
    )
    for r in rows
  ]
  best = [int(np.argmax([value for value, _ in row])) for row in scores]
  want = np.mean([b == r["label"] for b, r in zip(best, rows, strict=True)])
  assert found["results"]["letters"]["acc,none"] == pytest.approx(want)


TURNS = "{% for m in messages %}[{{ m.role }}]{{ CONTENT }};{% endfor %}"
CHAT = [
  {"role": "user", "content": "what"},
  {"role": "assistant", "content": "it is "},
]


@pytest.mark.parametrize(
  ("content", "want"),
  [
    ("m.content", "[user]what;[assistant]it is "),
    ("m.content | trim", "[user]what;[assistant]it is"),
  ],
)
def test_an_answer_that_a_task_begins_is_not_ended(
  loaded, monkeypatch, content, want
):
  """As transformers renders it with `continue_final_message`."""
  module = types.SimpleNamespace(LM=object)
  monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
  own = dataclasses.replace(
    loaded.tokenizer,
    chat_template=TURNS.replace("CONTENT", content)
    + "{% if add_generation_prompt %}[assistant]{% endif %}",
  )
  asked = lm_eval.adapter(dataclasses.replace(loaded, tokenizer=own))
  assert asked.apply_chat_template(CHAT[:1]) == "[user]what;[assistant]"
  assert asked.apply_chat_template(CHAT, add_generation_prompt=False) == want


def test_a_template_that_leaves_out_the_answer_is_an_error(loaded):
  own = dataclasses.replace(
    loaded.tokenizer, chat_template=TURNS.replace("CONTENT", "''")
  )
  with pytest.raises(UserError, match="leaves out the end of the last message"):
    harness_requests.unfinished(own, CHAT)


def test_without_the_harness(loaded, monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
  with pytest.raises(UserError, match=r"'\.\[evaluation\]"):
    lm_eval.adapter(loaded)
