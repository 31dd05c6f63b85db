"""Sums of adapters against their definitions, entry by entry."""

import jax
import numpy as np
import pytest

from research.lora.lora_factors import Factors
from research.lora.merge import arithmetic
from research.typing import UserError

SIZES = {"layers/0/attention/q": (12, 10), "layers/1/mlp/up": (6, 14)}


def adapter(seed, rank=3, scale=1.5):
  rng = np.random.default_rng(seed)

  def one(size_in, size_out):
    a, b = (
      rng.standard_normal((rank, n)).astype(np.float32)
      for n in (size_in, size_out)
    )
    return Factors(a, b, scale)

  return {path: one(*size) for path, size in SIZES.items()}


ONE, TWO, THREE = adapter(1), adapter(2, scale=0.5), adapter(3, rank=5)
WEIGHTS = [0.7, -0.4]


def dense(f):
  return f.scale * np.asarray(f.a, np.float64).T @ np.asarray(f.b, np.float64)


def test_cat_is_exact_and_ranks_add_up():
  got = arithmetic.add_weighted([ONE, THREE], WEIGHTS, "cat")
  for path, f in got.items():
    want = 0.7 * dense(ONE[path]) - 0.4 * dense(THREE[path])
    assert (f.rank, f.scale) == (8, 1.0)
    np.testing.assert_allclose(dense(f), want, atol=1e-5)


def test_svd_is_the_best_of_its_rank():
  got = arithmetic.add_weighted([ONE, THREE], WEIGHTS, "svd", rank=4)
  for path, f in got.items():
    u, s, v = np.linalg.svd(0.7 * dense(ONE[path]) - 0.4 * dense(THREE[path]))
    assert f.rank == 4
    np.testing.assert_allclose(dense(f), u[:, :4] * s[:4] @ v[:4], atol=1e-5)
    np.testing.assert_allclose(f.a @ f.a.T, np.eye(4), atol=1e-5)
  largest = arithmetic.add_weighted([ONE, THREE], WEIGHTS, "svd")
  assert {f.rank for f in largest.values()} == {5}


def by_entry(arrays, weights, left, signs, elect, density):
  """The definition, a number at a time."""
  kept = []
  for x in arrays:
    x = x.astype(np.float64)
    count = int(density * x.size)
    least = np.sort(np.abs(x), axis=None)[::-1][count - 1]
    kept.append(np.where(np.abs(x) >= least, x, 0) if left else x)
  out = np.zeros(arrays[0].shape)
  for i in np.ndindex(*out.shape):
    entries = [x[i] for x in kept]
    if not signs:
      out[i] = sum(w * e for w, e in zip(weights, entries, strict=True))
      continue
    votes = entries if elect == "total" else np.sign(entries)
    sign = 1 if sum(votes) >= 0 else -1
    agree = [
      (w, e) for w, e in zip(weights, entries, strict=True) if e * sign > 0
    ]
    out[i] = sum(w * e for w, e in agree) / max(len(agree), 1)
  return out


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize(
  "how, left, signs",
  [
    ("linear", False, False),
    ("ties", True, True),
    ("magnitude_prune", True, False),
  ],
)
def test_of_factors(how, left, signs, elect):
  adapters, weights = [ONE, TWO, adapter(4)], [0.7, -0.4, 0.3]
  got = arithmetic.add_weighted(
    adapters, weights, how, density=0.4, elect=elect
  )
  for path, f in got.items():
    pairs = zip(weights, adapters, strict=True)
    scaled = np.array([w * x[path].scale for w, x in pairs])
    roots = np.sqrt(np.abs(scaled))
    signed = roots * np.sign(scaled)
    options = dict(left=left, signs=signs, elect=elect, density=0.4)
    a = by_entry([x[path].a for x in adapters], signed, **options)
    b = by_entry([x[path].b for x in adapters], roots, **options)
    np.testing.assert_allclose(f.a, a, atol=1e-6)
    np.testing.assert_allclose(f.b, b, atol=1e-6)
    assert f.scale == 1.0


@pytest.mark.parametrize(
  "how, signs", [("ties_svd", True), ("magnitude_prune_svd", False)]
)
def test_of_updates(how, signs):
  options = dict(density=0.4, elect="total")
  got = arithmetic.add_weighted([ONE, THREE], WEIGHTS, how, rank=99, **options)
  for path, f in got.items():
    deltas = [x[path].delta() for x in (ONE, THREE)]
    want = by_entry(deltas, WEIGHTS, left=True, signs=signs, **options)
    assert f.rank == min(want.shape)
    np.testing.assert_allclose(f.delta(), want, atol=2e-5)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd"])
def test_dare_keeps_a_share_and_the_mean(how):
  """Of one adapter: entries are dropped, or divided by the density."""
  path, density = "layers/0/attention/q", 0.6
  rows = [
    arithmetic.add_weighted(
      [ONE], [1.0], how, density=density, key=jax.random.key(i), rank=10
    )[path]
    for i in range(200)
  ]
  root = np.sqrt(ONE[path].scale)
  if how.endswith("svd"):
    got, want = np.stack([f.delta() for f in rows]), ONE[path].delta()
  else:
    got, want = np.stack([f.a for f in rows]), root * ONE[path].a
  shares = got / want
  kept = np.abs(shares - 1 / density) < 1e-3
  assert (kept | (np.abs(shares) < 1e-3)).all()
  # Three standard deviations of the mean of all entries, of each entry five.
  n = kept.size
  assert abs(kept.mean() - density) < 3 * (0.24 / n) ** 0.5
  spread = 5 * (0.24 / len(rows)) ** 0.5
  assert np.abs(kept.mean(0) - density).max() < spread
  # A and B are dropped apart, and no two draws are equal.
  assert len({k.tobytes() for k in kept}) == len(rows)


def test_a_matrix_counts_those_that_have_it():
  path = "layers/1/mlp/up"
  got = arithmetic.add_weighted([ONE, {path: TWO[path]}], WEIGHTS, "cat")
  assert {p: f.rank for p, f in got.items()} == {
    "layers/0/attention/q": 3,
    path: 6,
  }


@pytest.mark.parametrize(
  "adapters, weights, how, options, words",
  [
    ([ONE], [1.0], "mean", {}, "expected one of cat, svd, linear"),
    ([ONE, TWO], [1.0], "cat", {}, "2 adapters and 1 weights"),
    ([ONE], [np.nan], "cat", {}, "expected finite numbers"),
    ([ONE], [1.0], "ties", dict(density=0.0), "density is 0.0"),
    ([ONE], [1.0], "svd", dict(rank=0), "rank is 0"),
    ([ONE], [1.0], "dare_ties", dict(density=0.5), "needs a key"),
    ([ONE, THREE], WEIGHTS, "linear", {}, "ranks are [3, 5]"),
  ],
)
def test_mistakes(adapters, weights, how, options, words):
  with pytest.raises(UserError) as error:
    arithmetic.add_weighted(adapters, weights, how, **options)
  assert words in str(error.value)
