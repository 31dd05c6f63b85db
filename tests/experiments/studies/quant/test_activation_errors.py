"""The command on a tiny model; its verdicts; what it refuses."""

import json
import pathlib

import pytest

from experiments.core import cli
from experiments.studies.quant import activation_errors
from research.quant.reports import input_errors

ROOT = pathlib.Path(__file__).resolve().parents[4]
MODEL = ROOT / "tests" / "golden" / "models" / "gguf_mixed" / "model.gguf"
MATRICES = ["layers/1/mlp/down", "layers/0/attention/q"]


def _call(*flags):
  return cli.call(activation_errors.main, ["activation_errors", *flags])


def test_the_command_measures_in_the_order_asked_for(capsys):
  flags = [f"--model={MODEL}", f"--matrices={','.join(MATRICES)}"]
  assert _call(*flags, "--tokens=24") == 0
  *_, last = capsys.readouterr().out.splitlines()
  found = json.loads(last)
  assert found["tokens"] == 24
  assert list(found["matrices"]) == MATRICES
  for row in found["matrices"].values():
    assert tuple(row) == input_errors.COLUMNS
    assert row["A8 token"] < row["A4 token"]


@pytest.mark.parametrize(
  "flags, says",
  [
    ([], "--model: is missing"),
    ([f"--model={MODEL}", "--matrices=layers/9/mlp/down"], "no such matrix"),
    ([f"--model={MODEL}", "--tokens=1"], "expected at least 2"),
  ],
)
def test_what_cannot_be_is_said(capsys, flags, says):
  assert _call(*flags) == 1
  assert says in capsys.readouterr().err


def test_verdicts_can_be_negative():
  good = {name: 0.01 for name in input_errors.COLUMNS}
  good |= {"A8 tensor": 0.9, "A4 token": 0.5, "A8 tensor smooth": 0.1}
  address = "layers/0/attention/q"
  assert all(activation_errors.verdicts({address: good}).values())
  bad = good | {"A8 tensor": 0.1, "A4 rotated": 0.4}
  assert not any(activation_errors.verdicts({address: bad}).values())
