"""Tests 4-bit codebooks against bitsandbytes' numbers and QLoRA's memory."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import sharding, tree, weights
from research.interop import native
from research.interop.quantized import bnb
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.layouts import cpu_layout
from research.quant.numerics import codebooks
from research.quant.quantize import Cast, Quantize
from research.typing import UserError
from tests import support, support_lora

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[2] / "golden" / "bnb4.json").read_text()
)


def label(found):
  return "-".join(map(str, found["case"]))


golden = pytest.mark.parametrize("found", GOLDEN, ids=label)


def matrix(outputs, inputs, dtype="float32"):
  """Returns `[inputs, outputs]`; the rule of make_bnb4.py."""
  t = np.arange(outputs * inputs, dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  return x.astype(np.float32).reshape(outputs, inputs).T.astype(dtype)


def tensors(found):
  out = {
    name: np.frombuffer(bytes.fromhex(text), dtype)
    for name, (dtype, text) in found["tensors"].items()
  }
  kind = found["case"][2]
  out.setdefault("weight.quant_map", codebooks.table(kind))
  if found["case"][3]:
    tables = tensors(GOLDEN[0]) if found is not GOLDEN[0] else out
    name = "weight.nested_quant_map"
    out.setdefault(name, tables[name])
  return out


def gaussian(*shape, seed=0):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


_packed = jax.jit(qtensor.pack, static_argnums=1)
_dense = jax.jit(weights.dense)


def pack(w, kind="nf4", block=64, nested=256):
  """Packs by NumPy, or by one program of JAX."""
  f = qtensor.pack if isinstance(w, np.ndarray) else _packed
  return f(w, Codebook(kind=kind, block=block, nested=nested))


def packed(found, how):
  outputs, inputs, kind, double, block, dtype = found["case"]
  w, nested = matrix(outputs, inputs, dtype), 256 if double else 0
  if how == "numpy":
    return pack(w, kind, block, nested)
  return jax.jit(lambda w: pack(w, kind, block, nested))(jnp.asarray(w))


@golden
@pytest.mark.parametrize("how", ["numpy", "jax"])
@pytest.mark.cover(1)
def test_codes_are_bitsandbytes(found, how):
  got, want = bnb.to_state_dict(packed(found, how)), tensors(found)
  assert set(got) == set(want)
  for name in ("weight", "weight.quant_map", "weight.nested_quant_map"):
    if name in want:
      np.testing.assert_array_equal(got[name].reshape(-1), want[name], name)
  if not found["case"][3]:
    np.testing.assert_array_equal(got["weight.absmax"], want["weight.absmax"])
    return
  # The mean is a sum in another order, and bitsandbytes' search for 8-bit
  # codes is inexact: a step of 1/128 at the top of the table.
  said = [json.loads(x[state(x)].tobytes()) for x in (got, want)]
  offsets = [x.pop("nested_offset") for x in said]
  assert said[0] == said[1]
  np.testing.assert_allclose(*offsets, rtol=1e-6)
  nested = "weight.nested_absmax"
  np.testing.assert_allclose(got[nested], want[nested], atol=3e-6)
  # Of a single magnitude nothing is left to have a code.
  step = got["weight.absmax"].astype(int) - want["weight.absmax"]
  step = step * np.repeat(want[nested] > 0, 256)[: step.size]
  assert abs(step).max() <= 1 and (step != 0).mean() < 0.01


def state(tensors):
  return next(name for name in tensors if "quant_state" in name)


@golden
@pytest.mark.sample(5)
def test_decoded_bitwise_and_written_back(found):
  w = bnb.from_state_dict(tensors(found))
  outputs, inputs = found["case"][:2]
  assert w.shape == (inputs, outputs)
  assert w.dtype == found["case"][-1]
  again = bnb.to_state_dict(w)
  for name, want in tensors(found).items():
    np.testing.assert_array_equal(again[name].reshape(-1), want, name)
  if found["dense"] is None:
    return
  want = np.frombuffer(bytes.fromhex(found["dense"]), np.float32)
  want = want.reshape(outputs, inputs).T
  for f in (weights.dense, jax.jit(weights.dense)):
    np.testing.assert_array_equal(np.asarray(f(w), np.float32), want)


def test_the_published_table_is_what_its_derivation_gives():
  """Quantiles of a normal distribution (Dettmers et al. 2023, appendix E)."""
  top = 0.5 * ((1 - 1 / 30) + (1 - 1 / 32))
  ppf = jax.scipy.special.ndtri
  high = ppf(jnp.linspace(top, 0.5, 9)[:8])
  low = -ppf(jnp.linspace(top, 0.5, 8)[:7])
  want = jnp.sort(jnp.concatenate([high, low, jnp.zeros(1)])) / high[0]
  np.testing.assert_allclose(codebooks.table("nf4"), want, atol=1e-6)


@pytest.mark.parametrize(
  ("kind", "block", "error"),
  [("nf4", 64, 0.0728), ("nf4", 256, 0.0803), ("fp4", 64, 0.0965)],
)
def test_error_on_gaussians_is_the_published_one(kind, block, error):
  w = gaussian(1024, 512)
  got = np.abs(np.asarray(_dense(pack(w, kind, block, 0))) - w).mean()
  assert got == pytest.approx(error, rel=0.005)


@pytest.mark.parametrize("shape", [(3, 128, 24), (2, 7, 5), (2, 3, 64, 6)])
def test_stacks_are_their_matrices_and_numpy_is_jax(shape):
  w = gaussian(*shape)
  here, there = pack(w), jax.jit(pack)(jnp.asarray(w))
  assert here.shape == there.shape == shape
  chex.assert_trees_all_equal(here.parts["codes"], there.parts["codes"])
  last = (-1,) * (len(shape) - 2)
  one = jax.tree.map(lambda x: x[last], here)
  chex.assert_trees_all_equal(one, pack(w[last]))
  dense = np.asarray(_dense(here))
  np.testing.assert_array_equal(dense[last], _dense(one))
  np.testing.assert_allclose(dense, _dense(there), atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 24), (7, 5)])
@pytest.mark.parametrize("how", [np.asarray, jnp.asarray])
def test_packing_decoded_weights_changes_nothing(shape, how):
  w = pack(how(gaussian(*shape)), nested=0)
  again = pack(how(np.asarray(_dense(w))), nested=0)
  chex.assert_trees_all_equal(w, again)


@pytest.mark.parametrize("shape", [(64, 4), (7, 5)])
@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("how", [np.asarray, jnp.asarray])
def test_zeros_stay_zeros(shape, nested, how):
  w = pack(how(np.zeros(shape, np.float32)), nested=nested)
  assert not np.asarray(_dense(w)).any()


def test_rows_are_read_from_where_the_order_says():
  rng = np.random.default_rng(5)
  w = jnp.asarray(rng.standard_normal((16, 4)), jnp.float32)
  stored = qtensor.pack(w, Affine(bits=8, block=8, symmetric=True))
  order = np.roll(np.arange(16), 3)  # not its own inverse
  found = dataclasses.replace(stored, order=jnp.asarray(order, jnp.int32))
  chex.assert_trees_all_equal(found.dense(), stored.dense()[order])


def test_bits_of_a_weight():
  w = pack(gaussian(1024, 512))
  # 4 + 8/64 + 32/(64 256), and a mean of 4 bytes.
  assert tree.nbytes(w) == 1024 * 512 * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 4
  w = pack(gaussian(1024, 512), nested=0)
  assert tree.nbytes(w) == 1024 * 512 * 4.5 / 8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inputs", [64, 45])
@pytest.mark.parametrize("eq", ["...i,io->...o", "...o,io->...i"])
@pytest.mark.sample(3)
def test_products_and_their_gradients_are_the_dense_ones(eq, inputs, dtype):
  w = pack(jnp.asarray(gaussian(inputs, 24)))
  x = jnp.asarray(gaussian(2, 5, w.shape[0 if eq[3] == "i" else 1]), dtype)

  def both(multiply, x, w):
    def total(x):
      y = multiply(x, w)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.value_and_grad(total, has_aux=True)(x)

  f = jax.jit(both, static_argnums=0)
  got = f(lambda x, w: weights.einsum(eq, x, w), x, w)
  want = f(lambda x, w: jnp.einsum(eq, x, w.astype(x.dtype)), x, _dense(w))
  # Sums of up to 64 products of size 1, and cosines of them.
  atol = 256 * float(jnp.finfo(dtype).eps)
  chex.assert_trees_all_close(got[0][1], want[0][1], atol=atol)
  chex.assert_trees_all_close(got[1], want[1], atol=atol)
  assert got[1].dtype == dtype


@pytest.mark.slow
def test_experts_and_rows():
  w = pack(jnp.asarray(gaussian(3, 64, 24)))
  x = jnp.asarray(gaussian(10, 64))
  got = weights.ragged_dot(x, w, jnp.array([4, 0, 6]))
  dense = w.dense()
  want = jnp.concatenate([x[:4] @ dense[0], x[4:] @ dense[2]])
  chex.assert_trees_all_close(got, want, atol=1e-4)
  one = jax.tree.map(lambda x: x[1], w)
  ids = jnp.array([[3, 0], [63, 3]])
  np.testing.assert_array_equal(weights.take(one, ids), dense[1][ids])


def test_the_backward_pass_keeps_the_packed_weights_alone():
  """Under adapters in fp32: residuals hold no decoded matrix."""
  layers, width = 16, 256
  w = pack(jnp.asarray(gaussian(layers, width, width)))
  a = jnp.asarray(gaussian(layers, 2, width))
  adapted = support_lora.lora(w, a, 0 * a)
  trained, fixed = tree.partition(adapted, "trained")
  x = jnp.ones((4, width))

  def total(trained, fixed, x, dense):
    def body(x, w):
      if dense:
        w = w.map_base(weights.dense)
      return jnp.tanh(weights.einsum("bi,io->bo", x, w)), None

    return jax.lax.scan(body, x, tree.combine(trained, fixed))[0].sum()

  def residuals(dense):
    def f(trained):
      return jax.vjp(lambda t: total(t, fixed, x, dense), trained)[1]

    return [r.shape for r in jax.tree.leaves(jax.eval_shape(f, trained))]

  def temporaries(dense):
    f = jax.jit(jax.grad(total), static_argnums=3)
    usage = f.lower(trained, fixed, x, dense).compile().memory_analysis()
    return usage.temp_size_in_bytes

  decoded = (layers, width, width)
  assert decoded not in residuals(False)
  assert decoded in residuals(True)
  # Forward and backward may each hold one decoded layer and its codes.
  one = 4 * width * width
  assert temporaries(False) < 4 * one
  assert temporaries(True) >= layers * one


def test_axes_follow_the_parts():
  w = pack(gaussian(3, 128, 24))
  named = weights.axes(w, ("in", "out"))
  assert named.parts["codes"] == (None, "in", None, "out")
  assert named.parts["top"] == (None, "in", "out")
  flat = pack(gaussian(3, 7, 24))
  for x in (w, flat):
    named = weights.axes(x, ("in", "out"))
    for name in ("codes", "top", "nested", "mean"):
      assert len(named.parts[name]) in (0, x.parts[name].ndim)


@pytest.mark.parametrize("of", ["float32", "bfloat16"])
def test_panels_hold_the_same_numbers(of):
  w = pack(jnp.asarray(gaussian(2, 128, 24), of))
  got = np.asarray(cpu_layout.from_qtensor(w).dense(), of)
  np.testing.assert_array_equal(got, w.dense())


# In a model ------------------------------------------------------------------

SIZES = dict(depth=2, width=64, hidden=64, head_dim=8, vocab=64)


def test_quantize_packs_the_layers_and_shares_the_rest():
  model = support.model(**SIZES)
  params = support.params(model)
  got = Quantize()(params)
  assert got["embed"] is params["embed"]
  layer = got["run0"]["layer0"]
  assert layer["mlp"]["up"].format.kind == "nf4"
  assert layer["attention_norm"] is not None
  dense = jax.tree.map(_dense, got, is_leaf=weights.is_weight)
  f = jax.jit(lambda p: model.apply({"params": p}, support.tokens(vocab=64))[0])
  want = f(dense)
  chex.assert_trees_all_close(f(got), want, atol=1e-5 * float(jnp.ptp(want)))
  unrolled = f(tree.unroll(got))
  chex.assert_trees_all_close(unrolled, want, atol=1e-5 * float(jnp.ptp(want)))
  some = Quantize(targets=("q", "mlp/up"))
  assert len(some.selected_paths(params)) == 2
  note = native._describe(got)
  described = native._abstract(json.loads(json.dumps(note)), "weights")
  assert jax.tree.structure(described) == jax.tree.structure(got)


@pytest.mark.slow
def test_sharded_weights_are_the_same():
  model = support.model(**SIZES)
  params = Quantize(format=Codebook(block=32))(support.params(model))
  layout = sharding.Layout(data=1, fsdp=2, tensor=2)
  mesh = layout.mesh()
  where = layout.shardings(params, mesh, sharding.head_counts(model))
  cut = where["run0"]["layer0"]["mlp"]["up"]
  assert (
    "fsdp" in cut.parts["codes"].spec and "tensor" in cut.parts["codes"].spec
  )
  f = jax.jit(lambda p: model.apply({"params": p}, support.tokens(vocab=64))[0])
  want = f(params)
  with jax.set_mesh(mesh):
    got = f(jax.device_put(params, where))
  chex.assert_trees_all_close(
    jax.device_get(got), want, atol=1e-5 * float(jnp.ptp(want))
  )


def test_cast_leaves_packed_weights():
  params = Quantize(targets=("q",))(support.params(support.model(**SIZES)))
  got = Cast()(params)
  assert got["embed"].dtype == jnp.bfloat16
  assert got["run0"]["layer0"]["attention"]["q"].dtype == jnp.float32


# Mistakes --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(targets=("qq",)), "'qq' matches no matrix"),
    (dict(targets="qq"), "expected 'all-linear' or a list"),
  ],
)
def test_mistakes_in_quantize(change, message):
  params = support.params(support.model(**SIZES))
  with pytest.raises(UserError, match=message):
    Quantize(**change)(params)


def test_adapted_weights_are_not_packed():
  params = support.params(support.model(**SIZES))
  adapted = support_lora.adapting(rank=2)(params, jax.random.key(0))
  with pytest.raises(UserError, match="quantize first, then adapt"):
    Quantize()(adapted)


def damaged(**said):
  found = dict(tensors(GOLDEN[0]))
  text = json.loads(found[state(found)].tobytes()) | said
  found[state(found)] = np.frombuffer(json.dumps(text).encode(), np.uint8)
  return found


@pytest.mark.parametrize(
  ("found", "message"),
  [
    (damaged(blocksize=63), "blocksize is 63"),
    (damaged(blocksize="64"), "blocksize is 64"),
    (damaged(quant_type="nf3"), "quant_type is nf3"),
    (damaged(dtype="object"), "dtype is object"),
    (damaged(shape=[4, 64, 1]), "shape is"),
    (damaged(shape=[2**40, 2**40]), "weight is uint8 .*, expected uint8 of"),
    (damaged(nested_offset=1e400), "nested_offset is inf"),
    (damaged(nested_blocksize=128), "nested_blocksize is 128"),
    ({"weight": np.zeros(3, np.uint8)}, "0 tensors weight.quant_state"),
  ],
)
def test_damaged_tensors(found, message):
  with pytest.raises(UserError, match=message):
    bnb.from_state_dict(found, "file")


def test_other_damage():
  found = tensors(GOLDEN[0])
  name = state(found)
  for bad in (b"{", b"[]", b"\xff", b"[" * 4000):
    with pytest.raises(UserError, match="JSON"):
      bnb.from_state_dict(found | {name: np.frombuffer(bad, np.uint8)})
  for name in ("weight", "weight.absmax", "weight.nested_absmax"):
    with pytest.raises(UserError, match=f"{name} is missing"):
      bnb.from_state_dict({k: v for k, v in found.items() if k != name})
    with pytest.raises(UserError, match=f"{name} is .* expected"):
      bnb.from_state_dict(found | {name: found[name][:-1]})
  wrong = found | {"weight.quant_map": np.zeros(16, np.float32)}
  with pytest.raises(UserError, match="not the values that codes stand for"):
    bnb.from_state_dict(wrong)
