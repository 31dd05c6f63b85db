"""The search takes the cheapest tile that compiles; its table is read."""

import dataclasses
import json

import numpy as np
import pytest

from kernels_pallas.flash_attention.tpu import tpu_tile_sizes
from kernels_pallas.inspect import __main__ as command
from kernels_pallas.inspect import bench, build, chips, report, schedule, search
from kernels_pallas.inspect.build import Job
from kernels_pallas.inspect.report import Measurement

JOB = Job("flash_attention", "v5p", "forward", 0, 128, "bfloat16", ())
KINDS = [chip.kind for chip in chips.CHIPS.values()]


def cost(blocks):
  """Least at parts of 128 x 256; larger tiles cost less."""
  q, kv, *parts = blocks
  return abs(parts[0] - 128) + abs(parts[1] - 256) + 1e6 / q / kv


def measurement(job):
  """A measurement of `cost`, as if a kernel of one bundle ran so often."""
  value = cost(job.blocks)
  kernel = schedule.Schedule(
    name="kernel", slots=("MXU", "VSTORE:SPILL"), capacity=np.array([2, 1]),
    use=np.array([[1, 0]]), weight=np.array([value]), macs=1.0, vmem=2**20,
  )  # fmt: skip
  return Measurement(job, (kernel,), value, value, executed=2)


@pytest.fixture(name="tried")
def _tried(monkeypatch):
  """Measurements without a compiler, which refuses more than 2^21 scores."""
  tried = []

  def measure(job, keep=None):
    tried.append(tuple(job.blocks))
    if job.blocks[0] * job.blocks[1] > 2**21:
      raise ValueError("does not fit")
    return measurement(job)

  monkeypatch.setattr(report, "measure", measure)
  monkeypatch.setattr(build, "missing", lambda maker="": None)
  return tried


def test_search_takes_the_cheapest_that_compiles(tried):
  told = {}
  found = search.search(JOB, told.__setitem__)
  assert found.job.blocks == (2048, 1024, 128, 256)
  assert found.job.length == 4 * 2048
  # The largest tile was tried, and refused.
  assert told[2048, 2048, 128, 256] == "does not fit"
  assert list(told) == tried


def test_nothing_compiles(monkeypatch):
  def refuse(job, keep=None):
    raise ValueError("no")

  monkeypatch.setattr(report, "measure", refuse)
  assert search.search(JOB, lambda *_: None) is None


@pytest.mark.parametrize(
  ("direction", "backward", "name"),
  [("forward", "fused", "forward"), ("backward", "fused", "dkv"),
   ("backward", "split", "dq")],
)  # fmt: skip
def test_what_is_written_is_read(
  tmp_path, monkeypatch, direction, backward, name
):
  path = tmp_path / "tiles.json"
  before = tpu_tile_sizes.TABLE.read_text()
  path.write_text(before)
  blocks = (512, 384, 256, 128)
  job = dataclasses.replace(
    JOB, direction=direction, backward=backward, blocks=blocks
  )
  search.write(measurement(job), path)
  lines = zip(before.splitlines(), path.read_text().splitlines(), strict=True)
  assert sum(a != b for a, b in lines) == 1
  monkeypatch.setattr(
    tpu_tile_sizes, "_table", lambda: json.loads(path.read_text())
  )
  tiles = tpu_tile_sizes.for_device(job.chip.kind, 128, "bfloat16")
  assert dataclasses.astuple(getattr(tiles, name)) == blocks


def test_the_table_is_written_as_search_writes_it():
  text = tpu_tile_sizes.TABLE.read_text()
  assert search._text(json.loads(text)) == text


@pytest.mark.parametrize("kind", [*KINDS, "TPU v99"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 192, 256, 300, 512, 4096])
def test_every_device_and_head_dim_has_tiles_that_a_tpu_takes(
  kind, dtype, head_dim
):
  tiles = tpu_tile_sizes.for_device(kind, head_dim, dtype)
  for tile in (tiles.forward, tiles.dkv, tiles.dq):
    assert not tile.q_part % 128 and not tile.kv_part % 128
    # Blocks of q, k, v, o, twice, within the memory of the smallest.
    if kind in KINDS:
      size = 2 if dtype == "bfloat16" else 4
      wide = max(128, head_dim)
      at_least = 2 * tile.q_part * wide * size
      assert max(4 * (tile.q + tile.kv) * wide * size, at_least) < 2**27


@pytest.mark.parametrize(("head_dim", "like"), [(8, 64), (80, 128), (200, 256)])
def test_other_head_dims_have_the_tiles_of_the_next(head_dim, like):
  found, expected = (
    tpu_tile_sizes.for_device("TPU v5", dim) for dim in (head_dim, like)
  )
  assert found == expected


def test_larger_head_dims_have_smaller_tiles():
  at = lambda dim: tpu_tile_sizes.for_device("TPU v5", dim).forward  # noqa: E731
  assert at(512).q * at(512).kv * 4 == at(256).q * at(256).kv


def test_the_command_searches_and_says_where_it_wrote(
  tried, monkeypatch, capsys
):
  written = []
  monkeypatch.setattr(search, "write", written.append)
  assert command.main(["--target=v5p", "--search"]) == 0
  assert written[0].job.blocks == (2048, 1024, 128, 256)
  out = capsys.readouterr().out
  assert "does not fit" in out and str(tpu_tile_sizes.TABLE) in out
  assert json.loads(out.splitlines()[-1])["kernel"] == "flash_attention"


def test_the_bench_has_all_rows_that_compile_and_compares_fairly(tried, capsys):
  assert bench.main(["--targets", "v5p", "v6e"]) == 0
  *table, last = capsys.readouterr().out.splitlines()
  rows = json.loads(last)["rows"]
  # Forward, the kernels' tiles are of 2^22 scores.
  assert [(row["target"], row["direction"]) for row in rows] == [
    ("v5p", "backward"), ("v6e", "backward"),
  ]  # fmt: skip
  for row in rows:
    assert row["reference"] <= (row["same"] or row["reference"])
  lines = [line for line in table if line.startswith("| v")]
  assert len(lines) == 2 and all(line.count("|") == 13 for line in lines)


def test_a_reference_that_is_not_installed_is_named(monkeypatch, capsys):
  monkeypatch.setattr(
    build.importlib.util, "find_spec", lambda name: name != "tokamax" or None
  )
  assert bench.main(["--compare", "tokamax"]) == 1
  assert "pip install tokamax" in capsys.readouterr().err
