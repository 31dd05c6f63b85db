"""JSON Lines sources: valid and invalid records, splits by any field."""

import json
import os
import warnings

import numpy as np
import pytest

from research.data import examples, packing, pipeline, sources
from research.data.sources import jsonl, records
from research.text.special_tokens import SpecialTokens
from research.text.tokenizer import Tokenizer
from research.typing import UserError


class Letters:
  """A tokenizer backend whose ids are character codes."""

  def encode(self, text, add_special_tokens=False):
    return type("Encoding", (), {"ids": [ord(c) for c in text]})

  def id_to_token(self, i):
    return chr(i)


LETTERS = Tokenizer(
  backend=Letters(),
  bos=ord("^"),
  eos=ord("$"),
  stop=(ord("$"),),
  add_bos=True,
  chat_template=(
    "{% for m in messages %}[{{ m.role[0] }}:{{ m.content }}$]{% endfor %}"
    "{% if add_generation_prompt %}[a:{% endif %}"
  ),
)


@pytest.fixture
def write(tmp_path):
  def write(*lines, name="f.jsonl"):
    path = tmp_path / name
    parts = [
      x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines
    ]
    path.write_bytes(b"\n".join(parts))
    return str(path)

  return write


def shown(example):
  text = "".join(map(chr, example.tokens))
  mask = example.loss_mask
  return text, "".join(c for c, on in zip(text, mask, strict=True) if on)


DEEP = b'{"a":' * 40 + b"1" + b"}" * 40


@pytest.mark.parametrize(
  ("line", "words"),
  [
    (b"\xff{}", "not UTF-8: byte 0xff at column 1"),
    (b'{"a": \xc3"}', "not UTF-8: byte 0xc3 at column 7"),
    (b"{", "is not JSON: .* at column 2"),
    (b"{'a': 1}", "is not JSON"),
    (b'{"a": 1} {"a": 2}', "is not JSON: Extra data"),
    (b"[1]", "found a list, expected a JSON object"),
    (b"null", "found a NoneType"),
    (b'{"a": NaN}', "found NaN, which is not a JSON number"),
    (b'{"a": -Infinity}', "found -Infinity"),
    (b'{"a": [1e999]}', "found a number too large for 64 bits"),
    (b'{"a": {"b": -1e999}}', "found a number too large for 64 bits"),
    (b'{"a": 1, "a": 2}', "found the key 'a' twice"),
    (b'{"b": [{"c": 1, "c": 1}]}', "found the key 'c' twice"),
    (b'{"a": ' + b"9" * 5000 + b"}", "expected|Expected standard JSON"),
    (DEEP, "more than 32 objects and lists"),
    (b'{"a":' + b"[" * 200_000, "more than 32 objects and lists|is not JSON"),
    (rb'{"a": "\ud800"}', r"half a surrogate pair, \\ud800"),
    (rb'{"\udc00": 1}', "half a surrogate pair"),
    (b'{"a": "\t"}', "is not JSON: Invalid control character"),
    (b"\xef\xbb\xbf{}", "is not JSON"),  # a byte order mark on line 2
  ],
)
def test_lines_that_are_no_records(write, line, words):
  path = write({"text": "fine"}, line)
  with pytest.raises(UserError, match=words) as error:
    jsonl.read((path,))
  assert str(error.value).startswith(f"{path}:2: ")
  assert len(str(error.value).splitlines()) <= 3


def test_a_huge_line_is_not_read_whole(write, monkeypatch):
  monkeypatch.setattr(jsonl, "MAX_LINE", 100)
  path = write({"text": "x" * 80}, {"text": "x" * 100})
  with pytest.raises(UserError, match=r":2: found a line of more than 100"):
    jsonl.read((path,))


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_nothing_in_it(write, content):
  with pytest.raises(UserError, match="holds no records"):
    jsonl.read((write(content),))


def test_no_such_file(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    jsonl.read((str(tmp_path / "none"),))
  with pytest.raises(UserError, match="cannot be read"):
    jsonl.read((str(tmp_path),))


def test_lines_are_counted_as_an_editor_does(write):
  path = write(b'\xef\xbb\xbf{"text": "a"}\r', b"", {"text": "\u2028\u0085b"})
  found = jsonl.read((path,))
  assert [r.where.rsplit(":")[-1] for r in found] == ["1", "3"]
  assert [r.text("text") for r in found] == ["a", "\u2028\u0085b"]


def test_texts_are_documents(write):
  source = records.Texts((write({"meta": {"t": "ab"}}, {"meta": {"t": "c"}}),))
  with pytest.raises(UserError, match=r":1: field 'text': found none among"):
    len(source)
  source = records.Texts(source.paths, field="meta.t")
  assert isinstance(source, sources.Documents)
  assert [source[i] for i in range(len(source))] == ["ab", "c"]
  around = SpecialTokens(end=(0,))
  made = examples.read(source, LETTERS, around)
  assert [e.tokens.tolist() for e in made] == [[97, 98, 0], [99, 0]]
  with pytest.raises(UserError, match="this model has no tokenizer"):
    examples.read(source, None)
  with pytest.raises(UserError, match="field 'meta': found dict"):
    len(records.Texts(source.paths, field="meta"))


@pytest.mark.parametrize("plan", [packing.best_fit, packing.one_per_row])
def test_what_is_cut_is_said_and_what_teaches_nothing_left_out(write, plan):
  """Counted by hand: rows of 4, answers after prompts of 2, 9 and 4."""
  lines = [("ab", "c"), ("abcdefgh", "ijk"), ("pqr", "s")]
  path = write(*({"prompt": p, "completion": c} for p, c in lines))
  data = pipeline.Pipeline(
    source=records.Completions((path,)), length=4, plan=plan, batch_size=1
  )
  with pytest.warns(RuntimeWarning) as said:
    rows = data.rows(LETTERS)
  [message] = [str(w.message) for w in said]
  # ^ab c$ is 5, ^abcdefgh ijk$ 13 and ^pqr s$ 6: none fits.
  assert "3 of 3 examples are longer than 4 positions" in message
  assert "the longest has 13" in message
  found = [rows[i] for i in range(len(rows))]
  assert all(row["weights"].any() for row in found)
  learned = [
    chr(t) for r in found for t in r["targets"][r["weights"] > 0].tolist()
  ]
  assert sorted(learned) == sorted("c$ijk$s$")
  given = data.source.examples(LETTERS)
  tokens, flags = [e.tokens for e in given], [e.loss_mask for e in given]
  whole = packing.pack(tokens, 4, plan, flags, (ord("^"),))
  empty = [i for i in range(len(whole)) if not whole[i]["weights"].any()]
  assert len(rows) == len(whole) - len(empty) < len(whole)
  assert f"{len(empty)} of {len(whole)} rows have no targets" in message


def test_what_fits_is_not_warned_of(write):
  path = write({"prompt": "ab", "completion": "c"})
  source = records.Completions((path,))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert len(pipeline.Pipeline(source=source, length=5).rows(LETTERS)) == 1
    texts = records.Texts((path,), field="prompt")
    pipeline.Pipeline(source=texts, length=3).rows(LETTERS)  # cut, as texts are


def test_splits_partition_and_keep_a_key_together(write):
  rows = [{"text": f"text {i}", "meta": {"id": i // 5}} for i in range(400)]
  path = write(*rows)
  names = sources.Split.__args__
  for key in (None, "meta.id", "text"):
    found = {s: jsonl.read((path,), s, key) for s in names}
    everything = [r.text("text") for part in found.values() for r in part]
    assert sorted(everything) == sorted(r["text"] for r in rows)
    if key == "meta.id":
      ids = [{r.get("meta.id") for r in part} for part in found.values()]
      assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
      assert all(ids)
  # By value, not by place: another order or file changes nothing.
  other = write(*reversed(rows), name="g.jsonl")
  a, b = (jsonl.read((p,), "heldout", "text") for p in (path, other))
  assert {r.text("text") for r in a} == {r.text("text") for r in b}
  with pytest.raises(UserError, match=":1: field 'nope': found none among"):
    jsonl.read((path,), "train", "nope")
  with pytest.raises(UserError, match="none of 1 records is in the split"):
    one = write({"text": "x"}, name="one.jsonl")
    [jsonl.read((one,), s) for s in names]


def test_chat(write):
  chat = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
  ]
  source = records.Chat((write({"messages": chat, "id": 7}),))
  assert shown(source.examples(LETTERS)[0]) == ("[u:hi$][a:yo$]", "yo$")
  assert source.texts == ["hi\nyo"]
  for wrong in ("hi", [], {"role": "user"}):
    bad = records.Chat((write({"messages": wrong}),))
    with pytest.raises(UserError, match=":1: field 'messages'"):
      bad.examples(LETTERS)
  bad = records.Chat((write({"messages": [*chat, {"role": "x"}]}),))
  with pytest.raises(UserError, match=":1: message 2: role: found 'x'"):
    bad.examples(LETTERS)


def test_completions(write):
  source = records.Completions((write({"prompt": "1+1=", "completion": "2"}),))
  assert shown(source.examples(LETTERS)[0]) == ("^1+1=2$", "2$")
  for row in ({"prompt": "x"}, {"prompt": "x", "completion": 3}):
    with pytest.raises(UserError, match=":1: field 'completion': found"):
      records.Completions((write(row),)).examples(LETTERS)
  with pytest.raises(UserError, match="found no text, expected an answer"):
    row = {"prompt": "x", "completion": ""}
    records.Completions((write(row),)).examples(LETTERS)


USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
FORMS = [
  {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
  {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
]


@pytest.mark.parametrize("row", FORMS)
def test_preferences_as_messages(write, row):
  [pair] = records.Preferences((write(row),)).pairs(LETTERS)
  assert shown(pair[0]) == ("[u:q$][a:good$]", "good$")
  assert shown(pair[1]) == ("[u:q$][a:bad$]", "bad$")


def test_preferences_as_text(write):
  row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
  [pair] = records.Preferences((write(row),)).pairs(LETTERS)
  assert shown(pair[0]) == ("^qgood$", "good$")
  assert shown(pair[1]) == ("^qbad$", "bad$")


def test_shared_earlier_answers_are_the_prompt(write):
  before = [USER, GOOD, USER]
  row = {"chosen": [*before, GOOD], "rejected": [*before, BAD]}
  [pair] = records.Preferences((write(row),)).pairs(LETTERS)
  assert [shown(e)[1] for e in pair] == ["good$", "bad$"]


@pytest.mark.parametrize(
  ("row", "words"),
  [
    ({"prompt": "q", "chosen": "a"}, "field 'rejected': found none among"),
    ({"prompt": "q", "rejected": "a"}, "field 'chosen': found none among"),
    ({"chosen": "a", "rejected": "b"}, "field 'prompt': found none among"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "another answer"),
    ({"chosen": [USER, GOOD], "rejected": "b"}, "field 'rejected': found str"),
  ],
)
def test_preferences_that_are_none(write, row, words):
  with pytest.raises(UserError, match=words) as error:
    records.Preferences((write(row),)).pairs(LETTERS)
  assert ":1: " in str(error.value)


def test_nothing_to_predict_is_said(write):
  class Empty:
    def examples(self, tokenizer):
      return [examples.join([([1, 2], False)])]

  with pytest.raises(UserError, match="none with a token to predict"):
    examples.read(Empty(), None)
  made = examples.join([([1], False), ([2, 3], True)])
  np.testing.assert_array_equal(made.loss_mask, [False, True, True])


ASKS = {"role": "user", "content": "q"}
WRONG = [
  (records.Texts, {"txt": "a"}, "field 'text': found none among txt"),
  (records.Chat, {"messages": [{"role": "user"}]}, "content: found NoneType"),
  (records.Chat, {"messages": [ASKS]}, "none by the assistant"),
  (records.Completions, {"prompt": "a"}, "field 'completion': found none"),
  (records.Preferences, {"chosen": "a", "rejected": "b"}, "field 'prompt'"),
  (records.Preferences, {"prompt": "a", "chosen": "b"}, "field 'rejected'"),
  # Near misses of a field that may be left out: it would be, in silence.
  *[
    (
      records.Chat,
      {"messages": [ASKS, {"role": "assistant", "content": "a", name: 0}]},
      f"'{name}': did you mean 'weight'",
    )
    for name in ("weigth", "Weight", "weights", "wieght", "weigh")
  ],
  *[
    (
      records.Preferences,
      {name: [ASKS]}
      | {
        x: [ASKS, {"role": "assistant", "content": x}]
        for x in ("chosen", "rejected")
      },
      f"'{name}': did you mean 'prompt'",
    )
    for name in ("promt", "Prompt", "prompts")
  ],
]


@pytest.mark.parametrize(("kind", "row", "words"), WRONG)
def test_fields_are_checked_before_splits(write, kind, row, words):
  """A wrong record is reported in every split, before an empty one is."""
  path = write(row)
  for split in (None, *sources.Split.__args__):
    source = kind((path,), split=split)
    with pytest.raises(UserError, match=words) as error:
      source.pairs(LETTERS) if kind is records.Preferences else source.texts
    assert ":1: " in str(error.value)
    with pytest.raises(UserError, match=words):
      source.check_files()


def test_every_file_is_checked_and_the_key(write):
  good = write({"text": "a"}, name="good.jsonl")
  bad = write({"text": "a"}, {"text": 3}, name="bad.jsonl")
  records.Texts((good,), split="heldout").check_files()
  with pytest.raises(UserError, match="bad.jsonl:2: field 'text': found int"):
    records.Texts((good, bad), split="heldout").check_files()
  with pytest.raises(UserError, match="good.jsonl:1: field 'author'"):
    records.Texts((good,), key="author").check_files()


def test_a_pipe_is_not_read_by_a_check(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  records.Texts(str(tmp_path / "pipe")).check_files()
  sources.TextFiles(str(tmp_path / "pipe")).check_files()


def test_other_formats_are_recognized(write):
  lines = '[\n{"text": "a"}\n]'
  with pytest.raises(UserError, match="found the beginning of a JSON array"):
    jsonl.read((write(lines.encode()),))
  with pytest.raises(UserError, match="iconv -f UTF-16 -t UTF-8"):
    jsonl.read((write(lines.encode("utf-16")),))
  with pytest.raises(UserError, match="iconv -f UTF-16 -t UTF-8"):
    sources.read_text(write(lines.encode("utf-16")))
  with pytest.raises(UserError, match="iconv -f ENCODING -t UTF-8"):
    sources.read_text(write(b"\xe4"))
