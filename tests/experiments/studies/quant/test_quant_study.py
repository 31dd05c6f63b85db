"""The table of formats: rows of a tiny model, lines, pictures."""

import dataclasses

import pytest

from experiments.core import config, from_scratch
from experiments.studies import protocol
from experiments.studies.quant import bands, pictures, quant_rows, quant_study
from research.nn import presets
from research.quant.algorithms.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.typing import UserError
from tests.support_letters import Letters, Text

RUNS = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("runs/quant/claims_*.gin")
  if "equal_bits" in p.name
)


SIZES = presets.Sizes(
  vocab=64, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, hidden=32
)
TABLE = quant_study.Table(
  model=from_scratch.FromScratch(sizes=SIZES, tokenizer=Letters()),
  rows=(
    quant_rows.rounding(bits=(4, 3), blocks=(16,), symmetric=(False,)),
    (
      quant_rows.row(Affine(bits=8, block=16), name="eight"),
      quant_rows.row(Affine(bits=8, block=48), name="does not fit"),
    ),
  ),
  text=Calibration(source=Text(1, 600), windows=6, length=64),
)


@pytest.fixture(scope="module", name="rows")
def _rows(tmp_path_factory):
  shared = TABLE.prepare(tmp_path_factory.mktemp("table"))
  return {arm: TABLE.run(arm, {}, shared) for arm in TABLE.arms}


@pytest.mark.parametrize("run", RUNS)
def test_awq_reads_fewer_windows_than_gptq(run):
  """Scopes apply from the left: `b/` alone says nothing of `a/b/`."""
  read = config.read(run, root=protocol.Run).experiment.study
  for kind, windows in (("AWQ", 4), ("GPTQ", 24), ("imatrix", 24)):
    rows = [row for row in read.flat if row.name.startswith(f"{kind} ")]
    assert rows
    assert {row.calibrated_on for row in rows} == {512 * windows}


@pytest.mark.slow
def test_more_bits_lose_less(rows):
  found = rows
  three, four, eight = (
    found[name] for name in ("int3-asym-g16", "int4-asym-g16", "eight")
  )
  # A code, a float16 scale for each 16, and a zero in half a byte or one.
  assert three["bits_per_weight"] == 3 + 1 + 0.25
  assert four["bits_per_weight"] == 4 + 1 + 0.25
  assert eight["bits_per_weight"] == 8 + 1 + 0.5
  assert three["kl"] > 2 * four["kl"] > 4 * eight["kl"] > 0
  for name in ("output_error", "weight_error"):
    assert three[name] > 1.8 * four[name] > 10 * eight[name]
  assert four["tokens"] == 6 * 63
  assert set(four["matrices"]) == {
    f"layers/0/{name}"
    for name in (
      *(f"attention/{n}" for n in "qkvo"),
      *(f"mlp/{n}" for n in ("gate", "up", "down")),
    )
  }


@pytest.mark.slow
def test_what_does_not_fit_is_a_row_that_says_so(rows):
  assert "no multiple" in rows["does not fit"]["failed"]
  assert "does not fit" not in [x["row"] for x in TABLE.table(rows)]


def test_settings_are_a_row_s_own():
  fewer = dataclasses.replace(TABLE, rows=TABLE.rows[:1], rules=(str,))
  for arm in fewer.arms:
    assert fewer.settings(arm) == TABLE.settings(arm)
  other = dataclasses.replace(TABLE, text=Calibration(windows=2))
  assert other.settings("eight") != TABLE.settings("eight")
  assert len({TABLE.settings(arm) for arm in TABLE.arms}) == len(TABLE.arms)


@pytest.mark.slow
def test_the_table_has_the_base_and_bands(rows):
  lines = TABLE.table(rows)
  assert [x["row"] for x in lines][:2] == ["base", "eight"]
  bits = [x["bits"] for x in lines[1:]]
  assert bits == sorted(bits, reverse=True)
  assert {x["row"]: x.get("band") for x in lines} == {
    "base": None,
    "eight": None,
    "int4-asym-g16": None,
    "int3-asym-g16": "4.25-4.5",
  }
  assert bands.band(3.5) == (3.25, 3.5) and not bands.band(None)


def test_the_front_is_what_nothing_beats():
  rows = [
    {"bits_per_weight": b, "kl": k}
    for b, k in ((4, 1.0), (4, 0.5), (5, 0.6), (6, 0.1), (3, 2.0))
  ]
  front = pictures.front(rows)
  assert [(r["bits_per_weight"], r["kl"]) for r in front] == [
    (3, 2.0),
    (4, 0.5),
    (6, 0.1),
  ]


@pytest.mark.slow
def test_a_picture_and_a_summary(rows, tmp_path):
  TABLE.plot(rows, tmp_path, "tiny")
  assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  assert TABLE.summary(rows["eight"]).startswith("9.500 bits, perplexity ")


def test_names_are_rows_of_their_own():
  with pytest.raises(UserError, match="two are called 'int4-asym-g16'"):
    dataclasses.replace(TABLE, rows=TABLE.rows[:1] * 2)
