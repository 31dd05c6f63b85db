"""The surrogate against TRL's GRPOTrainer, and what its parts promise."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.alignment import divergence, surrogate
from research.training.alignment.divergence import KL
from research.training.alignment.surrogate import (
  Clip,
  Surrogate,
  per_token,
  sequence_ratio,
  sequence_token_ratio,
)
from research.typing import UserError

GOLDEN = pathlib.Path("tests/golden/alignment.npz")
T = 7
CASES = {
  "grpo": surrogate.grpo(),
  "dr_grpo": surrogate.dr_grpo(length=T),
  "dapo": surrogate.dapo(),
  "gspo": surrogate.gspo(lower=0.05, upper=0.1),
  "most": Surrogate(
    clip=Clip(dual_clip=1.5), normalization=per_token, divergence=KL(beta=0.1)
  ),
  "tokens": Surrogate(),
}


@pytest.fixture(scope="module")
def golden():
  with np.load(GOLDEN) as file:
    return {name: file[name] for name in file.files}


def given(golden, name):
  """Returns the arguments of a case, in fp32."""
  advantage = "token_advantage" if name == "tokens" else "advantage"
  names = "new", "old", advantage, "answer", "reference"
  found = [jnp.asarray(golden[n]) for n in names]
  return [x if x.dtype == bool else x.astype(jnp.float32) for x in found]


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_trl_s(golden, name):
  new, *rest = given(golden, name)

  def mean(new):
    loss, weight, _ = CASES[name](new, *rest)
    return loss / weight

  loss, gradient = jax.value_and_grad(mean)(new)
  np.testing.assert_allclose(loss, golden[f"{name}/loss"], atol=2e-6)
  np.testing.assert_allclose(gradient, golden[f"{name}/gradient"], atol=2e-7)
  assert np.abs(golden[f"{name}/gradient"]).max() > 1e-3


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_microbatches_add_up(golden, name):
  """Rows without an answer weigh nothing, whatever their numbers are."""
  arguments = given(golden, name)
  whole = CASES[name](*arguments)
  parts = [
    CASES[name](*(x[i : i + 2] for x in arguments)) for i in range(0, 6, 2)
  ]
  sums = jax.tree.map(lambda *x: sum(x), *parts)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), sums, whole)
  empty = jnp.concatenate([arguments[3][:3], jnp.zeros((3, T), bool)])
  arguments[3] = empty
  some = CASES[name](*arguments)
  first = CASES[name](*(x[:3] for x in arguments))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), some, first)


def test_an_answer_s_ratio_counts_its_tokens_only():
  log_ratio = jnp.array([[0.3, 0.1, 9.0], [0.2, 9.0, 9.0]])
  answer = jnp.array([[True, True, False], [True, False, False]])
  found = sequence_ratio(log_ratio, answer)
  np.testing.assert_allclose(found, [[0.2] * 3, [0.2] * 3], rtol=1e-6)
  # GSPO-token has the same values, and a token's own gradient.
  value, pull = jax.vjp(lambda x: sequence_token_ratio(x, answer), log_ratio)
  np.testing.assert_allclose(value, found, rtol=1e-6)
  weight = jnp.arange(6.0).reshape(2, 3)
  np.testing.assert_array_equal(pull(weight)[0], weight)


def test_clips_act_on_one_side_each():
  ratio = jnp.array([[0.5, 1.0, 1.5]])
  clip = Clip(lower=0.2, upper=0.28)
  good, bad = jnp.ones((1, 1)), -jnp.ones((1, 1))
  np.testing.assert_allclose(clip(ratio, good), [[0.5, 1.0, 1.28]], rtol=1e-6)
  np.testing.assert_allclose(clip(ratio, bad), [[-0.8, -1.0, -1.5]], rtol=1e-6)
  np.testing.assert_array_equal(clip.acts(ratio, good), [[0, 0, 1]])
  np.testing.assert_array_equal(clip.acts(ratio, bad), [[1, 0, 0]])
  _, weight, sums = Surrogate(clip=clip)(
    jnp.log(ratio), jnp.zeros((1, 3)), good[0], jnp.ones((1, 3), bool)
  )
  assert float(weight) == 1
  np.testing.assert_allclose(sums["clipped"], 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(sums["ratio"], 1, rtol=1e-6)


def test_estimates_of_the_divergence_are_unbiased_by_enumeration():
  """Of a categorical policy and reference: sums over all its tokens."""
  rng = np.random.default_rng(0)
  p, q = (rng.dirichlet(np.ones(9)) for _ in range(2))
  d = jnp.asarray(np.log(q / p), jnp.float32)[None]
  exact = (p * np.log(p / q)).sum()
  for estimate in (divergence.k1, divergence.k3):
    assert float((p * estimate(d)[0]).sum()) == pytest.approx(exact, rel=1e-5)
  assert (np.asarray(divergence.k3(d)) >= 0).all()

  def k2(logits):
    log_p = jax.nn.log_softmax(logits)
    found = divergence.k2(jnp.log(q) - log_p[None])[0]
    return (jax.lax.stop_gradient(jnp.exp(log_p)) * found).sum()

  def kl(logits):
    log_p = jax.nn.log_softmax(logits)
    return (jnp.exp(log_p) * (log_p - jnp.log(q))).sum()

  logits = jnp.log(jnp.asarray(p, jnp.float32))
  np.testing.assert_allclose(
    jax.grad(k2)(logits), jax.grad(kl)(logits), atol=1e-6
  )


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: Clip(dual_clip=1.1),
      "Clip.dual_clip: found 1.1, expected more than",
    ),
    (
      lambda: surrogate.grpo()(*[jnp.ones((2, 2))] * 3, jnp.ones((2, 2), bool)),
      "Surrogate.divergence: found no log p of a reference",
    ),
  ],
)
def test_mistakes(make, message):
  with pytest.raises(UserError, match=message):
    make()
