"""Tests diagnosis on updates with chosen singular vectors."""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from research.interop import load
from research.lora import lora_factors, to_lora, wrap
from research.lora.diagnosis import diagnose, plot_diagnosis, spectrum
from research.typing import UserError
from tests.support_lora import lora

MODELS = pathlib.Path(__file__).resolve().parents[3] / "golden" / "models"
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


def test_a_change_is_diagnosed_as_the_adapter_that_makes_it():
  params = model([(4.0, 0, 0), (3.0, 1, 13)])
  before, after = wrap.disable(params), wrap.merge(params)
  (found,) = diagnose.diagnose_change(before, after).values()
  want = one(params)
  assert (found.energy_rank, found.intruders()) == (2, want.intruders())
  np.testing.assert_allclose(found.relative, want.relative, rtol=1e-4)
  np.testing.assert_allclose(found.stable_rank, want.stable_rank, rtol=1e-4)
  with pytest.raises(UserError, match="layers/0/x: found None"):
    other = {"run0": {"layer0": {"y": after["run0"]["layer0"]["x"]}}}
    diagnose.diagnose_change(before, other)


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
  again = lora_factors.wrap_factors(
    {"run0": {"layer0": {"x": jnp.asarray(w[None])}}}, found
  )
  assert (
    np.linalg.norm(
      lora_factors.update(lora_factors.adapters(again)["layers/0/x"])
    )
    < 12
  )


def test_other_vectors_are_unchanged_bit_for_bit():
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


def _by_svd(w, d, top, energy):
  """Returns a diagnosis by NumPy's SVDs of whole matrices, in fp64."""
  w, d = w.astype(np.float64), d.astype(np.float64)
  (u, s, v), (x, _, y), (_, _, z) = (
    np.linalg.svd(m, full_matrices=False) for m in (d, w, w + d)
  )
  sums = np.cumsum(s**2)
  rank = int((sums < energy * sums[-1]).sum()) + 1
  angles = [
    np.sort(linalg.subspace_angles(a, b))
    for a, b in ((u[:, :rank], x[:, :rank]), (v[:rank].T, y[:rank].T))
  ]
  return diagnose.Diagnosis(
    relative=(s**2).sum() ** 0.5 / np.linalg.norm(w),
    stable_rank=(s**2).sum() / s[0] ** 2,
    energy_rank=rank,
    angles_in=angles[0],
    angles_out=angles[1],
    cosines=np.abs(z[:top] @ y.T).max(1),
  )


def _assert_same(got, want):
  for field in dataclasses.fields(want):
    a, b = (getattr(x, field.name) for x in (got, want))
    np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-6, err_msg=field.name)


@pytest.mark.parametrize("shape", [(9, 20), (20, 9), (12, 12)], ids=str)
def test_gram_matrices_give_what_svds_give(shape):
  """Singular values of the base fall over three decades."""
  rng = np.random.default_rng(sum(shape))
  values = np.geomspace(1, 1e-3, min(shape))
  u, v = (np.linalg.qr(rng.standard_normal((n, len(values))))[0] for n in shape)
  w = (u * values @ v.T).astype(np.float32)
  a, b = (0.3 * rng.standard_normal((3, n)).astype(np.float32) for n in shape)
  t = lora(*(jnp.asarray(x[None]) for x in (w, a, b)), scale=0.5)
  got = one({"run0": {"layer0": {"x": t}}}, top=5, energy=0.8)
  _assert_same(got, _by_svd(w, 0.5 * a.T @ b, 5, 0.8))
  found, full = spectrum.decompose(w), np.linalg.svd(w.astype(np.float64))
  np.testing.assert_allclose(found[1], full[1], rtol=1e-9)
  np.testing.assert_allclose(found[0] * found[1] @ found[2], w, atol=1e-12)


def test_updates_of_other_methods_are_decomposed_whole():
  loaded = load.load_model(MODELS / "method_loha")
  found = diagnose.diagnose(loaded.params, top=4)
  address, t = next(iter(lora_factors.adapters(loaded.params).items()))
  assert to_lora.thin_svd_of(address, t) is None
  w, d = lora_factors.base(t), lora_factors.update(t)
  _assert_same(found[address], _by_svd(w, d, 4, 0.9))


def test_a_null_space_has_no_vectors():
  """A new direction there is an intruder, however LAPACK completes a basis."""
  left, right = bases()
  w = left[:, :2] * np.float32([4, 2]) @ right[:, :2].T
  _, s, v = spectrum.decompose(w)
  assert v.shape == (2, OUT)
  np.testing.assert_allclose(s, [4, 2], rtol=1e-6)
  assert [len(x) for x in spectrum.decompose(np.zeros((3, 2)))] == [3, 0, 0]
  t = lora(
    *(jnp.asarray(x[None]) for x in (w, left[:, 3:4].T, 9 * right[:, 3:4].T))
  )
  assert one({"run0": {"layer0": {"x": t}}}).intruders() == 1


def test_the_picture(tmp_path):
  found = diagnose.diagnose(model([(20.0, 11, 14)]))
  plot_diagnosis.draw(found, tmp_path / "a.png", "an adapter")
  assert (tmp_path / "a.png").stat().st_size > 10_000


def test_mistakes():
  params = model([(1.0, 0, 0)])
  for call, words in (
    (lambda: diagnose.diagnose({"x": jnp.zeros((2, 2))}), "no adapter"),
    (lambda: diagnose.diagnose(params, top=0), "top is 0"),
    (lambda: diagnose.diagnose(params, energy=0.0), "Energy.share: found 0"),
    (lambda: diagnose.mitigate(params, strength=2.0), "strength is 2"),
  ):
    with pytest.raises(UserError, match=words):
      call()
