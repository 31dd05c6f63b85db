"""Gaps to full training, from results whose gaps are known."""

import math

import pytest

from experiments.core import cli, tables
from experiments.studies.lora import lora_gap
from research.typing import UserError

BEFORE, TOTAL = 26.0, 1000


def unit(loss, seed, rate=1e-3, count=10, chosen=None, **bindings):
  return {
    "unit": f"{bindings}{rate}{seed}",
    **bindings,
    "LEARNING_RATE": rate,
    "SEED": seed,
    "status": "done",
    "perplexity_before": BEFORE,
    "perplexity_after": math.exp(loss),
    "validation/loss": loss if chosen is None else chosen,
    "trainable_parameters": count,
    "total_parameters": TOTAL + (count if count < TOTAL else 0),
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
  # Of 1,000 numbers, the adapter's own 10 not counted.
  assert (lora["seeds"], lora["trained %"]) == (3, 1.0)
  # Two rates were tried, and beyond the better one none.
  assert (lora["rate"], full["rate"]) == ("0.003*", "0.0001")
  assert lora["above full"] == pytest.approx(0.05)
  assert lora["±"] == pytest.approx(0, abs=1e-9)
  gain = math.log(BEFORE) - 3.0
  assert lora["closed %"] == pytest.approx(100 * (1 - 0.05 / gain))
  assert full["above full"] is None and full["closed %"] == 100
  # Gaps of 0.2, 0.11 and 0.32: 4.303 times the deviation over root three.
  assert dora["above full"] == pytest.approx(0.21)
  assert dora["±"] == pytest.approx(4.303 * 0.105357 / 3**0.5, rel=1e-4)
  assert dora["± %"] == pytest.approx(100 * dora["±"] / gain)
  (pair,) = found["apart"]
  assert (pair["arm"], pair["from"]) == ("DoRA r=8", "LoRA r=8")
  assert pair["nats"] == pytest.approx(0.16)
  assert not pair["told apart"] and pair["±"] == pytest.approx(dora["±"])
  assert (tmp_path / "gap.png").stat().st_size > 5000


def test_the_rate_is_chosen_on_other_documents(tmp_path):
  """The grid's middle is best there, its edge where perplexity is told."""
  rates = {1e-3: (3.3, 2.0), 3e-3: (3.2, 1.0), 1e-2: (3.1, 3.0)}
  low = [
    unit(loss, s, rate, chosen=chosen, RANK=8)
    for rate, (loss, chosen) in rates.items()
    for s in range(3)
  ]
  _, lora = run(written(tmp_path, [*low, *FULL]))["arms"]
  assert lora["rate"] == "0.003" and lora["above full"] == pytest.approx(0.2)


def test_ranks_are_told_apart_where_seeds_agree(tmp_path):
  """Rank 1 is 0.1 above rank 64 with each seed, rank 8 with one of three."""

  def arm(rank, *losses):
    return [unit(x, s, count=rank, RANK=rank) for s, x in enumerate(losses)]

  low, high = arm(1, 3.2, 3.3, 3.1), arm(64, 3.1, 3.2, 3.0)
  found = run(written(tmp_path, [*low, *high, *FULL]))["apart"]
  assert [(x["arm"], x["from"]) for x in found] == [("LoRA r=1", "LoRA r=64")]
  assert found[0]["told apart"] and found[0]["nats"] == pytest.approx(0.1)
  between = arm(8, 3.4, 3.2, 3.0)
  found = run(written(tmp_path, [*high, *between, *low, *FULL]))["apart"]
  assert [x["from"] for x in found] == ["LoRA r=8", "LoRA r=64"]
  assert not any(x["told apart"] for x in found)


@pytest.mark.parametrize(
  "rows, said",
  [
    ([], "no unit is done"),
    ([unit(3.0, 0, RANK=8)], "no unit trains all 1010 parameters"),
    ([unit(3.0, 7, RANK=8), *FULL], "LoRA r=8 has seeds 7, full training"),
    (
      [unit(3.0, 0, RANK=8), unit(3.0, 2, RANK=64), *FULL],
      "LoRA r=8 has seeds 0, LoRA r=64 2, expected one in common",
    ),
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
