"""The assignment of work to blocks of a persistent GPU kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention.gpu import persistent, support
from kernels_pallas.flash_attention.gpu.problem import (
  KEYS,
  QUERIES,
  prepare,
)
from kernels_pallas.flash_attention.gpu.tile_sizes import (
  GpuTile,
  GpuTiles,
)
from kernels_pallas.flash_attention.spec import Operands, Spec
from kernels_pallas.masks import Mask


def segments(rows, length):
  """Documents of random lengths."""
  rng = np.random.default_rng([rows, length])
  cuts = rng.random((rows, length)) < 8 / length
  return jnp.asarray(np.cumsum(cuts, 1), jnp.int32)


MASKS = {
  "causal": lambda B, T: Mask.causal(),
  "full": lambda B, T: Mask.full(),
  "diffusion": lambda B, T: Mask.block_diffusion(T // 2, 32),
  "documents": lambda B, T: Mask.causal(segments=segments(B, T)),
}


def lists(name, dims, programs, streamed=KEYS):
  """[(head, row, line), ...] of each block, and tiles of each line."""
  B, N, K, T, H = dims
  spec = Spec(scale=1.0, blocks=GpuTiles(programs=programs))
  q = jnp.zeros((B, T, N, H), jnp.bfloat16)
  k = jnp.zeros((B, T, K, H), jnp.bfloat16)
  x = Operands(q, k, k, MASKS[name](B, T))
  p = prepare(spec, x, GpuTile(2, 128), streamed)
  table = np.asarray(persistent.assign_lines(p))
  table = table.reshape(persistent.num_blocks(p), -1)
  found = []
  for count, *items in table.tolist():
    assert 1 <= count <= len(items)
    rest = [divmod(item, p.lines) for item in items[:count]]
    found.append([(*divmod(one, B), line) for one, line in rest])
  visible = np.asarray(x.mask.visible(T, T))
  visible = np.broadcast_to(visible, (B, T, T))
  tiles = visible.reshape(B, T // 128, 128, T // 128, 128).any((2, 4))
  return found, tiles.sum(2 if streamed == KEYS else 1)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("streamed", [KEYS, QUERIES])
@pytest.mark.sample(5)
def test_every_line_is_done_once(name, streamed):
  B, N, K, T = 2, 6, 3, 1024
  heads = N if streamed == KEYS else K
  every = {
    (h, b, i) for h in range(heads) for b in range(B) for i in range(T // 128)
  }
  for programs in (5, 1000):
    found, _ = lists(name, (B, N, K, T, 64), programs, streamed)
    assert len(found) == min(programs, len(every))
    done = [item for one in found for item in one]
    assert len(done) == len(every) and set(done) == every


@pytest.mark.parametrize(
  ("name", "dims", "share"),
  [
    ("causal", (1, 16, 4, 2048, 64), 1.04),
    ("causal", (1, 8, 8, 4096, 64), 1.01),
    ("diffusion", (1, 24, 24, 2048, 64), 1.1),
    ("documents", (2, 24, 3, 1024, 64), 1.15),
  ],
)
def test_blocks_have_balanced_work(name, dims, share):
  """By tiles, against the lower bound: the mean, or one line."""
  found, work = lists(name, dims, 132)
  busy = [sum(work[b, i] for _, b, i in one) for one in found]
  best = max(sum(busy) / len(busy), work.max())
  assert max(busy) <= share * best
  # In text order, some blocks would have more.
  text = sorted(item for one in found for item in one)
  naive = [sum(work[b, i] for _, b, i in text[n::132]) for n in range(132)]
  assert max(naive) > max(busy)


def test_a_head_is_finished_before_its_cache_is_needed(monkeypatch):
  """Keys and values of two heads at a time, longest lines first."""
  B, N, K, T, H = 1, 8, 4, 1024, 64
  monkeypatch.setattr(persistent, "L2_BYTES", 2 * T * 2 * H * 2)
  found, work = lists("causal", (B, N, K, T, H), 3)
  for one in found:
    pairs = [h // (N // K) // 2 for h, _, _ in one]
    assert pairs == sorted(pairs) and set(pairs) == {0, 1}
    for pair in (0, 1):
      costs = [work[b, i] for h, b, i in one if h // (N // K) // 2 == pair]
      assert costs == sorted(costs, reverse=True)


def test_many_lines_are_assigned_round_robin(monkeypatch):
  monkeypatch.setattr(persistent, "MAX_BALANCED_LINES", 0)
  found, work = lists("causal", (1, 8, 8, 4096, 64), 132)
  assert sum(map(len, found)) == 8 * 32
  busy = [sum(work[b, i] for _, b, i in one) for one in found]
  assert max(busy) <= 1.04 * max(sum(busy) / 132, work.max())


def test_programs_are_the_devices_multiprocessors(monkeypatch):
  class Device:
    device_kind = "NVIDIA H100 80GB HBM3 MIG 3g.40gb"
    core_count = 60

  monkeypatch.setattr(jax, "devices", lambda: [Device()])
  for kind, count in {
    Device.device_kind: 60,
    "NVIDIA H100 80GB HBM3": 132,
    "NVIDIA H100 PCIe": 114,
    "NVIDIA H200": 132,
    "NVIDIA GH200 480GB": 132,
    "NVIDIA H20": 78,
  }.items():
    assert support.num_multiprocessors(kind) == count
