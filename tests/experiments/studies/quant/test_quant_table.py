"""The table of formats: the command on a tiny model, lines, pictures."""

import dataclasses
import json

import pytest

from experiments.core import cli, config, from_scratch
from experiments.notebooks import quant_pictures
from experiments.studies.quant import quant_rows, quant_study, quant_table
from research.nn import presets
from research.quant.algorithms.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.typing import UserError
from tests.support_letters import Letters, Text

RUNS = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("runs/quant/claims_*.gin")
  if "quant_study" in p.read_text("utf-8")
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
  folder = tmp_path_factory.mktemp("table")
  return folder, quant_study.measured(TABLE, folder)


@pytest.mark.parametrize("run", RUNS)
def test_every_table_parses_and_its_text_rebuilds_it(run):
  first = config.read(run, root=quant_study.Table)
  again = config.parse(first.text, root=quant_study.Table)
  assert again.text == first.text
  assert [r.name for r in again.experiment.flat] == [
    r.name for r in first.experiment.flat
  ]


@pytest.mark.parametrize("run", [r for r in RUNS if "equal_bits" in r])
def test_awq_reads_fewer_windows_than_gptq(run):
  """Scopes apply from the left: `b/` alone says nothing of `a/b/`."""
  read = config.read(run, root=quant_study.Table).experiment
  for kind, windows in (("AWQ", 4), ("GPTQ", 24), ("imatrix", 24)):
    rows = [row for row in read.flat if row.name.startswith(f"{kind} ")]
    assert rows
    assert {row.calibrated_on for row in rows} == {512 * windows}


def test_more_bits_lose_less(rows):
  _, found = rows
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


def test_what_does_not_fit_is_a_row_that_says_so(rows):
  _, found = rows
  assert "no multiple" in found["does not fit"]["failed"]
  assert "does not fit" not in [x["row"] for x in quant_study.table(found)]


def test_rows_are_measured_once(rows, monkeypatch):
  folder, found = rows
  good = dataclasses.replace(TABLE, rows=TABLE.rows[:1])
  monkeypatch.setattr(
    quant_study, "one", lambda *x: pytest.fail("measured again")
  )
  again = quant_study.measured(good, folder)
  assert again == {name: found[name] for name in again} and len(again) == 2
  other = dataclasses.replace(good, text=Calibration(windows=2))
  with pytest.raises(UserError, match="another configuration"):
    quant_study.measured(other, folder)


def test_what_tells_rows_apart_is_no_address():
  row = quant_study.Row(name="a", transforms=(quant_study.band,))
  key = quant_study._key(TABLE, row)
  assert key["made"] == "(<function band>,)" and "0x" not in f"{key}"


def test_the_table_has_the_base_and_bands(rows):
  _, found = rows
  lines = quant_study.table(found)
  assert [x["row"] for x in lines][:2] == ["base", "eight"]
  bits = [x["bits"] for x in lines[1:]]
  assert bits == sorted(bits, reverse=True)
  assert {x["row"]: x.get("band") for x in lines} == {
    "base": None,
    "eight": None,
    "int4-asym-g16": None,
    "int3-asym-g16": "4.25-4.5",
  }
  assert quant_study.band(3.5) == (3.25, 3.5) and not quant_study.band(None)


def test_the_front_is_what_nothing_beats():
  rows = [
    {"bits_per_weight": b, "kl": k}
    for b, k in ((4, 1.0), (4, 0.5), (5, 0.6), (6, 0.1), (3, 2.0))
  ]
  front = quant_pictures.front(rows)
  assert [(r["bits_per_weight"], r["kl"]) for r in front] == [
    (3, 2.0),
    (4, 0.5),
    (6, 0.1),
  ]


def test_the_command_leaves_what_it_says(rows, tmp_path, capsys, monkeypatch):
  read = config.Read(TABLE, "")
  monkeypatch.setattr(config, "read", lambda *x, **y: read)
  folder, _ = rows
  for path in (folder / "rows").iterdir():
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / path.name).write_text(path.read_text())
  argv = ["quant_table", "--config=x.gin", f"--workdir={tmp_path}"]
  assert cli.call(quant_table.main, [*argv, "--only=int|eight"]) == 0
  out = capsys.readouterr().out
  result = json.loads(out.splitlines()[-1])
  assert result == json.loads((tmp_path / "result.json").read_text())
  assert result["tokens"] == 6 * 63 and len(result["rows"]) == 4
  assert (tmp_path / "pareto.png").read_bytes()[:4] == b"\x89PNG"
  assert (tmp_path / "table.csv").read_text().count("\n") == 5
  assert cli.call(quant_table.main, [*argv, "--only=none such"]) == 1
  assert "finds no row" in capsys.readouterr().err


def test_names_are_rows_of_their_own():
  with pytest.raises(UserError, match="two are called 'int4-asym-g16'"):
    dataclasses.replace(TABLE, rows=TABLE.rows[:1] * 2)
