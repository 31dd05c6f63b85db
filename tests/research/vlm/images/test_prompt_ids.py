"""A prompt's ids are those that the published processors make, exactly.

The goldens are transformers' `Processor(text=..., images=...)` on photographs:
tests/golden/make_prompts.py.
"""

import functools
import pathlib
import sys

import numpy as np
import pytest

from experiments.generating import conversation
from experiments.generating import images as asked
from research.interop.loaded import Loaded
from research.text.tokenizer import Tokenizer
from research.vlm.images import prompt_ids
from research.vlm.images.configs import from_preprocessor_config
from tests import support_vlm

GOLDEN = pathlib.Path(__file__).parents[3] / "golden"
sys.path.insert(0, str(GOLDEN))
import prompt_cases  # noqa: E402
from prompt_cases import CASES, CONVERSATIONS, FAMILIES, MARK  # noqa: E402

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


def ids_of(name, texts, keys, rendered=False):
  """Returns the ids of a prompt with some of the photographs, or with none."""
  family, words = FAMILIES[name], tokenizer(name)
  patch, pool = family.encoder
  how = from_preprocessor_config(family.config, patch=patch, pool=pool)
  if not keys:
    model = support_vlm.model()
    loaded = Loaded(model, {}, words, source={}, preprocessor=how)
    return asked.text_ids(loaded, *texts, rendered=rendered)
  images = [how.pieces(how.plan(*IDS[f"size {k}"].tolist())) for k in keys]
  token = words.backend.token_to_id(how.placeholder)
  form = how.prompt.rendered() if rendered else how.prompt
  return prompt_ids.joined_ids(texts, images, words, token, form)


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_with_one_image_several_in_a_row_and_between_words(name):
  """PaliGemma's processor refuses a text alone."""
  for case, (text, keys) in CASES.items():
    if not keys and name.startswith("paligemma"):
      continue
    found = ids_of(name, text.split(MARK), keys)
    assert found == IDS[f"{name} {case}"].tolist(), case


@pytest.mark.parametrize(
  "name", [name for name, family in FAMILIES.items() if family.template]
)
def test_conversations_in_the_manner_of_the_published_templates(name):
  for case, (said, keys) in CONVERSATIONS.items():
    text = conversation.text_of(tokenizer(name), prompt_cases.messages(said))
    found = ids_of(name, text.split(MARK), keys, rendered=True)
    assert found == IDS[f"{name} {case}"].tolist(), case
