"""Caches of blocks against Fast-dLLM's own code, run by make_fast_dllm."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.denoiser import BlockCache, NoCache
from research.diffusion.sampling.policies import Threshold
from research.diffusion.sampling.prefix_cache import PrefixCache
from research.interop import load

FOLDER = pathlib.Path(__file__).parents[3] / "golden" / "diffusion" / "llada"
KINDS = {"none": NoCache, "prefix": PrefixCache, "dual": BlockCache}


@functools.cache
def golden():
  with np.load(FOLDER / "fast_dllm.npz") as file:
    return dict(file)


@functools.cache
def loaded():
  return load.load_model(FOLDER)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.sample(3)
def test_tokens_are_those_of_the_authors_loops(kind):
  """Of two prompts in a batch, the shorter one padded."""
  it, want = loaded(), golden()
  prompts = [want[f"{i}/prompt"].tolist() for i in (0, 1)]
  tokens = [want[f"{i}/{kind}/tokens"] for i in (0, 1)]
  options = SamplerConfig(
    mask_id=it.diffusion.mask_id,
    length=len(tokens[0]) - len(prompts[0]),
    block=int(want["block"]),
    policy=Threshold(threshold=float(want["threshold"])),
  )
  state = sampler.start(prompts, options, jax.random.key(0))
  d = KINDS[kind](model=it.model)
  got = sampler.sample(d, it.params, state, options)
  for i, row in enumerate(tokens):
    np.testing.assert_array_equal(got.tokens[i, -len(row) :], row)
    assert got.counts[i] == len(want[f"{i}/{kind}/rows"])


@pytest.mark.parametrize("kind", ["prefix", "dual"])
@pytest.mark.sample(2)
def test_logits_of_every_call_are_the_authors(kind):
  it, want = loaded(), golden()
  rows, starts, logits = (
    want[f"0/{kind}/{name}"] for name in ("rows", "start", "logits")
  )
  d, size = KINDS[kind](model=it.model), int(want["block"])
  valid = jnp.ones((1, rows.shape[1]), bool)

  @jax.jit
  def block(rows, start):
    """Returns logits of a block's calls, the first one of whole rows."""
    first, carry = d.prefill(it.params, rows[:1], valid, start, size)

    def later(carry, row):
      given = it.params, row[None], valid, start, size
      return d.step(*given, carry)[::-1]

    return jnp.concatenate(
      [first[None], jax.lax.scan(later, carry, rows[1:])[1]]
    )

  most = max(np.bincount(starts))
  for start in np.unique(starts):
    calls = np.flatnonzero(starts == start)
    padded = np.pad(rows[calls], ((0, most - len(calls)), (0, 0)), "edge")
    got = block(jnp.asarray(padded), jnp.int32(start))[: len(calls), 0]
    real = np.arange(logits.shape[-1]) != it.diffusion.mask_id
    # Two layers in fp32 on either side.
    np.testing.assert_allclose(
      np.asarray(got)[..., real],
      logits[calls][..., real],
      atol=2e-5 * float(np.ptp(logits[..., real])),
      rtol=0,
    )
