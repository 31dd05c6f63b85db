"""Tests the vectors of research/lora/MATH.md 4.

They were computed independently of this code, in PEFT's layout and under its
names: `W [out, in]`, `A [r, in]`, `B [out, r]`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.interop.peft import experts as peft_experts
from research.lora.adapted import AdaptedTensor
from research.lora.method import MatrixSpec
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.dora import DoRA
from research.lora.methods.hira import HiRA
from research.lora.methods.loha import LoHa
from research.lora.methods.lokr import LoKr
from research.lora.methods.lora import LoRA
from research.lora.methods.vera import VeRA

W = np.array([[1, 2, -1], [0.5, -1, 3]], np.float32)
A = np.array([[1, 0, 2]], np.float32)
B = np.array([[0.5], [-1]], np.float32)
X = np.array([1, -1, 2], np.float32)
NORMS = np.array([2.449490, 3.201562], np.float32)
LORA = {"lora_A.weight": A, "lora_B.weight": B}

CASES = {
  "lora": (
    LoRA(rank=1, alpha=2.0),
    LORA,
    W + [[1, 0, 2], [-2, 0, -4]],
    [2, -2.5],
  ),
  "dora": (
    DoRA(rank=1, alpha=2.0),
    LORA | {"lora_magnitude_vector": np.array([1.1, 0.9], np.float32) * NORMS},
    [[1.796292, 1.796292, 0.898146], [-2.096531, -1.397687, -1.397687]],
    [1.796292, -3.494218],
  ),
  "hira": (
    HiRA(rank=1),
    {"hira_A": A, "hira_B": B},
    W + [[0.5, 0, -1], [-0.5, 0, -6]],
    [-4.5, -5],
  ),
  "adalora": (
    AdaLoRA(rank=1, alpha=2.0),
    {"lora_A": A, "lora_B": B, "lora_E": np.array([[0.5]], np.float32)},
    W + [[0.499995, 0, 0.99999], [-0.99999, 0, -1.99998]],
    None,
  ),
  "vera": (
    VeRA(rank=1),
    {
      # As large as other modules want them.
      "vera_A": np.array([[1, 0, 2, 7]], np.float32),
      "vera_B": np.array([[0.5], [-1], [7]], np.float32),
      "vera_lambda_b": np.array([0.2, -0.4], np.float32),
      "vera_lambda_d": np.array([0.1], np.float32),
    },
    W + [[0.01, 0, 0.02], [0.04, 0, 0.08]],
    None,
  ),
  "lokr": (
    LoKr(rank=4, alpha=4.0, factor=1),
    {
      "lokr_w1": np.array([[2]], np.float32),
      "lokr_w2": W,
    },
    3 * W,
    None,
  ),
  "loha": (
    LoHa(rank=1, alpha=2.0),
    {
      "hada_w1_a": B,
      "hada_w1_b": A,
      "hada_w2_a": np.array([[1], [2]], np.float32),
      "hada_w2_b": np.array([[1, 1, -1]], np.float32),
    },
    W + 2 * np.array([[0.5, 0, -1], [-2, 0, 4]]),
    None,
  ),
}


def adapted(method, tensors, w):
  place = MatrixSpec(*reversed(w.shape))
  trained, fixed = method.from_peft(tensors, place, jnp.asarray(w.T))
  t = AdaptedTensor(w.T, trained, fixed, method=method)
  return jax.tree.map(jnp.asarray, t)


@pytest.mark.parametrize("name", CASES)
def test_the_matrix_and_what_it_does(name):
  method, tensors, matrix, y = CASES[name]
  t = adapted(method, tensors, W)
  np.testing.assert_allclose(
    weights.dense(t).T, matrix, rtol=1e-6, atol=2e-6, err_msg="matrix"
  )
  got = weights.einsum("ti,io->to", jnp.asarray(X)[None], t)[0]
  want = np.asarray(matrix, np.float64) @ X if y is None else y
  np.testing.assert_allclose(got, want, rtol=2e-6, atol=4e-6)


def test_lokrs_factors_are_multiplied_as_kronecker_said():
  w1, w2 = np.array([[1, 2]], np.float32), np.array([[1], [3]], np.float32)
  method = LoKr(rank=2, alpha=6.0)
  place = MatrixSpec(2, 2)
  p, _ = method.from_peft({"lokr_w1": w1, "lokr_w2": w2}, place, None)
  want = 6.0 / 2 * np.array([[1, 2], [3, 6]])
  np.testing.assert_array_equal(method.delta(p, None).T, want)


def test_doras_magnitudes_start_as_norms_of_outputs():
  key = jax.random.key(0)
  trained, _ = DoRA(rank=1).init_arrays(key, MatrixSpec(3, 2), jnp.asarray(W.T))
  np.testing.assert_allclose(trained["m"], NORMS, rtol=1e-6)


class Tensor:
  """A tensor of a file."""

  def __init__(self, x):
    self.x, self.shape, self.dtype = x, x.shape, x.dtype

  def read(self):
    return self.x


def test_experts_factors():
  """Section 2.4: experts come first among A's rows, last among B's columns."""
  size = experts, size_in, size_out = 2, 3, 2
  method = LoRA(rank=2, alpha=2.0)
  stack = peft_experts.Stack("m", "m", ("w",), method, size)
  a = np.arange(12, dtype=np.float32).reshape(4, 3)
  b = np.arange(8, dtype=np.float32).reshape(2, 4)
  tensors = {"m.lora_A.weight": Tensor(a), "m.lora_B.weight": Tensor(b)}
  arrays = peft_experts.read("f", tensors, [stack])["w"]
  w = jnp.zeros((experts, size_in, size_out))
  t = AdaptedTensor(w, jax.tree.map(jnp.asarray, arrays), method=method)
  want = np.array(
    [[[6, 8, 10], [18, 28, 38]], [[33, 37, 41], [93, 105, 117]]], np.float32
  )
  np.testing.assert_array_equal(weights.dense(t).swapaxes(1, 2), want)
  rows = jnp.concatenate([jnp.eye(3), jnp.eye(3)])
  got = weights.ragged_dot(rows, t, jnp.array([3, 3]))
  np.testing.assert_array_equal(got.reshape(2, 3, 2).swapaxes(1, 2), want)
