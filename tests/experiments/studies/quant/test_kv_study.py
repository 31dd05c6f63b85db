"""The study of caches: arms of a tiny model, lines, verdicts."""

import dataclasses

import pytest

from experiments import generate, perplexity
from experiments.core import cli, from_scratch
from experiments.studies.quant import kv_study
from research.nn import presets
from research.typing import UserError
from tests.support_letters import Letters, Text

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
  batch=2,
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
  assert [line["kv"] for line in others] == list(TABLE.attention)


def test_verdicts_follow_rows():
  caches = {"whole": {"nll": 2.0}, "k8v4": {"nll": 2.1}, "k4v8": {"nll": 2.2}}
  errors = {"k16v4": {"error": 0.3}, "k16v4,value=per_channel": {"error": 0.2}}
  rows = caches | {"attention": {"errors": errors}}
  values, bits = TABLE.verdicts(rows)
  assert bits.holds and "0.1000" in bits.found
  assert not values.holds
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
  """Before any model is looked for."""
  found = cli.call(main, ["x", "--model=nowhere", more, "--kv=k3v4"])
  assert found == 1
  assert "found 'k3v4', expected bits of keys" in capsys.readouterr().err
