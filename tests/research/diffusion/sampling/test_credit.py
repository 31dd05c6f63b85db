"""Credit by hand, and what it is for: a steady second choice of certainty."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from research.diffusion.sampling import sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.credit import Credited
from research.diffusion.sampling.denoiser import Denoiser
from research.diffusion.sampling.policies import Credit, Threshold

MASK = 3


@dataclasses.dataclass(frozen=True)
class Table(Denoiser):
  """Logits of each step are the parameters; the carry counts."""

  def prefill(self, params, tokens, valid, start, size):
    return params["table"][0], jnp.int32(1)

  def step(self, params, tokens, valid, start, size, carry):
    return params["table"][carry], carry + 1


def test_credit_by_hand():
  """Three steps, one place; the mask's logit is the largest and ignored."""
  steps = np.array([[2.0, 1, 0, 9], [0.5, 1, 0, 9], [1.0, 0, 0, 9]])
  credited = Credited(inner=Table(), mask_id=MASK)
  table = jnp.asarray(steps[:, None, None])
  got, carry = credited.prefill({"table": table}, None, None, 0, 1)
  found = [got]
  for _ in range(2):
    got, carry = credited.step({"table": table}, None, None, 0, 1, carry)
    found.append(got)
  held = np.zeros(4)
  for got, row in zip(found, steps, strict=True):
    p = np.exp(row[:3]) / np.exp(row[:3]).sum()
    held *= 0.8
    held[p.argmax()] += p.max() ** 0.2
    want = row + 0.7 * np.log(1 + held)
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-6)


def test_a_steady_first_choice_is_filled_earlier():
  """0.7 at each step is worth 0.787 at the first one, 0.823 at the second."""
  p = np.array([[0.7, 0.2, 0.1], [0.75, 0.15, 0.1], [0.7, 0.2, 0.1]])
  logits = np.concatenate([np.log(p), np.full((3, 1), -20.0)], axis=-1)
  table = jnp.asarray(np.broadcast_to(logits, (6, 1, 3, 4)))
  options = SamplerConfig(
    mask_id=MASK, length=3, block=3, policy=Threshold(threshold=0.82)
  )
  tokens = np.full((1, 3), MASK)

  def filled(denoiser):
    begun = sampler.begin(
      tokens, tokens == MASK, tokens == MASK, jax.random.key(0)
    )
    got = sampler.sample(denoiser, {"table": table}, begun, options)
    return got.filled[0].tolist()

  assert filled(Table()) == [1, 0, 2]
  assert filled(Credited(inner=Table(), mask_id=MASK)) == [1, 0, 1]


def test_without_credit_nothing_changes():
  table = jax.random.normal(jax.random.key(0), (2, 1, 3, 4))
  credited = Credited(inner=Table(), mask_id=MASK, credit=Credit(alpha=0.0))
  got, carry = credited.prefill({"table": table}, None, None, 0, 3)
  np.testing.assert_array_equal(got, table[0])
  got, _ = credited.step({"table": table}, None, None, 0, 3, carry)
  np.testing.assert_array_equal(got, table[1])
