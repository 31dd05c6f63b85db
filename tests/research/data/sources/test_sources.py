"""Text sources: splits by name, and invalid files."""

import collections
import hashlib
from pydoc_data.topics import topics

import pytest

from research.data import sources
from research.typing import UserError


def test_splits_are_disjoint_and_cover_all_topics():
  names = {s: sources.PydocTopics(s).names for s in sources.Split.__args__}
  everything = [n for found in names.values() for n in found]
  assert sorted(everything) == sorted(topics)
  assert len(set(everything)) == len(everything)
  # 80/10/10 of 80 or more names: three standard deviations.
  n = len(topics)
  assert abs(len(names["train"]) / n - 0.8) < 3 * (0.8 * 0.2 / n) ** 0.5


def test_split_is_the_hash_of_the_name():
  found = collections.Counter()
  for i in range(1000):
    name = f"topic {i}"
    share = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) / 16**16
    want = (
      "train" if share < 0.8 else "validation" if share < 0.9 else "heldout"
    )
    assert sources.split_of(name) == want
    found[want] += 1
  assert min(found.values()) > 60


def test_topics_are_documents():
  source = sources.PydocTopics("heldout")
  assert isinstance(source, sources.Documents)
  assert [source[i] for i in range(len(source))] == [
    topics[n] for n in source.names
  ]


@pytest.mark.parametrize(
  "content,message",
  [
    (None, "No such file"),
    (b"good \xff bad", "byte 0xff at offset 5"),
    (b" \n", "no text"),
  ],
)
def test_bad_files(tmp_path, content, message):
  path = tmp_path / "x.txt"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(UserError, match=message) as caught:
    sources.TextFiles((str(path),))[0]
  assert str(path) in str(caught.value)
  assert str(caught.value).count("\n") < 3


@pytest.mark.parametrize(
  ("lines", "refused"),
  [
    (['{"text": "a"}'], True),
    (['{"text": "a"}', "", '{"text": "b"}'], True),
    (['{"messages": []}'] * 9, True),
    (["{", '  "text": "a"', "}"], False),  # one JSON document
    (["[1, 2]", "[3, 4]"], False),
    (['{"text": "a"}', "is how a record looks"], False),
  ],
)
@pytest.mark.parametrize("split", [None, "train"])
def test_json_lines_are_no_text(tmp_path, lines, refused, split):
  path = tmp_path / "a.txt"
  path.write_text("\n".join(lines) + "\n")
  files = sources.TextFiles((str(path),), split=split)
  if not refused:
    files.check_files()
    assert files.texts
    return
  with pytest.raises(UserError, match=r"found JSON Lines .*\n.*text_jsonl"):
    files.check_files()
  with pytest.raises(UserError, match="found JSON Lines"):
    files.texts  # noqa: B018


def test_directory_is_no_text_file(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    sources.read_text(str(tmp_path))


def test_files_are_documents(tmp_path):
  for name, text in (("a", "eins"), ("b", "\ufeffzwei – drei")):
    (tmp_path / name).write_text(text, encoding="utf-8")
  source = sources.TextFiles((str(tmp_path / "a"), str(tmp_path / "b")))
  assert [source[0], source[1], len(source)] == ["eins", "zwei – drei", 2]


@pytest.mark.parametrize("lines", [3, 10, 57])
def test_splits_of_a_file_are_its_parts_in_order(tmp_path, lines):
  path = tmp_path / "a.txt"
  text = [f"line {i}\n" for i in range(lines)]
  path.write_text("".join(text))
  parts = {}
  for split in sources.Split.__args__:
    try:
      [parts[split]] = sources.TextFiles(str(path), split).texts
    except sources.NoExamples:
      assert lines == 3
  assert "".join(parts.values()) == "".join(text)
  if lines > 9:
    shares = [
      len(parts[s].splitlines()) / lines for s in sources.Split.__args__
    ]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=1 / lines)


def test_a_split_without_text_is_said(tmp_path):
  path = tmp_path / "a.txt"
  path.write_text("one line")
  assert sources.TextFiles((str(path),), "train")[0] == "one line"
  with pytest.raises(sources.NoExamples, match="too short for a split 'held"):
    len(sources.TextFiles((str(path),), "heldout"))


def test_patterns_are_the_files_they_match(tmp_path):
  for name in ("b.txt", "a.txt", "c.log", "[d].txt"):
    (tmp_path / name).write_text(name)
  found = sources.expand((f"{tmp_path}/?.txt", f"{tmp_path}/[d].txt"))
  assert [p.split("/")[-1] for p in found] == ["a.txt", "b.txt", "[d].txt"]
  assert sources.TextFiles(f"{tmp_path}/*.log").texts == ["c.log"]
  with pytest.raises(UserError, match="matches no file"):
    sources.expand(f"{tmp_path}/*.json")
  with pytest.raises(UserError, match="expected at least one file"):
    sources.expand(())
