"""Tokenizers of GGUF files against reference definitions."""

import hashlib
import json
import pathlib
import pydoc_data.topics

import numpy as np
import pytest

from research.interop import packages
from research.interop.gguf import open_gguf
from research.text.gguf_tokenizer import tokenizer_from_gguf
from research.text.tokenizer import Tokenizer
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
TRUTH = json.loads((GOLDEN / "tokenizer_smollm2.json").read_text())
STRINGS = [case["text"] for case in TRUTH["smollm2"]["strings"]]
TINY = GOLDEN / "models" / "gguf_f32" / "model.gguf"


@pytest.fixture(scope="module")
def real():
  path = packages.packaged("smollm2-135m")
  return tokenizer_from_gguf(open_gguf(path).metadata)


@pytest.fixture(scope="module")
def tiny():
  return open_gguf(TINY).metadata


def test_smollm2_ids_are_those_of_plain_byte_pair_encoding(real):
  for case in TRUTH["smollm2"]["strings"]:
    assert real[0].encode(case["text"]).ids == case["ids"], case["text"]
  topics = TRUTH["smollm2"]["topics"]
  ids = real[0].encode(topics["text"]).ids
  assert len(ids) == topics["count"]
  digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()
  assert digest == topics["sha"]


def test_smollm2_round_trips_on_every_topic(real):
  tokenizer, _ = real
  texts = list(pydoc_data.topics.topics.values())
  for text, found in zip(texts, tokenizer.encode_batch(texts), strict=True):
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == text


def test_smollm2_special_tokens(real):
  tokenizer, special = real
  assert "<|im_start|>" in special.pop("chat_template")
  assert special == dict(
    bos=1,
    eos=2,
    eot=None,
    eom=None,
    unk=0,
    pad=2,
    stop=(2, 0),  # <|im_end|> and <|endoftext|>
    add_bos=False,
    add_eos=False,
  )
  ids = tokenizer.encode("<|im_start|>hi<|im_end|>").ids
  assert (ids[0], ids[-1]) == (1, 2)
  assert tokenizer.decode(ids) == "hi"
  assert tokenizer.decode(ids, skip_special_tokens=False) == (
    "<|im_start|>hi<|im_end|>"
  )


def test_of_equal_tokens_the_first_is_used(tiny):
  tokens = list(tiny["tokenizer.ggml.tokens"])
  first = tokens.index("a")
  again = tiny | {"tokenizer.ggml.tokens": [*tokens, "a"]}
  again.pop("tokenizer.ggml.token_type", None)
  for metadata in (tiny, again):
    tokenizer, _ = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a").ids == [first]


def test_the_end_of_a_turn_stops_a_text_like_its_end(tiny):
  eos = tiny["tokenizer.ggml.eos_token_id"]
  turn = {"tokenizer.ggml.eot_token_id": eos + 1}
  assert Tokenizer.from_gguf(tiny).stop == (eos,)
  assert Tokenizer.from_gguf(tiny | turn).stop == (eos, eos + 1)
  message = {"tokenizer.ggml.eom_token_id": eos + 2}
  assert Tokenizer.from_gguf(tiny | message).stop == (eos, eos + 2)


@pytest.mark.parametrize(
  ("more", "ends"),
  [
    (["<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    (["<|eot_id|>", "<|eom_id|>"], ["<|eot_id|>", "<|eom_id|>"]),
    (["<start_of_turn>", "<end_of_turn>"], ["<end_of_turn>"]),
    (["<|end_of_text|>", "<|end|>"], ["<|end_of_text|>", "<|end|>"]),
    # Of a channel in gpt-oss, and of a page in Gemma 4.
    (["<|end|>", "<|return|>", "<|call|>"], ["<|return|>", "<|call|>"]),
    (["<|end|>", "<|calls|>", "<|flush|>"], ["<|calls|>", "<|flush|>"]),
    (["</s>", "<turn|>", "<|tool_response>"], ["<turn|>", "<|tool_response>"]),
  ],
)
def test_tokens_that_end_a_turn_by_name_stop_a_text(tiny, more, ends):
  """`llama_vocab::impl::load`, where a file names no other than `eos`."""
  tokens, types = (
    tiny[f"tokenizer.ggml.{x}"] for x in ("tokens", "token_type")
  )
  metadata = tiny | {
    "tokenizer.ggml.tokens": [*tokens, *more],
    "tokenizer.ggml.token_type": np.append(types, [3] * len(more)),
  }
  stop = Tokenizer.from_gguf(metadata).stop
  assert [([*tokens, *more])[i] for i in stop] == ["<|im_end|>", *ends]


def test_the_tiny_files_tokenizer_is_the_tokenizers_packages(tiny):
  tokenizer, _ = tokenizer_from_gguf(tiny)
  for case in json.loads(
    (GOLDEN / "models" / "gguf_tokenizer.json").read_text()
  ):
    assert tokenizer.encode(case["text"]).ids == case["ids"]
    back = tokenizer.decode(case["ids"], skip_special_tokens=False)
    assert back == case["decoded"]


@pytest.mark.parametrize("pre", TRUTH["pre"])
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(tiny, pre):
  extra = TRUTH["extra"]
  tokens = tiny["tokenizer.ggml.tokens"] + [m.replace(" ", "") for m in extra]
  types = tiny["tokenizer.ggml.token_type"].tolist() + [1] * len(extra)
  tokenizer, _ = tokenizer_from_gguf(
    tiny
    | {
      "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.tokens": tokens,
      "tokenizer.ggml.token_type": np.asarray(types, np.int32),
      "tokenizer.ggml.merges": tiny["tokenizer.ggml.merges"] + extra,
    }
  )
  for text, ids in zip(STRINGS, TRUTH["pre"][pre], strict=True):
    assert tokenizer.encode(text).ids == ids, text


SPACE = "\u2581"
PIECES = ["a", "b", "c", SPACE, "ab", "bc", "abc", SPACE + "a", "ca", "cab"]
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def sentencepiece(prefix: bool, scores: dict[str, float]) -> dict:
  """Returns metadata of a tiny SentencePiece vocabulary."""
  tokens = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<tool>"]
  types = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [4]
  return {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": tokens,
    "tokenizer.ggml.token_type": np.asarray(types, np.int32),
    "tokenizer.ggml.scores": np.asarray(
      [scores.get(t, -1e6) for t in tokens], np.float32
    ),
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_space_prefix": prefix,
  }


def by_definition(text: str, scores: dict[str, float]) -> list[str]:
  """Joins the best-scored neighbours, the leftmost of equals, until none."""
  parts = list(text)
  while True:
    pairs = [a + b for a, b in zip(parts, parts[1:], strict=False)]
    known = [(-scores[p], i) for i, p in enumerate(pairs) if p in scores]
    if not known:
      break
    _, i = min(known)
    parts[i : i + 2] = [pairs[i]]
  out = []
  for p in parts:
    out += [p] if p in PIECES else [f"<0x{b:02X}>" for b in p.encode()]
  return out


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_sentencepiece_joins_by_score(prefix, seed):
  rng = np.random.default_rng(seed)
  order = rng.permutation(len(PIECES))
  scores = {p: -float(i) for p, i in zip(PIECES, order, strict=True)}
  metadata = sentencepiece(prefix, scores)
  tokenizer, special = tokenizer_from_gguf(metadata)
  assert special["add_bos"] is True
  for _ in range(50):
    text = "".join(rng.choice(list("abc é"), rng.integers(0, 12)))
    spelled = text.replace(" ", SPACE)
    if prefix and text:
      spelled = SPACE + spelled
    found = tokenizer.encode(text)
    assert found.tokens == by_definition(spelled, scores), text
    assert tokenizer.decode(found.ids) == text


def test_sentencepiece_has_llama_cpps_special_tokens():
  """`llama_vocab`: 0, 1 and 2 where a file has no keys."""
  metadata = sentencepiece(True, {p: 0.0 for p in PIECES})
  names = ("unknown", "bos", "eos")
  keys = [f"tokenizer.ggml.{name}_token_id" for name in names]
  bare = {k: x for k, x in metadata.items() if k not in keys}
  tokenizer, special = tokenizer_from_gguf(bare)
  assert (special["unk"], special["bos"], special["eos"]) == (0, 1, 2)
  assert tokenizer.model.unk_token == "<unk>"
  assert Tokenizer.from_gguf(bare).stop == (2,)
  assert Tokenizer.from_gguf(bare).special.begin == (1,)
  count = len(bare["tokenizer.ggml.tokens"])
  plain = bare | {"tokenizer.ggml.token_type": np.ones(count, np.int32)}
  assert tokenizer_from_gguf(plain)[1]["bos"] is None


def test_sentencepiece_finds_user_defined_tokens_whole():
  metadata = sentencepiece(False, {p: 0.0 for p in PIECES})
  tokenizer, _ = tokenizer_from_gguf(metadata)
  found = tokenizer.encode("a<tool>b</s>")
  assert found.tokens == ["a", "<tool>", "b", "</s>"]
  assert tokenizer.decode(found.ids) == "a<tool>b"


BAD = {
  "model": ("bert", "tokenizer.ggml.model"),
  "pre": ("viking", "one of default, gpt-2, smollm"),
  "tokens": ([], "a list of strings"),
  "merges": (["a b c"], "two tokens and a space"),
  "token_type": (np.zeros(3, np.int32), "one per token"),
  "eos_token_id": (1 << 20, "a token below"),
  "add_bos_token": (3, "type bool"),
  "add_eos_token": (3, "type bool"),
}


@pytest.mark.parametrize("key", BAD)
def test_a_malformed_key_is_named(tiny, key):
  value, message = BAD[key]
  with pytest.raises(UserError, match=message):
    tokenizer_from_gguf(tiny | {f"tokenizer.ggml.{key}": value})


def test_merges_of_unknown_tokens_are_an_error(tiny):
  with pytest.raises(UserError, match="pairs of tokens that join"):
    tokenizer_from_gguf(tiny | {"tokenizer.ggml.merges": ["qq zz"]})


def test_a_sentencepiece_token_of_absurd_length_is_an_error():
  metadata = sentencepiece(False, {})
  metadata["tokenizer.ggml.tokens"][5] = "a" * 100_000
  with pytest.raises(UserError, match="up to 512 characters"):
    tokenizer_from_gguf(metadata)
