"""Tests data-dependent initialisations and random positions.

Singular triples, columns of QR, explained variance and torch's random places,
each against numpy or a vector; the laws of all methods are `test_methods`.
"""

import functools
import json
import pathlib

import chex
import numpy as np
import pytest

from research.lora import torch_rng
from research.lora.adapted import AdaptedTensor
from research.lora.methods import eva
from research.lora.methods.lora import LoRA
from research.lora.methods.svd_init import DecompositionInit, OLoRA, PiSSA
from research.typing import UserError
from tests.research.lora.methods import test_methods as laws

RESIDUAL = [m for m in laws.METHODS if isinstance(m, DecompositionInit)]


@pytest.mark.parametrize("method", RESIDUAL, ids=laws.label)
def test_data_dependent_inits_are_exported_as_lora_of_twice_the_rank(method):
  t = laws.moved(method)
  plain, arrays = method.exported(t.arrays)
  assert type(plain) is LoRA and plain.rank == 8
  chex.assert_trees_all_close(plain.scale, method.scale, rtol=1e-12)
  other = AdaptedTensor(t.w, arrays, method=plain)
  laws.close(other.delta(), t.delta())


@pytest.mark.parametrize("part", ["largest", "smallest"])
def test_pissa_takes_singular_triples_out_of_the_weight(part):
  w = np.asarray(laws.base()[0], np.float64)
  t = laws.one(laws.fresh(PiSSA(rank=4, part=part), laws.base()))
  start = t.method.scale * np.asarray(t.fixed["a0"], np.float64).T
  left = np.linalg.svd(w - start @ np.asarray(t.fixed["b0"], np.float64))[1]
  want = np.linalg.svd(w)[1]
  want = want[4:] if part == "largest" else want[:-4]
  np.testing.assert_allclose(left[: len(want)], want, atol=1e-5)
  assert left[len(want) :].max() < 1e-5


def test_olora_takes_the_first_columns_of_qr():
  t = laws.one(laws.fresh(OLoRA(rank=4), laws.base()))
  w = np.asarray(laws.base()[0], np.float64).T
  b = np.asarray(t.fixed["b0"], np.float64)
  np.testing.assert_allclose(b @ b.T, np.eye(4), atol=1e-6)
  # The first four columns of [out, in] are wholly theirs.
  np.testing.assert_allclose((b.T @ t.fixed["a0"])[:, :4], w[:, :4], atol=1e-6)


def test_eva_gives_ranks_to_the_directions_that_explain_most():
  explained = {"p": [0.6, 0.3, 0.05], "q": [0.4, 0.02], "r": [0.01, 0.0]}
  explained = {k: np.array(v) for k, v in explained.items()}
  assert eva.ranks(explained, 1) == {"p": 2, "q": 1, "r": 0}


@pytest.mark.parametrize(
  "seed, total, first",
  [
    (777, 30, [5, 28, 25, 8, 19, 7]),
    (0, 100_000, [36044, 73702, 76369, 2549, 52523, 32634]),
  ],
)
def test_positions_are_torchs(seed, total, first):
  """Vectors of `torch.randperm` with a seeded generator, torch 2.x on CPU."""
  assert torch_rng.randperm_prefix(seed, total, len(first)).tolist() == first


@functools.cache
def permutations():
  """Returns torch's golden permutations (`make_randperm`)."""
  folder = pathlib.Path(__file__).parents[3] / "golden"
  return json.loads((folder / "randperm.json").read_text())


def test_torchs_algorithm_for_long_permutations(monkeypatch):
  """From that length on; in chunks, and truncated."""
  golden = permutations()
  assert golden["bound"] == torch_rng._LONG
  monkeypatch.setattr(torch_rng, "_PIECE", 300)
  for seed, want in golden["inside_out"].items():
    monkeypatch.setattr(torch_rng, "_LONG", len(want))
    for count in (len(want), 40, 1):
      got = torch_rng.randperm_prefix.__wrapped__(int(seed), len(want), count)
      assert got.tolist() == want[:count]


@pytest.mark.parametrize(
  "total",
  [torch_rng._LONG - 1, pytest.param(torch_rng._LONG, marks=pytest.mark.slow)],
)
def test_positions_of_a_large_matrix_are_torchs(total):
  """A down_proj of Llama 3 70B, say, has 234,881,024 entries."""
  for seed, want in permutations()["randperm"][str(total)].items():
    got = torch_rng.randperm_prefix(int(seed), total, len(want))
    assert got.tolist() == want


def test_positions_beyond_int32_are_refused():
  with pytest.raises(UserError, match="2,147,483,648 entries, some of which"):
    torch_rng.randperm_prefix(0, 2**31, 5)
