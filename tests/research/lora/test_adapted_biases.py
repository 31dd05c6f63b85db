"""Tests that biases are scaled wherever an adapter that scales them is merged.

(IA)^3 multiplies whole outputs, in PEFT as in the paper. Adapter and bias are
two leaves of the tree: what takes the adapter off its matrix, or writes it, has
to mind the other one. `interop/peft/test_methods` has PEFT's own numbers.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop import parts, peft
from research.lora import adapt, to_lora, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.merge import changes, merge
from research.lora.methods.ia3 import IA3
from research.lora.optim import row_factors
from research.nn import time_embedding
from research.quant.algorithms import qat
from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.typing import UserError
from tests.research.lora.methods import test_methods as methods
from tests.support_peft import base

NAMES = ("attention/q", "attention/v", "mlp/down")


@functools.cache
def adapted():
  """Returns (IA)^3 with random arrays, twice on one matrix."""
  how = adapt.Adapt(method=IA3(), targets=("q", "v", "down"))
  params = how(base("llama_biases").params, jax.random.key(0))
  layer = params["run0"]["layer0"]["attention"]
  layer["q"] = dataclasses.replace(layer["q"], w=layer["q"])
  rng = np.random.default_rng(0)
  return tree.map_paths(
    lambda p, x: (
      x * (1 + 0.5 * rng.standard_normal(x.shape)).astype(np.float32)
      if "/trained/" in p
      else x
    ),
    params,
  )


@functools.cache
def wanted():
  """Returns the biases as they should be, by NumPy."""
  layer = adapted()["run0"]["layer0"]
  q, v = layer["attention"]["q"], layer["attention"]["v"]
  gains = {"q_bias": q.trained["l"] * q.w.trained["l"]}
  gains["v_bias"] = v.trained["l"]
  return {
    name: np.asarray(layer["attention"][name]) * np.asarray(gain)
    for name, gain in gains.items()
  }


def check(params, atol=1e-6):
  """Asserts that the tree has those biases, and all others as they were."""
  attention = params["run0"]["layer0"]["attention"]
  for name, want in wanted().items():
    np.testing.assert_allclose(np.asarray(attention[name]), want, atol=atol)
  before = adapted()["run0"]["layer0"]
  same = [("attention", "k_bias"), ("attention", "o_bias")]
  same += [("mlp", f"{name}_bias") for name in ("gate", "up", "down")]
  for module, name in same:
    found = params["run0"]["layer0"][module][name]
    np.testing.assert_array_equal(found, before[module][name])


def test_they_are_found_by_their_paths():
  found = wrap.biases(adapted())
  assert set(found) == {f"run0/layer0/attention/{x}_bias" for x in "qv"}
  assert weights.bias_path("run0/layer0/mlp/router") is None
  assert weights.bias_path("patches/kernel/matrix") == "patches/bias"


def test_merged():
  check(wrap.merge(adapted()))
  got, losses = merge.merge(adapted())
  check(got)
  of_biases = {name for name in losses if name.endswith("_bias")}
  assert of_biases == {
    f"layers/{i}/attention/{x}_bias" for i in range(3) for x in "qv"
  }
  assert all(losses[name].update > 0 for name in of_biases)


def test_converted_after_training_with_rounding():
  """The matrix is packed with its gain, so its bias has it, too."""
  rounds = qat.Prepare(format=Affine(block=4, symmetric=True))
  check(qat.Convert()(rounds(adapted())))


@pytest.mark.parametrize("mode", merge.MODES)
def test_merged_over_a_packed_base(mode):
  first = base("llama_biases").params
  packed = Quantize(format=Affine(block=4))(first)

  def over(leaf, w):
    if not isinstance(leaf, AdaptedTensor):
      return w
    return leaf.map_base(lambda below: over(below, w))

  params = jax.tree.map(over, adapted(), packed, is_leaf=weights.is_weight)
  check(merge.merge_as(params, mode, first))


def test_exporters_see_scaled_biases():
  """Exporters iterate over these leaves."""
  found = parts.from_params(adapted())
  merged = parts.from_params(wrap.merge(adapted()))
  assert found.keys() == merged.keys()
  for address, part in found.items():
    assert part.shape == merged[address].shape
    got, want = (
      changes.dense_weight(p.read()).array for p in (part, merged[address])
    )
    np.testing.assert_allclose(got, want, atol=1e-6, err_msg=str(address))
    scaled = str(address).endswith(("q_bias", "v_bias"))
    adapted_too = str(address).endswith(NAMES)
    change = changes.dense_weight(part.read()).base
    assert (change is not None) == (scaled or adapted_too), address


def test_plain_lora_stores_the_whole_bias(tmp_path):
  """PEFT's `bias="lora_only"`; rank 36 is all that these matrices have."""
  params, _ = to_lora.to_lora(adapted(), to_lora.Rank(36))
  check(params)
  it = base("llama_biases")
  whole = {f"layers/{i}/attention/{x}_bias" for i in range(3) for x in "qv"}
  peft.save_adapter(tmp_path, params, it.model, "x", whole=whole)
  again = peft.load_adapter(tmp_path, it.params, it.model)
  check(wrap.merge(again))


def test_rows_of_a_batch_cannot_have_one():
  with pytest.raises(UserError, match="q_bias: IA3 scales this bias"):
    row_factors.extract(adapted(), 4)


def scaled(w, b):
  """Returns a matrix under (IA)^3 with random arrays."""
  gain = np.linspace(0.5, 2, b.shape[-1], dtype=np.float32)
  return AdaptedTensor(w, {"l": gain}, method=IA3())


def test_biases_of_keys():
  """A cache that stores keys minus their bias needs it."""
  model = base("llama_biases").model
  layer = jax.tree.map(
    lambda x: x[0], base("llama_biases").params["run0"]["layer0"]["attention"]
  )
  layer |= dict(k=scaled(layer["k"], layer["k_bias"]))
  attention = model.layer_kinds()[0].attention.clone(parent=None)
  got, want = (
    attention.apply({"params": p}, jnp.arange(5)[None], method="_key_bias")
    for p in (layer, wrap.merge(layer))
  )
  assert np.abs(got).max() > 0
  chex.assert_trees_all_close(got, want, atol=1e-6)


def test_biases_of_modulations():
  told, params = methods.draw(2, 1, 5), dict(weight=methods.draw(5, 12))
  params |= dict(weight_bias=methods.draw(12, seed=4))
  params |= dict(weight=scaled(params["weight"], params["weight_bias"]))
  got, want = (
    time_embedding.AdaLN().apply({"params": p}, told, 4)
    for p in (params, wrap.merge(params))
  )
  chex.assert_trees_all_close(got, want, atol=1e-5)
