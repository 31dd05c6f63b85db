"""What methods add to a loss, against PEFT and against a loss that has it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.studies.lora import lora_terms
from research.data import batch_of
from research.lora import adapt, allocate, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.kasa import KaSA
from research.training import state, step
from research.training.objectives import objective
from research.typing import UserError
from tests import support

# peft 0.21.2, lora.variants._kasa_layer_regularization_loss with beta 0.2 and
# gamma 0.3, of a [3, 5], b [3, 4], d [3] by default_rng(seed).
PEFT = {
  0: (3.672786235809326, [-0.36869016, -0.18309033, 0.08807805],
      [0.07235325, 0.10868620, 0.23289439, -0.04525476, -0.00587590]),
  1: (4.255282878875732, [-0.16887616, 0.08545720, 0.08692878],
      [0.15141690, 0.46393630, 0.13606611, -0.70519203, 0.45511627]),
}  # fmt: skip


def drawn(seed):
  rng = np.random.default_rng(seed)
  sizes = dict(a=(3, 5), b=(3, 4), d=(3,))
  return {k: jnp.float32(rng.standard_normal(s)) for k, s in sizes.items()}


def leaf(arrays):
  return AdaptedTensor(None, arrays, method=KaSA(rank=3, beta=0.2, gamma=0.3))


def test_kasas_terms_are_pefts():
  f = jax.jit(jax.value_and_grad(lora_terms.kasa))
  for seed, (value, d, a0) in PEFT.items():
    found, slope = f({"q": leaf(drawn(seed))})
    assert float(found) == pytest.approx(value, rel=1e-6)
    np.testing.assert_allclose(slope["q"].trained["d"], d, rtol=1e-5)
    np.testing.assert_allclose(slope["q"].trained["a"][0], a0, rtol=1e-5)
  # Layers in front, and matrices beside each other, add up.
  both = jax.tree.map(lambda *x: jnp.stack(x), drawn(0), drawn(1))
  want = PEFT[0][0] + PEFT[1][0]
  assert float(f({"q": leaf(both)})[0]) == pytest.approx(want, rel=1e-6)


def test_orthonormal_factors_have_a_slope():
  """There the root's argument is 0."""
  arrays = drawn(0) | {"b": jnp.eye(3, 4)}
  slope = jax.grad(lora_terms.kasa)({"q": leaf(arrays)})
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


@pytest.mark.slow
def test_beside_the_data_is_inside_the_loss():
  """AdaLoRA's step: the term in the optimizer, or in the objective."""
  model = support.model(width=32, depth=1, head_dim=8)
  made = adapt.Adapt(method=AdaLoRA(rank=4))
  params = made(support.params(model), jax.random.key(0))
  plain = objective.NextToken(model=model)
  batch, key = batch_of(support.tokens()), jax.random.key(1)
  inside = allocate.Orthogonal(plain)
  outside = lora_terms.add_gradient(lora_terms.orthogonal, optax.sgd(10.0))

  def after(goal, tx):
    begun = state.create(params, wrap.TRAINABLE, tx)
    moved, _ = jax.jit(step.make_train_step(goal, tx))(begun, batch, key)
    return jax.tree.leaves(moved.trainable)

  want, got = after(inside, optax.sgd(10.0)), after(plain, outside)
  without = after(plain, optax.sgd(10.0))
  for x, y in zip(want, got, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)
  moved = [np.abs(x - y).max() for x, y in zip(want, without, strict=True)]
  assert max(moved) > 1e-2


def test_other_adapters_are_refused():
  with pytest.raises(UserError, match="no KaSA adapter"):
    lora_terms.kasa({"q": jnp.ones(3)})
  tx = lora_terms.add_gradient(lora_terms.kasa, optax.sgd(0.1))
  with pytest.raises(ValueError, match="needs the parameters"):
    tx.update({}, tx.init({}))
