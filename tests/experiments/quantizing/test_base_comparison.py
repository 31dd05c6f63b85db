"""A quantized model beside its base: the command, and what it says."""

import json
import pathlib

import numpy as np
import pytest

from experiments import evaluate
from experiments.core import cli
from experiments.quantizing import base_comparison
from research.generation import perplexity
from research.interop import convert, load, sources
from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.text import special_tokens

TINY = (
  pathlib.Path(__file__).parents[2]
  / "golden"
  / "models"
  / "gguf_f32"
  / "model.gguf"
)


@pytest.fixture(scope="module", name="packed")
def _packed(tmp_path_factory):
  """The tiny model in 4 bits, as a checkpoint of ours, and a text."""
  folder = tmp_path_factory.mktemp("packed")
  loaded = load.load_model(TINY)
  params = Quantize(format=Affine(bits=4, block=8))(loaded.params)
  source = sources.from_training(loaded, params, dict(format="quantized"), None)
  convert.to_orbax(source, folder / "model")
  text = folder / "text.txt"
  rng = np.random.default_rng(0)
  text.write_text("".join(map(chr, rng.integers(97, 123, 400))))
  return folder / "model", text, loaded, params


@pytest.mark.slow
def test_the_command_says_what_was_lost(packed, capsys):
  model, text, loaded, params = packed
  argv = [f"--model={model}", f"--base={TINY}", f"--text={text}"]
  argv += ["--window=32", "--max_windows=3"]
  assert cli.call(evaluate.main, ["evaluate", *argv]) == 0
  lines = capsys.readouterr().out.splitlines()
  found = json.loads(lines[-1])
  # An 8-bit code of 16 bits a scale, and a zero in half a byte or one.
  assert 4 + 16 / 8 + 4 / 8 <= found["bits_per_weight"] <= 4 + 16 / 8 + 8 / 8
  assert found["tokens"] == 3 * 31 and found["windows"] == 3
  assert found["kl"] > 0 and 0 <= found["same_top"] <= 1
  assert found["disk_bytes"] > found["nbytes"]
  ids = loaded.tokenizer.encode(text.read_text())
  for name, tree in (
    ("perplexity", params),
    ("base_perplexity", loaded.params),
  ):
    one = perplexity.perplexity(loaded.model, tree, ids, 32, 3)
    assert found[name] == pytest.approx(one.perplexity, rel=1e-5)
  # The matrices are shown, the worst first.
  assert lines[0].startswith("matrix")
  assert found["worst"] == lines[2].split()[0]


@pytest.mark.slow
def test_what_is_missing_is_named(packed, capsys):
  model, text, _, _ = packed
  assert cli.call(evaluate.main, ["evaluate", f"--model={model}"]) == 1
  assert "--base: is missing" in capsys.readouterr().err
  argv = [f"--model={model}", "--base=nowhere", f"--text={text}"]
  assert cli.call(evaluate.main, ["evaluate", *argv]) == 1
  assert "nowhere: no such file" in capsys.readouterr().err


def test_a_window_is_at_most_the_context(packed):
  model, _, loaded, _ = packed
  text = "a" * 4 * loaded.model.max_positions
  found = base_comparison.compare_with_base(
    str(model), str(TINY), text, window=10**6, max_windows=1, layers=False
  )
  begin = special_tokens.from_tokenizer(loaded.tokenizer).row_begin
  assert found["window"] + len(begin) == loaded.model.max_positions


def test_sizes_on_disk_are_those_of_files(packed):
  model = packed[0]
  want = sum(f.stat().st_size for f in model.rglob("*") if f.is_file())
  assert base_comparison.on_disk(str(model)) == want
