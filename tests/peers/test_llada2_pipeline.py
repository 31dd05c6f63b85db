"""Equal tokens: Heptad and diffusers' whole LLaDA 2 pipeline, on one model."""

import json
import types

import make_diffusion
import numpy as np
import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from make_models import build, float64

BLOCK, STEPS, NEW, MASK = 4, 8, 11, 46
CASES = {
  "threshold": dict(value=0.15),
  "surest_only": dict(value=1.0),
  "edited": dict(value=0.25, edit=0.2),
}
PROMPT = (3, 17, 8, 30, 5, 21)
"""Its last two tokens stand in the first block that is filled."""


class Peer(torch.nn.Module):
  """GLM-4-MoE in fp64, blocks seeing those before and themselves."""

  def __init__(self):
    super().__init__()
    config, _ = make_diffusion.CASES["llada2"]
    seed = list(make_diffusion.CASES).index("llada2")
    with float64():
      tensors = make_diffusion.draw(config, seed)
      self.inner = build(config, tensors, torch.float64)

  @property
  def device(self):
    return torch.device("cpu")

  def forward(self, tokens, attention_mask, position_ids):
    length = tokens.shape[1]
    number = torch.arange(length) // BLOCK
    hidden = torch.zeros(1, 1, length, length, dtype=torch.float64)
    lowest = torch.finfo(torch.float64).min
    hidden[:, :, number[:, None] < number[None, :]] = lowest
    with float64(), torch.no_grad():
      logits = self.inner(
        tokens, attention_mask=hidden, position_ids=position_ids,
        use_cache=False,
      ).logits  # fmt: skip
    logits[..., MASK] = -1e30
    return types.SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def ours(shared_heptad):
  whole = -(-(len(PROMPT) + NEW) // BLOCK) * BLOCK
  first = len(PROMPT) // BLOCK * BLOCK
  length = whole - first
  cases = [
    dict(
      name=name,
      policy="refine",
      length=length,
      block=BLOCK,
      steps=STEPS * length // BLOCK,
      **case,
    )
    for name, case in CASES.items()
  ]
  shared_heptad.hurry()
  return shared_heptad.bridge(
    "continue",
    make_diffusion.TO / "llada2",
    cases=json.dumps(cases),
    prompt=np.array(PROMPT),
  )


@pytest.mark.parametrize("case", CASES)
def test_the_same_tokens(case, ours):
  given = CASES[case]
  pipeline = LLaDA2Pipeline(
    model=Peer(), scheduler=BlockRefinementScheduler(BLOCK, STEPS)
  )
  pipeline.set_progress_bar_config(disable=True)
  tokens, _ = pipeline(
    input_ids=torch.tensor([PROMPT]),
    gen_length=NEW,
    block_length=BLOCK,
    num_inference_steps=STEPS,
    threshold=given["value"],
    editing_threshold=given.get("edit"),
    eos_early_stop=False,
    mask_token_id=MASK,
    output_type="seq",
    return_dict=False,
  )
  made = ours[f"{case}/tokens"][0, len(PROMPT) :][:NEW]
  np.testing.assert_array_equal(made, tokens[0].numpy())
  # By the cache of finished blocks or without it.
  np.testing.assert_array_equal(
    ours[f"{case}/tokens"], ours[f"{case}/uncached"]
  )


def test_cases_differ(ours):
  made = {ours[f"{case}/tokens"].tobytes() for case in CASES}
  assert len(made) == len(CASES)
