"""The list of methods, and that a new one is a file, a config and a row."""

import dataclasses
import functools
import inspect
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import config
from experiments.notebooks import lora_story
from experiments.studies import results
from research import tree, weights
from research.interop.peft import config as peft_config
from research.lora.adapt import init_adapters
from research.lora.adapted import AdaptedTensor
from research.lora.method import Method
from research.lora.methods import all_methods, qalora
from research.lora.methods.lora import LoRA
from research.quant import quantize
from research.quant.formats import ggml
from research.typing import UserError

SIDE = 128
"""Of the matrix; methods' default blocks and groups divide it."""

PATH = "layers/0/x"

NAMES = ("PEFT's files", "packed base", "merges")
"""Columns."""


@functools.cache
def columns(method: Method) -> dict[str, str]:
  """Returns whose files it reads and writes, and what it stands on.

  PEFT's files are both read and written; written, as plain LoRA, which is what
  comes back; or neither. A method merges into an array, or also into a base
  that stays packed as it is, by its offsets; or not at all.

  Args:
    method: with all that it needs.
  """
  whole = np.random.default_rng(0).standard_normal((SIDE, SIDE))
  base = jnp.asarray(whole, jnp.float32)
  merges = "yes" if _works(_dense, method, base) else "no"
  if isinstance(method, qalora.QALoRA):
    four = quantize.Quantize(format=ggml.GGML(kind="Q4_1")).pack(base)
    whole_blocks = dataclasses.replace(method, group=four.format.block)
    if _works(_offsets, whole_blocks, four):
      merges = "yes, packed too"
  packed = quantize.Quantize().pack(base)  # NF4
  return dict(
    zip(
      NAMES,
      (
        _files(method),
        "yes" if _works(_product, method, packed) else "no",
        merges,
      ),
      strict=True,
    )
  )


def _files(method: Method) -> str:
  if method.PEFT is not None:
    return "both"
  plain = type(method).exported is not Method.exported
  return "written" if plain else "-"


def _works(use: Callable[[Any], Any], method: Method, base: Any) -> bool:
  """Returns whether `use` of a fresh adapter on `base` is no error."""

  def tried(w):
    lifted = jax.tree.map(lambda x: x[None], w)
    # As many numbers as a look measures; they need not mean anything.
    seen = {PATH: jnp.eye(SIDE)}
    trained, fixed = init_adapters(
      jax.random.key(0), [PATH], method, lifted, seen
    )
    arrays = jax.tree.map(lambda x: x[0], (trained, fixed))
    return use(AdaptedTensor(w, *arrays, method=method))

  try:
    jax.eval_shape(tried, base)
  except UserError:
    return False
  return True


def _dense(leaf: AdaptedTensor) -> Any:
  return leaf.dense()


def _offsets(leaf: AdaptedTensor) -> Any:
  return qalora.merged_offsets(leaf)


def _product(leaf: AdaptedTensor) -> Any:
  """Returns the gradient by what is trained of a sum of products."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  x = jnp.ones((1, 2, SIDE))

  def total(trained):
    moved = AdaptedTensor(leaf.w, trained, leaf.fixed, method=leaf.method)
    bound = weights.with_tokens(moved, tokens)
    return weights.einsum("btd,df->btf", x, bound).sum()

  return jax.grad(total)(leaf.trained)


ROOT = pathlib.Path(__file__).resolve().parents[3]
README = ROOT / "research" / "lora" / "README.md"

STATIC = ("method", "file", "trained", "share %", "PEFT", *NAMES)
"""Columns that the code says alone."""

# (in, out, matrices of that size in a layer) of SmolLM2-135M.
SIZES = ((576, 576, 2), (576, 192, 2), (576, 1536, 2), (1536, 576, 1))


@pytest.fixture(scope="module", name="rows")
def _rows():
  found = {}
  for row in lora_story.methods():
    kind = all_methods()[row["method"]]
    method = kind(**lora_story.OPTIONS.get(row["method"], {}))
    file = pathlib.Path(inspect.getfile(kind))
    lines = len(file.read_text("utf-8").splitlines())
    own = dict(row, file=file.name, lines=lines)
    found[row["method"]] = own | columns(method)
  return found


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
  found = columns(Picky())
  assert (found["packed base"], found["merges"]) == ("no", "no")
  found = columns(LoRA())
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
  "name", sorted(set(all_methods()) - set(lora_story.ABSTRACT))
)
def test_one_run_file_takes_any_method(name):
  kind = all_methods()[name]
  module = kind.__module__.rpartition(".")[2]
  lines = [f"METHOD=@{module}.{name}()", *NEEDED.get(name, ())]
  run = config.read("runs/lora/any_smollm2.gin", lines)
  (transform,) = run.experiment.transforms
  assert type(transform.method) is kind
  looks = name in lora_story.MEASURED
  assert (transform.init_stats is not None) == looks
  if not looks:  # data would have to be read
    made = jax.eval_shape(
      transform, lora_story.smollm2_shapes(), jax.random.key(0)
    )
    counted = tree.count(tree.partition(made, run.experiment.trainable)[0])
    options = lora_story.OPTIONS.get(name, {})
    assert counted == lora_story.trained(
      name, kind(**options), lora_story.smollm2_shapes()
    )
  again = config.parse(run.text).experiment
  assert again.transforms[0].method == transform.method
  readme = README.read_text("utf-8")
  assert all(line in readme for line in NEEDED.get(name, ()))


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
