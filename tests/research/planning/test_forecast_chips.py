"""The forecast's total memory is what a TPU compiler checks."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from research.planning import chips, forecast, text

pytestmark = pytest.mark.chips

ROWS, WIDTH, INNER = 2048, 4096, 8192


def _loss(x, ws):
  @jax.checkpoint
  def layer(x, w):
    return jax.nn.relu(jax.nn.relu(x @ w) @ w.T), None

  return jax.lax.scan(layer, x, ws)[0].sum().astype(jnp.float32)


def _compiled(layers):
  device = chips.topology("v5e:1x1").devices[0]
  where = SingleDeviceSharding(device)
  shapes = (ROWS, WIDTH), (layers, WIDTH, INNER)
  x, ws = (
    jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=where) for s in shapes
  )
  return jax.jit(jax.grad(_loss)).lower(x, ws).compile()


def test_the_sum_is_what_a_program_is_refused_by():
  fits = _compiled(190).memory_analysis()
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    _compiled(210)
  # Each layer more is its weights and the input that is kept for it.
  more = 20 * 2 * (WIDTH * INNER + ROWS * WIDTH)
  found = text.parse_out_of_memory(str(error.value))
  # The message has two digits behind the point.
  unit = 0.005 * 2**30
  assert found["total_bytes"] == pytest.approx(
    forecast.peak_bytes(fits) + more, abs=unit
  )
  # The parts are more than that, on a TPU.
  parts = fits.argument_size_in_bytes + fits.output_size_in_bytes
  assert parts + fits.temp_size_in_bytes > forecast.peak_bytes(fits) + 2 * unit
