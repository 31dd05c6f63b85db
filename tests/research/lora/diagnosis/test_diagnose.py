"""Diagnoses of updates whose singular vectors are chosen."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from research.lora import lora_factors
from research.lora.diagnosis import diagnose, plot_diagnosis
from research.typing import UserError
from tests.support_lora import lora

IN, OUT = 12, 16


@functools.cache
def bases():
  """Returns orthonormal columns of both sides; twelve outputs are spanned."""
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.standard_normal((IN, IN)))
  right, _ = np.linalg.qr(rng.standard_normal((OUT, OUT)))
  return left.astype(np.float32), right.astype(np.float32)


def model(terms, scale=2.0):
  """Returns a tree; the update has (size, input, output) terms.

  The base's singular values fall from 12 to 1; outputs from 12 on are new.
  """
  left, right = bases()
  w = left * np.arange(IN, 0, -1, dtype=np.float32) @ right[:, :IN].T
  a = np.stack([left[:, i] for _, i, _ in terms])
  b = np.stack([size / scale * right[:, o] for size, _, o in terms])
  t = lora(*(jnp.asarray(x[None]) for x in (w, a, b)), scale=scale)
  return {"run0": {"layer0": {"x": t}}}


def one(params, **options):
  return diagnose.diagnose(params, **options)["layers/0/x"]


def test_sizes_and_ranks():
  d = one(model([(4.0, 0, 0), (2.0, 1, 1), (1.0, 2, 2)]))
  base = (np.arange(1, 13) ** 2).sum() ** 0.5
  np.testing.assert_allclose(d.relative, 21**0.5 / base, rtol=1e-5)
  np.testing.assert_allclose(d.stable_rank, 21 / 16, rtol=1e-5)
  assert d.energy_rank == 2  # 16 and 20 of 21
  assert one(model([(4.0, 0, 0), (2.0, 1, 1)]), energy=0.75).energy_rank == 1


def test_angles_to_the_leading_subspace():
  # Inputs are the base's leading two; of the outputs one is new.
  d = one(model([(4.0, 0, 0), (3.0, 1, 13)]))
  np.testing.assert_allclose(np.cos(d.angles_in), [1, 1], atol=1e-5)
  np.testing.assert_allclose(d.angles_out, [0, np.pi / 2], atol=1e-3)
  d = one(model([(4.0, 3, 14), (3.0, 1, 13)]))
  np.testing.assert_allclose(d.angles_in, [0, np.pi / 2], atol=1e-3)


def test_angles_are_scipys():
  rng = np.random.default_rng(1)
  a, b = (np.linalg.qr(rng.standard_normal((9, 3)))[0] for _ in range(2))
  want = np.sort(linalg.subspace_angles(a, b))
  np.testing.assert_allclose(diagnose._angles(a.T, b.T), want, atol=1e-6)


def test_intruders_are_large_and_new():
  # At an input of little weight: a new direction that leads.
  intruder = one(model([(20.0, 11, 14)]))
  assert intruder.intruders() == 1
  assert intruder.cosines.shape == (10,)
  assert intruder.cosines[0] < 0.1
  # Strengthening what is there, or something small and new, is none.
  assert one(model([(20.0, 0, 0)])).intruders() == 0
  assert one(model([(0.1, 0, 14)])).intruders() == 0
  # Below the leading ones it is not looked at.
  assert one(model([(5.5, 11, 14)]), top=3).intruders() == 0
  assert one(model([(5.5, 11, 14)]), top=8).intruders() == 1
  assert intruder.intruders(0.0) == 0
  assert intruder.intruders(1.1) == 10


def test_mitigation_weakens_intruders_alone():
  params = model([(20.0, 11, 14)])
  found, counts = diagnose.mitigate(params, strength=0.25)
  assert counts == {"layers/0/x": 1}
  f = found["layers/0/x"]
  assert (f.rank, f.scale) == (1, 2.0)
  t = lora_factors.adapters(params)["layers/0/x"]
  w, d = lora_factors.base(t), lora_factors.update(t)
  u, s, v = np.linalg.svd((w + d).astype(np.float64), full_matrices=False)
  want = d - 0.75 * s[0] * np.outer(u[:, 0], v[0])
  u, s, v = np.linalg.svd(want)
  np.testing.assert_allclose(
    f.delta(), s[0] * np.outer(u[:, 0], v[0]), atol=1e-4
  )
  again = lora_factors.wrapped(
    {"run0": {"layer0": {"x": jnp.asarray(w[None])}}}, found
  )
  assert (
    np.linalg.norm(
      lora_factors.update(lora_factors.adapters(again)["layers/0/x"])
    )
    < 12
  )


def test_what_is_no_intruder_stays_bit_for_bit():
  params = model([(3.0, 0, 0), (1.0, 2, 1)])
  found, counts = diagnose.mitigate(params)
  assert counts == {"layers/0/x": 0}
  want = lora_factors.factors(params)["layers/0/x"]
  np.testing.assert_array_equal(found["layers/0/x"].a, want.a)
  np.testing.assert_array_equal(found["layers/0/x"].b, want.b)


def test_an_update_of_zero():
  d = one(model([(0.0, 0, 0)]))
  assert (d.relative, d.stable_rank, d.energy_rank) == (0.0, 0.0, 0)
  assert d.angles_in.size == d.angles_out.size == d.intruders() == 0


def test_experts_are_diagnosed_one_by_one():
  w = np.asarray(bases()[1])[None, None].repeat(2, 1)
  a, b = (
    np.zeros((1, 2, 1, OUT), np.float32),
    np.zeros((1, 2, 1, OUT), np.float32),
  )
  a[0, 1], b[0, 1] = 1, 1
  t = lora(jnp.asarray(w), jnp.asarray(a), jnp.asarray(b))
  found = diagnose.diagnose({"run0": {"layer0": {"x": t}}})
  assert [d.energy_rank for d in found.values()] == [0, 1]
  assert list(found) == ["layers/0/x[0]", "layers/0/x[1]"]


def test_the_picture(tmp_path):
  found = diagnose.diagnose(model([(20.0, 11, 14)]))
  plot_diagnosis.draw(found, tmp_path / "a.png", "an adapter")
  assert (tmp_path / "a.png").stat().st_size > 10_000


def test_mistakes():
  params = model([(1.0, 0, 0)])
  for call, words in (
    (lambda: diagnose.diagnose({"x": jnp.zeros((2, 2))}), "no adapter"),
    (lambda: diagnose.diagnose(params, top=0), "top is 0"),
    (lambda: diagnose.diagnose(params, energy=0.0), "energy is 0"),
    (lambda: diagnose.mitigate(params, strength=2.0), "strength is 2"),
  ):
    with pytest.raises(UserError, match=words):
      call()
