"""Tests methods that PEFT lacks, or defines otherwise, against their papers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lora.method import MatrixSpec
from research.lora.methods.lora import LoRA
from research.lora.methods.mora import MoRA
from research.lora.methods.svd_init import LoRAGA
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden"


def mora(x, m, size_out, form):
  """Returns section 4 of the paper, one number at a time, in fp64.

  As many inputs as the square matrix has rows are a group. All are added up
  (their type 1), or each is turned by angles of its own, as RoPE turns a
  position, and multiplied alone (type 6). Inputs that are too few for their
  last group, and outputs that are too few, begin again.
  """
  side, size_in = len(m), len(x)
  groups = -(-size_in // side)
  given = [
    [x[(j * side + i) % size_in] for i in range(side)] for j in range(groups)
  ]
  if form == "share":
    given = [[sum(group[i] for group in given) for i in range(side)]]
  else:
    for j, group in enumerate(given):
      half = side // 2
      for i in range(half):
        angle = j * 10000 ** (-2 * i / side)
        low, high = group[i], group[i + half]
        group[i] = low * np.cos(angle) - high * np.sin(angle)
        group[i + half] = high * np.cos(angle) + low * np.sin(angle)
  made = [
    sum(group[i] * m[i][o] for i in range(side))
    for group in given
    for o in range(side)
  ]
  return np.array([made[o % len(made)] for o in range(size_out)])


@pytest.mark.parametrize("form", ["rotate", "share"])
@pytest.mark.parametrize(
  "size_in, size_out, rank",
  [(12, 12, 6), (10, 7, 2), (7, 29, 2), (40, 6, 1), (4, 30, 4)],
)
@pytest.mark.sample(6)
def test_mora_is_its_papers(form, size_in, size_out, rank):
  method, rng = MoRA(rank=rank, form=form), np.random.default_rng(3)
  side = method.side(size_in, size_out)
  # As many parameters as LoRA of that rank, but for rounding to a square.
  even = 2 if form == "rotate" else 1
  assert abs(side - ((size_in + size_out) * rank) ** 0.5) <= even
  m, x = rng.standard_normal((side, side)), rng.standard_normal((3, size_in))
  want = np.stack([mora(row, m, size_out, form) for row in x])
  p, w = {"m": jnp.asarray(m, jnp.float32)}, jnp.zeros((size_in, size_out))
  branch = method.branch("ti,io->to", jnp.asarray(x, jnp.float32), p, w)
  np.testing.assert_allclose(branch, want, atol=2e-5)
  np.testing.assert_allclose(x @ method.delta(p, w), want, atol=2e-5)


def test_lora_ga_is_initialised_as_in_peft():
  golden = json.loads((GOLDEN / "peft_facts.json").read_text())["lora_ga"]
  w, gradient, a, b, left = (
    np.array(golden[k], np.float32)
    for k in ("weight", "gradient", "a", "b", "left")
  )
  method = LoRAGA(
    rank=golden["rank"],
    alpha=golden["alpha"],
    gamma=golden["gamma"],
    rslora=True,
    form="peft",
  )
  place = MatrixSpec(*w.T.shape)
  p, p0 = method.init_arrays(
    jax.random.key(0), place, jnp.asarray(w.T), jnp.asarray(gradient.T)
  )
  # A singular vector's sign is anybody's choice.
  signs = [np.sign(np.sum(x * y, -1)) for x, y in ((p["a"], a), (p["b"], b.T))]
  np.testing.assert_allclose(signs[0][:, None] * p["a"], a, atol=2e-5)
  np.testing.assert_allclose(signs[1][:, None] * p["b"], b.T, atol=2e-5)
  start = (
    method.scale
    * (signs[0][:, None] * p0["a0"]).T
    @ (signs[1][:, None] * p0["b0"])
  )
  np.testing.assert_allclose(w.T - start, left.T, atol=2e-5)
  # The paper's form is another one.
  other = LoRAGA(rank=3, gamma=16.0).init_arrays(
    jax.random.key(0), place, jnp.asarray(w.T), jnp.asarray(gradient.T)
  )[0]
  assert np.abs(np.abs(other["b"]) - np.abs(b.T)).max() > 0.1


@pytest.mark.parametrize(
  "init, embedding, a, b",
  [
    ("peft", False, 1 / (3 * 512), 0),
    ("gaussian", False, 1 / 8**2, 0),
    ("random", False, 1 / (3 * 512), 1 / (3 * 8)),
    # Half of the directions of the rank, each a hundredth.
    ("orthogonal", False, 1 / 200, 1 / 200),
    ("peft", True, 0, 1),
    ("random", True, 1, 1),
  ],
)
def test_loras_initialisations_are_pefts(init, embedding, a, b):
  """Variances of research/lora/MATH.md 2.2, within 5 standard errors."""
  place = MatrixSpec(512, 768, embedding=embedding)
  p, _ = LoRA(rank=8, init=init).init_arrays(jax.random.key(0), place, None)
  for name, want in (("a", a), ("b", b)):
    x = np.asarray(p[name], np.float64)
    assert abs(x.mean()) <= 5 * (want / x.size) ** 0.5
    # Kaiming's numbers, uniform, vary less than normal ones.
    np.testing.assert_allclose(x.var(), want, rtol=5 * (2 / x.size * 2) ** 0.5)
  update = np.abs(np.asarray(p["a"]).T @ np.asarray(p["b"])).max()
  assert (update > 0.01) == (init == "random")
  assert update < 1e-6 or init == "random"


def test_orthogonal_init_halves_the_rank():
  with pytest.raises(UserError, match="rank is 3, expected an even one"):
    LoRA(rank=3, init="orthogonal").init_arrays(
      jax.random.key(0), MatrixSpec(5, 4), None
    )
