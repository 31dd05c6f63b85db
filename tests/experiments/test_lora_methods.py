"""The list of methods, and that a new one is a file, a config and a row."""

import json
import pathlib
import re

import pytest

from experiments import lora_methods
from research.typing import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

# (in, out, matrices of that size in a layer) of SmolLM2-135M.
SIZES = ((576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1))


@pytest.fixture(scope="module", name="rows")
def _rows():
  return {row["method"]: row for row in lora_methods.rows()}


def test_counts_are_those_of_the_papers(rows):
  def count(f):
    return 30 * sum(n * f(i, o) for i, o, n in SIZES)

  assert rows["LoRA"]["trained"] == count(lambda i, o: 8 * (i + o))
  assert rows["VeRA"]["trained"] == count(lambda i, o: 256 + o)
  assert rows["HiRA"]["trained"] == count(lambda i, o: 32 * (i + o))
  assert rows["FourierFT"]["trained"] == 30 * 7 * 1000
  # Inputs of `down`, outputs of all others.
  assert rows["IA3"]["trained"] == count(lambda i, o: 1536 if i == 1536 else o)


def test_the_readme_has_them_all(rows):
  text = (ROOT / "research" / "lora" / "README.md").read_text("utf-8")
  lines = re.findall(
    r"^\| (\w+) \| (\w+\.py) \| \d+ \| ([\d,]+) \|", text, re.M
  )
  stated = {name: (file, int(n.replace(",", ""))) for name, file, n in lines}
  made = {n: (r["file"], r["trained"]) for n, r in rows.items()}
  assert stated == made, "python -m experiments.lora_methods prints the table"


def test_speeds_come_from_the_bench(tmp_path):
  def row(name, rate):
    return {
      "row": f"method_{name}",
      "ratio": rate / 50,
      "ours_tokens_per_s": rate,
      "ours_peak_rss_bytes": 1,
      "torch_peak_rss_bytes": 2,
    }

  file = tmp_path / "bench.log"
  found = {"rows": [], "methods": [row("lora", 100), row("hira", 80)]}
  file.write_text("a line\n" + json.dumps(found) + "\n")
  speeds = lora_methods._speeds(str(file))
  assert speeds["hira"] == {
    "times PEFT": 1.6,
    "step / LoRA's": 1.25,
    "memory / PEFT's": 0.5,
  }
  made = {row["method"]: row for row in lora_methods.rows(speeds)}
  assert made["HiRA"]["times PEFT"] == 1.6
  assert made["LoHa"]["times PEFT"] is None
  assert made["HiRA"]["swept score"] is None
  file.write_text(json.dumps(found | {"methods": [row("hira", 80)]}))
  with pytest.raises(UserError, match="no row method_lora"):
    lora_methods._speeds(str(file))


def test_scores_come_from_the_table_of_claims(tmp_path):
  found = lora_methods._scores(lora_methods.README)
  made = {row["method"]: row for row in lora_methods.rows({}, found)}
  for name in ("LoRA", "HiRA", "LoRAFA", "LoRAGA", "OFT"):
    assert re.fullmatch(r"\d\.\d+ ± \d\.\d+", made[name]["swept score"]), name
  # Each is a method, a form of one or an optimizer, or full training.
  others = {"full", "riemannian", "rslora", "milora", "lorapro", "lora+"}
  assert set(found) - {name.lower() for name in made} == others
  file = tmp_path / "printed.md"
  file.write_text(
    "| method | held out | against LoRA |\n|--|--|--|\n| LoRA-FA | 2 | 3 |\n\n"
  )
  want = {"swept score": "2", "against LoRA": "3"}
  assert lora_methods._scores(file) == {"lorafa": want}
  file.write_text("| method | trained |\n")
  with pytest.raises(UserError, match="no table with columns"):
    lora_methods._scores(file)


def test_a_method_is_one_file(rows):
  """HiRA, the example of the README: no other module knows of it."""
  file = ROOT / "research" / "lora" / "methods" / "hira.py"
  assert rows["HiRA"]["lines"] <= 60
  imports = re.compile(r"import .*\bhira\b|methods\.hira|\bHiRA\(", re.I)
  others = [
    path.relative_to(ROOT).as_posix()
    for folder in ("research", "kernels_pallas")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != file and imports.search(path.read_text("utf-8"))
  ]
  assert not others
  assert list((ROOT / "configs" / "runs" / "lora").glob("hira*.gin"))
  laws = ROOT / "tests" / "research" / "lora" / "test_methods.py"
  assert re.search(r"^  HiRA\(", laws.read_text("utf-8"), re.M)
