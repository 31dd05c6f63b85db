"""A prompt's ids are those that the published processors make, exactly.

The goldens are transformers' `Processor(text=..., images=...)` on photographs:
tests/golden/make_prompts.py.
"""

import dataclasses
import functools
import pathlib
import sys

import numpy as np
import pytest

from experiments.generating import conversation
from experiments.generating import images as asked
from research.data.rendering import Conversation
from research.interop.loaded import Loaded
from research.text.tokenizer import Tokenizer
from research.vlm.images import prompt_ids
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.prompts import conversations
from tests import support_vlm

GOLDEN = pathlib.Path(__file__).parents[3] / "golden"
sys.path.insert(0, str(GOLDEN))
import prompt_cases  # noqa: E402
from prompt_cases import (  # noqa: E402
  CASES,
  CONVERSATIONS,
  FAMILIES,
  LEARNED,
  MARK,
)

with np.load(GOLDEN / "prompts.npz") as _file:
  IDS = dict(_file)


@functools.cache
def tokenizer(name):
  family = FAMILIES[name]
  backend = prompt_cases.backend(family)
  ids = {x: x and backend.token_to_id(x) for x in (family.bos, family.eos)}
  return Tokenizer(
    backend=backend,
    bos=ids[family.bos],
    eos=ids[family.eos],
    chat_template=family.template,
  )


def preprocessor(name):
  family = FAMILIES[name]
  patch, pool = family.encoder
  return from_preprocessor_config(family.config, patch=patch, pool=pool)


def pieces_of(name, keys):
  """Returns what stands for each of some photographs."""
  how = preprocessor(name)
  return [how.pieces(how.plan(*IDS[f"size {k}"].tolist())) for k in keys]


def ids_of(name, texts, keys, rendered=False):
  """Returns the ids of a prompt with some of the photographs, or with none."""
  how, words = preprocessor(name), tokenizer(name)
  if not keys:
    model = support_vlm.model()
    loaded = Loaded(model, {}, words, source={}, preprocessor=how)
    return asked.text_ids(loaded, *texts, rendered=rendered)
  token = words.backend.token_to_id(how.placeholder)
  return prompt_ids.joined_ids(
    texts, pieces_of(name, keys), words, token, how.prompt
  )


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_with_one_image_several_in_a_row_and_between_words(name):
  """PaliGemma's processor refuses a text alone."""
  for case, (text, keys) in CASES.items():
    if not keys and name.startswith("paligemma"):
      continue
    found = ids_of(name, text.split(MARK), keys)
    assert found == IDS[f"{name} {case}"].tolist(), case


@pytest.mark.parametrize("name", FAMILIES)
def test_conversations_in_the_manner_of_the_published_templates(name):
  """PaliGemma's `bos` follows the last image, its newline the rendered text.

  Also where the template begins with `bos`. A text alone, which its processor
  refuses, begins with one.
  """
  for case, (said, keys) in CONVERSATIONS.items():
    text = conversation.text_of(tokenizer(name), prompt_cases.messages(said))
    found = ids_of(name, text.split(MARK), keys, rendered=True)
    want = IDS.get(f"{name} {case}")
    if want is None:
      text = "<bos>" + text.removeprefix("<bos>") + "\n"
      want = np.array(tokenizer(name).encode(text))
      assert not keys and name.startswith("paligemma")
    assert found == want.tolist(), case


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("name", ["paligemma", "paligemma_saved"])
def test_rows_are_those_of_processors_that_make_labels(name, weight):
  """`weight` is that of earlier answers, which their `suffix` leaves out."""
  how, words = preprocessor(name), tokenizer(name)
  for case, (question, answer) in LEARNED.items():
    said, keys = CONVERSATIONS[question]
    messages = prompt_cases.messages([*said, answer])
    messages[1:-1:2] = [dict(x, weight=weight) for x in messages[1:-1:2]]
    made = conversations.tokens_of(
      conversations.ChatSample((), Conversation(messages, case)),
      pieces_of(name, keys),
      dataclasses.replace(words, stop=(words.eos,)),
      words.backend.token_to_id(how.placeholder),
      how.prompt,
    )
    want, labels = IDS[f"{name} {case}"], IDS[f"{name} labels {case}"]
    row, rest = np.split(made.tokens, [len(want)])
    np.testing.assert_array_equal(row, want, err_msg=case)
    assert words.decode(rest.tolist()) == "\n"  # of the template
    learned = np.flatnonzero(made.loss_mask)
    count = (labels >= 0).sum()
    np.testing.assert_array_equal(
      learned[-count:], np.flatnonzero(labels >= 0), err_msg=case
    )
    assert (len(learned) > count) == (len(said) > 1 and weight)
