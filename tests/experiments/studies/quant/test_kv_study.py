"""The study of caches: arms of a tiny model, lines, verdicts."""

import dataclasses

import numpy as np
import pytest

from experiments import generate, perplexity
from experiments.core import cli, from_scratch
from experiments.studies.quant import kv_study
from research.nn import presets
from research.typing import UserError
from tests.support_letters import Letters, Text

GGUF = "tests/golden/models/gguf_f32/model.gguf"

TABLE = kv_study.Table(
  model=from_scratch.FromScratch(
    sizes=presets.Sizes(
      vocab=64, width=32, depth=2, heads=2, kv_heads=1, head_dim=8, hidden=32
    ),
    tokenizer=Letters(),
  ),
  text=Text(2, 40),
  caches=("k2v2,group=8,residual=0",),
  attention=("k8v16,group=8", "k2v16,group=8", "k16v16"),
  window=32,
  windows=2,
  chunk=8,
  tokens=48,
)


@pytest.mark.slow
def test_arms_of_a_tiny_model(tmp_path):
  shared = TABLE.prepare(tmp_path)
  assert len(shared.ids) == 64
  assert TABLE.arms == ["attention", "whole", "k2v2,group=8,residual=0"]
  rows = {arm: TABLE.run(arm, {}, shared) for arm in TABLE.arms}
  fine, coarse, none = rows["attention"]["errors"].values()
  # 2 bits have steps 85 times those of 8.
  assert 20 < coarse["error"] / fine["error"] < 340
  assert none["error"] == none["worst"] == 0
  assert coarse["error"] <= coarse["worst"]
  whole, packed, *others = TABLE.table(rows)
  assert whole["kv"] == "whole" and whole["bits"] == 32
  # 2 bits, and 32 for each 8 numbers.
  assert packed["bits"] == 6
  assert packed["bytes_per_token"] == whole["bytes_per_token"] * 6 / 32
  assert packed["more"] == packed["nll"] - whole["nll"] != 0
  assert "windows" not in packed and "layers" not in others[0]
  for row in (rows["whole"], rows["k2v2,group=8,residual=0"]):
    assert len(row["windows"]) == 2 and len({*row["windows"]}) == 2
    assert np.exp(np.mean(row["windows"])) == pytest.approx(row["perplexity"])
  assert [line["kv"] for line in others] == list(TABLE.attention)


def test_verdicts_follow_rows():
  rows = {"k8v4": {"windows": [2.0, 2.2]}, "k4v8": {"windows": [2.1, 2.3]}}
  channel = {"layers": [0.2, 0.3]}
  errors = {"k16v4": {"layers": [0.3, 0.4]}, "k16v4,value=per_channel": channel}
  rows["attention"] = {"errors": errors}
  values, bits = TABLE.verdicts(rows)
  assert bits.holds and "k8v4 2.1000, k4v8 2.2000: 0.100" in bits.found
  assert bits.found.endswith("less, over 2 windows")
  assert values.holds is False
  # One window is ahead by more than the other one is behind.
  rows["k4v8"] = {"windows": [2.3, 2.1]}
  assert TABLE.verdicts(rows)[1].holds is None
  assert TABLE.verdicts({}) == []


def test_what_cannot_be_measured():
  with pytest.raises(UserError, match="found 80 tokens.*fewer windows"):
    kv_study.read(dataclasses.replace(TABLE, windows=3), Letters())
  with pytest.raises(UserError, match="expected bits of keys"):
    dataclasses.replace(TABLE, caches=("k5v5",))
  with pytest.raises(UserError, match="rows of 48.*group of 32"):
    odd = dataclasses.replace(TABLE, attention=("k4v16",))
    loaded = odd.model.load()
    kv_study.errors(odd, loaded, kv_study.read(odd, Letters()))


@pytest.mark.parametrize(
  "main, more",
  [(generate.main, "--prompt=x"), (perplexity.main, f"--text={__file__}")],
)
def test_a_command_says_what_bits_are(capsys, main, more):
  """Before any model is read."""
  found = cli.call(main, ["x", f"--model={GGUF}", more, "--kv=k3v4"])
  assert found == 1
  assert "found 'k3v4', expected bits of keys" in capsys.readouterr().err
