"""Gaps to full training, from results whose gaps are known."""

import math

import pytest

from experiments import cli, lora_gap, tables
from research.typing import UserError

BEFORE, TOTAL = 26.0, 1000


def unit(loss, seed, rate=1e-3, count=10, **bindings):
  return {
    "unit": f"{bindings}{rate}{seed}",
    **bindings,
    "LEARNING_RATE": rate,
    "SEED": seed,
    "status": "done",
    "perplexity_before": BEFORE,
    "perplexity_after": math.exp(loss),
    "trainable_parameters": count,
    "total_parameters": TOTAL,
  }


FULL = [unit(loss, s, 1e-4, TOTAL) for s, loss in enumerate((3.0, 3.1, 2.9))]


def written(folder, rows):
  tables.write_csv(folder / "results.csv", rows)
  return folder


def run(folder):
  lora_gap.FLAGS.unparse_flags()
  lora_gap.FLAGS(["lora_gap", f"--sweep={folder}"])
  return lora_gap.main([])


def test_gaps_are_paired_by_seed_at_the_best_rate(tmp_path):
  # The losses differ by 0.1 between seeds, the gaps by nothing.
  low = [
    unit(loss + 0.05, s, 3e-3, RANK=8) for s, loss in enumerate((3.0, 3.1, 2.9))
  ]
  worse = [unit(4.0, s, 1e-2, RANK=8) for s in range(3)]
  other = [
    unit(3.2 + 0.01 * s, s, 3e-3, 30, METHOD="@dora.DoRA()", RANK=8)
    for s in range(3)
  ]
  rows = [*worse, *other, *low, *FULL, unit(0.1, 0) | {"status": "failed"}]
  found = run(written(tmp_path, rows))
  full, lora, dora = found["arms"]
  assert [x["arm"] for x in found["arms"]] == ["full", "LoRA r=8", "DoRA r=8"]
  assert (lora["rate"], lora["seeds"], lora["trained %"]) == (3e-3, 3, 1.0)
  assert lora["above full"] == pytest.approx(0.05)
  assert lora["±"] == pytest.approx(0, abs=1e-9)
  gain = math.log(BEFORE) - 3.0
  assert lora["closed %"] == pytest.approx(100 * (1 - 0.05 / gain))
  assert full["above full"] is None and full["closed %"] == 100
  # Gaps of 0.2, 0.11 and 0.32: 4.303 times the deviation over root three.
  assert dora["above full"] == pytest.approx(0.21)
  assert dora["±"] == pytest.approx(4.303 * 0.105357 / 3**0.5, rel=1e-4)
  assert (tmp_path / "gap.png").stat().st_size > 5000


@pytest.mark.parametrize(
  "rows, said",
  [
    ([], "no unit is done"),
    ([unit(3.0, 0, RANK=8)], "no unit trains all 1000 parameters"),
    ([unit(3.0, 7, RANK=8), *FULL], "LoRA r=8 has seeds 7, full training"),
    ([{"status": "done", "SEED": 0}], "no column LEARNING_RATE, perplexity"),
  ],
)
def test_results_that_say_nothing(tmp_path, rows, said):
  written(tmp_path, rows or [unit(3.0, 0) | {"status": "missing"}])
  with pytest.raises(UserError, match=said):
    run(tmp_path)


def test_no_sweep(tmp_path):
  with pytest.raises(UserError, match="results.csv: cannot be read"):
    run(tmp_path)
  lora_gap.FLAGS.unparse_flags()
  lora_gap.FLAGS(["lora_gap"])
  with pytest.raises((UserError, cli.flags.Error), match="sweep"):
    lora_gap.main([])
