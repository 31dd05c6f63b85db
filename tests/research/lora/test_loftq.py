"""Tests LoftQ, QPiSSA and QA-LoRA, which account for quantization."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop.gguf import tensor_types
from research.lora import adapt, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.loftq import LoftQ, fit
from research.lora.methods.dora import DoRA
from research.lora.methods.lora import LoRA
from research.lora.methods.qalora import QALoRA, merged_offsets
from research.quant import qtensor
from research.quant.activations import Inputs, Round
from research.quant.formats import ggml
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Quantize
from research.typing import UserError
from tests import support

RANK, SCALE = 16, 2.0


def spread(inputs=128, outputs=96):
  """Returns a matrix with decaying singular values, like trained ones."""
  rng = np.random.default_rng(0)
  u = np.linalg.qr(rng.standard_normal((inputs, outputs)))[0]
  v = np.linalg.qr(rng.standard_normal((outputs, outputs)))[0]
  s = 4 * np.arange(1, outputs + 1) ** -0.7
  return jnp.asarray((u * s) @ v, jnp.float32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def error(w, steps, first, scale=SCALE):
  q, a, b = fit(w, RANK, scale, steps, first)
  return jnp.linalg.norm(w - q.dense() - scale * a.T @ b)


@pytest.mark.slow
def test_errors_fall_as_lora_md_9_2_has_them():
  w = spread()
  plain = float(jnp.linalg.norm(w - qtensor.pack(w, Codebook()).dense()))
  loftq = [float(error(w, steps, "codes")) for steps in (1, 2, 3, 5)]
  # QLoRA's error is that of the codes; each step of LoftQ takes from it.
  assert loftq[0] < 0.9 * plain
  assert all(b < a * 1.001 for a, b in zip(loftq, loftq[1:], strict=False))
  qpissa = float(error(w, 1, "factors"))
  assert qpissa < 0.9 * plain
  assert float(error(w, 3, "factors")) < qpissa
  # The factors are made for their scale: it changes nothing.
  other = float(error(w, 2, "codes", 0.25))
  assert other == pytest.approx(loftq[1], rel=1e-3)


@pytest.mark.slow
def test_one_step_is_the_best_correction_of_the_plain_codes():
  w = spread()
  q, _, _ = fit(w, RANK, SCALE, 1, "codes")
  chex.assert_trees_all_equal(q, qtensor.pack(w, Codebook()))
  rest = np.asarray(w - q.dense(), np.float64)
  want = np.sqrt((np.linalg.svd(rest, compute_uv=False)[RANK:] ** 2).sum())
  assert float(error(w, 1, "codes")) == pytest.approx(want, rel=1e-4)


@functools.cache
def model():
  return support.model(width=64, hidden=64, head_dim=8, depth=2)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["codes", "factors"])
@pytest.mark.sample(3)
def test_in_a_model(first):
  params = support.params(model())
  how = Quantize(targets=("q", "k", "up"))
  method = LoRA(rank=4, alpha=8.0)
  start = adapt.Adapt(method=method, targets=("q", "up"))
  got = LoftQ(quantize=how, adapt=start, steps=2, first=first)(params)
  layer = got["run0"]["layer0"]
  assert type(layer["attention"]["q"].w).__name__ == "QTensor"
  assert type(layer["attention"]["k"]).__name__ == "QTensor"
  assert layer["attention"]["v"] is params["run0"]["layer0"]["attention"]["v"]
  q, w = layer["attention"]["q"], params["run0"]["layer0"]["attention"]["q"]
  plain = jnp.linalg.norm(w - how.pack(w).dense())
  assert jnp.linalg.norm(w - q.dense()) < plain
  trainable, _ = tree.partition(got, wrap.TRAINABLE)
  assert tree.count(trainable) == 2 * 2 * 4 * (64 + 64) - 2 * 4 * (64 - 32)
  # Plain LoRA: the base is what stays when it is taken off.
  off = wrap.disable(got)["run0"]["layer0"]["attention"]["q"]
  assert type(off) is type(q.w)


@pytest.mark.slow
def test_a_base_in_blocks_of_ggml():
  """Their encoder is NumPy code inside of LoftQ's program."""
  params = support.params(model())
  how = Quantize(format=ggml.GGML(kind="Q4_0"))
  start = adapt.Adapt(method=LoRA(rank=4, alpha=8.0), targets=("q", "up"))
  one, two = (
    LoftQ(quantize=how, adapt=start, steps=steps)(params) for steps in (1, 2)
  )
  w = params["run0"]["layer0"]["attention"]["q"]
  q, again = (p["run0"]["layer0"]["attention"]["q"] for p in (one, two))
  chex.assert_trees_all_equal(q.w.parts, how.pack(w).parts)
  errors = [
    float(jnp.linalg.norm(w - x.dense())) for x in (how.pack(w), q, again)
  ]
  assert errors[2] < errors[1] < errors[0]


def test_mistakes():
  with pytest.raises(UserError, match="method is DoRA, expected LoRA"):
    LoftQ(adapt=adapt.Adapt(method=DoRA()))


def test_operations_on_inputs_are_not_dropped():
  params = Inputs(op=Round(bits=3))(support.params(model()))
  with pytest.raises(UserError, match="attention/.*: found a InputTensor"):
    LoftQ()(params)


def test_a_rank_beyond_the_matrix():
  start = adapt.Adapt(method=LoRA(rank=65))
  with pytest.raises(UserError, match="rank is 65, expected at most"):
    LoftQ(adapt=start)(support.params(model()))


def test_weights_that_are_not_finite_are_named():
  params = support.params(model())
  q = params["run0"]["layer0"]["attention"]["q"]
  params["run0"]["layer0"]["attention"]["q"] = q.at[1, 0, 0].set(jnp.nan)
  start = adapt.Adapt(method=LoRA(rank=4), targets=("q",))
  with pytest.raises(UserError, match="attention/q"):
    LoftQ(quantize=Quantize(format=ggml.GGML()), adapt=start)(params)


# QA-LoRA ---------------------------------------------------------------------


def affine(kind="Q4_1", n=3, inputs=128, outputs=24):
  rng = np.random.default_rng(0)
  x = 0.1 * rng.standard_normal((n, outputs, inputs)).astype(np.float32)
  rows = tensor_types.encode(kind, x).reshape(n, outputs, -1)
  return ggml.from_ggml(kind, list(rows), -2)


def over(w, group=64):
  rng = np.random.default_rng(1)
  n, inputs, outputs = w.shape
  a = rng.standard_normal((n, 4, inputs // group)).astype(np.float32)
  b = rng.standard_normal((n, 4, outputs)).astype(np.float32)
  method = QALoRA(rank=4, alpha=4.0, group=group)
  arrays = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
  return AdaptedTensor(w, arrays, method=method)


def test_the_update_is_pefts_formula():
  """`QALoraLinearVariant.forward`: pooled means, times their number."""
  t = jax.tree.map(lambda x: x[0], over(affine()))
  x = np.random.default_rng(2).standard_normal((5, 128)).astype(np.float32)
  pooled = x.reshape(5, 2, 64).mean(2) * 2
  added = pooled @ t.trained["a"].T @ t.trained["b"]
  want = x @ np.asarray(t.w.dense()) + added
  got = weights.einsum("td,df->tf", jnp.asarray(x), t)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_merging_changes_offsets_only():
  t = over(affine())
  merged = merged_offsets(t)
  chex.assert_trees_all_equal(merged.parts["codes"], t.w.parts["codes"])
  chex.assert_trees_all_equal(merged.parts["scale"], t.w.parts["scale"])
  want = np.asarray(t.dense())
  # float16 has 11 bits, and an offset is the smallest number of its group.
  atol = 2.0**-11 * float(np.abs(np.asarray(merged.parts["offset"])).max())
  np.testing.assert_allclose(merged.dense(), want, atol=atol)
  assert np.abs(want - t.w.dense()).max() > 100 * atol


def test_mistakes_in_merging():
  with pytest.raises(UserError, match="takes a base with offsets"):
    merged_offsets(over(affine("Q4_0")))
  with pytest.raises(UserError, match="group is 16, expected a multiple"):
    merged_offsets(over(affine(), 16))
  method = QALoRA(group=48)
  start = adapt.Adapt(method=method)
  with pytest.raises(UserError, match="expected inputs in groups of 48"):
    start(support.params(model()), jax.random.key(0))
  assert dataclasses.replace(method, group=64).scale == 2.0
