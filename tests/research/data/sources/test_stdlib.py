"""The standard library corpus: completeness, splits and hash."""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import pytest

from research.data import sources
from research.data.sources import stdlib
from research.typing import UserError

SPLITS = sources.Split.__args__


def test_splits_are_disjoint_and_go_by_the_name():
  names = {s: stdlib.Stdlib(s).names for s in SPLITS}
  together = [n for found in names.values() for n in found]
  assert len(set(together)) == len(together) > 300
  assert all(sources.split_of(n) == s for s in SPLITS for n in names[s])
  assert any(n.startswith("topics/") for n in together)


def test_documents_are_the_files():
  source = stdlib.Stdlib("heldout")
  assert isinstance(source, sources.Documents)
  name = next(n for n in source.names if not n.startswith("topics/"))
  root = pathlib.Path(json.__file__).parents[1]
  text = (root / name).read_bytes().decode().replace("\r\n", "\n")
  assert source[source.names.index(name)] == text


def test_folders_that_some_pythons_lack_are_left_out():
  parts = {
    p for s in SPLITS for n in stdlib.Stdlib(s).names for p in n.split("/")
  }
  assert not parts & {"test", "tkinter", "idlelib", "site-packages"}
  assert not [p for p in parts if p.startswith("_sysconfigdata")]


def test_order_is_no_alphabet_and_a_limit_takes_its_beginning():
  names = stdlib.Stdlib("train").names
  assert list(names) != sorted(names)
  assert stdlib.Stdlib("train", limit=7).names == names[:7]


def test_long_documents_end_at_a_line():
  cut = stdlib.Stdlib("train", size=5_000)
  whole = stdlib.Stdlib("train", size=10**9)
  assert max(len(whole[i]) for i in range(len(whole))) > 100_000
  for i in range(len(cut)):
    assert len(cut[i]) <= 5_000
    assert whole[i].startswith(cut[i])
    assert cut[i] == whole[i] or cut[i].endswith("\n")


def test_hash_tells_corpora_apart():
  few = stdlib.Stdlib("heldout", limit=3)
  digest = hashlib.sha256()
  for name, text in zip(few.names, few, strict=False):
    data = text.encode()
    digest.update(f"{name} {len(data)}\n".encode() + data)
  assert few.sha256 == digest.hexdigest()
  assert dataclasses.replace(few, limit=2).sha256 != few.sha256
  assert dataclasses.replace(few, size=100).sha256 != few.sha256


def test_another_process_has_the_same_corpus():
  code = (
    "from research.data.sources import stdlib\n"
    "print([stdlib.Stdlib(s).sha256 for s in ('train', 'heldout')])"
  )
  out = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  mine = [stdlib.Stdlib(s).sha256 for s in ("train", "heldout")]
  assert out.strip() == str(mine)


def test_files_that_are_no_text(tmp_path, monkeypatch):
  for name, data in {
    "a.py": b"x = 1\r\n",
    "b.py": b"# \xff\n",
    "c.py": b"\n",
    "d/e.py": "π = 3\n".encode(),
    "test/f.py": b"y = 1\n",
    "_sysconfigdata_x.py": b"z = 1\n",
  }.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
  monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
  found = stdlib._corpus.__wrapped__()
  files = {n: t for n, t in found.items() if not n.startswith("topics/")}
  assert files == {"a.py": "x = 1\n", "d/e.py": "π = 3\n"}
  for file in tmp_path.rglob("*.py"):
    file.unlink()
  with pytest.raises(UserError, match="holds no sources"):
    stdlib._corpus.__wrapped__()
