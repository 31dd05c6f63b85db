"""A chat model as the judge of steps: of another model, or of itself."""

import dataclasses

import numpy as np
import pytest

from experiments.core.from_scratch import FromScratch
from experiments.searching.context import Context
from experiments.searching.judges import ChatJudge
from experiments.searching.prompts import Plain
from research.data.bpe import Bpe
from research.generation.stepwise import Stepwise
from research.nn.presets import Sizes
from research.search.engine import Path
from research.typing import UserError
from tests.experiments.searching import parity

TEMPLATE = (
  "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }};{% endfor %}"
)
SIZES = Sizes(
  vocab=270, width=16, depth=1, heads=2, kv_heads=2, head_dim=8, hidden=32
)


@dataclasses.dataclass(frozen=True)
class Chatting:
  """A tiny model with a chat template."""

  def load(self):
    texts = Bpe(documents=["user system right wrong"], size=270)
    made = FromScratch(sizes=SIZES, tokenizer=texts).load()
    tokenizer = dataclasses.replace(
      made.tokenizer, chat_template=TEMPLATE, stop=(3,)
    )
    return dataclasses.replace(made, tokenizer=tokenizer)


def context_of(loaded):
  task = parity.Parity()
  return Context(
    policy=Stepwise(model=loaded.model, params=loaded.params),
    params=loaded.params,
    tokenizer=loaded.tokenizer,
    prompting=Plain(),
    task=task,
    judge=task,
  )


def scores_of(judge, context):
  verifier = judge.load(context)
  encode = context.tokenizer.encode
  prompt, step = encode("1 + 1"), tuple(encode(" = 2"))
  state = verifier.start([prompt], 1, 16)
  path = Path(0, 0, len(prompt), (step,), ())
  rows, scores = verifier.read(state, [path], np.array([step]))
  return rows[0].critiques, scores


def test_a_policy_judges_itself_as_the_same_model_would():
  loaded = Chatting().load()
  context = context_of(loaded)
  critiques, scores = scores_of(ChatJudge(max_new_tokens=4), context)
  other = ChatJudge(model=Chatting(), max_new_tokens=4)
  assert scores_of(other, context)[0] == critiques != ()
  assert scores == [0]  # no verdict: as much as a wrong step
  tokens = loaded.tokenizer.encode(critiques[0])
  assert len(tokens) > 0


def test_a_model_without_a_tokenizer_is_refused():
  context = context_of(Chatting().load())
  judge = ChatJudge(model=FromScratch(sizes=SIZES))
  with pytest.raises(UserError, match="ChatJudge.model: found a Transformer"):
    judge.load(context)
