"""Plans of generation and of searches, for virtual devices of this machine."""

import dataclasses

import jax
import pytest

from experiments.core.from_scratch import FromScratch
from experiments.planning import calls, plan_decoding, plan_search
from kernels_pallas.common.chips import Chip
from research.diffusion.objective import MaskedDiffusion
from research.generation.generate import bucket
from research.generation.paging import Paging
from research.interop import rewards
from research.planning import chips
from research.prm.objective import StepReward
from research.sharding import Layout
from research.typing import UserError
from tests import support, support_plan

SIZES = dataclasses.replace(support.SIZES, window=None, tied=False)
WANTED = calls.Rows(count=4, prompt=32, length=16)
LAYERS = SIZES.depth * (
  2 * SIZES.width * SIZES.head_dim * (SIZES.heads + SIZES.kv_heads)
  + 3 * SIZES.width * SIZES.hidden
)
HEAD = SIZES.width * SIZES.vocab
SCORES = 4 * SIZES.depth * SIZES.heads * SIZES.head_dim
"""FLOPs of a pair of query and key."""
A_TOKEN = 2 * SIZES.depth * SIZES.kv_heads * SIZES.head_dim * 4
"""Bytes of a token's keys and values in float32."""


@pytest.fixture(scope="module")
def topology():
  """Two devices of known speed."""
  found = chips.topology("cpu:2")
  chip = Chip(name="c", memory=1e9, flops=1e9, bandwidth=1e9, link=1e9)
  return dataclasses.replace(found, chip=chip)


@pytest.fixture(scope="module")
def whole():
  return support_plan.experiment(Layout(data=1, tensor=2), SIZES)


def _flops(call):
  return call["useful_flops"] * call["flops"] * 2


@pytest.mark.slow
def test_a_step_of_decoding_reads_the_cache_once(topology, whole):
  found = plan_decoding.plan(whole, topology, WANTED)
  first, step = found["prefill"], found["decode"]
  keys = bucket(WANTED.prompt + WANTED.length)
  # Matrices of each token, and logits of each row's last.
  least = WANTED.count * (WANTED.prompt * 2 * LAYERS + 2 * HEAD)
  assert least < _flops(first) <= least + WANTED.count * 32 * 32 * SCORES
  least = WANTED.count * (2 * LAYERS + 2 * HEAD)
  most = least + WANTED.count * keys * SCORES
  assert least <= _flops(step) <= most
  assert 2 * step["flops"] > least
  # Beside the weights it is given keys and values of all places, in halves.
  kept = WANTED.count * keys * A_TOKEN / 2
  more = step["argument_bytes"] - first["argument_bytes"]
  assert more == pytest.approx(kept, rel=0.05)
  assert step["unknown_loops"] == 0
  seconds = first["seconds"] + 15 * step["seconds"]
  assert found["seconds"] == pytest.approx(seconds)
  assert found["tokens_per_s"] == pytest.approx(4 * 16 / seconds)


@pytest.mark.slow
def test_copies_share_the_prompt_and_its_pages(topology, whole):
  model = plan_decoding.policy(whole, topology)
  one = calls.Rows(count=1, prompt=32, length=16)
  rows = plan_decoding.calls(model, one, copies=4)
  pages = plan_decoding.calls(model, one, 4, Paging(size=16, dtype=None))
  # The prompt is read once, whatever the copies.
  prompt = 32 * 2 * LAYERS
  assert _flops(rows["prefill"]) < 1.5 * prompt
  # Two pages are shared, and each copy has one of its own.
  kept = (4 * 48 - (32 + 4 * 16)) * A_TOKEN / 2
  less = rows["decode"]["argument_bytes"] - pages["decode"]["argument_bytes"]
  assert less == pytest.approx(kept, rel=0.05)


def test_packed_weights_are_served_as_they_are():
  one = jax.ShapeDtypeStruct((4,), "float32", sharding=None)
  ids = jax.ShapeDtypeStruct((4,), "int32", sharding=None)
  found = calls.served({"w": one, "n": ids})
  assert found["w"].dtype == "bfloat16" and found["n"] is ids


def test_calls_have_the_bytes_of_the_largest():
  first = {"fits": True, "total_bytes": 9, "limit_bytes": 10}
  made = {"devices": 8, "prefill": first, "decode": first | {"total_bytes": 7}}
  want = {"fits": True, "total_bytes": 9, "limit_bytes": 10}
  assert calls.largest(made) == want
  # A step is not planned where the first call does not fit.
  nothing = {"fits": False, "total_bytes": None, "limit_bytes": None}
  assert calls.largest({"prefill": {"fits": False}}) == nothing


def _verifier(whole, sizes):
  backbone = FromScratch(sizes=sizes)
  return dataclasses.replace(
    whole,
    model=rewards.WithHead(backbone=backbone),
    objective=StepReward(),
  )


@pytest.mark.slow
def test_a_search_holds_both_models_and_adds_their_seconds(topology, whole):
  search = plan_search.parse_search("2x2x32+16")
  assert search == plan_search.SearchRows(
    rows=calls.Rows(count=2, prompt=32, length=16), copies=2
  )
  judge = _verifier(whole, SIZES)
  found = plan_search.plan(whole, judge, topology, search, batch=2)
  policy, verifier = found["policy"], found["verifier"]
  assert verifier["passes"] == 2
  least = 2 * 48 * 2 * LAYERS  # one pass over two solutions
  assert least < _flops(verifier) <= least + 2 * 48 * 48 * SCORES + 2 * 48 * 64
  seconds = policy["seconds"] + 2 * verifier["seconds"]
  assert found["seconds"] == pytest.approx(seconds)
  alone = plan_search.plan(whole, None, topology, search)
  assert found["total_bytes"] > alone["total_bytes"]
  assert found["fits"] and "verifier" not in alone


def test_memory_is_that_of_the_largest_call_beside_the_other_model(topology):
  small = dataclasses.replace(topology, chip=Chip(name="c", memory=120.0))
  # The policy's calls take 50 and 60, of them 40 of weights; the verifier 90,
  # of them 70.
  needs = [{"total_bytes": n} for n in (50, 60, 90)]
  found = plan_search.all_resident([40, 70], needs, small)
  assert found == {"total_bytes": 130, "limit_bytes": 120, "fits": False}
  assert plan_search.all_resident([40], [{"fits": False}], small) == {
    "fits": False
  }


@pytest.mark.parametrize("given", ["", "2x2", "2x0x8+8", "ax2x8+8", "2x2x8"])
def test_what_is_no_search(given):
  with pytest.raises(UserError, match="PROBLEMSxCOPIESxPROMPT"):
    plan_search.parse_search(given)


def test_models_that_neither_write_nor_score(topology, whole):
  masked = dataclasses.replace(whole, objective=MaskedDiffusion(mask_id=3))
  with pytest.raises(UserError, match="--fill"):
    plan_decoding.plan(masked, topology, WANTED)
  search = plan_search.parse_search("1x2x32+16")
  with pytest.raises(UserError, match="expected a reward model"):
    plan_search.score(whole, topology, 2, 48)
  with pytest.raises(UserError, match="expected a language model"):
    plan_decoding.plan(_verifier(whole, SIZES), topology, WANTED)
  assert search.copies == 2
