"""Heptad's side of the comparisons of diffusion models; see `ours.py`.

sample  cases (JSON), prompts [B, P] -> of each case: tokens, the call that
                                        filled each place, calls, and what was
                                        random
ancestral  steps, length, prompts [B, P] -> tokens on Dream's times, and what
                                        was random
refine  cases (JSON), table [S, B, K, V] -> tokens and calls of one block
                                        whose logits at step s are table[s]
continue  cases (JSON), prompt [P]   -> of each case: tokens of a model with
                                        blocks, by its cache and without
scores  tokens [B, T], positions     -> logits [B, T, V], each place's own
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion.sampling import ancestral, policies, sampler
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.classifier_free_guidance import (
  ClassifierFreeGuidance,
  with_prompt,
)
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import BlockCache, Denoiser, NoCache
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.generation import sampling as samplers
from research.generation.sampling import Sampling

POLICIES = {
  "quota": lambda value: policies.Quota(),
  "threshold": lambda value: policies.Threshold(threshold=value),
  "factor": lambda value: policies.Factor(factor=value),
  "refine": lambda value: policies.Threshold(threshold=value, quota_first=True),
}
CACHES = {"none": NoCache, "prefix": PrefixCache, "dual": BlockCache}


def options(case: dict, mask_id: int) -> SamplerConfig:
  """Returns what a case's own names stand for."""
  known = {f.name for f in dataclasses.fields(SamplerConfig)}
  given = {k: v for k, v in case.items() if k in known and k != "policy"}
  given["end"] = tuple(given.get("end", ()))
  given["cache"] = None  # which denoiser reads is said by `CACHES`
  policy = POLICIES[case["policy"]](case.get("value", 0.0))
  return SamplerConfig(
    mask_id=mask_id, policy=policy, stop_early=False, **given
  )


def sample(it, args, rows) -> dict:
  prompts = rows["prompts"]
  key, out = jax.random.key(0), {}
  for case in json.loads(str(rows["cases"])):
    how = options(case, it.diffusion.mask_id)
    reads = CACHES[case.get("cache", "none")]
    asked = reads(model=it.model, shift=it.diffusion.shift)
    state, params = sampler.start(prompts.tolist(), how, key), it.params
    if case.get("cfg"):
      asked = ClassifierFreeGuidance(
        inner=asked, mask_id=how.mask_id, weight=case["cfg"]
      )
      params = with_prompt(params, state.fixed)
    hot = case.get("temperature", 0.0)
    rule = Sampling(temperature=hot) if hot else samplers.GREEDY
    got = sampler.sample(asked, params, state, how, rule)
    found = dict(tokens=got.tokens, filled=got.filled, calls=got.calls)
    if hot or case.get("select") == "random":
      found |= noise(key, len(prompts), how, it.model.vocab_size)
    out |= {f"{case['name']}/{k}": np.asarray(v) for k, v in found.items()}
  return out


def noise(key, rows: int, how: SamplerConfig, vocabulary: int) -> dict:
  """Returns what each step of each row draws, as `candidates` does."""
  own = samplers.row_keys(key, jnp.arange(rows))
  gumbel, uniform = [], []
  for step in range(how.steps or how.length):
    keys = jax.vmap(lambda k, step=step: jax.random.fold_in(k, step))(own)
    first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
    gumbel.append(
      [
        np.asarray(jax.random.gumbel(k, (how.block, vocabulary), mode="high"))
        for k in first
      ]
    )
    uniform.append(
      [np.asarray(jax.random.uniform(k, (how.block,))) for k in second]
    )
  return dict(gumbel=np.array(gumbel), uniform=np.array(uniform))


@dataclasses.dataclass(frozen=True)
class Table(Denoiser):
  """A denoiser that knows each step's logits; its parameters are they."""

  def prefill(self, params, tokens, valid, start, size):
    return params[0], jnp.int32(1)

  def step(self, params, tokens, valid, start, size, carry):
    return params[jnp.minimum(carry, len(params) - 1)], carry + 1


def refine(it, args, rows) -> dict:
  table, out = jnp.asarray(rows["table"]), {}
  _, count, size, _ = table.shape
  for case in json.loads(str(rows["cases"])):
    how = options(case, it.diffusion.mask_id)
    tokens = np.full((count, size), how.mask_id)
    masked = np.ones((count, size), bool)
    if "given" in case:
      tokens[:, : len(case["given"])] = case["given"]
      masked[:, : len(case["given"])] = False
    state = sampler.begin(
      tokens, masked, np.ones_like(masked), jax.random.key(0)
    )
    got = sampler.sample(Table(), table, state, how)
    found = dict(tokens=got.tokens, calls=got.calls)
    out |= {f"{case['name']}/{k}": np.asarray(v) for k, v in found.items()}
  return out


def ancestors(it, args, rows) -> dict:
  how = it.diffusion
  asked = NoCache(model=it.model, shift=how.shift, block=how.block)
  steps, length = int(rows["steps"]), int(rows["length"])
  first = rows["prompts"]
  count, before = first.shape
  tokens = np.full((count, before + length), how.mask_id, np.int32)
  tokens[:, :before] = first
  masked = np.broadcast_to(np.arange(before + length) >= before, tokens.shape)
  keys = samplers.row_keys(jax.random.key(0), jnp.arange(count))
  valid = jnp.ones(tokens.shape, bool)
  got, _ = ancestral.sample(
    lambda x: asked.scores(it.params, x, valid),
    jnp.asarray(tokens),
    jnp.asarray(masked),
    how.mask_id,
    keys,
    ancestral.Ancestral(steps=steps, grid="dream"),
  )
  gumbel, uniform = [], []
  for i in range(steps):
    now = [jax.random.split(jax.random.fold_in(k, i), 3) for k in keys]
    shape = tokens.shape[1], it.model.vocab_size
    gumbel.append([jax.random.gumbel(k[0], shape, mode="high") for k in now])
    uniform.append([jax.random.uniform(k[1], shape[:1]) for k in now])
  return dict(
    tokens=np.asarray(got), gumbel=np.array(gumbel), uniform=np.array(uniform)
  )


def continued(it, args, rows) -> dict:
  prompt, out = rows["prompt"], {}
  how, key = it.diffusion, jax.random.key(0)
  for case in json.loads(str(rows["cases"])):
    wanted = options(case, how.mask_id)
    first = len(prompt) // how.block * how.block
    tokens = np.full((1, first + wanted.length), how.mask_id)
    tokens[0, : len(prompt)] = prompt
    masked = np.arange(tokens.shape[1])[None] >= len(prompt)
    ways = dict(
      tokens=BlockCausal(model=it.model, block=how.block, shift=how.shift),
      uncached=NoCache(model=it.model, block=how.block, shift=how.shift),
    )
    for name, asked in ways.items():
      state = sampler.begin(tokens, masked, np.ones_like(masked), key)
      got = sampler.sample(asked, it.params, state, wanted)
      out[f"{case['name']}/{name}"] = got.tokens
  return out


def scores(it, args, rows) -> dict:
  how = it.diffusion
  asked = NoCache(model=it.model, shift=how.shift, block=how.block)
  valid = jnp.asarray(rows["positions"] >= 0)
  found = jax.jit(asked.scores)(it.params, rows["tokens"], valid)
  return dict(logits=np.asarray(found))


COMMANDS = dict(
  {"continue": continued},
  sample=sample,
  ancestral=ancestors,
  refine=refine,
  scores=scores,
)
