"""The Python of README.md and research/README.md runs as it stands there.

With a tiny model in place of SmolLM2, which runs with `--slow`.
"""

import itertools
import json
import pathlib
import re

import jax
import numpy as np
import pytest

from research import interop, tree
from research.data import bpe
from research.interop.loaded import Loaded
from tests import support

ROOT = pathlib.Path(__file__).resolve().parents[1]


def ten_lines():
  """Returns the block between the README's marks."""
  text = (ROOT / "README.md").read_text("utf-8")
  [marked] = re.findall(r"<!-- ten lines -->(.*?)<!-- end -->", text, re.S)
  return _blocks(marked)[0]


def _blocks(text):
  return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


def tiny(name):
  """Returns a model of two layers, random, that knows some English letters."""
  assert name == "smollm2-135m"
  words = bpe.Bpe(documents=["A class is what a decorator wraps."], size=300)
  model = support.model(
    vocab=300, width=64, depth=2, head_dim=16, hidden=128, max_positions=128
  )
  return Loaded(model, support.params(model), words.load(), {"format": "tiny"})


@pytest.fixture
def here(tmp_path, monkeypatch):
  """An empty working directory, and a tiny model for SmolLM2's name."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(interop, "load_model", tiny)
  return tmp_path


def _nll(logits, tokens):
  """Returns the mean negative log-likelihood of each row's next tokens."""
  x = np.asarray(logits, np.float64)[:, :-1]
  x -= x.max(-1, keepdims=True)
  log_p = x - np.log(np.exp(x).sum(-1, keepdims=True))
  return -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1).mean()


def _check(found):
  """The step's loss is that of the logits; only adapters have moved."""
  loss = _nll(found["logits"], found["batch"]["tokens"])
  assert float(found["metrics"]["loss"]) == pytest.approx(loss, rel=1e-4)
  before, after = (
    dict(tree.flatten_paths(found[name]["run0"]["layer0"]["mlp"]["up"]))
    for name in ("params", "after")
  )
  assert before["w/parts/codes"].dtype == np.uint8  # NF4
  moved = {
    path for path, x in before.items() if not np.array_equal(x, after[path])
  }
  assert moved == {"trained/a", "trained/b"}
  # b is 0 at first, so a has no gradient: AdamW decays it, by 1e-4 of the rate.
  a, decayed = (np.asarray(x["trained/a"]) for x in (before, after))
  np.testing.assert_allclose(decayed, a * (1 - 1e-3 * 1e-4), rtol=1e-6)


def _run_ten_lines():
  found = {}
  exec(compile(ten_lines(), "README.md", "exec"), found)
  found["after"] = found["state"].params
  _check(found)
  assert found["logits"].shape[-1] == found["model"].vocab_size
  assert found["made"].tokens <= 24
  return found


def test_the_ten_lines_and_seven_steps_more(here, capsys):
  """Those are the last cell of the notebook that has the ten lines."""
  found = _run_ten_lines()
  assert capsys.readouterr().out.strip()
  hello = json.loads((ROOT / "colab" / "00_hello.ipynb").read_text("utf-8"))
  first = float(found["metrics"]["loss"])
  exec("".join(hello["cells"][-1]["source"]), found)
  last = float(found["metrics"]["loss"])
  assert last < first and int(found["state"].step) == 8
  printed = capsys.readouterr().out
  assert printed.startswith(f"loss   {last:.2f}\nbefore A decorator")
  assert "\nafter  A decorator" in printed


@pytest.mark.slow
def test_the_ten_lines_of_the_real_model(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  _run_ten_lines()


def test_they_are_ten_and_import_from_three_places():
  lines = ten_lines().splitlines()
  imports = [x for x in lines if re.match(r"(import|from)\b", x)]
  assert len(imports) <= 4
  assert len([x for x in lines if x and x not in imports]) <= 12


def test_every_block_of_the_page_runs(here):
  text = (ROOT / "research" / "README.md").read_text("utf-8")
  found = {"__name__": "__main__"}
  for number, block in zip(itertools.count(1), _blocks(text)):
    exec(compile(block, f"research/README.md, block {number}", "exec"), found)
  assert number >= 6
  layers = found["params"]["run0"]["layer0"]["attention"]
  assert "AdaptedTensor" in type(layers["q"]).__name__
  assert int(found["state"].step) == 1
  assert (here / "adapter" / "adapter_config.json").is_file()
  assert len(text.splitlines()) <= 120
  assert np.isfinite(jax.device_get(found["metrics"]["loss"]))
