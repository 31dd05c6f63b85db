"""Equal tokens: Heptad's sampler, the loops of `diffusion_loops`, diffusers."""

import functools
import json

import diffusion_loops as loops
import make_diffusion
import numpy as np
import pytest
import torch
from diffusers import BlockRefinementScheduler
from make_models import build, float64
from transformers import DynamicCache

MASK = {"llada": 46, "dream": 39}
ENDS = {"llada": (41, 7), "dream": (38, 31)}
ROWS, PROMPT = 3, 5

CASES = {
  "one_block": dict(length=12, block=12),
  "fewer_steps": dict(length=12, block=12, steps=5),
  "blocks": dict(length=12, block=4),
  "blocks_fewer_steps": dict(length=12, block=4, steps=6),
  "guided": dict(length=12, block=4, steps=6, cfg=1.5),
  "random": dict(length=12, block=6, steps=6, select="random"),
  "hot": dict(length=12, block=6, steps=6, temperature=0.7),
  "hot_random": dict(length=12, block=12, temperature=1.0, select="random"),
  "never_end": dict(length=12, block=4, steps=6, ends="never"),
  "end_last": dict(length=12, block=6, steps=6, ends="last"),
  "threshold": dict(length=12, block=6, policy="threshold", value=0.3),
  "factor": dict(length=12, block=6, policy="factor", value=2.0),
  "prefix": dict(length=12, block=4, cache="prefix"),
  "dual": dict(length=12, block=4, cache="dual"),
  "prefix_threshold": dict(
    length=12, block=4, policy="threshold", value=0.3, cache="prefix"
  ),
}

DREAM = {
  "maskgit_plus": dict(select="max"),
  "topk_margin": dict(select="margin"),
  "entropy": dict(select="entropy"),
}
"""Its algorithms that take the surest places."""

DREAM_STEPS = (1, 5, 12, 20)


class Peer:
  """transformers' model in fp64, all tokens seeing each other."""

  def __init__(self, name: str):
    config, _ = make_diffusion.CASES[name]
    number = list(make_diffusion.CASES).index(name)
    with float64():
      tensors = make_diffusion.draw(config, number)
      self.model = build(config, tensors, torch.float64)
    self.shift = name == "dream"

  def __call__(self, tokens):
    logits, _ = self.read(tokens, 0, None)
    if self.shift:
      logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    return logits

  def read(self, tokens, first, past):
    cache = DynamicCache()
    for i, layer in enumerate(past or ()):
      cache.update(*layer, i)
    rows, length = tokens.shape
    keys = cache.get_seq_length() + length
    with float64(), torch.no_grad():
      out = self.model(
        tokens,
        attention_mask=torch.zeros(rows, 1, length, keys, dtype=torch.float64),
        position_ids=torch.arange(first, first + length)[None],
        past_key_values=cache,
        use_cache=True,
      )
    layers = out.past_key_values.layers
    return out.logits, [(layer.keys, layer.values) for layer in layers]


peer = functools.cache(Peer)


def prompts(name: str) -> np.ndarray:
  rng = np.random.default_rng(3)
  return rng.integers(0, MASK[name] - 8, (ROWS, PROMPT)).astype(np.int32)


def given_of(name: str, case: str) -> dict:
  """Returns a case with the ends of a model, where it speaks of ends."""
  given = dict(CASES[case])
  return given | ({"end": ENDS[name]} if "end" in case else {})


def asked(cases: dict) -> str:
  return json.dumps(
    [{"policy": "quota", **case, "name": name} for name, case in cases.items()]
  )


@pytest.fixture(scope="module", params=["llada", "dream"])
def sampled(request, shared_heptad):
  """Returns (which model, what Heptad's sampler made of every case)."""
  cases = {case: given_of(request.param, case) for case in CASES} | {
    f"{name}_{steps}": case
    | dict(length=12, block=12, steps=steps, plan="dream")
    for name, case in DREAM.items()
    for steps in DREAM_STEPS
  }
  shared_heptad.hurry()
  got = shared_heptad.bridge(
    "sample",
    make_diffusion.TO / request.param,
    cases=asked(cases),
    prompts=prompts(request.param),
  )
  return request.param, got


@pytest.mark.parametrize("case", CASES)
def test_lladas_loop(case, sampled):
  """Also of Dream's model: its logits are those of the place before."""
  name, got = sampled
  given = given_of(name, case)
  random = given.pop("select", None) == "random"
  wanted = loops.Wanted(
    **given,
    remasking="random" if random else "low_confidence",
    gumbel=_noise(got, f"{case}/gumbel"),
    uniform=_noise(got, f"{case}/uniform"),
  )
  tokens, calls = loops.llada(
    peer(name), torch.from_numpy(prompts(name)).long(), MASK[name], wanted
  )
  np.testing.assert_array_equal(got[f"{case}/tokens"], tokens.numpy())
  # LLaDA puts both passes of guidance into one batch.
  each = 2 if "cfg" in CASES[case] else 1
  assert int(got[f"{case}/calls"]) == each * calls


@pytest.mark.parametrize("steps", DREAM_STEPS)
@pytest.mark.parametrize("case", DREAM)
def test_dreams_loop(case, steps, sampled):
  name, got = sampled
  prompt = torch.from_numpy(prompts(name)).long()
  want = loops.dream(peer(name), prompt, MASK[name], 12, steps, case)
  np.testing.assert_array_equal(got[f"{case}_{steps}/tokens"], want.numpy())


def test_dreams_origin(shared_heptad):
  """Its first algorithm, which fills places by chance, at temperature 1."""
  steps, first = 6, prompts("dream")
  got = shared_heptad.bridge(
    "ancestral",
    make_diffusion.TO / "dream",
    prompts=first,
    steps=steps,
    length=12,
  )
  want = loops.dream(
    peer("dream"),
    torch.from_numpy(first).long(),
    MASK["dream"],
    12,
    steps,
    "origin",
    torch.from_numpy(got["uniform"]),
    torch.from_numpy(got["gumbel"]),
  )
  np.testing.assert_array_equal(got["tokens"], want.numpy())


def _noise(got, name):
  return torch.from_numpy(got[name]) if name in got else None


def test_cases_differ(sampled):
  """Or a rule that does nothing would pass."""
  _, got = sampled
  made = {case: got[f"{case}/tokens"].tobytes() for case in CASES}
  for one, other in (
    ("one_block", "fewer_steps"),
    ("blocks_fewer_steps", "guided"),
    ("blocks_fewer_steps", "never_end"),
    ("fewer_steps", "hot"),
  ):
    assert made[one] != made[other], (one, other)
  calls = {case: int(got[f"{case}/calls"]) for case in CASES}
  assert min(calls["threshold"], calls["factor"]) < 12
  assert len({made[case] for case in ("blocks", "prefix", "dual")}) == 3


REFINED = {
  "quota": dict(value=1.0, steps=4),
  "threshold": dict(value=0.5, steps=8),
  "low_threshold": dict(value=0.2, steps=8),
  "edited": dict(value=0.4, steps=12, edit=0.3),
  "edited_after_a_prompt": dict(
    value=0.4, steps=8, edit=0.3, given=[3, 9, 1, 2]
  ),
  "edited_twice_when_full": dict(value=1e-9, steps=8, edit=0.1, edit_steps=2),
}
BLOCK, STEPS = 12, 16


def table() -> np.ndarray:
  """Returns logits of every step, `[S, 1, K, V]`; they settle in the end."""
  rng = np.random.default_rng(11)
  moving = rng.standard_normal((STEPS, 1, BLOCK, 48))
  last = rng.standard_normal((1, 1, BLOCK, 48))
  share = np.linspace(1, 0, STEPS)[:, None, None, None] ** 2
  logits = 2.5 * (share * moving + (1 - share) * last)
  logits[..., MASK["llada"]] = loops.LOWEST
  return logits.astype(np.float32)


@pytest.fixture(scope="module")
def refined(shared_heptad):
  cases = {
    name: dict(length=BLOCK, block=BLOCK, policy="refine", **case)
    for name, case in REFINED.items()
  }
  model = make_diffusion.TO / "llada"
  shared_heptad.hurry()
  return shared_heptad.bridge(
    "refine", model, cases=asked(cases), table=table()
  )


@pytest.mark.parametrize("case", REFINED)
def test_block_refinement_of_diffusers(case, refined):
  given = REFINED[case]
  tokens, calls, edits = diffusers_block(table(), **given)
  np.testing.assert_array_equal(refined[f"{case}/tokens"], tokens)
  more = int(refined[f"{case}/calls"]) - calls
  if "edit_steps" in given:
    assert more == 0 and calls == 1 + given["edit_steps"]
  else:
    assert more in ((0, 1) if "edit" in given else (0, -1))
  assert (edits > 0) == ("edit" in given)


def diffusers_block(logits, value, steps, edit=None, given=(), edit_steps=17):
  """Returns a block as diffusers' LLaDA2 pipeline fills it: its loop here.

  The tokens, the calls of the model, and how many tokens were edited. The
  pipeline asks once more when all places are filled, even where nothing is to
  be edited, but never when its steps have run out; Heptad looks once more
  wherever a step filled or edited a place, if tokens are edited at all. The
  pipeline ends after the call that exceeds its limit, LLaDA 2.1's own
  `generate` and Heptad before it: so the limit here is one less.
  """
  mask_id, most = MASK["llada"], edit_steps - 1
  scheduler = BlockRefinementScheduler(BLOCK, steps, value, edit)
  masks = BLOCK - len(given)
  scheduler.set_timesteps(steps, block_length=masks)
  block = torch.full((1, BLOCK), mask_id)
  block[:, : len(given)] = torch.tensor(given, dtype=torch.long)
  prompt = torch.arange(BLOCK) < len(given)
  step = after = calls = edits = 0
  more = True
  while more:
    masked = bool((block == mask_id).any())
    after += not masked
    out = scheduler.step(
      torch.from_numpy(logits[min(calls, len(logits) - 1)]),
      step,
      block,
      mask_token_id=mask_id,
      prompt_mask=prompt,
    )
    block, calls = out.prev_sample, calls + 1
    edits += int(out.editing_transfer_index.sum())
    step += masked
    more = scheduler.check_block_should_continue(
      step,
      masked,
      edit is not None,
      out.editing_transfer_index,
      after,
      most,
      torch.zeros(1, dtype=torch.bool),
    )
  return block.numpy(), calls, edits
