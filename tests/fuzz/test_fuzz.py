"""Damaged files end in success or one clear error, within 5 s and 1 GiB.

`make test` draws 500 of the 10,000 cases that `make soak` runs; cases that
once failed are kept, shrunk, and run each time.
"""

import pathlib
import random

import pytest

from research.typing import UserError
from tests.fuzz import mutations, soak, worker
from tests.fuzz.targets import TARGETS

KEPT = sorted(soak.KEPT.glob("*.bin"))
CASES, SHARE = 10_000, 0.05


@pytest.fixture(scope="module")
def results():
  drawn = random.Random(0).sample(range(CASES), int(CASES * SHARE))
  return soak.run(sorted(drawn), workers=1)


def test_drawn_cases_are_read_or_refused(results):
  failed = [r for r in results if r["outcome"] == "FAILED"]
  assert not failed, failed
  assert len(results) == int(CASES * SHARE)
  assert {r["target"] for r in results} == set(TARGETS)


def test_the_damage_bites_and_does_not_only_break(results):
  """Cases that are all refused at the first byte would prove little."""
  for name in ("safetensors", "gguf", "adapter_config", "config", "tokenizer"):
    outcomes = [r["outcome"] for r in results if r["target"] == name]
    assert 0.05 < outcomes.count("read") / len(outcomes) < 0.9, name
  refusals = {r["error"][-60:] for r in results if r["outcome"] == "refused"}
  assert len(refusals) > 60


def test_the_same_number_is_the_same_case():
  for number in range(40):
    assert worker.damaged(number) == worker.damaged(number)


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.stem)
def test_kept_cases(path, tmp_path):
  name = path.stem.rsplit("-", 1)[0]
  result = worker.attempt(name, path.read_bytes(), tmp_path)
  assert result["outcome"] != "FAILED", result


@pytest.mark.slow
@pytest.mark.parametrize(
  "fault, words",
  [
    pytest.param("raise KeyError('x')", "KeyError", marks=pytest.mark.slow),
    pytest.param("bytes(2 << 30)", "MemoryError", marks=pytest.mark.slow),
    ("import os; os.abort()", "the process died"),
    pytest.param(
      "assert False, 'a partial load'",
      "a partial load",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_harness_notices(fault, words, monkeypatch):
  """A reader that fails in each of these ways is reported."""
  monkeypatch.setenv(worker.FAULT, fault)
  # A worker that dies is started again: two cases are enough.
  some = [n for n in range(60) if worker.case(n)[0] == "config"][:2]
  results = soak.run(some)
  assert len(results) == 2
  assert all(r["outcome"] == "FAILED" for r in results)
  assert all(words in r["error"] for r in results)


def test_mutations_of_nothing():
  r = random.Random(0)
  assert mutations.of_bytes(r, b"") == b""


def test_errors_that_tell_too_much_fail(tmp_path, monkeypatch):
  def talks(path):
    raise UserError("a\n" * 9)

  target = TARGETS["config"]
  monkeypatch.setitem(
    TARGETS, "config", type(target)(*[*vars(target).values()][:4], talks)
  )
  data = pathlib.Path(target.source() / target.file).read_bytes()
  result = worker.attempt("config", data, tmp_path)
  assert result["outcome"] == "FAILED"
