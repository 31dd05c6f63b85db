"""Models whose activations are in few bits, too: written and loaded."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop import convert, load, sources
from research.quant import llm_int8
from research.quant.activations import Inputs, InputTensor, Round
from research.quant.algorithms.rotate import Rotate
from research.quant.qtensor import QTensor
from research.quant.quantize import Quantize

ROOT = pathlib.Path(__file__).resolve().parents[3]
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
