"""Merges lose what rounding takes; stochastic ones nothing on average."""

import functools

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from research import tree, weights
from research.lora import adapt, wrap
from research.lora.merge import changes, merge
from research.lora.methods.lora import LoRA
from research.typing import UserError
from tests import support
from tests.support_lora import lora

MODEL = support.model()
BF16 = np.dtype(ml_dtypes.bfloat16)


@functools.cache
def adapted(size=0.1, dtype="float32"):
  params = support.params(MODEL)
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  made = adapt.Adapt(method=LoRA(rank=3), targets=("q", "down", "embed"))(
    params, jax.random.key(0)
  )
  rng = np.random.default_rng(0)
  return tree.map_paths(
    lambda p, x: (
      jnp.asarray(size**0.5 * rng.standard_normal(x.shape), x.dtype)
      if "/trained/" in p
      else x
    ),
    made,
  )


def test_in_fp32_nothing_is_lost():
  got, losses = merge.merge(adapted())
  want = jax.tree.map(weights.dense, adapted(), is_leaf=weights.is_weight)
  chex.assert_trees_all_close(got, want, atol=1e-6)
  assert set(losses) == {"embed"} | {
    f"layers/{i}/{name}"
    for i in range(3)
    for name in ("attention/q", "mlp/down")
  }
  assert all(c.kept == 1 and c.fidelity == 0 for c in losses.values())


def matrix(relative, n=256):
  """Returns a base in bf16 under a random update of that relative size."""
  rng = np.random.default_rng(0)
  w = jnp.asarray(0.02 * rng.standard_normal((1, n, n)), jnp.bfloat16)
  a, b = (rng.standard_normal((1, n, n)).astype(np.float32) for _ in range(2))
  # Independent entries: a is the identity.
  a[0] = np.eye(n)
  b *= 0.02 * relative
  t = lora(w, jnp.asarray(a), jnp.asarray(b))
  return {"run0": {"layer0": {"x": t}}}


@pytest.mark.parametrize(
  "relative, still, lost",
  [(1e-2, 0.17, 0.17), (1e-3, 0.78, 0.80), (3e-4, 0.93, 0.94)],
)
def test_small_updates_are_lost_in_bf16(relative, still, lost):
  """The shares are those of research/lora/MATH.md 2.4."""
  params = matrix(relative)
  got, losses = merge.merge(params)
  before = wrap.disable(params)["run0"]["layer0"]["x"]
  after = got["run0"]["layer0"]["x"]
  assert after.dtype == jnp.bfloat16
  assert abs(float(jnp.mean(before == after)) - still) < 0.03
  assert abs(losses["layers/0/x"].fidelity - lost) < 0.03


def test_what_the_base_loses_alone_is_not_the_updates():
  """A base a quarter of a step off, and an update of whole steps."""
  step = 2.0**-7
  w = jnp.full((1, 8, 8), 1 + step / 4)
  steps = jnp.asarray(np.random.default_rng(0).integers(1, 9, (1, 8, 8)) * step)
  params = {"run0": {"layer0": {"x": lora(w, jnp.eye(8)[None], steps)}}}
  _, losses = merge.merge(params, dtype="bfloat16")
  found = losses["layers/0/x"]
  assert (found.kept, found.fidelity) == (1, 0)
  assert found.max_abs_error == step / 4
  want = dict(kept=1.0, lost=0.0, noise=0.0, worst="layers/0/x")
  assert changes.merge_summary(losses.values()) == want


@pytest.mark.parametrize("relative", [1e-2, 1e-3, 3e-4])
def test_stochastic_rounding_keeps_them(relative):
  params = matrix(relative)
  _, losses = merge.merge(params, merge.StochasticRounding(1))
  found = losses["layers/0/x"]
  # Four deviations: an entry's noise is at most half a step of 2^-8.
  noise = 4 * 0.5 * 2**-8 / relative / 256
  assert abs(found.kept - 1) < noise
  assert found.fidelity > merge.merge(params)[1]["layers/0/x"].fidelity


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_stochastic_rounding_takes_a_neighbour(dtype):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(2000).astype(np.float32)
  x[:3] = [0.0, 1.0, -1.5]
  rounds = [merge.StochasticRounding(i) for i in range(400)]
  draws = np.stack([r("w", x, dtype).astype(np.float32) for r in rounds])
  low, high = draws.min(0), draws.max(0)
  step = float(ml_dtypes.finfo(dtype).eps) * np.abs(x)
  assert (np.abs(draws - x) <= step).all()
  np.testing.assert_array_equal(draws[:, :3], np.tile(x[:3], (400, 1)))
  above = np.nextafter(low.astype(dtype), dtype.type(np.inf))
  assert (high <= above.astype(np.float32)).all()
  assert (high > low).mean() > 0.9
  # Five deviations of the mean of two numbers a step apart.
  assert (np.abs(draws.mean(0) - x) <= 5 * 0.5 * step / 400**0.5).all()


def test_stochastic_rounding_is_repeatable_and_finite():
  x = np.float32([65519.0, 6.1e-5, -65519.0])
  one = merge.StochasticRounding(0)("w", x, np.dtype(np.float16))
  assert np.isfinite(one).all()
  np.testing.assert_array_equal(
    one, merge.StochasticRounding(0)("w", x, np.dtype(np.float16))
  )
  wide = np.random.default_rng(0).standard_normal(999).astype(np.float32)
  draws = [merge.StochasticRounding(0)(name, wide, BF16) for name in "ab"]
  assert (draws[0] != draws[1]).any()
  with pytest.raises(UserError, match="beyond the range"):
    merge.StochasticRounding(0)("w", np.float32([1e6]), np.dtype(np.float16))


def test_a_lossy_merge_is_refused():
  with pytest.raises(UserError) as error:
    merge.merge(matrix(3e-4), least=changes.LEAST_KEPT)
  text = str(error.value)
  assert "of the adapter's update would be left" in text
  assert "layers/0/x" in text
  assert "--lossy" in text
  merge.merge(matrix(1e-2), least=changes.LEAST_KEPT)
  merge.merge(matrix(1e-3), merge.StochasticRounding(), least=0.9)
  merge.merge(matrix(3e-4), dtype="float32", least=changes.LEAST_KEPT)


def test_outputs():
  params, tokens = adapted(), support.tokens()
  base = wrap.disable(params)
  found = merge.logit_change(MODEL, base, params, tokens)

  @jax.jit
  def logits(params):
    hidden, _ = MODEL.apply({"params": params}, tokens)
    return MODEL.apply({"params": params}, hidden, method="logits")

  x, y = (np.asarray(logits(p), np.float64) for p in (base, params))
  p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (x, y))
  kl = (p * np.log(p / q)).sum(-1)
  want = merge.LogitChange(
    max_logit=np.abs(x - y).max(),
    mean_logit=np.abs(x - y).mean(),
    kl=kl.mean(),
    max_kl=kl.max(),
    agreement=(x.argmax(-1) == y.argmax(-1)).mean(),
    tokens=32,
  )
  for name, value in vars(want).items():
    np.testing.assert_allclose(vars(found)[name], value, rtol=1e-3)
  assert merge.logit_change(MODEL, base, base, tokens).max_kl < 1e-6
