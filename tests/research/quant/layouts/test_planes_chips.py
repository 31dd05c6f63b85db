"""A decode step over a packed model in planes, compiled for a TPU."""

import re

import jax
import jax.numpy as jnp
import pytest

from research.planning import chips
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.layouts import accelerator_layout
from research.quant.quantize import Quantize
from tests import support

pytestmark = pytest.mark.chips

SIZES = dict(depth=2, width=1024, hidden=2048, head_dim=128, vocab=256)


@pytest.mark.parametrize(
  "format", [Affine(block=64), Codebook()], ids=lambda f: f.name
)
def test_a_decode_step_multiplies_packed_weights(format):
  model = support.model(**SIZES, heads=8, kv_heads=2)
  chip = chips.topology("v5e:1x1").devices[0]
  there = jax.sharding.SingleDeviceSharding(chip)

  def shapes():
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = model.init(jax.random.key(0), tokens)["params"]
    return Quantize(format=format)(params)

  params = jax.eval_shape(shapes)
  made = jax.eval_shape(
    lambda p: accelerator_layout.to_planes(p, gpu=False), params
  )

  def step(params, tokens):
    return model.apply({"params": params}, tokens)[0]

  def compiled(params):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    given = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
      (params, tokens),
    )
    return jax.jit(step).lower(*given).compile()

  found = compiled(made)
  calls = re.findall(r'custom_call_target="tpu_custom_call"', found.as_text())
  assert len(calls) == 7 * SIZES["depth"]
  # The largest matrix, [1024, 2048], is decoded nowhere.
  assert found.memory_analysis().temp_size_in_bytes < 4 * 1024 * 2048 / 2
