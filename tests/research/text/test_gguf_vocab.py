"""Exporting tokenizers to GGUF: the same ids, or a reason."""

import dataclasses
import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from research.interop import load
from research.interop.hf import tokenizer as hf_tokenizer
from research.text import gguf_tokenizer, gguf_vocab
from research.text.special_tokens import SpecialTokens
from research.text.tokenizer import Tokenizer

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"
TEXT = pathlib.Path(__file__).read_text()


def metadata_of_golden():
  from research.interop import gguf

  file = MODELS / "gguf_f32" / "model.gguf"
  return dict(gguf.open_gguf(file).metadata)


# "default" cuts as llama.cpp does where a file names no rule.
@pytest.mark.parametrize("pre", gguf_tokenizer.PRE_TOKENIZERS)
def test_every_rule_for_words_is_found_again(pre):
  metadata = metadata_of_golden() | {"tokenizer.ggml.pre": pre}
  tokenizer = Tokenizer.from_gguf(metadata)
  keys, reason = gguf_vocab.from_tokenizer(tokenizer, 280)
  assert reason == ""
  again = Tokenizer.from_gguf(keys)
  for text in (TEXT[:2000], *gguf_vocab.PROBE_TEXTS):
    assert again.encode(text) == tokenizer.encode(text)
  found = keys["tokenizer.ggml.pre"]
  rules = gguf_tokenizer.PRE_TOKENIZERS
  assert rules[found] == rules[pre]
  assert len(keys["tokenizer.ggml.tokens"]) == 280
  assert keys["tokenizer.ggml.tokens"][-1] == "[PAD279]"
  assert again.chat_template == tokenizer.chat_template
  assert (again.bos, again.eos, again.pad) == (
    tokenizer.bos,
    tokenizer.eos,
    tokenizer.pad,
  )


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_what_stands_around_a_text_is_kept(bos, eos):
  metadata = metadata_of_golden() | {
    "tokenizer.ggml.add_bos_token": bos,
    "tokenizer.ggml.add_eos_token": eos,
  }
  tokenizer = Tokenizer.from_gguf(metadata)
  keys, _ = gguf_vocab.from_tokenizer(tokenizer, 280)
  begin, end = (1,) * bos, (2,) * eos
  for one in (tokenizer, Tokenizer.from_gguf(keys)):
    assert one.special == SpecialTokens(begin, end, every_row=bos)
    ids = one.encode("ab")
    assert one.encode("ab", add_special=True) == [*begin, *ids, *end]
    assert one.prompt("ab") == [*begin, *ids]


def test_every_token_that_ends_a_text_still_does(tmp_path):
  """Two more than `eos`, or one where there is no `eos`."""
  whole = Tokenizer.from_gguf(metadata_of_golden())
  for eos, stop in ((2, (2, 7, 8)), (None, (7,))):
    tokenizer = dataclasses.replace(whole, eos=eos, stop=stop)
    keys, _ = gguf_vocab.from_tokenizer(tokenizer, 280)
    assert set(stop) <= set(Tokenizer.from_gguf(keys).stop)
    hf_tokenizer.write(tmp_path, None, tokenizer)
    assert Tokenizer.from_directory(tmp_path).stop == stop


def sentencepiece(prefix: bool):
  """Returns a tokenizer like Llama 2's or Gemma's."""
  words = sorted({w for w in TEXT.split() if len(w) < 12})[:300]
  pieces = {f"\u2581{w[:n]}" for w in words for n in range(1, len(w))}
  pieces |= {w[:n] for w in words for n in range(2, len(w))} | {"\u2581"}
  letters = sorted(set(TEXT) - {" ", "\n"})
  pieces = sorted(pieces - set(letters), key=lambda p: (len(p), p))
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
  kinds = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
  ranks = [0] * len(tokens) + list(range(len(pieces) + len(letters)))
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*tokens, *pieces, *letters],
    "tokenizer.ggml.scores": -np.asarray(ranks, np.float32),
    "tokenizer.ggml.token_type": np.asarray(kinds, np.int32),
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.add_space_prefix": prefix,
  }


@pytest.mark.parametrize("prefix", [True, False])
def test_what_sentencepiece_merges(prefix):
  tokenizer = Tokenizer.from_gguf(sentencepiece(prefix))
  keys, reason = gguf_vocab.from_tokenizer(tokenizer, tokenizer.vocab_size)
  assert reason == ""
  assert keys["tokenizer.ggml.model"] == "llama"
  again = Tokenizer.from_gguf(keys)
  for line in (*TEXT.splitlines(), *gguf_vocab.PROBE_TEXTS):
    assert again.encode(line) == tokenizer.encode(line)
  assert again.encode("a", add_special=True)[0] == 1


@pytest.mark.slow
@hypothesis.given(st.text(max_size=40))
@hypothesis.settings(max_examples=50)
def test_any_text_is_cut_alike(text):
  tokenizer = load.load_model(MODELS / "gguf_f32" / "model.gguf").tokenizer
  again = Tokenizer.from_gguf(gguf_vocab.from_tokenizer(tokenizer, 270)[0])
  assert again.encode(text) == tokenizer.encode(text)


def test_what_no_rule_cuts_alike_stays_behind():
  metadata = metadata_of_golden()
  tokenizer = Tokenizer.from_gguf(metadata)
  tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split("e", "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  keys, reason = gguf_vocab.from_tokenizer(tokenizer, 270)
  assert keys == {}
  assert "no pre-tokenizer that" in reason


@pytest.mark.parametrize("side", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_take_in_blanks_stay_behind(side):
  """GGUF has no key for it; the token is one of many."""
  tokenizer = Tokenizer.from_gguf(metadata_of_golden())
  names = [f"<|{i}|>" for i in range(99)]
  tokenizer.backend.add_special_tokens(names)
  assert gguf_vocab.from_tokenizer(tokenizer, 400)[1] == ""
  last = tokenizers.AddedToken("<m>", normalized=False, **{side: True})
  tokenizer.backend.add_special_tokens([last])
  assert gguf_vocab.from_tokenizer(tokenizer, 400)[0] == {}


def test_other_kinds_of_tokenizer_stay_behind():
  backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
  keys, reason = gguf_vocab.from_tokenizer(Tokenizer(backend=backend), 1)
  assert keys == {}
  assert "WordLevel" in reason
