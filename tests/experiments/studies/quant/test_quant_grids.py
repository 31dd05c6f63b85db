"""GPTQ by when its grids are fitted: rows of a tiny model, and verdicts."""

import pytest

from experiments.core import from_scratch
from experiments.studies.quant import quant_grids, quant_study
from research.nn import presets
from research.quant.algorithms.calibrate import Calibration
from research.quant.formats.affine import Affine
from tests.support_letters import Letters, Text

SIZES = presets.Sizes(
  vocab=64, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, hidden=256
)


def holds(verdicts):
  return [v.holds for v in verdicts]


def test_grids_are_compared_layer_by_layer():
  def row(group, errors):
    matrices = {
      f"layers/{i}/mlp/{name}": {"output_all": error}
      for i, pair in enumerate(errors)
      for name, error in zip(("up", "down"), pair, strict=True)
    }
    return dict(group=group, bits_per_weight=3.6, matrices=matrices)

  rows = [
    row("nearest", [(0.2, 0.4), (0.2, 0.4), (0.2, 0.4)]),
    row("fresh", [(0.1, 0.2), (0.1, 0.2), (0.1, 0.2)]),
    row("stale", [(0.2, 0.1), (0.11, 0.22), (0.1, 0.2)]),
    row("static", [(0.12, 0.24), (0.12, 0.24), (0.13, 0.26)]),
  ]
  rows = {row["group"]: row for row in rows}
  found = quant_grids.fitted(rows)
  assert holds(found) == [True, None, True]
  # A quarter everywhere; then 1, 1.21 and 1: geometric means of two matrices.
  assert "0.250 ± 0.000" in found[0].found
  assert "1.070 ± 0.301" in found[1].found
  assert "6 of 6" in found[0].found and "3 of 6" in found[1].found
  del rows["nearest"], rows["stale"]
  assert holds(quant_grids.fitted(rows)) == [True]


@pytest.mark.slow
def test_rows_of_a_tiny_model(tmp_path):
  text = Calibration(source=Text(1, 1200), windows=8, length=64)
  table = quant_study.Table(
    model=from_scratch.FromScratch(sizes=SIZES, tokenizer=Letters()),
    rows=(quant_grids.rows(text, Affine(bits=3, block=16)),),
    text=text,
  )
  shared = table.prepare(tmp_path)
  found = {arm: table.run(arm, {}, shared) for arm in table.arms}
  assert [r["group"] for r in found.values()] == [
    "nearest",
    "fresh",
    "stale",
    "static",
  ]
  assert {r["calibrated_on"] for r in found.values()} == {None, 512}
  errors = {
    r["group"]: r["matrices"]["layers/0/mlp/down"]["output_all"]
    for r in found.values()
  }
  # RoundToNearest uses no inputs; 256 inputs are two blocks of
  # `gptq.MAX_BLOCK`.
  assert errors["nearest"] > max(errors[w] for w in ("fresh", "stale"))
  assert len(set(errors.values())) == 4
