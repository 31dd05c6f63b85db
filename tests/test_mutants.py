"""Defects that `make mutants` plants fit the code, and are found or missed."""

import collections
import pathlib

import pytest

from tests.mutants import defects, run
from tests.mutants.defects import ROOT, Defect, StaleDefect
from tests.mutants.reach import Reach

ROOMS = {  # folder -> file of its defects
  "kernels_pallas/masks": "masks",
  "kernels_pallas/flash_attention": "flash_attention",
  "kernels_pallas/decode_attention": "decode_attention",
  "kernels_pallas/quantized_matmul": "quantized_matmul",
  "kernels_pallas/sequence_parallel": "sequence_parallel",
  "research/io": "io",
  "research/text": "text",
  "research/nn": "nn",
  "research/generation": "generation",
  "research/data": "data",
  "research/optim": "optim",
  "research/reasoning": "reasoning",
  "research/training": "training",
  "research/quant": "quant",
  "research/lora": "lora",
  "research/diffusion": "diffusion",
  "research/vlm/scenes": "vlm_scenes",
  "research/vlm/evaluation": "vlm_evaluation",
  "research/vlm/images": "vlm_images",
  "research/vlm": "vlm",
  "research/prm": "prm",
  "research/search": "search",
  "research/interop": "interop",
  "research/planning": "planning",
  "experiments/core": "experiments_core",
  "experiments": "experiments",
}


def test_every_defect_fits_its_file():
  stale = []
  for defect in defects.load():
    try:
      defect.plant(ROOT)
    except StaleDefect as error:
      stale.append(str(error))
  assert not stale, "\n".join(stale)


def test_every_room_has_defects_of_many_kinds():
  found = defects.load()
  assert len(found) >= 64
  assert len({d.name for d in found}) == len(found)
  assert len({d.kind for d in found}) >= 12
  rooms = collections.Counter(d.room for d in found)
  assert rooms.keys() == set(ROOMS.values())
  assert min(rooms.values()) >= 4
  for defect in found:
    folder = next(x for x in ROOMS if defect.file.startswith(f"{x}/"))
    assert ROOMS[folder] == defect.room, str(defect)


def test_named_tests_reach_the_file():
  reach = Reach()
  for defect in defects.load():
    assert defect.tests, str(defect)
    assert not {*defect.tests} - {*reach.tests_of(defect.file)}, str(defect)


def _defect(**fields) -> Defect:
  given = dict(room="a", name="b", kind="c", file="research/thing.py")
  given |= dict(find="+ 1", replace="+ 2", tests=("tests/test_thing.py",))
  return Defect(**given | fields)


@pytest.mark.parametrize(
  "fields, words",
  [
    (dict(find="+ 3"), "occurs 0 times"),
    (dict(find="return"), "occurs 2 times"),
    (dict(replace="+ 1"), "expected a difference"),
    (dict(replace="+  1"), "changes no code"),
    (dict(replace="+"), "is not Python"),
    (dict(file="research/gone.py"), "no such file"),
  ],
)
def test_a_stale_defect_names_its_file(tree, fields, words):
  defect = _defect(**fields)
  with pytest.raises(StaleDefect, match=words) as found:
    defect.plant(tree)
  assert defect.file in str(found.value)


@pytest.fixture
def tree(tmp_path) -> pathlib.Path:
  """A checkout of one function, one weak test and one good one."""
  files = {
    "research/thing.py": "def one(x):\n  return x + 1\n\n\n"
    "def two(x):\n  return 2 * x\n",
    "tests/test_thing.py": "from research import thing\n\n\n"
    "def test_type():\n  assert isinstance(thing.one(1), int)\n",
    "tests/test_value.py": "from tests import helper\n\n\n"
    "def test_value():\n  assert helper.one(1) == 2\n",
    "tests/helper.py": "from research.thing import one as one\n",
    "tests/test_other.py": "def test_broken():\n  assert False\n",
  }
  for name, text in files.items():
    path = tmp_path / "source" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return tmp_path / "source"


def test_tests_are_named_without_what_they_say():
  report = """
FAILED a.py::plain - assert [1] == [2]
FAILED a.py::case[x - y] - assert [np.int32(0)] == [0, 1]
ERROR b.py::case[k]
FAILED b.py::plain
"""
  assert run.failed_tests(report) == [
    "a.py::plain",
    "a.py::case[x - y]",
    "b.py::case[k]",
    "b.py::plain",
  ]


def test_a_defect_is_missed_by_weak_tests_and_found_by_others(tree, tmp_path):
  names = [p.relative_to(tree).as_posix() for p in tree.rglob("*.py")]
  copy, defect = run.Copy(tmp_path / "copy", names, tree), _defect()
  before = (copy.root / defect.file).read_text()
  weak = run.run(copy, defect, "default", None)
  assert (weak.outcome, weak.test, weak.final) == ("missed", None, False)
  full = run.run(copy, defect, "default", Reach(tree))
  found = "tests/test_value.py::test_value"
  assert (full.outcome, full.test, full.final) == ("found", found, True)
  assert (copy.root / defect.file).read_text() == before
  assert (tree / defect.file).read_text() == before
  # What fails without a defect finds none.
  broken = "tests/test_other.py::test_broken"
  failed, whole = copy.pytest([found, broken], seconds=60)
  assert (failed, whole) == ([broken], True)


def test_results_of_changed_defects_are_forgotten(tmp_path):
  defect, report = _defect(), tmp_path / "report.jsonl"
  line = (
    '{"defect": "b", "suite": "default", "outcome": "found", "test": "t",'
    ' "all_tests": false, "seconds": 1.0, "digest": "%s"}\n'
  )
  report.write_text(line % defect.digest + '{"defect": "b", "su')
  results = run.read(report, [defect])
  assert results["b", "default"].test == "t"
  assert not run.read(report, [_defect(replace="+ 4")])
  text = run.table([defect, _defect(name="d")], results, set(), False)
  assert "default: unknown  rooms/a.toml: d" in text
  assert text.splitlines()[2].split() == ["all", "2", "1"]
  assert "unsound" in run.table([defect], results, {"t"}, False)


def test_results_of_tests_that_are_gone_are_forgotten(tree, tmp_path):
  def found(test, suite="default", outcome="found"):
    return run.Result(
      defect=f"{test} {suite}",
      suite=suite,
      outcome=outcome,
      test=test,
      all_tests=False,
      seconds=1.0,
      digest="d",
    )

  slow = "import pytest\n\n\n@pytest.mark.slow\ndef test_slow():\n  pass\n"
  (tree / "tests/test_slow.py").write_text(slow)
  names = [p.relative_to(tree).as_posix() for p in tree.rglob("*.py")]
  stay = [
    found("tests/test_value.py::test_value"),
    found("tests/test_slow.py::test_slow", "slow"),
    found("tests/test_value.py (the process died)"),
    found(None, outcome="missed"),
  ]
  gone = [
    found("tests/test_value.py::test_value[1]"),
    found("tests/test_moved.py::test_value"),
    found("tests/test_slow.py::test_slow"),
  ]
  results = {(r.defect, r.suite): r for r in stay + gone}
  copy = run.Copy(tmp_path / "copy", names, tree)
  assert [*run.current(copy, results).values()] == stay


def test_files_reach_what_they_import_name_and_configure(tmp_path):
  files = {
    "research/pack/__init__.py": "import lazy_loader\n"
    "a, b, c = lazy_loader.attach(__name__, submod_attrs={'deep': ['Deep']})\n",
    "research/pack/deep.py": "class Deep: pass\n",
    "research/pack/other.py": "",
    "research/pack/fast.cc": "",
    "configs/run.gin": "import research.pack.other\n",
    "tests/conftest.py": "",
    "tests/test_name.py": "from research.pack import Deep\n",
    "tests/test_gin.py": "RUN = '--config=run.gin'\n",
    "tests/test_text.py": "CODE = 'import research.pack.deep as deep'\n",
    "tests/test_none.py": "from research import pack\n",
    "tests/test_nothing.py": "",
  }
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  reach = Reach(tmp_path)

  def names(file):
    return {pathlib.Path(x).stem for x in reach.tests_of(file)}

  assert names("research/pack/deep.py") == {
    *("test_name", "test_text", "test_none")
  }
  assert names("research/pack/other.py") == {"test_gin"}
  assert names("research/pack/fast.cc") >= {"test_gin", "test_name"}
  assert "test_nothing" in names("tests/conftest.py")
