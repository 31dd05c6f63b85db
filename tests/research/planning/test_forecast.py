"""Memory of a compiled program against the local compiler's analysis."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common.chips import Chip
from research.planning import cost, forecast
from research.planning.chips import Topology


@pytest.fixture(scope="module")
def compiled():
  def loss(x, w):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
    return x.sum()

  def update(x, w):
    return x, w - jax.grad(loss, 1)(x, w)

  x, w = (jax.ShapeDtypeStruct(s, "float32") for s in ((64, 96), (5, 96, 96)))
  return jax.jit(update, donate_argnums=1).lower(x, w).compile()


@pytest.fixture(scope="module")
def usage(compiled):
  return compiled.memory_analysis()


SIZES = "argument", "output", "alias", "temp"


def _sizes(usage):
  names = [f"{name}_size_in_bytes" for name in SIZES]
  return {name: getattr(usage, name) for name in names}


def test_what_is_held_is_the_sum_of_its_parts(usage):
  of = list(_sizes(usage).values())
  arguments, outputs, kept, temporaries = of
  # Weights are donated and x is not; each product is kept for the gradient.
  assert arguments == 4 * (64 * 96 + 5 * 96 * 96)
  assert outputs - kept >= 4 * 64 * 96
  assert temporaries >= 4 * 5 * 64 * 96
  # On a CPU both accounts agree, but for a few scalars.
  found = forecast.peak_bytes(usage)
  assert found == pytest.approx(
    arguments + outputs - kept + temporaries, abs=64
  )


def test_what_is_donated_takes_no_memory_again(compiled, usage):
  devices = jax.devices()[:1]
  mesh = jax.sharding.Mesh(devices, ("data",))
  chip = Chip(name="small", memory=1e6)
  topology = Topology(name="one", devices=devices, chip=chip)
  found = forecast.forecast(compiled, mesh, topology).memory
  arguments, outputs, kept, temporaries = _sizes(usage).values()
  assert (found.arguments, found.outputs) == (arguments, outputs - kept)
  assert found.temporaries == pytest.approx(temporaries, abs=64)
  parts = found.arguments + found.outputs + found.temporaries
  assert found.total == parts + usage.generated_code_size_in_bytes
  assert found.limit == 1e6 and found.fits == (found.total <= 1e6)


def test_where_the_compiler_has_no_sum_it_is_made(usage):
  without = types.SimpleNamespace(**_sizes(usage))
  assert forecast.peak_bytes(without) == pytest.approx(
    forecast.peak_bytes(usage), abs=64
  )


def test_the_compilers_sum_wins_and_its_rest_is_temporaries(usage):
  other = types.SimpleNamespace(
    **_sizes(usage), total_allocation_bytes=forecast.peak_bytes(usage) - 1000
  )
  assert forecast.peak_bytes(other) == forecast.peak_bytes(usage) - 1000


GPU = Chip(name="gpu", memory=1e9, link=100.0, network=10.0)
TPU = Chip(name="tpu", memory=1e9, link=100.0)


# Sixteen devices gather, reduce, exchange or pass on 1,600 bytes: those of two
# hosts get half of it over the network, by eight ports of 10 B/s a host.
@pytest.mark.parametrize(
  ("kind", "operand", "within", "between"),
  [
    ("all-gather", 100, 15.0, 800 / 80),
    ("reduce-scatter", 1600, 15.0, 800 / 80),
    ("all-reduce", 1600, 30.0, 1600 / 80),
    ("all-to-all", 1600, 15.0, 800 / 10),
    ("collective-permute", 1600, 16.0, 1600 / 10),
  ],
)
def test_seconds_of_links_and_of_the_network(kind, operand, within, between):
  one = cost.Collective(kind, (), operand, tuple(range(16)), 16)
  assert forecast.link_seconds(TPU, one, hosts=2) == within
  assert forecast.link_seconds(GPU, one, hosts=1) == within
  assert forecast.link_seconds(GPU, one, hosts=2) == max(within, between)
  unknown = Chip(name="unknown", memory=1e9)
  assert forecast.link_seconds(unknown, one, hosts=1) is None


def test_hosts_are_those_along_the_axes_of_a_group():
  hosts = [[types.SimpleNamespace(process_index=h)] * 4 for h in (0, 1)]
  mesh = types.SimpleNamespace(
    devices=np.array(hosts, object), axis_names=("data", "fsdp")
  )
  assert forecast.hosts_along(("fsdp",), mesh) == 1
  assert forecast.hosts_along(("data",), mesh) == 2
  assert forecast.hosts_along(("data", "fsdp"), mesh) == 2
