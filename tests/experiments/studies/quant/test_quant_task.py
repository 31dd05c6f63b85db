"""Accuracy of a task in few bits: relative to the base, with intervals."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies.quant import quant_study, quant_task
from research.data.sources.last_words import Item
from research.interop import load
from research.quant.algorithms.calibrate import Calibration

MODEL = (
  pathlib.Path(__file__).resolve().parents[3]
  / "golden/models/gguf_mixed/model.gguf"
)


def test_a_share_has_the_interval_that_drawing_again_has():
  rng = np.random.default_rng(0)
  base = rng.random(400) < 0.6
  right = np.where(rng.random(400) < 0.85, base, rng.random(400) < 0.3)
  found = quant_task.relative_accuracy(right.tolist(), base.tolist())
  picks = rng.integers(0, 400, (4000, 400))
  shares = right[picks].mean(1) / base[picks].mean(1)
  assert found.share == pytest.approx(right.mean() / base.mean())
  assert found.share_half == pytest.approx(1.96 * shares.std(), rel=0.06)
  accuracies = right[picks].mean(1)
  assert found.half == pytest.approx(1.96 * accuracies.std(), rel=0.1)


def test_equal_answers_lose_nothing_surely():
  answers = [True, False] * 50
  found = quant_task.relative_accuracy(answers, answers)
  assert found.share == 1 and found.share_half == 0


@pytest.mark.parametrize(
  "lost, questions, bits, holds",
  [(1, 1000, 4.3, True), (40, 1000, 4.3, False), (1, 40, 4.3, None)]
  + [(300, 1000, 2.6, False), (100, 1000, 2.6, True)],
)
def test_the_interval_decides(lost, questions, bits, holds):
  half = questions // 2
  base = [True] * half + [False] * (questions - half)
  right = [i >= lost and b for i, b in enumerate(base)]
  rows = {
    quant_task.BASE: {"right": {"last word": base}, "bits_per_weight": None},
    "few": {"right": {"last word": right}, "bits_per_weight": bits},
    "broken": {"failed": "no multiple"},
  }
  (verdict,) = quant_task.answers(rows)
  assert verdict.holds == holds and f"{questions} questions" in verdict.found


def test_without_a_base_nothing_is_said():
  assert not quant_task.answers({"few": {"right": {}}})


class _Some(quant_task.LastWords):
  """Sentences whose continuations are the model's own, or are not."""

  def __init__(self):
    object.__setattr__(self, "source", ("",))

  def items(self):
    return [Item("a b c", " d"), Item("a b c d", " e"), Item("b", " a")]


@pytest.mark.slow
def test_right_is_what_greedy_decoding_says():
  loaded = load.load_model(MODEL)
  if loaded.tokenizer is None:
    pytest.skip("that model has no tokenizer")
  found = quant_task.LastWord(data=_Some(), batch=2).right(loaded)
  for item, right in zip(_Some().items(), found, strict=True):
    before = loaded.tokenizer.encode(item.context, add_special=True)
    whole = loaded.tokenizer.encode(
      item.context + item.answer, add_special=True
    )
    params = {"params": loaded.params}
    hidden, _ = loaded.model.apply(params, jnp.asarray([whole[:-1]]))
    logits = loaded.model.apply(params, hidden, method="logits")
    best = np.asarray(logits[0]).argmax(-1)[len(before) - 1 :]
    assert right == (best.tolist() == whole[len(before) :])


def test_rows_begin_with_the_model_and_read_what_they_are_given():
  calibration = Calibration(windows=3, length=16)
  rows = quant_task.rows(calibration)
  assert rows[0].name == quant_task.BASE and not rows[0].transforms
  assert {r.calibrated_on for r in rows} == {None, 48}
  assert all(isinstance(r, quant_study.Row) for r in rows)
  assert len({r.name for r in rows}) == len(rows) == 7
