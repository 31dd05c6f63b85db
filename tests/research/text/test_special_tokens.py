"""Special tokens around texts, from tokenizer files; windows of texts."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from research.interop.hf import tokenizer as hf_tokenizer
from research.text import special_tokens
from research.text.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests.research.text.test_tokenizer import byte_level

BOS, EOS, PAD = 256, 257, 258


def template(single):
  names = {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
  return processors.TemplateProcessing(
    single=single, special_tokens=list(names.items())
  )


def directory(path, post=None, **config):
  backend = byte_level()
  if post is not None:
    backend.post_processor = post
  backend.save(str(path / "tokenizer.json"))
  config = {"bos_token": "<s>", "eos_token": "</s>"} | config
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return backend, Tokenizer.from_directory(path)


@pytest.mark.parametrize(
  "single, begin, end",
  [
    ("$A", (), ()),
    ("<s> $A", (BOS,), ()),
    ("$A </s>", (), (EOS,)),
    ("<s> $A </s>", (BOS,), (EOS,)),
    ("<pad> <s> $A", (PAD, BOS), ()),  # as GLM's [gMASK]<sop>
  ],
)
def test_a_post_processor_says_it(tmp_path, single, begin, end):
  """For any template: the reference is what the library adds."""
  backend, found = directory(tmp_path, template(single))
  assert found.special == SpecialTokens(begin, end, bool(begin))
  want = backend.encode("ab").ids
  assert found.encode("ab", add_special=True) == want
  assert found.prompt("ab") == want[: len(want) - len(end)]
  # What a text spells out itself is not there twice.
  spelled = backend.decode(want, skip_special_tokens=False)
  assert found.encode(spelled, add_special=True) == want


def test_a_vocabulary_may_lack_a_letter():
  names = {"<s>": 0, "</s>": 1, "0": 2}
  backend = tokenizers.Tokenizer(tokenizers.models.BPE(names, merges=[]))
  backend.add_special_tokens(["<s>", "</s>"])
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
  )
  assert backend.encode("a").ids == [0, 1]
  assert Tokenizer(backend=backend).special == SpecialTokens((0,), (1,), True)


@pytest.mark.parametrize(
  "config, begin, end",
  [
    ({}, (), ()),
    ({"add_bos_token": True}, (BOS,), ()),
    ({"add_bos_token": True, "add_eos_token": True}, (BOS,), (EOS,)),
    ({"add_bos_token": False, "add_eos_token": True}, (), (EOS,)),
    ({"add_bos_token": True, "bos_token": None}, (), ()),
  ],
)
def test_a_config_says_what_no_post_processor_does(
  tmp_path, config, begin, end
):
  special = directory(tmp_path, **config)[1].special
  assert special == SpecialTokens(begin, end, bool(begin))


def test_a_post_processor_wins(tmp_path):
  """As in transformers 5, which uses the post-processor only."""
  post = template("<s> $A")
  found = directory(tmp_path, post, add_bos_token=False)[1]
  assert found.special.begin == (BOS,)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_it_is_written_and_read_again(tmp_path, add_bos, add_eos):
  own = Tokenizer(
    backend=byte_level(), bos=BOS, eos=EOS, add_bos=add_bos, add_eos=add_eos
  )
  for name, value in hf_tokenizer.files(own).items():
    (tmp_path / name).write_text(json.dumps(value))
  assert Tokenizer.from_directory(tmp_path).special == own.special


def test_what_a_run_did_stands_above_its_tokenizer():
  run = SpecialTokens((PAD,), (EOS,))
  words = Tokenizer(backend=byte_level(), bos=BOS, add_bos=True, documents=run)
  assert words.encode("a", add_special=True) == [PAD, *words.encode("a"), EOS]
  assert words.special == run and words.own_special.begin == (BOS,)


def test_windows_tile_the_text():
  around, rng = SpecialTokens((1, 2), (3,), True), np.random.default_rng(0)
  documents = [
    around.document(rng.integers(4, 99, n).tolist()) for n in (5, 40, 1, 17)
  ]
  text = [i for d in documents for i in d]
  for size in (3, 4, 7, 20):
    windows = around.windows(text, size)
    assert all(len(w) == size and w[:2] == [1, 2] for w in windows)
    place = 0
    for window in windows:
      # A window where a document begins has its own; the others, one more.
      skip = 0 if text[place : place + 2] == [1, 2] else 2
      assert window[skip:] == text[place : place + size - skip]
      place += size - skip
    assert len(text) - place < size
  assert NO_SPECIAL_TOKENS.windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]]


def test_what_fits_is_the_end_behind_the_beginning():
  around = SpecialTokens((1, 2), (), True)
  assert around.truncate([1, 2, 5, 6, 7], 4) == [1, 2, 6, 7]
  assert around.truncate([1, 2, 5, 6], 4) == [1, 2, 5, 6]
  assert around.truncate([5, 6, 7], 2) == [6, 7]  # begins with nothing
  assert around.truncate([1, 2, 5, 6], 2) == [5, 6]  # no room behind
  assert SpecialTokens((1, 2)).truncate([1, 2, 5, 6, 7], 4) == [2, 5, 6, 7]


def test_a_record_comes_back(tmp_path):
  path, around = tmp_path / special_tokens.FILE, SpecialTokens((1,), (2, 3))
  path.write_text(json.dumps(around.record()))
  assert special_tokens.read(path) == around


@pytest.mark.parametrize(
  "text",
  [
    "",
    "[]",
    "{}",
    '{"begin": [1], "end": [2]}',
    '{"begin": 1, "end": [], "every_row": true}',
    '{"begin": ["1"], "end": [], "every_row": true}',
    '{"begin": [-1], "end": [], "every_row": true}',
    '{"begin": [1], "end": [], "every_row": 1}',
  ],
)
def test_no_record_is_an_error(tmp_path, text):
  path = tmp_path / special_tokens.FILE
  path.write_text(text)
  with pytest.raises(
    UserError, match="is not a record of a run's special tokens"
  ):
    special_tokens.read(path)
