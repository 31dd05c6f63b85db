"""Chip specifications against JAX's, and invalid topologies."""

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import chips as chips_table
from research.planning import chips, gpus
from research.typing import UserError


@pytest.mark.parametrize("name", chips_table.TPUS)
def test_the_data_sheet_is_near_that_of_jax(name):
  version = {
    "v4": pltpu.ChipVersion.TPU_V4,
    "v5e": pltpu.ChipVersion.TPU_V5E,
    "v5p": pltpu.ChipVersion.TPU_V5P,
    "v6e": pltpu.ChipVersion.TPU_V6E,
    "tpu7x": pltpu.ChipVersion.TPU_7X,
  }[name]
  cores = version.num_physical_tensor_cores_per_chip
  theirs = pltpu.get_tpu_info_for_chip(version, 1)
  ours = chips_table.TPUS[name]
  # Sources differ by 12% on v5p's bandwidth, by less elsewhere.
  for mine, of_a_core in (
    (ours.flops, theirs.bf16_ops_per_second),
    (ours.bandwidth, theirs.mem_bw_bytes_per_second),
    (ours.memory, theirs.hbm_capacity_bytes),
  ):
    assert mine == pytest.approx(cores * of_a_core, rel=0.13)


def test_this_machine_in_parts():
  found = chips.topology("cpu:4")
  assert found.devices == jax.devices("cpu")[:4]
  assert found.chip.flops is None
  two = chips.topology("cpu:2")
  assert two.chip.memory == pytest.approx(2 * found.chip.memory)


@pytest.mark.parametrize(
  "name",
  ["cpu", "cpu:0", "gpu:8", "v5e", "v5e:4x", "", "v5e:4x4 ", "v9x:4x4", "v5:8"],
)
def test_what_is_no_topology(name, monkeypatch):
  """Also where libtpu, which no name would need, is not installed."""
  monkeypatch.setattr(chips, "has_tpu_compiler", lambda: False)
  with pytest.raises(UserError, match=r"a TPU pod .*v4, v5e, v5p, v6e, tpu7x"):
    chips.topology(name)


def test_more_devices_than_this_process_has():
  with pytest.raises(UserError, match="JAX_NUM_CPU_DEVICES=64"):
    chips.topology("cpu:64")


def test_a_pod_without_its_compiler(monkeypatch):
  monkeypatch.setattr(chips, "has_tpu_compiler", lambda: False)
  with pytest.raises(UserError, match=r"pip install 'jax\[tpu\]'"):
    chips.topology("v5e:4x4")


@pytest.mark.parametrize(
  ("name", "want"),
  [("h100:8", ("h100", 1, 8)), ("b200:4x8", ("b200", 4, 8))],
)
def test_hosts_of_gpus(name, want):
  assert gpus.hosts(name) == want


@pytest.mark.parametrize("name", ["h100", "h100:0", "h100:2x", "h100:1x2x8"])
def test_what_is_no_host_of_gpus(name):
  with pytest.raises(UserError, match="h100:4x8"):
    chips.topology(name)


def test_gpus_without_their_compiler(monkeypatch):
  monkeypatch.setattr(gpus.gpu, "missing", lambda: "the plugin is missing")
  with pytest.raises(UserError, match="(?s)plugin is missing.*cuda-compile"):
    chips.topology("h100:8")


def test_a_chip_without_a_description_is_a_relative_with_its_own_memory():
  like, own = gpus.description("h100"), gpus.description("h200")
  lines = zip(like.splitlines(), own.splitlines(), strict=True)
  changed = {b.strip().split(":")[0]: b for a, b in lines if a != b}
  assert set(changed) == {
    "memory_bandwidth",
    "device_memory_size",
    "device_description_str",
  }
  assert "4800000000000" in changed["memory_bandwidth"]
  assert "141000000000" in changed["device_memory_size"]
  # CUDA takes some of the 80 GiB before XLA sees them.
  assert gpus.usable("h100").memory < chips_table.CHIPS["h100"].memory
