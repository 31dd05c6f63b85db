"""Quantized weights on the command line: kept by default where that is fast."""

import json

import jax
import numpy as np
import pytest

from experiments import perplexity
from experiments.core import cli
from experiments.generating import packed_weights
from research import tree, weights
from research.interop import convert, load, parts, sources
from research.interop.peft import full_weights
from research.quant.formats.affine import Affine
from research.quant.formats.fp8 import FP8
from research.quant.layouts import cpu_layout
from research.quant.quantize import Quantize
from tests.experiments import generated
from tests.experiments.generated import MODELS, told

FILE = MODELS / "gguf_mixed" / "model.gguf"
QUANTIZED = MODELS.with_name("quantized")
PROMPT = ("--prompt=the cat", "--max_new_tokens=12")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  """Checkpoints of ours, one in a format that kernels take, one in another."""
  folder, loaded = tmp_path_factory.mktemp("ours"), load.load_model(FILE)
  for name, format in (("int4", Affine(block=32)), ("fp8", FP8())):
    params = Quantize(format=format)(loaded.params)
    source = sources.from_training(
      loaded, params, {"format": "quantized"}, None
    )
    convert.to_orbax(source, folder / name)
  return folder


@pytest.mark.slow
def test_text_is_the_same_kept_or_decoded(capsys):
  if not cpu_layout.cpu.available():
    pytest.skip("no C++ compiler")
  call = generated.command(capsys)
  found = {
    flag: told(call(f"--model={FILE}", *PROMPT, *flag.split()))
    for flag in ("", "--packed", "--nopacked")
  }
  kept = found[""]["packed"]
  assert kept == found["--packed"]["packed"] == ["Q4_1", "Q8_0"]
  assert found["--nopacked"]["packed"] == []
  assert len({x["text"] for x in found.values()}) == 1


@pytest.mark.slow
def test_perplexity_too(capsys, tmp_path):
  text = tmp_path / "text"
  text.write_text("the cat sat on the mat and the dog ran " * 6)
  found = {}
  for flag in ("--packed", "--nopacked", "--chunk=1"):
    given = (f"--model={FILE}", f"--text={text}", "--window=16", flag)
    assert cli.call(perplexity.main, ["perplexity", *given]) == 0
    found[flag] = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["--nopacked"]["packed"] == []
  assert found["--chunk=1"]["packed"] == found["--packed"]["packed"] != []
  # Sums of up to 64 products in another order, through two layers.
  want = found["--nopacked"]["nll"]
  for one in found.values():
    assert one["nll"] == pytest.approx(want, abs=2e-5)


def formats(loaded):
  return packed_weights.report(loaded.params)["packed"]


def test_by_default_they_are_kept_where_there_is_a_kernel(monkeypatch):
  monkeypatch.setattr(cpu_layout.cpu, "available", lambda: True)
  assert formats(packed_weights.load(str(FILE))) == ["Q4_1", "Q8_0"]


@pytest.mark.slow
def test_without_a_kernel_they_are_decoded(ours, monkeypatch):
  kept = formats(packed_weights.load(str(ours / "int4")))
  assert kept == ["int4-asym-g32"]
  assert formats(packed_weights.load(str(ours / "fp8"))) == []
  assert formats(packed_weights.load(str(ours / "fp8"), packed=True)) == [
    "fp8-e4m3-channel"
  ]
  monkeypatch.setattr(cpu_layout.cpu, "available", lambda: False)
  for name in (ours / "int4", FILE):
    loaded = packed_weights.load(str(name))
    assert formats(loaded) == []
    want = load.load_model(name).params
    jax.tree.map(np.testing.assert_array_equal, loaded.params, want)
  # A directory that a tool has quantized stays what it is.
  assert formats(packed_weights.load(str(QUANTIZED / "gptq"))) != []


def test_what_is_not_quantized_needs_no_word(capsys):
  call = generated.command(capsys)
  done = told(call(f"--model={generated.TINY}", *PROMPT))
  assert done["packed"] == []


def test_an_adapter_may_bring_one_of_a_packed_runs_weights():
  params = load.load_model(FILE, packed=True).params
  layers = [i for ids in tree.layer_indices(params).values() for i in ids]
  run = next(k for k, v in tree.layer_indices(params).items() if len(v) > 1)
  first = tree.layer_indices(params)[run][0]
  assert len(layers) > 1
  leaf = next(tree.layers(params))["mlp"]["up"]
  new = np.ones(leaf.shape, np.float32)
  got = full_weights.replace(params, {f"layers/{first}/mlp/up": new})
  for i, (a, b) in enumerate(
    zip(tree.layers(got), tree.layers(params), strict=True)
  ):
    want = new if i == first else weights.dense(b["mlp"]["up"])
    np.testing.assert_array_equal(weights.dense(a["mlp"]["up"]), want)
    assert weights.is_weight(a["mlp"]["down"]) == weights.is_weight(
      b["mlp"]["down"]
    )
  assert parts.from_params(got)
