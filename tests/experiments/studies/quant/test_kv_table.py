"""The table of caches: rows of a tiny model, verdicts, the run file."""

import dataclasses

import pytest

from experiments import generate, perplexity
from experiments.core import cli, config, from_scratch
from experiments.studies.quant import kv_study
from research.nn import presets
from research.typing import UserError
from tests.support_letters import Letters, Text

RUNS = sorted(
  str(p.relative_to(config.CONFIGS))
  for p in config.CONFIGS.glob("runs/quant/claims_kv*.gin")
)


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


def test_rows_of_a_tiny_model():
  loaded = TABLE.model.load()
  ids = kv_study.read(TABLE, loaded.tokenizer)
  assert len(ids) == 64
  fine, coarse, none = kv_study.errors(TABLE, loaded, ids)
  # 2 bits have steps 85 times those of 8.
  assert 20 < coarse["mean"] / fine["mean"] < 340
  assert none["mean"] == none["worst"] == 0
  assert coarse["mean"] <= coarse["worst"]
  whole, packed = kv_study.perplexities(TABLE, loaded, ids)
  assert whole["kv"] == "whole" and whole["bits"] == 32
  # 2 bits, and 32 for each 8 numbers.
  assert packed["bits"] == 6
  assert packed["bytes_per_token"] == whole["bytes_per_token"] * 6 / 32
  assert packed["more"] == packed["nll"] - whole["nll"] != 0


def test_verdicts_follow_rows():
  caches = [{"kv": "k8v4", "more": 0.1}, {"kv": "k4v8", "more": 0.2}]
  attention = [
    {"kv": "k16v4", "mean": 0.3},
    {"kv": "k16v4,value=per_channel", "mean": 0.2},
  ]
  values, bits = kv_study.verdicts(caches, attention)
  assert bits.holds and "0.1000" in bits.found
  assert not values.holds
  assert kv_study.verdicts([], []) == []


def test_what_cannot_be_measured():
  with pytest.raises(UserError, match="found 80 tokens.*fewer windows"):
    kv_study.read(dataclasses.replace(TABLE, windows=3), Letters())
  with pytest.raises(UserError, match="expected bits of keys"):
    dataclasses.replace(TABLE, caches=("k5v5",))
  with pytest.raises(UserError, match="rows of 48.*group of 32"):
    odd = dataclasses.replace(TABLE, attention=("k4v16",))
    loaded = odd.model.load()
    kv_study.errors(odd, loaded, kv_study.read(odd, Letters()))


@pytest.mark.parametrize("run", RUNS)
def test_every_table_parses_and_its_text_rebuilds_it(run):
  first = config.read(run, root=kv_study.Table)
  assert config.parse(first.text, root=kv_study.Table).text == first.text


@pytest.mark.parametrize(
  "main, more",
  [(generate.main, "--prompt=x"), (perplexity.main, f"--text={__file__}")],
)
def test_a_command_says_what_bits_are(capsys, main, more):
  """Before any model is looked for."""
  found = cli.call(main, ["x", "--model=nowhere", more, "--kv=k3v4"])
  assert found == 1
  assert "found 'k3v4', expected bits of keys" in capsys.readouterr().err
