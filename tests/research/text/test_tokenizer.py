"""Encoding, decoding and streaming; damaged tokenizer files."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from research.text.tokenizer import StopStrings, StreamDecoder, Tokenizer
from research.typing import UserError
from tests import support_text

SPECIAL = ("<s>", "</s>", "<pad>")


def byte_level() -> tokenizers.Tokenizer:
  """Every byte is a token; then come the special ones."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(alphabet)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(
    [tokenizers.AddedToken(s, special=True) for s in SPECIAL]
  )
  return backend


def sentencepiece() -> tokenizers.Tokenizer:
  """Words with a leading space, bytes for the rest, as Llama 2 decodes."""
  words = ["\u2581", "\u2581a", "\u2581caf", "b", "a", "c", "f"]
  backend = support_text.byte_fallback(words)
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace("\u2581", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  return backend


@pytest.fixture(scope="module")
def bytes_() -> Tokenizer:
  return Tokenizer(backend=byte_level())


def _ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
  table = _byte_ids(tokenizer)
  return [table[b] for b in data]


def _byte_ids(tokenizer: Tokenizer) -> dict[int, int]:
  """Returns the id of each byte by GPT-2's table, reimplemented."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [b for b in range(256) if b not in printable]
  letters = {b: chr(b) for b in printable}
  letters |= {b: chr(256 + i) for i, b in enumerate(others)}
  return {b: tokenizer.backend.token_to_id(c) for b, c in letters.items()}


TEXTS = [
  "",
  "plain",
  "caf\u00e9 \u4e2d\u6587",
  "\U0001f600\U0001f468\u200d\U0001f469 x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_stream(bytes_, text):
  ids = bytes_.encode(text)
  assert bytes_.decode(ids) == text
  stream = StreamDecoder(bytes_)
  pieces = [stream.feed([i]) for i in ids]
  assert not any("\ufffd" in piece for piece in pieces)
  assert "".join(pieces) + stream.flush() == text


def test_stream_of_any_bytes_is_their_lossy_text(bytes_):
  """Also for invalid UTF-8 of any length, in any chunks."""
  rng = np.random.default_rng(0)
  starts = np.array(
    [0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F]
  )
  for trial in range(60):
    data = bytes(rng.choice(starts, size=int(rng.integers(1, 60))).tolist())
    ids = _ids(bytes_, data)
    stream, out, at = StreamDecoder(bytes_), "", 0
    while at < len(ids):
      n = int(rng.integers(1, 7))
      out += stream.feed(ids[at : at + n])
      at += n
    out += stream.flush()
    assert out == data.decode("utf-8", "replace") == bytes_.decode(ids), trial


def test_stream_does_not_hold_back_for_ever(bytes_):
  stream = StreamDecoder(bytes_)
  ids = _ids(bytes_, b"\x80" * 64)
  assert len("".join(stream.feed([i]) for i in ids)) > 48


def test_the_stream_of_the_package_holds_back_for_ever(bytes_):
  """Why ours is by hand; what it gives out is the same."""
  for data in (b"\x80" * 64, "caf\u00e9".encode(), b"a\xe2\x82"):
    ids, out = _ids(bytes_, data), ""
    stream = decoders.DecodeStream(skip_special_tokens=True)
    for i in ids:
      out += stream.step(bytes_.backend, i) or ""
    whole = bytes_.decode(ids)
    assert whole.startswith(out)
    held = {b"\x80" * 64: 64, b"a\xe2\x82": 1}.get(data, 0)
    assert len(whole) - len(out) == held


def test_stream_keeps_the_spaces_of_sentencepiece():
  tokenizer = Tokenizer(backend=sentencepiece())
  to = tokenizer.backend.token_to_id
  names = ["\u2581caf", "<0xC3>", "<0xA9>", "\u2581a", "b", "\u2581", "\u2581a"]
  ids = [to(name) for name in names]
  stream = StreamDecoder(tokenizer)
  pieces = [stream.feed([i]) for i in ids]
  assert "".join(pieces) + stream.flush() == "caf\u00e9 ab  a"
  assert pieces[1:3] == ["", "\u00e9"]


@pytest.mark.parametrize(
  "names",
  [
    ["\u2581a", "<s>", "\u2581caf"],
    ["\u2581a", "<s>", "</s>", "\u2581", "\u2581a"],
    ["<s>", "\u2581a", "b", "<s>"],
    ["\u2581", "<s>", "\u2581a"],
  ],
)
@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_keeps_the_spaces_behind_special_tokens(names, skip_special):
  backend = sentencepiece()
  backend.add_special_tokens(list(SPECIAL))
  tokenizer = Tokenizer(backend=backend)
  ids = [backend.token_to_id(name) for name in names]
  stream = StreamDecoder(tokenizer, skip_special)
  out = "".join(stream.feed([i]) for i in ids) + stream.flush()
  assert out == backend.decode(ids, skip_special_tokens=skip_special)


def test_special_tokens(bytes_):
  ids = bytes_.encode("a</s>")
  assert ids[-1] == bytes_.backend.token_to_id("</s>")
  assert bytes_.decode(ids) == "a"
  assert bytes_.decode(ids, skip_special=False) == "a</s>"
  first = bytes_.backend.token_to_id("<s>")
  added = Tokenizer(backend=byte_level(), bos=first, add_bos=True)
  assert added.encode("a", add_special=True) == [first, *added.encode("a")]
  twice = added.encode("<s>a", add_special=True)
  assert twice.count(first) == 1


@pytest.mark.parametrize("size", range(1, 8))
def test_stop_strings_wherever_the_text_is_cut(size):
  text = "one two aab aabaac three STOP four"
  for stops, expected in [
    (["STOP"], "one two aab aabaac three "),
    (["aabaac", "three"], "one two aab "),
    (["aabaad"], text),
    (["nowhere", "t"], "one "),
    ([], text),
  ]:
    stop, out = StopStrings(stops), ""
    for at in range(0, len(text), size):
      out += stop.feed(text[at : at + size])
      assert expected.startswith(out)
    out += stop.flush()
    assert out == expected
    assert stop.found == (expected != text)


def test_an_empty_stop_string_is_an_error():
  with pytest.raises(UserError, match="empty"):
    StopStrings(["a", ""])


def _save(directory, **files):
  byte_level().save(str(directory / "tokenizer.json"))
  for name, value in files.items():
    (directory / f"{name}.json").write_text(json.dumps(value))


def test_directory(tmp_path):
  _save(
    tmp_path,
    tokenizer_config={
      "bos_token": {"content": "<s>", "special": True},
      "eos_token": "</s>",
      "pad_token": None,
      "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    },
    config={"eos_token_id": 9},
    generation_config={"eos_token_id": [7, 8]},
  )
  found = Tokenizer.from_directory(tmp_path)
  to = found.backend.token_to_id
  assert to("</s>") == 257
  assert (found.bos, found.eos, found.pad) == (to("<s>"), to("</s>"), None)
  assert found.stop == (to("</s>"), 7, 8)
  assert found.chat([{"role": "user", "content": "hi"}]) == "<s>hi"
  assert found.vocab_size == 259


def test_the_post_processor_adds_what_it_adds(tmp_path):
  backend = byte_level()
  bos = backend.token_to_id("<s>")
  backend.post_processor = processors.TemplateProcessing(
    single="<s> $A", special_tokens=[("<s>", bos)]
  )
  backend.enable_truncation(2)
  backend.save(str(tmp_path / "tokenizer.json"))
  found = Tokenizer.from_directory(tmp_path)
  assert found.encode("abc", add_special=True)[0] == bos
  assert len(found.encode("abc", add_special=True)) == 4
  assert len(found.encode("abc")) == 3


@pytest.mark.parametrize(
  "name, text, words",
  [
    ("tokenizer.json", None, "no such file"),
    ("tokenizer.json", "{", "is not a tokenizer"),
    ("tokenizer.json", b"\xff", "UTF-8"),
    ("tokenizer_config.json", "[]", "not an object"),
    ("tokenizer_config.json", "{", "is not JSON"),
    ("tokenizer_config.json", "[" * 100_000, "is not JSON"),
    ("generation_config.json", '{"eos_token_id": "a"}', "eos_token_id"),
    ("generation_config.json", '{"eos_token_id": [1, true]}', "eos_token_id"),
  ],
)
def test_damaged_directories(tmp_path, name, text, words):
  _save(tmp_path)
  if text is None:
    (tmp_path / name).unlink()
  elif isinstance(text, bytes):
    (tmp_path / name).write_bytes(text)
  else:
    (tmp_path / name).write_text(text)
  with pytest.raises(UserError, match=words) as error:
    Tokenizer.from_directory(tmp_path)
  assert name in str(error.value)
  assert len(str(error.value).splitlines()) <= 3


def test_without_a_chat_template(bytes_):
  with pytest.raises(UserError, match="--chat"):
    bytes_.chat([{"role": "user", "content": "hi"}])
