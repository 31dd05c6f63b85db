"""Notebooks: they run from top to bottom, teach, and hold no logic."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
MAX_CELLS = 25
LOGIC = (
  *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
  *(ast.For, ast.While, ast.Try, ast.With, ast.If, ast.Match),
)

RUN = """
import json, sys
cells = json.load(sys.stdin)
namespace = {"__name__": "__main__"}
for number, source in cells:
  print(f"--- cell {number}", flush=True)
  exec(compile(source, f"cell {number}", "exec"), namespace)
print(json.dumps({k: v for k, v in namespace.items() if k in %r}))
"""
"""One namespace for all cells, like a kernel's; without IPython."""


def _read(path: pathlib.Path) -> dict:
  return json.loads(path.read_text("utf-8"))


def _source(cell: dict) -> str:
  return "".join(cell["source"])


def _code(notebook: dict) -> list[tuple[int, str]]:
  return [
    (i, _source(cell))
    for i, cell in enumerate(notebook["cells"])
    if cell["cell_type"] == "code"
  ]


def faults(notebook: dict) -> list[str]:
  """Returns what a notebook of ours must not be, in words."""
  cells, found = notebook["cells"], []
  if (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) != (
    4,
    "python3",
  ):
    found.append("format")
  if len(cells) > MAX_CELLS:
    found.append(f"{len(cells)} cells")
  if len({cell["id"] for cell in cells}) != len(cells):
    found.append("cell ids")
  if cells[0]["cell_type"] != "markdown":
    found.append("no title")
  texts = [_source(c) for c in cells if c["cell_type"] == "markdown"]
  if len(texts) < len(_code(notebook)) - 2 or min(map(len, texts)) < 40:
    found.append("too little text between the cells")
  for i, cell in enumerate(cells):
    if cell["cell_type"] == "code" and (
      cell["outputs"] or cell["execution_count"] is not None
    ):
      found.append(f"cell {i}: outputs")
  for i, source in _code(notebook):
    nodes = list(ast.walk(ast.parse(source)))
    found += [
      f"cell {i}: {type(node).__name__}"
      for node in nodes
      if isinstance(node, LOGIC)
    ]
    if source.count("\n") > 15:
      found.append(f"cell {i}: long")
    if re.search(r"https?://|git\+|/root|/home|/tmp|/work", source):
      found.append(f"cell {i}: names a place")
  return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_structure(path):
  assert not faults(_read(path))


def test_faults_can_be_found():
  (path, *_) = NOTEBOOKS
  for source, fault in (
    ("def f():\n  return 1", "FunctionDef"),
    ("for i in range(3):\n  print(i)", "For"),
    ("x = lambda: 1", "Lambda"),
    ("!pip install git+https://example.org/x".replace("!", "# "), "a place"),
    ("x = 1\n" * 20, "long"),
  ):
    notebook = _read(path)
    code = next(c for c in notebook["cells"] if c["cell_type"] == "code")
    code["source"] = [source]
    assert any(fault in found for found in faults(notebook)), fault
  notebook = _read(path)
  notebook["cells"] += [
    notebook["cells"][0] | {"id": f"x{i}"} for i in range(9)
  ]
  assert any("cells" in found for found in faults(notebook))


def _execute(path: pathlib.Path, names: tuple[str, ...]) -> tuple[dict, str]:
  """Returns the values of `names` after all cells, and what was printed."""
  environ = dict(os.environ, QUICK="1", MPLBACKEND="Agg")
  # As a user has it: one device, no import hook; but compiled without LLVM's
  # passes, as all tests are.
  environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
  done = subprocess.run(
    [sys.executable, "-c", RUN % (names,)],
    input=json.dumps(_code(_read(path))),
    cwd=path.parent,
    env=environ,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.mark.slow
def test_quickstart_learns_and_reloads(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "00_quickstart.ipynb"
  values, printed = _execute(notebook, ("result",))
  result = values["result"]
  assert result["perplexity_after"] < result["perplexity_before"]
  before, after = map(
    float, re.search(r"perplexity ([\d.]+) -> ([\d.]+)", printed).groups()
  )
  assert after < before
  assert "[cuda]" not in printed
  (adapter,) = tmp_path.rglob("adapter_config.json")
  assert json.loads(adapter.read_text())["base_model_name_or_path"] == (
    "smollm2-135m"
  )


def test_flash_attention_shows_what_it_says():
  notebook = ROOT / "colab" / "flash_attention.ipynb"
  values, printed = _execute(notebook, ("memory", "moved", "steps"))
  short, long = values["memory"]
  assert long["naive"] / short["naive"] > 2.4 > long["flash"] / short["flash"]
  assert [row["bytes"] for row in values["moved"]] == sorted(
    (row["bytes"] for row in values["moved"]), reverse=True
  )
  end = re.search(r"([-\d.e]+) is ([-\d.e]+)", printed)
  assert float(end[1]) == pytest.approx(float(end[2]), rel=1e-5)
  assert "timing: skipped" in printed
  if importlib.util.find_spec("libtpu") is None:
    assert "schedule: skipped" in printed


@pytest.mark.slow
def test_lora_ranks_merges_and_comes_back(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "lora.ipynb"
  names = ("methods", "ranking", "losses", "difference")
  values, printed = _execute(notebook, names)
  counts = {row["method"]: row["trained"] for row in values["methods"]}
  assert counts["IA3"] < counts["LoRA"] < counts["HiRA"]
  full, *low = values["ranking"]
  assert full["trained %"] == 100 > low[-1]["trained %"]
  assert all(row["rank of 90%"] < full["rank of 90%"] for row in low)
  losses = values["losses"]
  assert losses["tuned"] < losses["base"]
  assert losses["merged"] == pytest.approx(losses["tuned"], rel=1e-5)
  assert values["difference"] == 0
  (adapter,) = tmp_path.rglob("adapter_config.json")
  assert json.loads(adapter.read_text())["peft_type"] == "LORA"


@pytest.mark.slow
def test_llada_is_bounded_by_the_truth(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "llada.ipynb"
  names = ("bounds", "entropy", "quality", "turned")
  values, printed = _execute(notebook, names)
  bounds, entropy = values["bounds"], values["entropy"]
  # Of 32 rows of 32 tokens, nats a token vary by about 0.2 from row to row.
  assert bounds["perfect"] == pytest.approx(entropy, abs=0.15)
  assert bounds["model"] > bounds["perfect"] + 0.2  # it has hardly learned
  (once,) = values["quality"]["perfect"]
  # In one call places do not know of each other: of pairs, 256 rows of the
  # chain itself are off by 0.02.
  assert once["pairs off"] > 0.2 and once["nats a token"] > entropy + 0.5
  plain, ones = (row["nats a token"] for row in values["turned"])
  assert ones == pytest.approx(plain, rel=1e-4)
  assert re.search(r"^ +24  [a-j]{32}$", printed, re.M)
  (picture,) = tmp_path.rglob("a.gif")
  assert picture.read_bytes()[:6] == b"GIF89a"


@pytest.mark.slow
def test_quantization_shows_what_it_says(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "quantization.ipynb"
  names = ("errors", "outliers", "cache", "rows", "texts", "different", "equal")
  values, printed = _execute(notebook, names)
  bits = [row["bits"] for row in values["errors"]]
  assert bits == sorted(bits, reverse=True) and bits[-1] == 2.625
  assert values["errors"][-1]["outputs' error"] > 0.2
  near, compensated = map(
    float, re.search(r"end ([\d.]+) with GPTQ ([\d.]+)", printed).groups()
  )
  assert compensated < 0.5 * near and values["equal"] > 0.99
  found = {row["what"]: row["found"] for row in values["outliers"]}
  assert found["outliers"] > 10_000 > 100 > found["outliers rotated"]
  assert found["A8 tensor"] > 0.9 > 0.1 > found["A8 token"]
  assert found["A4 rotated"] < 0.5 * found["A4 token"]
  keys, turned, rows, columns = (x["median layer"] for x in values["cache"])
  assert keys < 0.7 * turned and rows < 0.7 * columns
  four, three = values["rows"].values()
  assert four["bits_per_weight"] > three["bits_per_weight"]
  assert four["kl"] < three["kl"]
  assert set(values["texts"]) == {"4.5 bits"} and values["different"] == 0
  (file,) = tmp_path.rglob("*.gguf")
  assert 85e6 < file.stat().st_size < 95e6


def _install():
  spec = importlib.util.spec_from_file_location(
    "install", ROOT / "colab" / "install.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_installation_has_the_versions_of_the_makefile(monkeypatch):
  install = _install()
  makefile = (ROOT / "Makefile").read_text()
  assert f"MODEL := {install.MODEL}\n" in makefile
  monkeypatch.setattr(install.shutil, "which", lambda name: None)
  monkeypatch.setattr(install.glob, "glob", lambda pattern: [])
  first, second = install.commands()
  assert first[-1] == str(ROOT)
  assert second[-2:] == ["--no-deps", install.MODEL]
  extras = (ROOT / "setup.cfg").read_text()
  monkeypatch.setattr(install.glob, "glob", lambda pattern: ["/dev/accel0"])
  assert install.extra() == "[tpu]" and "\ntpu =" in extras
  monkeypatch.setattr(install.shutil, "which", lambda name: name)
  assert install.extra() == "[cuda]" and "\ncuda =" in extras
