"""Models whose activations are in few bits, too: written, loaded, judged."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import config
from experiments.studies import protocol
from experiments.studies.quant import quant_inputs
from research.interop import convert, load, sources
from research.quant import llm_int8
from research.quant.activations import Inputs, InputTensor, Round
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.rotate import Rotate
from research.quant.qtensor import QTensor
from research.quant.quantize import Quantize

ROOT = pathlib.Path(__file__).resolve().parents[4]
MODEL = ROOT / "tests" / "golden" / "models" / "gguf_mixed" / "model.gguf"


def _logits(loaded):
  tokens = jnp.arange(12)[None]

  @jax.jit
  def run(params):
    hidden, _ = loaded.model.apply({"params": params}, tokens)
    return loaded.model.apply({"params": params}, hidden, method="logits")

  return np.asarray(run(loaded.params))


@pytest.mark.slow
def test_a_rotated_model_is_written_and_loaded(tmp_path):
  loaded = load.load_model(MODEL)
  params = loaded.params
  for transform in (
    Rotate(model=loaded.model),
    Quantize(format=llm_int8.INT8),
    Inputs(op=Round(bits=8, integer=True)),
  ):
    params = transform(params, jax.random.key(0))
  origin = {"format": "quantized", "of": "test"}
  source = sources.from_training(loaded, params, origin, None)
  convert.to_orbax(source, tmp_path / "model")
  want = _logits(loaded)
  for packed in (True, False):
    found = load.load_model(tmp_path / "model", packed=packed)
    # The head is a matrix of its own, and no step of loading loses it.
    assert not found.model.tied and "head" in found.params
    down = found.params["run0"]["layer0"]["mlp"]["down"]
    assert isinstance(down, InputTensor) and down.w.op == Round(integer=True)
    assert isinstance(down.w.w, QTensor) == packed
    error = np.linalg.norm(_logits(found) - want) / np.linalg.norm(want)
    assert 0 < error < 0.1


def test_rows_and_what_they_say():
  rows = quant_inputs.rows(calibration=Calibration(windows=2, length=16))
  names = [row.name for row in rows]
  assert len(set(names)) == len(names)
  wanted = {name for claim in quant_inputs.CLAIMS for name in claim[:2]}
  assert wanted <= set(names)
  kl = dict.fromkeys(wanted, 1.0)
  kl |= {f"W8A8 tensor{x}, SmoothQuant": 0.4 for x in ("", " behind norms")}
  kl |= {"W8A8 token": 0.1}
  kl |= {"W8A4 rotated": 0.1, "W4A4 rotated, GPTQ": 0.9}
  found = quant_inputs.repaired({k: {"kl": v} for k, v in kl.items()})
  assert len(found) == 6 and all(v.holds for v in found)
  same = quant_inputs.repaired({k: {"kl": 1.0} for k in wanted})
  assert not any(v.holds for v in same)
  assert quant_inputs.repaired({}) == []

  kl = {"random, seed 0": 0.2, "random, seed 1": 0.3}
  kl |= {"learned, seed 0": 0.1, "learned, seed 1": 0.2}
  for worst, holds in ((0.2, True), (0.4, False)):
    kl["learned, seed 1"] = worst
    spun = {f"W8A4 {name}": {"kl": value} for name, value in kl.items()}
    (found,) = quant_inputs.better_learned(spun)
    assert found.holds == holds
  assert quant_inputs.better_learned({}) == []


@pytest.mark.parametrize(
  "name, count", [("activations_smollm2", 12), ("rotations", 7)]
)
def test_run_files_can_be_read(name, count):
  run = f"runs/quant/claims_{name}.gin"
  table = config.read(run, root=protocol.Run).experiment.study
  assert len(table.flat) == count
