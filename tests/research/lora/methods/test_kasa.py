"""KaSA's terms of the loss, against PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lora.adapted import AdaptedTensor
from research.lora.methods import kasa
from research.lora.methods.kasa import KaSA
from research.typing import UserError

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
  f = jax.jit(jax.value_and_grad(kasa.penalty))
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
  slope = jax.grad(kasa.penalty)({"q": leaf(arrays)})
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(slope))


def test_other_adapters_are_refused():
  with pytest.raises(UserError, match="no KaSA adapter"):
    kasa.penalty({"q": jnp.ones(3)})
