"""Judges that write: scripted critiques, and a tiny model against NumPy's."""

import dataclasses
import functools
import time
import types
import zlib

import jax
import numpy as np
import pytest

from research.generation import generate
from research.generation.sampling import Sampling
from research.nn.flops import Causal, model_cost
from research.prm.formats import genprm
from research.search import ledger as ledgers
from research.search.engine import Engine, Path
from research.search.generative_judge import (
  Decision,
  GenerativeJudge,
  GenPRMChat,
  Judgement,
  LanguageModelWriter,
  ThinkPRMChain,
)
from research.search.ledger import Ledger
from research.search.strategies.beam import Beam
from research.typing import UserError
from tests import support
from tests.research.diffusion import passes
from tests.research.search import test_search as shared

YES = "<output>**Judgement**: $\\boxed{Yes}$</output>"
NO = "<output>**Judgement**: $\\boxed{No}$</output>"


def text(tokens):
  return " ".join(map(str, tokens))


# Formats ---------------------------------------------------------------------


@pytest.mark.parametrize(
  ("critique", "right"),
  [
    (f"<analyze>fine</analyze>{YES}", True),
    (f"{YES} no, wait {NO}", False),
    ("", None),
    ("\\boxed{Yes}", None),  # not within an output
    (f"{YES[:-9]}\\boxed{{No}}</output>", None),  # both
    (f"{NO}<output>\\boxed{{Yes", False),  # cut: the last whole one
    ("<output>\\boxed{yes}</output>", None),
  ],
)
def test_a_step_is_right_if_the_last_output_says_so(critique, right):
  found = GenPRMChat().decision(critique, 1)
  assert (found and found.right) is right
  if found:
    assert critique[found.at :].startswith(("Yes}", "No}"))


@pytest.mark.parametrize(
  ("verdicts", "steps", "right"),
  [
    ("++", 2, True),
    ("+++", 2, True),  # what follows is about no step
    ("+", 2, None),  # cut
    ("+-", 3, False),  # it stops at an error: what follows it is wrong
    ("-", 1, False),
    ("", 1, None),
    ("++-", 2, True),
  ],
)
def test_a_chain_judges_the_last_step_unless_an_earlier_one_is_wrong(
  verdicts, steps, right
):
  words = {"+": "\\boxed{correct}", "-": "\\boxed{incorrect}"}
  chain = "".join(f"Step: fine. {words[x]}\n" for x in verdicts)
  found = ThinkPRMChain().decision(chain, steps)
  assert (found and found.right) is right
  if found:
    assert chain[found.at :].startswith("correct" if right else "incorrect")


def test_a_chat_is_that_of_the_training_data():
  """Written by the format that reads it."""
  solution = genprm.GenPRM().solutions(
    genprm.Record(
      {
        "conversations": genprm.files.messages(
          GenPRMChat().conversation("2 + 2?", ("2 + 2", "= 5"), (YES, NO))
        )
      },
      "line 1",
    )
  )[0]
  assert solution.prompt == "2 + 2?" and solution.labels == (1, 0)
  asked = GenPRMChat().conversation("2 + 2?", ("2 + 2", "= 5"), (YES,))
  assert [role for role, _ in asked][-2:] == ["assistant", "user"]
  ((role, question),) = ThinkPRMChain().conversation("2 + 2?", ["a\n", "b"], ())
  assert role == "user" and question.endswith("Step 1: a\n\nStep 2: b")


@pytest.mark.parametrize(
  "hostile",
  [
    "<output>" * 50_000,
    "<output>" + "\\boxed{" * 50_000,
    "\\boxed{correct" * 50_000,
    "<verify>```python\nimport os; os.abort()\n```</verify>",
  ],
)
def test_hostile_critiques_are_read_quickly_and_never_run(hostile):
  began = time.monotonic()
  assert GenPRMChat().decision(hostile, 1) is None
  assert ThinkPRMChain().decision(hostile, 1) is None
  assert time.monotonic() - began < 2


# Judging ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Scripted:
  """Says of each step what its tokens say; keeps what it read."""

  says: object
  asked: list = dataclasses.field(default_factory=list)

  def __call__(self, conversations, decide, count):
    self.asked.extend(conversations)
    found = []
    for conversation, read in zip(conversations, decide, strict=True):
      critiques = tuple(self.says(conversation, i) for i in range(count))
      verdicts = [read(critique) for critique in critiques]
      chances = tuple(None if x is None else float(x.right) for x in verdicts)
      spent = Ledger(verifier_decode_tokens=len(critiques), flops_verifier=7)
      found.append(Judgement(critiques, chances, spent))
    return found


def last_number(conversation):
  return int(conversation[-1][1].split()[-1])


def says(conversation, i):
  """Votes as the last token of the step has it: of 4, none, or some."""
  number = last_number(conversation) + i
  return {0: YES, 1: NO, 2: "I cannot say", 3: YES}[number % 4]


def test_scores_are_shares_of_votes_and_what_says_nothing_counts_as_wrong():
  writer = Scripted(says)
  judge = GenerativeJudge(writer=writer, text=text, count=3)
  # Here stop tokens have a text as well.
  engine = Engine(policy=shared.policy(), verifier=judge, silent=())
  samples = shared.found(Beam(copies=4, width=2), engine)
  for one in samples:
    steps = 0
    for path in one.paths:
      for step, score in zip(path.steps, path.scores, strict=True):
        votes = [says([("user", text(step))], i) for i in range(3)]
        assert score == pytest.approx(votes.count(YES) / 3)
      steps += len(path.steps)
    # Steps of paths that were dropped are paid for as well.
    assert one.ledger.verifier_decode_tokens >= 3 * steps / 2
    assert one.ledger.flops_verifier % 7 == 0
    assert one.ledger.verifier_decode_tokens == 3 * (
      one.ledger.flops_verifier // 7
    )
  # Each conversation has the path's own steps, each with its critique.
  deep = max(writer.asked, key=len)
  assert len(deep) >= 6 and deep[0] == ("system", genprm.SYSTEM)
  for (_, step), (_, critique) in zip(deep[1::2], deep[2::2], strict=False):
    assert critique == says([("user", step)], 0)


@pytest.mark.parametrize(("unparsed", "score"), [(0.0, 0.0), (0.5, 0.5)])
def test_a_judge_that_cannot_be_read_has_a_defined_score(unparsed, score):
  writer = Scripted(lambda conversation, i: "hm")
  judge = GenerativeJudge(writer=writer, text=text, unparsed=unparsed)
  state = judge.start([[1]], 2, 9)
  paths = [Path(0, i, 1, steps=((4,),)) for i in range(2)]
  new = np.array([[4], [-1]])
  state, scores = judge.read(state, paths, new)
  assert scores[0] == score
  assert [len(row.critiques) for row in state] == [1, 0]
  assert [x.verifier_decode_tokens for x in judge.spent(state)] == [1, 0]


# A language model ------------------------------------------------------------


@functools.cache
def writer(**fields):
  model = support.model("llama", tied=False)
  return LanguageModelWriter(
    model=model,
    params=support.params(model),
    encode=lambda x: [ord(c) % 67 for c in x[-1][1]],
    decode=lambda tokens: "".join(chr(65 + token) for token in tokens),
    sampling=Sampling(temperature=1.0),
    stop_tokens=(3, 30, 40),
    max_new_tokens=6,
    **fields,
  )


QUESTIONS = [[("user", x)] for x in ("one", "longer", "three", "four")]
COUNT = 2


def long(text):
  return Decision(len(text) > 3, 2) if len(text) > 2 else None


@functools.cache
def judgements(words):
  it = dataclasses.replace(writer(), words=words)
  return it(QUESTIONS[:3], [long] * 3, COUNT)


@pytest.mark.slow
def test_critiques_are_generated_texts_and_every_token_is_paid_for():
  it = writer()
  prompts = [it.encode(x) for x in QUESTIONS]
  # Of three conversations, four rows: the first one fills up a power of two.
  rows = [x for x in [*prompts[:3], prompts[0]] for _ in range(COUNT)]
  seed = zlib.crc32(repr(prompts[:3]).encode())
  key = jax.random.fold_in(jax.random.key(0), seed)
  made = generate.generate(
    *(it.model, it.params, rows, 6, it.sampling, key, it.stop_tokens)
  )
  cost = model_cost(it.model)
  for i, one in enumerate(judgements(None)):
    part = slice(i * COUNT, (i + 1) * COUNT)
    texts = [it.decode(tokens) for tokens in made.tokens[part]]
    assert one.critiques == tuple(texts)
    found = map(long, texts)
    assert one.chances == tuple(x and float(x.right) for x in found)
    ends = [reason == "stop" for reason in made.reasons[part]]
    new = [len(x) + end for x, end in zip(made.tokens[part], ends, strict=True)]
    expected = ledgers.generation(cost, len(prompts[i]), new)
    assert one.ledger.flops_verifier == expected.flops_policy
    assert one.ledger.verifier_decode_tokens == sum(new)
    assert one.ledger.verifier_prefill_tokens == len(prompts[i])
    assert one.ledger.flops_policy == 0
  used = judgements(None)[0].ledger
  tokens = used.verifier_prefill_tokens + used.verifier_decode_tokens
  assert used.two_n(cost, cost) == cost.two_n(tokens)


def test_conversations_of_equal_lengths_do_not_share_their_noise():
  keys = []

  class Policy:
    def start(self, prompts, tokens, key, count):
      keys.append(jax.random.key_data(key).tolist())
      drawn = np.zeros((len(prompts) * count, 1), np.int32)
      return None, types.SimpleNamespace(tokens=drawn)

  it = dataclasses.replace(writer())
  it.__dict__["_policy"] = Policy()
  for words in ("abc", "abd", "abc"):
    it([[("user", words)]], [long], COUNT)
  assert keys[0] == keys[2] != keys[1]


def test_chances_are_the_two_words_softmax_where_the_verdict_stands():
  it, read = writer(), 0
  for question, one, vote in zip(
    QUESTIONS[:3], judgements((5, 9)), judgements(None), strict=True
  ):
    assert one.critiques == vote.critiques
    prompt, own = it.encode(question), 0
    for text_, chance in zip(one.critiques, one.chances, strict=True):
      if len(text_) <= 2:
        assert chance is None
        continue
      tokens = np.array([[*prompt, *(ord(c) - 65 for c in text_[:2])]])
      (last,) = passes.logits(
        it.model, it.params, tokens, tokens >= 0, block=1
      )[:, -1]
      expected = 1 / (1 + np.exp(last[9] - last[5]))
      np.testing.assert_allclose(chance, expected, rtol=1e-3)
      own += 1
    length = len(prompt) + 2
    assert one.ledger.verifier_new_tokens == own * length
    again = model_cost(it.model).forward(length, Causal(0, length), 1)
    more = one.ledger.flops_verifier - vote.ledger.flops_verifier
    assert more == own * again
    read += own
  assert read > 2


def test_mistakes():
  judge = GenerativeJudge(writer=Scripted(says), text=text)
  with pytest.raises(UserError, match="known only afterwards"):
    judge.step_cost(3, 4)
