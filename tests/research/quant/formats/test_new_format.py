"""Tests that a new format is one file: the one below works everywhere.

It is no format of ours. Powers of the square root of two with a sign, as a
logarithmic grid has them, and a largest magnitude for 32 weights.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import sharding, tree, weights
from research.generation import generate
from research.interop import convert, load
from research.quant import formats, qtensor
from research.quant.layouts import cpu_layout
from research.quant.quantize import Quantize
from research.quant.quantize_by_rules import Quantization, Rule
from research.typing import UserError
from tests import support, support_hf_quant, support_lora

FILE = '''
"""A logarithmic grid."""

import dataclasses

import jax.numpy as jnp

from research.quant.layouts import packing
from research.quant.format import Format, NormalForm

GRID = tuple(s * 2.0 ** (-k / 2) for s in (-1, 1) for k in range(8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logarithmic(Format):
  block: int = 32

  @property
  def name(self):
    return f"log4-b{self.block}"

  def layout(self):
    return {"codes": "x.o", "top": "xo"}

  def encode(self, w, importance=None):
    groups = jnp.asarray(w, jnp.float32).reshape(-1, self.block, w.shape[1])
    top = abs(groups).max(1)
    unit = groups / jnp.where(top == 0, 1, top)[:, None]
    codes = abs(unit[..., None] - jnp.asarray(GRID)).argmin(-1)
    return {"codes": packing.pack(codes.astype(jnp.uint8), 4), "top": top}

  def normal_form(self, parts):
    codes = packing.unpack(parts["codes"], 4)
    codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    return NormalForm(codes, parts["top"], self.block, codebook=GRID)
'''

SIZES = dict(depth=2, width=64, hidden=64, head_dim=16, vocab=64)


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """Returns the format, whose file is temporarily in the package's path."""
  name = "logarithmic_of_a_test"
  (tmp_path / f"{name}.py").write_text(FILE)
  monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
  formats.all_formats.cache_clear()
  module = importlib.import_module(f"{formats.__name__}.{name}")
  yield module.Logarithmic()
  del sys.modules[module.__name__]
  formats.all_formats.cache_clear()


def model_and_packed(toy):
  model = support.model(**SIZES)
  return model, Quantize(format=toy)(support.params(model))


def logits(model, params, tokens):
  def read(params):
    hidden, _ = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, hidden, method="logits")

  return np.asarray(jax.jit(read)(params))


def close(got, want):
  np.testing.assert_allclose(got, want, atol=2e-5 * float(np.ptp(want)))


def test_it_packs_multiplies_and_is_sharded(toy):
  w = np.random.default_rng(0).normal(size=(3, 128, 24)).astype(np.float32)
  q = qtensor.pack(w, toy)
  assert q.bits_per_weight == 5 and q.shape == w.shape
  dense = np.asarray(q.dense())
  # Neighbours are a factor of 1.41 apart, so that none is off by a fifth.
  top = np.abs(w.reshape(3, 4, 32, 24)).max(2, keepdims=True)
  large = (np.abs(w.reshape(3, 4, 32, 24)) > top / 8).reshape(w.shape)
  assert (np.abs(dense / w - 1)[large] < 0.21).all()
  x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 128)), jnp.float32)
  one = jax.tree.map(lambda x: x[1], q)
  close(weights.einsum("ti,io->to", x, one), x @ dense[1])
  sizes = jnp.array([2, 0, 3])
  got = weights.ragged_dot(x, q, sizes)
  close(got, np.concatenate([x[:2] @ dense[0], x[2:] @ dense[2]]))
  np.testing.assert_array_equal(
    weights.take(one, jnp.array([7])), dense[1][[7]]
  )
  named = weights.axes(q, ("experts", "in", "out"))
  assert named.parts["codes"] == ("experts", "in", None, "out")


@pytest.mark.slow
def test_adapters_train_over_it(toy):
  model, packed = model_and_packed(toy)
  params = support_lora.adapting(rank=2)(packed, jax.random.key(0))
  tokens = support.tokens(vocab=64)
  close(logits(model, params, tokens), logits(model, packed, tokens))
  trained, fixed = tree.partition(params, "trained")

  @jax.jit
  def loss(trained):
    hidden, _ = model.apply({"params": tree.combine(trained, fixed)}, tokens)
    out = model.apply(
      {"params": tree.combine(trained, fixed)}, hidden, method="logits"
    )
    each = optax.softmax_cross_entropy_with_integer_labels(
      out[:, :-1], tokens[:, 1:]
    )
    return each.mean()

  first = loss(trained)
  for _ in range(3):
    slope = jax.grad(loss)(trained)
    trained = jax.tree.map(lambda x, g: x - 0.01 * g, trained, slope)
  assert loss(trained) < first


def test_rules_accept_it_and_gptq_refuses_it(toy):
  params = support.params(support.model(**SIZES))
  rule = Rule(match="^layers/", format=toy)
  packed, report = Quantization(rules=(rule,)).run(params)
  assert len(report.rows) == 14 and all(r.bits == 5 for r in report.rows)
  assert packed["run0"]["layer0"]["mlp"]["up"].format == toy
  up = packed["run0"]["layer0"]["mlp"]["up"]
  with pytest.raises(UserError, match="log4-b32: GPTQ needs fixed scales"):
    toy.with_codes(up.parts, up.normal_form().codes[0])


def test_a_checkpoint_keeps_it(toy, tmp_path):
  model, packed = model_and_packed(toy)
  source = support_hf_quant.source(model, packed)
  folder = tmp_path / "saved"
  convert.to_orbax(source, folder)
  again = load.load_model(folder, packed=True)
  assert jax.tree.structure(again.params) == jax.tree.structure(packed)
  jax.tree.map(np.testing.assert_array_equal, again.params, packed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:quantized_matmul")
def test_panels_hold_it(toy):
  model, packed = model_and_packed(toy)
  up = packed["run0"]["layer0"]["mlp"]["up"]
  assert cpu_layout.is_supported(up)
  close(cpu_layout.from_qtensor(up).dense(), up.dense())
  got = cpu_layout.to_panels(packed)
  tokens = support.tokens(vocab=64)
  close(logits(model, got, tokens), logits(model, packed, tokens))
  prompts = [[3, 5, 7], [11]]
  want = generate.generate(model, packed, prompts, 4)
  assert generate.generate(model, got, prompts, 4) == want


@pytest.mark.slow
def test_sharded_it_is_the_same(toy):
  model, packed = model_and_packed(toy)
  layout = sharding.Layout(data=1, fsdp=2, tensor=2)
  mesh = layout.mesh()
  where = layout.shardings(packed, mesh, sharding.head_counts(model))
  cut = where["run0"]["layer0"]["mlp"]["up"].parts["codes"].spec
  assert "fsdp" in cut and "tensor" in cut
  tokens = support.tokens(vocab=64)
  with jax.set_mesh(mesh):
    got = logits(model, jax.device_put(packed, where), tokens)
  close(got, logits(model, packed, tokens))
