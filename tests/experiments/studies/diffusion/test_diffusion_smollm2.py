"""SmolLM2 as a diffusion model: its study, on a model of its vocabulary."""

import copy

import numpy as np
import pytest

from experiments.studies.diffusion import smollm2
from experiments.studies.diffusion.smollm2 import (
  Backwards,
  Instructed,
)
from experiments.studies.diffusion.study import Tiny
from research.interop import gguf, load
from research.interop.loaded import Loaded
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests import support


@pytest.fixture(scope="module", name="words")
def _words():
  file = load.locate("smollm2-135m")
  return Tokenizer.from_gguf(gguf.open_gguf(file).metadata)


@pytest.mark.slow
def test_lists_are_said_backwards_and_none_is_in_both_splits(words):
  task = Backwards(words=3)
  splits = [task.examples(words, s, 40) for s in ("train", "heldout")]
  lists = []
  for found in splits:
    texts = [words.decode(e.tokens.tolist()) for e in found]
    for e, text in zip(found, texts, strict=True):
      head, _, answer = text.partition(". Backwards: ")
      asked = head.removeprefix("Words: ").split(" ")
      assert answer.split(" ") == asked[::-1] and len(set(asked)) == 3
      assert e.loss_mask.sum() == 3 and e.loss_mask[-3:].all()
    assert len({len(e.tokens) for e in found}) == 1
    lists.append(set(texts))
  assert not lists[0] & lists[1]


@pytest.mark.slow
def test_every_stage_is_judged(words, monkeypatch):
  model = support.model(
    depth=1, width=8, hidden=8, heads=2, kv_heads=2, head_dim=4, vocab=49_152,
    tied=True,
  )  # fmt: skip
  made = Loaded(model, support.params(model), words, {})
  monkeypatch.setattr(smollm2.load, "load_model", lambda _: made)
  study = Instructed(
    train=Tiny(batch=2, every=1, warmup=1, rate=1e-2),
    length=64,
    adapt=1,
    tune=1,
    pool=4,
    graded=2,
    heldout=3,
    passes=2,
    seeds=1,
  )
  (arm,) = study.arms
  row = study.run(arm, {}, None)
  text = row.pop("text")
  assert list(row) == ["converted", "adapted", "tuned"]
  losses = [row[stage]["loss"] for stage in row]
  assert np.isfinite(losses).all() and len(set(losses)) == 3
  assert all(row[stage]["error"] > 0 for stage in row)
  # Nothing is known yet of 49,152 tokens, by either kind.
  for kind in ("next token", "diffusion"):
    assert text[kind] == pytest.approx([np.log(49_152)] * 2, rel=0.1)
    assert text[kind][0] != text[kind][1]
  assert len(study.table({arm: row | {"text": text}})) == 7


STUDY = Instructed()
ROW = {
  "converted": dict(loss=9.0, error=0.1, token=0.0, right=0.0),
  "adapted": dict(loss=5.0, error=0.1, token=0.2, right=0.0),
  "tuned": dict(loss=3.0, error=0.1, token=0.9, right=0.8),
  "text": {"next token": [3.0, 2.5], "diffusion": [8.0, 2.54]},
}


def rows_of(row):
  """Three seeds, little apart."""
  out = {}
  for seed in range(3):
    out[f"seed {seed}"] = mine = copy.deepcopy(row)
    for stage in ("converted", "adapted", "tuned"):
      mine[stage]["loss"] += 0.01 * (seed - 1) * (stage == "adapted")
      mine[stage]["right"] += 0.01 * seed * (stage == "tuned")
  return out


@pytest.mark.parametrize(
  ("stage", "changes", "wanted"),
  [
    ("tuned", {}, [True, True, True, True, True]),
    ("adapted", dict(loss=9.0), [None, True, True, True, True]),
    ("tuned", dict(loss=4.98), [True, None, True, True, True]),
    ("tuned", dict(right=0.0), [True, True, None, False, True]),
    ("tuned", dict(right=0.3), [True, True, True, False, True]),
    ("text", dict(diffusion=[8.0, 2.6]), [True, True, True, True, False]),
  ],
)
def test_verdicts(stage, changes, wanted):
  row = copy.deepcopy(ROW)
  row[stage] |= changes
  said = STUDY.verdicts(rows_of(row))
  assert [v.holds for v in said] == wanted


def test_picture(tmp_path):
  STUDY.plot(rows_of(ROW), tmp_path, "three stages")
  assert (tmp_path / "smollm2.png").stat().st_size > 1000


def test_mistakes():
  class Letters:
    def encode(self, text):
      return list(text.encode())

  with pytest.raises(UserError, match="0 words are one token"):
    Backwards().examples(Letters(), "train", 1)
  with pytest.raises(UserError, match="passes is 1"):
    Instructed(passes=1)
