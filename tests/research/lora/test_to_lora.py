"""Tests conversion to plain LoRA and the reported errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.lora import adapt, lora_factors, to_lora, wrap
from research.lora.methods.dora import DoRA
from research.lora.methods.hira import HiRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.loha import LoHa
from research.lora.methods.lora import LoRA
from research.lora.methods.miss import MiSS
from research.lora.methods.svd_init import PiSSA
from research.lora.methods.vera import VeRA
from research.typing import UserError
from tests import support

MODEL = support.model()
METHODS = [
  LoRA(rank=3, rslora=True),
  PiSSA(rank=2),
  DoRA(rank=3),
  HiRA(rank=3),
  LoHa(rank=2),
  VeRA(rank=3),
  IA3(),
  MiSS(rank=4),
]


@functools.cache
def adapted(method, targets=("q", "down")):
  params = support.params(MODEL)
  made = adapt.Adapt(method=method, targets=targets)(params, jax.random.key(0))
  rng = np.random.default_rng(0)

  def moved(path, x):
    if "/trained/" not in path:
      return x
    return x + jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)

  return tree.map_paths(moved, made)


def deltas(params):
  return {
    path: lora_factors.update(t)
    for path, t in lora_factors.adapters(params).items()
  }


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.sample(3)
def test_all_of_an_update(method):
  params = adapted(method)
  got, fits = to_lora.to_lora(params, to_lora.Rank(99))
  want = deltas(params)
  for path, d in deltas(got).items():
    scale = np.abs(want[path]).max()
    np.testing.assert_allclose(d, want[path], atol=2e-5 * scale)
    assert fits[path].error < 1e-6
  for t in lora_factors.adapters(got).values():
    assert type(t.method) is LoRA
    assert t.method.scale == 1.0
  chex.assert_trees_all_equal(
    tree.unroll(wrap.disable(got)), tree.unroll(wrap.disable(params))
  )


@pytest.mark.parametrize("method", [DoRA(rank=3), LoRA(rank=3)], ids=str)
@pytest.mark.parametrize(
  "size", [to_lora.Rank(2), to_lora.Energy(0.8)], ids=["rank", "energy"]
)
def test_the_error_is_that_of_the_truncated_part(method, size):
  params = adapted(method)
  got, fits = to_lora.to_lora(params, size)
  have = deltas(got)
  for path, want in deltas(params).items():
    lost = np.linalg.norm(want - have[path]) / np.linalg.norm(want)
    np.testing.assert_allclose(fits[path].error, lost, rtol=1e-3, atol=1e-6)
    s = np.linalg.svd(want, compute_uv=False) ** 2
    shares, rank = np.cumsum(s) / s.sum(), fits[path].rank
    if isinstance(size, to_lora.Energy):
      assert shares[rank - 1] >= 0.8 > shares[: rank - 1].max(initial=0)
    else:
      assert rank == 2


def test_experts_are_converted_one_by_one():
  w = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 8, 6)))
  params = {"run0": {"layer0": {"x": w.astype(jnp.float32)}}}
  made = adapt.Adapt(method=LoHa(rank=2), targets=("x",))(
    params, jax.random.key(0)
  )
  made = tree.map_paths(
    lambda p, x: (
      x + 0.1 * (1 + jnp.arange(x.size).reshape(x.shape) % 3)
      if "/trained/" in p
      else x
    ),
    made,
  )
  got, _ = to_lora.to_lora(made, to_lora.Rank(6))
  chex.assert_trees_all_close(
    jax.tree.map(weights.dense, got, is_leaf=weights.is_weight),
    jax.tree.map(weights.dense, made, is_leaf=weights.is_weight),
    atol=1e-5,
  )


def test_factors_of_methods_that_are_lora():
  params = adapted(PiSSA(rank=2))
  for path, f in lora_factors.factors(params).items():
    assert f.rank == 4
    np.testing.assert_allclose(f.delta(), deltas(params)[path], atol=1e-5)
  with pytest.raises(UserError, match="expected plain LoRA"):
    lora_factors.factors(adapted(HiRA(rank=3)))
  with pytest.raises(UserError, match="hold no adapter"):
    lora_factors.factors(support.params(MODEL))
  with pytest.raises(UserError, match="hold no adapter"):
    to_lora.to_lora(support.params(MODEL), to_lora.Rank(1))
