"""Reports: numbers against what was written, and what is refused."""

import json

import pytest

from experiments import report, sweep, sweeps
from experiments.core import cli, config, tables
from experiments.sweeps import compare
from research.training.reports import goodput, plot_runs
from research.typing import UserError


def write(folder, rate=1e-3, steps=40, *, totals=True, finished=True):
  """Leaves what a run does: a second a step, 100 tokens each."""
  folder.mkdir(parents=True)
  records = []
  for step in range(1, steps + 1):
    records.append(
      {
        "step": step,
        "train/loss": 5.0 - step / 20,
        "train/tokens": 100.0,
        "train/seconds": 1.0,
        "train/learning_rate": rate,
      }
    )
    if step % 20 == 0:
      records.append({"step": step, "validation/loss": 5.5 - step / 20})
      seconds = {f"goodput/{b}": 0.0 for b in goodput.BUCKETS}
      seconds |= {"goodput/step": 1.0 * step, "goodput/lost": 10.0}
      more = {"goodput/fraction": step / (step + 10), "goodput/lives": 2}
      records += [{"step": step, **seconds, **more}] * totals
  records[7]["train/slow_step"] = 1
  lines = "".join(json.dumps(r) + "\n" for r in records)
  (folder / "metrics.jsonl").write_text(lines)
  bindings = [f"LEARNING_RATE={rate}", f"STEPS={steps}"]
  text = config.read("runs/quickstart.gin", bindings).text
  (folder / "config.gin").write_text(text)
  result = {
    "perplexity_after": 12.5,
    "trainable_parameters": 1234567,
    "peak_memory_bytes": 2**31,
    "seconds": 60.0,
    "seconds_by_part": {"train": 45.0, "compile": 5.0},
  }
  if finished:
    (folder / "result.json").write_text(json.dumps(result))
  return folder


@pytest.fixture
def command(capsys):
  def call(*arguments):
    status = cli.call(report.main, ["report", *map(str, arguments)])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if lines and not status else None
    return status, result, out

  return call


def test_two_runs_side_by_side(command, tmp_path):
  a, b = write(tmp_path / "a"), write(tmp_path / "b", 3e-3, 80)
  status, result, out = command(f"--workdir={a},{b}", f"--out={tmp_path}/new")
  assert status == 0, out.err
  first, second = result["runs"]
  assert first == {
    "run": "a",
    "steps": 40,
    "train loss": pytest.approx(5 - 38.5 / 20),  # the mean of the last four
    "validation loss": 3.5,
    "held-out perplexity": 12.5,
    "tokens/s": 100,
    "goodput": 0.8,
    "slow steps": 1,
    "lives": 2,
    "minutes": pytest.approx(50 / 60),
    "trainable": 1234567,
    "peak GiB": 2,
  }
  assert second["steps"] == 80 and second["goodput"] == pytest.approx(80 / 90)
  assert result["differences"] == {
    "LEARNING_RATE": {"a": "0.001", "b": "0.003"},
    "STEPS": {"a": "40", "b": "80"},
  }
  picture = (tmp_path / "new" / "report.png").read_bytes()
  assert picture.startswith(b"\x89PNG\r\n\x1a\n")
  assert int.from_bytes(picture[16:20], "big") >= 1200  # pixels
  assert "LEARNING_RATE  0.001  0.003" in out.out
  assert "1,234,567" in out.out


def test_unfinished_runs_work(command, tmp_path):
  """Before the first totals there is no time by parts."""
  short = write(tmp_path / "short", totals=False)
  torn = write(tmp_path / "torn", totals=False, finished=False)
  (torn / "config.gin").unlink()
  status, result, _ = command(f"--workdir={short},{torn}")
  assert status == 0
  first, second = result["runs"]
  assert first["goodput"] is None and first["minutes"] is None
  assert second["minutes"] is None and second["peak GiB"] is None
  assert result["differences"] == {}
  assert (short / "report.png").exists()


def test_a_sweep_stands_for_its_units(command, tmp_path):
  for i in range(9):
    write(tmp_path / "units" / f"R={i}", rate=1e-3 * (1 + i))
  status, result, out = command(f"--workdir={tmp_path}")
  assert status == 0
  assert [r["run"] for r in result["runs"]] == [f"R={i}" for i in range(9)]
  # One binding and nine runs: a line a run.
  assert "R=8  0.009" in out.out


def test_so_does_a_sweep_of_runs_of_stages(tmp_path):
  for unit in ("R=1", "R=8"):
    folder = tmp_path / "units" / unit
    write(folder / "tune"), write(folder / "align")
    (folder / "stages.json").write_text('{"stages": ["tune", "align", "end"]}')
    (tmp_path / "units" / f"{unit}.gin").write_text("")
  names = [run.name for run in compare.load([str(tmp_path)])]
  parts = [name.split("/")[-2:] for name in names]
  assert parts == [[u, s] for u in ("R=1", "R=8") for s in ("tune", "align")]


def test_a_run_without_losses_is_drawn_too(tmp_path):
  curves = plot_runs.Curves(name="x", records=[], seconds={}, fraction=None)
  plot_runs.compare([curves], tmp_path / "x.png")
  assert (tmp_path / "x.png").exists()


def test_long_values_are_read_whole():
  """As gin writes them, over several lines; against gin's own reading."""
  value = {f"key{i}": list(range(9)) for i in range(6)}
  text = config.parse(
    "from __gin__ import dynamic_registration\n"
    "from experiments import sweeps\n"
    "sweeps.Sweep.config = 'x'\n"
    f"sweeps.Sweep.over = {value!r}\n",
    root=sweeps.Sweep,
  ).text
  assert "sweeps.Sweep.over = \\" in text
  found = compare.bindings(text)
  assert json.loads(found["sweeps.Sweep.over"].replace("'", '"')) == value
  assert found["sweeps.Sweep.config"] == "'x'"


def test_what_is_no_run_is_refused(command, tmp_path):
  a = write(tmp_path / "a")
  (tmp_path / "bad").mkdir()
  for arguments, message in [
    ([], "--workdir: is missing"),
    ([f"--workdir={tmp_path}/none"], "no metrics.jsonl"),
    ([f"--workdir={a},{a}"], "is given twice"),
    ([f"--workdir={a},gs://b/c"], "expected a local one"),
    (
      [f"--workdir={a}", f"--out={a}/result.json/x"],
      "is a file, expected a directory",
    ),
  ]:
    status, _, out = command(*arguments)
    assert status == 1 and message in out.err
    assert len(out.err.strip().splitlines()) <= 3
  (a / "result.json").write_text("{")
  with pytest.raises(UserError, match="is no JSON"):
    compare.load([str(a)])


def test_runs_of_one_name_are_told_apart(tmp_path):
  paths = [write(tmp_path / part / "run") for part in "xy"]
  names = [run.name for run in compare.load([str(p) for p in paths])]
  assert [name[-5:] for name in names] == ["x/run", "y/run"]


@pytest.mark.parametrize("module", [report, sweep])
def test_help_names_every_flag(module):
  text = cli.describe(module.main)
  for name in module.FLAGS:
    assert f"--{name}" in text or f"--[no]{name}" in text


def test_tables():
  rows = [
    {"name": "a", "n": 1234567, "x": 0.123456, "none": None},
    {"name": "long", "x": 12.0, "more": "text"},
  ]
  text = tables.text(tables.without_empty(rows)).splitlines()
  assert text == [
    "name          n       x  more",
    "----  ---------  ------  ----",
    "a     1,234,567  0.1235  -",
    "long          -      12  text",
  ]
  assert tables.cell(float("nan")) == "nan"
  assert tables.cell(True) == "True"
