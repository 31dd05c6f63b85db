"""The list of methods, and that a new one is a file, a config and a row."""

import dataclasses
import json
import pathlib
import re

import jax
import pytest

from experiments.core import config
from experiments.studies import results
from experiments.studies.lora import lora_abilities, lora_methods
from research import tree
from research.interop.peft import config as peft_config
from research.lora.methods import all_methods
from research.lora.methods.lora import LoRA
from research.typing import UserError

ROOT = pathlib.Path(__file__).resolve().parents[4]
README = ROOT / "research" / "lora" / "README.md"

STATIC = ("method", "file", "trained", "share %", "PEFT", *lora_abilities.NAMES)
"""Columns that the code says alone."""

# (in, out, matrices of that size in a layer) of SmolLM2-135M.
SIZES = ((576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1))


@pytest.fixture(scope="module", name="rows")
def _rows():
  return {row["method"]: row for row in lora_methods.rows()}


@pytest.mark.slow
def test_counts_are_those_of_the_papers(rows):
  def count(f):
    return 30 * sum(n * f(i, o) for i, o, n in SIZES)

  assert rows["LoRA"]["trained"] == count(lambda i, o: 8 * (i + o))
  assert rows["VeRA"]["trained"] == count(lambda i, o: 256 + o)
  assert rows["HiRA"]["trained"] == count(lambda i, o: 32 * (i + o))
  assert rows["FourierFT"]["trained"] == 30 * 7 * 1000
  # Inputs of `down`, outputs of all others.
  assert rows["IA3"]["trained"] == count(lambda i, o: 1536 if i == 1536 else o)


def test_the_stored_table_has_them_all(rows):
  """All but what was measured, and how long files are."""
  [table] = results.load("runs/lora/methods.gin")["tables"]
  lines = [dict(zip(table["header"], x, strict=True)) for x in table["rows"]]
  assert [line["method"] for line in lines] == list(rows), "in this order"
  for line in lines:
    row = rows[line["method"]]
    for column in STATIC:
      assert line[column] == row[column], f"{line['method']}, {column}"


def test_the_readme_says_what_is_not_there():
  """Every type of PEFT's that no class has, and every field that is refused."""
  text = README.read_text("utf-8")
  text = text.partition("### Not supported")[2].partition("\n## ")[0]
  facts = json.loads(
    (ROOT / "tests" / "golden" / "peft_facts.json").read_text()
  )
  ours = {kind.PEFT for kind in all_methods().values()}
  named = set(re.findall(r"\b[A-Z][A-Z0-9_]{2,}\b", text)) - {"PEFT"}
  assert named == set(facts["types"]) - ours
  fields = set(re.findall(r"`(\w+)`", text)) - {"form"}
  assert fields == set(peft_config._OFF)


def test_what_methods_can_be_used_with(rows):
  """Files of PEFT's are the peers' tests; the rest are laws of methods."""

  def having(column, value):
    return {name for name, row in rows.items() if row[column] == value}

  assert having("merges", "no") == {"ALoRA"}
  assert having("merges", "yes, packed too") == {"QALoRA"}
  assert having("PEFT's files", "-") == {"MoRA"}
  assert having("PEFT's files", "written") >= {"PiSSA", "EVA", "LoRAFA"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picky(LoRA):
  """Stands on arrays alone, and merges into nothing."""

  def init_arrays(self, key, spec, w, stats=None):
    if not isinstance(w, jax.Array):
      raise UserError("Picky: wants an array")
    return super().init_arrays(key, spec, w, stats)

  def delta(self, p, w):
    raise UserError("Picky: has no matrix")


def test_a_method_that_refuses_is_said_to():
  found = lora_abilities.columns(Picky())
  assert (found["packed base"], found["merges"]) == ("no", "no")
  found = lora_abilities.columns(LoRA())
  assert (found["packed base"], found["merges"]) == ("yes", "yes")


NEEDED = {
  "CorDA": ["adapt.Adapt.init_stats=@init_stats.Covariances()"]
  + ["init_stats.Covariances.calibration=@init_stats.CalibrationData()"],
  "LoRAGA": ["adapt.Adapt.init_stats=@init_stats.Gradients()"]
  + ["init_stats.Gradients.calibration=@init_stats.CalibrationData()"],
  "EVA": ["adapt.Adapt.init_stats=@init_stats.InputPCA()"]
  + ["init_stats.InputPCA.calibration=@init_stats.CalibrationData()"],
  "C3A": ["c3a.C3A.block=64"],
  "ALoRA": ["alora.ALoRA.invocation=(0,)"],
  "Tokens": ["tokens.Tokens.ids=(0,)", "adapt.Adapt.targets='embed'"],
}
"""What the README says these need."""


@pytest.mark.parametrize(
  "name", sorted(set(all_methods()) - set(lora_methods.ABSTRACT))
)
def test_one_run_file_takes_any_method(name):
  kind = all_methods()[name]
  module = kind.__module__.rpartition(".")[2]
  lines = [f"METHOD=@{module}.{name}()", *NEEDED.get(name, ())]
  run = config.read("runs/lora/any_smollm2.gin", lines)
  (transform,) = run.experiment.transforms
  assert type(transform.method) is kind
  looks = name in lora_methods.MEASURED
  assert (transform.init_stats is not None) == looks
  if not looks:  # data would have to be read
    made = jax.eval_shape(transform, lora_methods._shapes(), jax.random.key(0))
    counted = tree.count(tree.partition(made, run.experiment.trainable)[0])
    options = lora_methods.OPTIONS.get(name, {})
    assert counted == lora_methods.trained(
      name, kind(**options), lora_methods._shapes()
    )
  again = config.parse(run.text).experiment
  assert again.transforms[0].method == transform.method
  readme = README.read_text("utf-8")
  assert all(line in readme for line in NEEDED.get(name, ()))


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


def test_scores_come_from_the_result_of_claims(tmp_path):
  found = lora_methods._scores(results.path_of(lora_methods.CLAIMS))
  made = {row["method"]: row for row in lora_methods.rows({}, found)}
  for name in ("LoRA", "HiRA", "LoRAFA", "LoRAGA", "OFT"):
    assert re.fullmatch(r"\d\.\d+ ± \d\.\d+", made[name]["swept score"]), name
  # Each is a method, a form of one or an optimizer, or full training.
  others = {"full", "riemannian", "rslora", "milora", "lorapro", "lora+"}
  assert set(found) - {name.lower() for name in made} == others
  file = tmp_path / "result.json"
  table = {"header": ["method", "held out", "against LoRA"]}
  table["rows"] = [["LoRA-FA", [2.0, 0.015], "+0.1"], ["LoRA", 2.5, None]]
  file.write_text(json.dumps({"tables": [table]}))
  assert lora_methods._scores(file) == {
    "lorafa": {"swept score": "2.000 ± 0.015", "against LoRA": "+0.1"},
    "lora": {"swept score": "2.5", "against LoRA": ""},
  }
  table["header"][1] = "trained"
  file.write_text(json.dumps({"tables": [table]}))
  with pytest.raises(UserError, match="no table with columns"):
    lora_methods._scores(file)
  file.write_text("| method | trained |\n")
  with pytest.raises(UserError, match="cannot be read as a result"):
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
  laws = ROOT / "tests" / "research" / "lora" / "methods" / "test_methods.py"
  assert re.search(r"^  HiRA\(", laws.read_text("utf-8"), re.M)
