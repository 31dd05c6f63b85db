"""Bytes counted from index maps, against closed forms and a simulation."""

import itertools

import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from kernels_pallas.flash_attention.tpu.tile_sizes import Tile
from kernels_pallas.inspect import traffic
from kernels_pallas.masks import Mask


def test_a_block_moves_when_its_index_changes():
  grid = (2, 3, 4)
  maps = {
    "row": lambda i, j, k, table: (i, 0),
    "inner": lambda i, j, k, table: (j, table[k]),
    "all": lambda i, j, k, table: (k, i * j),
    "fixed": lambda i, j, k, table: (0, 0),
  }
  table = [5, 5, 6, 5]
  specs = {n: pl.BlockSpec((None, 8, 2), f) for n, f in maps.items()}
  sizes = dict.fromkeys(maps, 2)
  found = traffic.count_traffic(grid, specs, sizes, jnp.asarray(table))
  for name, f in maps.items():
    moved, last = 0, None
    for ids in itertools.product(*map(range, grid)):
      here = tuple(map(int, f(*ids, table)))
      moved, last = moved + (here != last), here
    assert found[name] == moved * 8 * 2 * 2, name


@pytest.mark.parametrize("block", [128, 256, 512])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_forward_kernels_traffic_matches_the_formula(block, head_dim):
  S = 2048
  tile = Tile(block, block, min(block, 256), 128)
  found = traffic.forward_traffic(S, head_dim, tile)
  # kernels_pallas/MATH.md 5.3: q, o once, k, v once a block of queries, bf16.
  expected = 2 * S * 2 * head_dim + S // block * 2 * S * 2 * head_dim
  assert found.total - found.bytes["lse"] == expected
  assert found.bytes["lse"] == 4 * S
  assert found.intensity == pytest.approx(block / (1 + block / S), rel=0.02)


def test_skipped_tiles_move_nothing():
  S, tile = 2048, Tile(256, 256, 256, 128)
  full = traffic.forward_traffic(S, 64, tile)
  causal = traffic.forward_traffic(S, 64, tile, mask=Mask.causal())
  n = S // 256
  # A row of tiles ends where the next begins only at its first tile of keys.
  assert causal.bytes["k"] / full.bytes["k"] == (n * (n + 1) / 2 - 1) / n**2
  assert causal.flops == 4 * 64 * S * (S + 1) // 2


def test_standard_attention_moves_its_scores_four_times():
  found = traffic.standard_traffic(1024, 128)
  assert found.total == 2 * (4 * 1024**2 + 4 * 1024 * 128)
