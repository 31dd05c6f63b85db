"""Tests quantization-aware training: bitwise conversion, explicit gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.lora import adapt
from research.lora.methods.lora import LoRA
from research.quant.activations import Inputs, InputTensor, Round
from research.quant.algorithms import qat
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.qtensor import QTensor
from research.quant.quantize import Quantize
from research.training import state, step
from research.training.objectives import distill, preference
from research.typing import UserError
from tests import support

SYMMETRIC = Affine(bits=4, block=4, symmetric=True)
FORMATS = [
  Affine(bits=4, block=32),
  Affine(bits=3, block=32, zero="float"),
  Affine(bits=4, block=32, symmetric=True, rule="signed"),
  Codebook(block=32, nested=0),
  Codebook(block=32),
  Microscaling(),
  NVFP4(),
  GGML(kind="Q5_1"),
]


def _matrix(*shape, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(0.1 * x, jnp.float32)


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.sample(5)
def test_what_is_converted_is_what_was_trained_bit_for_bit(format):
  w = qat.Prepare(format=format).prepare(_matrix(2, 64, 24))
  trained = jax.jit(lambda w: w.dense())(w)
  packed = w.pack()
  np.testing.assert_array_equal(packed.dense(), trained)
  np.testing.assert_array_equal(packed.dense(), w.dense())
  # And it is what rounding the masters alone would have been.
  quantized = Quantize(format=format)
  if format.traceable:
    plain = quantized.pack(w.w)
    jax.tree.map(np.testing.assert_array_equal, packed.parts, plain.parts)
  assert 0 < float(abs(trained - w.w).max()) < 0.2


@pytest.mark.parametrize(
  "format", [FORMATS[0], FORMATS[-1]], ids=lambda f: f.name
)
def test_the_gradient_goes_straight_through(format):
  w, x = qat.FakeQuantTensor(_matrix(64, 8), format=format), _matrix(3, 64)

  @jax.jit
  @jax.grad
  def slope(w):
    return (w.einsum("...d,df->...f", x) ** 2).sum()

  y = x @ w.dense()
  np.testing.assert_allclose(slope(w).w, 2 * x.T @ y, rtol=1e-5, atol=1e-7)


def test_learned_scales_have_lsq_s_gradient():
  """Equation 3 of the paper, an element at a time in float64."""
  w = qat.Prepare(format=SYMMETRIC, learned=True).prepare(_matrix(8, 3))
  # Some masters beyond the ends.
  w = qat.FakeQuantTensor(w.w, 0.3 * w.gain, w.start, w.format)
  dy = _matrix(8, 3, seed=1)
  (found,) = jax.vjp(lambda w: w.dense(), w)[1](dy)
  want_w, want = np.zeros((8, 3)), np.zeros((2, 3))
  for i in range(8):
    for o in range(3):
      scale = np.float64(np.float16(w.gain[i // 4, o] * w.start[i // 4, o]))
      x = float(w.w[i, o]) / scale
      inside = -8 < x < 7
      slope = np.clip(np.round(x), -8, 7) - (x if inside else 0)
      want[i // 4, o] += dy[i, o] * slope / np.sqrt(4 * 7)
      want_w[i, o] = dy[i, o] * inside
  np.testing.assert_allclose(found.w, want_w, rtol=1e-6)
  assert (want_w == 0).any() and (want_w != 0).any()
  np.testing.assert_allclose(found.gain, want * w.start, rtol=2e-4)
  assert not np.any(found.start)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learned_scales_are_converted_bit_for_bit(dtype):
  format = Affine(bits=4, block=32, symmetric=True)
  masters = _matrix(2, 64, 24).astype(dtype)
  w = qat.Prepare(format=format, learned=True).prepare(masters)
  gain = 1 + _matrix(2, 2, 24, seed=3)
  w = qat.FakeQuantTensor(w.w, gain, w.start, w.format)
  trained = jax.jit(lambda w: w.dense())(w)
  np.testing.assert_array_equal(w.pack().dense(), trained)
  # Activations may have more bits than the masters.
  x = _matrix(3, 64, seed=4)
  y = [v.einsum("...d,ldf->...lf", x) for v in (w.pack(), w)]
  np.testing.assert_array_equal(*y)
  # They start where LSQ does.
  size = np.abs(np.asarray(w.w[1, 32:, 5], np.float32)).mean()
  assert w.start[1, 1, 5] == pytest.approx(2 * size / 7**0.5, rel=1e-6)
  with pytest.raises(UserError, match="symmetric Affine"):
    qat.Prepare(format=Affine(block=32), learned=True).prepare(w.w)


def _batch():
  rows = support.tokens(4, 17)
  places = jnp.broadcast_to(jnp.arange(16), (4, 16))
  return dict(
    tokens=rows[:, :-1],
    targets=rows[:, 1:],
    positions=places,
    segments=jnp.zeros((4, 16), jnp.int32),
    weights=jnp.ones((4, 16)),
  )


@functools.cache
def _trained():
  """Returns (loss, prepared, trained) of adapters, distilled in a few steps."""
  model, key = support.model(depth=1), jax.random.key(0)
  params = adapt.Adapt(method=LoRA(rank=4))(support.params(model), key)
  params = qat.Prepare(format=SYMMETRIC)(params)
  objective = distill.Distill(
    model, student=preference.all_params, source=qat.remove_fake_quant
  )
  tx = optax.adam(3e-3)
  now = state.create(params, r"/trained/", tx)
  update = jax.jit(step.make_train_step(objective, tx))
  losses = []
  for _ in range(15):
    now, metrics = update(now, _batch(), key)
    losses.append(float(metrics["loss"]))
  return losses, params, now.params


@pytest.mark.slow
def test_adapters_learn_what_rounding_lost():
  losses, params, trained = _trained()
  assert losses[-1] < 0.8 * losses[0]
  before = dict(tree.flatten_paths(params))
  moved = {
    path
    for path, x in tree.flatten_paths(trained)
    if not np.array_equal(x, before[path])
  }
  assert moved == {p for p in before if p.endswith(("/a", "/b"))}


@pytest.mark.slow
@pytest.mark.parametrize("learned", [False, True])
def test_training_lowers_the_loss_of_the_rounded_matrix(learned):
  # Inputs of four directions leave roundings to choose among.
  x = _matrix(64, 4, seed=1) @ (10 * _matrix(4, 32, seed=2))
  want = _matrix(32, 16)
  format = Affine(bits=3, block=32, symmetric=True)
  w = qat.Prepare(format=format, learned=learned).prepare(want)
  tx = optax.adam(3e-4)

  @jax.jit
  @jax.value_and_grad
  def loss(w):
    return ((w.einsum("...d,df->...f", x) - x @ want) ** 2).sum()

  state, losses = tx.init(w), []
  for _ in range(80):
    value, slope = loss(w)
    losses.append(float(value))
    updates, state = tx.update(slope, state)
    w = optax.apply_updates(w, updates)
  assert losses[-1] < 0.6 * losses[0]
  np.testing.assert_array_equal(w.pack().dense(), w.dense())


@pytest.mark.slow
def test_a_converted_model_is_the_trained_one():
  _, _, trained = _trained()
  packed = qat.Convert()(trained)
  masters = {
    path: w
    for path, w in _weights(trained).items()
    if isinstance(w, qat.FakeQuantTensor)
  }
  assert len(masters) == 7
  for path, w in _weights(packed).items():
    if path in masters:
      np.testing.assert_array_equal(w.dense(), masters[path].dense())
      assert w.format == masters[path].format
      assert w.bits_per_weight == 4 + 16 / 4
  # Products run in another order where a matrix is decoded beside them.
  model, tokens = support.model(depth=1), support.tokens()
  run = jax.jit(lambda p: model.apply({"params": p}, tokens)[0])
  np.testing.assert_allclose(run(trained), run(packed), atol=1e-4)


def _weights(params):
  found, _ = jax.tree_util.tree_flatten_with_path(
    params, is_leaf=weights.is_weight
  )
  return {tree.path_name(path): w for path, w in found}


@pytest.mark.parametrize("first", [True, False])
def test_rounding_of_activations_stays(first):
  """Before and after: with weights that are trained, converted, and removed."""
  model, tokens = support.model(depth=1), support.tokens()
  params, key = support.params(model), jax.random.key(0)
  transforms = [qat.Prepare(format=SYMMETRIC), Inputs(op=Round(bits=3))]
  prepared = params
  for transform in transforms[::-1] if first else transforms:
    prepared = transform(prepared, key)
  converted = qat.Convert()(prepared)
  q = converted["run0"]["layer0"]["attention"]["q"]
  assert isinstance(q, InputTensor) and isinstance(q.w, QTensor)
  removed = qat.remove_fake_quant(prepared)
  alone = Quantize(format=SYMMETRIC)(params)
  run = jax.jit(lambda p: model.apply({"params": p}, tokens)[0])
  for found, same in ((prepared, alone), (converted, alone), (removed, params)):
    want = run(transforms[1](same, key))
    np.testing.assert_allclose(run(found), want, atol=1e-4)


def test_rounding_of_activations_below_an_adapter_is_not_lost():
  params, key = support.params(support.model(depth=1)), jax.random.key(0)
  adapted = adapt.Adapt()(Inputs(op=Round(bits=3))(params), key)
  with pytest.raises(UserError, match="over operations on inputs.*Round"):
    qat.Prepare(format=SYMMETRIC)(adapted)


def test_the_teacher_is_the_original_model():
  params = support.params(support.model())
  adapted = adapt.Adapt(method=LoRA(rank=2))(params, jax.random.key(0))
  prepared = qat.Prepare(format=SYMMETRIC)(adapted)
  jax.tree.map(
    np.testing.assert_array_equal, qat.remove_fake_quant(prepared), params
  )


def test_dropout_cannot_act_on_what_is_rounded():
  method = LoRA(rank=2, dropout=0.1)
  params = support.params(support.model())
  params = adapt.Adapt(method=method)(params, jax.random.key(0))
  prepared = qat.Prepare(format=SYMMETRIC)(params)
  weights.bind(prepared)  # in evaluation there is none
  with pytest.raises(UserError, match="adapter with dropout, expected"):
    weights.bind(prepared, key=jax.random.key(0))


def test_scales_are_sharded_like_their_matrix():
  w = qat.Prepare(format=SYMMETRIC, learned=True).prepare(_matrix(8, 3))
  names = w.axes(("embed", "mlp"))
  assert names.w == names.gain == names.start == ("embed", "mlp")
