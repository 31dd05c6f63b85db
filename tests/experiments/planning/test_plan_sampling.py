"""Plans of sampling's calls, for virtual devices of this machine."""

import dataclasses

import pytest

from experiments.planning import calls, plan_sampling
from research.diffusion.objective import MaskedDiffusion
from research.planning import chips
from research.sharding import Layout
from research.typing import UserError
from tests import support, support_plan

SIZES = dataclasses.replace(support.SIZES, window=None, tied=False)


@pytest.mark.slow
def test_a_block_s_calls_do_less_than_a_row_s():
  layout = Layout(data=2, tensor=2)
  whole = support_plan.experiment(layout, SIZES)
  whole = dataclasses.replace(whole, objective=MaskedDiffusion(mask_id=3))
  wanted = calls.Rows(count=4, prompt=48, length=16)
  found = plan_sampling.plan(whole, chips.topology("cpu:4"), wanted, block=8)
  # A matrix of a layer takes 2 FLOPs a token and weight; the head is asked for
  # the block alone.
  width, head = SIZES.width, SIZES.width * SIZES.vocab
  layers = SIZES.depth * (
    2 * width * SIZES.head_dim * (SIZES.heads + SIZES.kv_heads)
    + 3 * width * SIZES.hidden
  )
  for name, tokens in (("first", 64), ("again", 8)):
    call = found[name]
    least = wanted.count * (tokens * 2 * layers + 8 * 2 * head)
    # Scores and values of attention: all 64 keys, or the first of the tiles
    # whose number depends on the mask.
    seen = 4 * SIZES.depth * SIZES.heads * SIZES.head_dim * 64
    most = least + wanted.count * tokens * seen
    model_flops = call["useful_flops"] * call["flops"] * found["devices"]
    assert least < model_flops <= most * 1.001, name
    assert call["fits"]
  assert found["first"]["argument_bytes"] < found["again"]["argument_bytes"]


@pytest.mark.parametrize("given", ["", "16", "4x8", "0x8+4", "4x8+x", "4x-1+4"])
def test_rows_that_are_none(given):
  with pytest.raises(UserError, match="expected ROWSxPROMPT"):
    calls.rows(given, "fill")


def test_rows():
  want = calls.Rows(count=16, prompt=1024, length=256)
  assert calls.rows("16x1024+256") == want


def test_next_token_prediction_fills_nothing():
  whole = support_plan.experiment(Layout(data=1))
  with pytest.raises(UserError, match="NextToken, which has no mask_id"):
    plan_sampling.plan(whole, chips.topology("cpu:1"), calls.rows("4x8+32"))
