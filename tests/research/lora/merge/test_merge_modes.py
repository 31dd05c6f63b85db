"""Merging over a packed base: what each of the three ways does to logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from research import tree, weights
from research.lora import adapt, loftq
from research.lora.merge import merge
from research.lora.methods.dora import DoRA
from research.quant import activations
from research.quant.algorithms import folding, rotate
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.quantize import Quantize
from research.typing import UserError
from tests import support, support_lora

MODEL = support.model(depth=2, width=64, hidden=64, head_dim=16, vocab=64)
FORMATS = [Affine(block=32), Codebook(), GGML(kind="Q4_0")]
every = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


@functools.cache
def original():
  return support.params(MODEL)


def adapted(format, size, start=None):
  """Returns adapters, updates of a relative size, over a packed base."""
  packed = Quantize(format=format)(original() if start is None else start)
  made = support_lora.adapting(rank=2, targets=("q", "up", "down"))(
    packed, jax.random.key(0)
  )
  rng = np.random.default_rng(0)

  def one(path, x):
    if "/trained/" not in path:
      return x
    scale = size * 0.125 if path.endswith("/b") else 0.7
    return jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype)

  return tree.map_paths(one, made)


@pytest.mark.slow
@every
def test_each_way_is_its_sum(format):
  params = adapted(format, 0.3)
  up = params["run0"]["layer0"]["mlp"]["up"]
  got = {
    mode: merge.merge_as(params, mode, original())["run0"]["layer0"]["mlp"]
    for mode in merge.MODES
  }
  a, b = (np.float64(up.trained[name]) for name in "ab")
  update = up.method.scale * np.einsum("lri,lro->lio", a, b)
  decoded = np.asarray(up.w.dense()) + update
  close = functools.partial(np.testing.assert_allclose, atol=2e-6, rtol=1e-6)
  close(got["decoded"]["up"], decoded)
  first = original()["run0"]["layer0"]["mlp"]["up"]
  close(got["original"]["up"], np.asarray(first) + update)
  # In the same few bits, and no further off than its grid.
  again = got["requantized"]["up"]
  assert again.format == up.w.format and again.nbytes == up.w.nbytes
  for i in (0, 1):
    want = format.decode(format.encode(np.float32(decoded[i])))
    # A number halfway between two codes may take either.
    off = np.abs(again.dense()[i] - want) > 1e-5
    assert off.mean() < 0.005
  # What had no adapter stays packed, or what it was.
  for mode in merge.MODES:
    assert got[mode]["gate"] is params["run0"]["layer0"]["mlp"]["gate"]


@pytest.mark.slow
@every
@pytest.mark.sample(3)
def test_logits_are_kept_by_one_way_alone(format):
  tokens = support.tokens(vocab=64)
  found = merge.report_modes(MODEL, adapted(format, 0.3), original(), tokens)
  kl = {mode: x.kl for mode, x in found.items()}
  # Rounding of float32; the others lose what 4 bits do.
  assert abs(kl["decoded"]) < 1e-6
  assert kl["requantized"] > 1e-3 and kl["original"] > 1e-3


@pytest.mark.slow
def test_a_small_update_is_rounded_away():
  """What lies within half a step of its code is that code again."""
  format = Affine(block=32, symmetric=True, rule="amax/qmax")
  params = adapted(format, 1e-4)
  up = params["run0"]["layer0"]["mlp"]["up"]
  got = merge.merge_as(params, "requantized")["run0"]["layer0"]["mlp"]["up"]
  assert np.abs(np.asarray(up.delta())).max() > 0
  np.testing.assert_array_equal(got.parts["codes"], up.w.parts["codes"])
  tokens = support.tokens(vocab=64)
  found = merge.report_modes(MODEL, params, original(), tokens)
  assert found["decoded"].kl < found["requantized"].kl + 1e-9
  # Rounding itself is what is far off: the update is small beside it.
  assert found["original"].kl > 100 * abs(found["requantized"].kl)


def test_doras_lengths_are_its_magnitudes_over_any_base():
  """A norm of the packed base would be of another matrix."""
  packed = Quantize(format=Affine(block=32))(original())
  how = adapt.Adapt(method=DoRA(rank=2), targets=("up",))
  params = how(packed, jax.random.key(0))
  for mode in ("decoded", "original"):
    got = merge.merge_as(params, mode, original())
    up = params["run0"]["layer0"]["mlp"]["up"]
    lengths = jnp.linalg.norm(got["run0"]["layer0"]["mlp"]["up"], axis=-2)
    np.testing.assert_allclose(lengths, up.trained["m"], rtol=1e-5)
  # Which are other lengths than the original's.
  first = jnp.linalg.norm(original()["run0"]["layer0"]["mlp"]["up"], axis=-2)
  assert np.abs(first / lengths - 1).max() > 1e-3


def test_embeddings_and_adapters_over_adapters():
  params = adapted(Affine(block=32), 0.3)
  up = params["run0"]["layer0"]["mlp"]["up"]
  twice = dataclasses.replace(up, w=up)
  params["run0"]["layer0"]["mlp"]["up"] = twice
  rows = original()["embed"].T
  packed = dataclasses.replace(
    Quantize(format=Affine(block=32)).pack(rows), axis=-1
  )
  a, b = jnp.ones((1, 64)), jnp.full((1, 64), 0.01)
  params["embed"] = support_lora.lora(packed, a, b)
  got = merge.merge_as(params, "requantized")
  assert got["embed"].axis == -1 and got["embed"].shape == (64, 64)
  near = packed.dense() + 0.01
  step = np.asarray(got["embed"].parts["scale"], np.float32).max()
  assert np.abs(got["embed"].dense() - near).max() <= 0.51 * step
  got = merge.merge_as(params, "original", original())
  first = original()["run0"]["layer0"]["mlp"]["up"]
  want = first + 2 * up.delta()
  np.testing.assert_allclose(
    got["run0"]["layer0"]["mlp"]["up"], want, atol=1e-5
  )
  np.testing.assert_allclose(
    got["embed"], original()["embed"] + 0.01, atol=1e-6
  )


@pytest.mark.parametrize("axis", [-2, -1])
def test_order_and_outliers_are_the_bases(axis):
  """Whatever its order is, a matrix that it holds exactly comes back so.

  Blocks of the stored order have multiples of a step of their own, rows apart
  numbers a thousand times as large: in another order, or among the others,
  neither is exact.
  """
  rng = np.random.default_rng(3)
  format = Affine(block=8, symmetric=True, rule="amax/qmax")
  order = np.stack([rng.permutation(32) for _ in range(2)]).astype(np.int32)
  rows = np.array([[3, 17], [0, 31]], np.int32)
  codes = rng.integers(-7, 8, (2, 4, 8, 16))
  codes[:, :, 0] = 7  # in every block, so that its step is that of its scale
  steps = 2.0 ** np.arange(4)[:, None, None]
  exact = np.float32(codes * steps / 64).reshape(2, 32, 16)
  want = np.take_along_axis(exact, order[..., None], 1)
  values = np.float32(1000 + rng.standard_normal((2, 2, 16)))
  start = Quantize(format=format).pack(jnp.zeros((2, 32, 16)))
  base = dataclasses.replace(
    start,
    axis=axis,
    order=jnp.asarray(order),
    outliers={"rows": jnp.asarray(rows), "values": jnp.zeros((2, 2, 16))},
  )
  np.put_along_axis(want, rows[..., None], values, 1)
  logical = want if axis == -2 else want.swapaxes(1, 2)
  got = merge._packed_as(base, jnp.asarray(logical), "w")
  np.testing.assert_array_equal(got.dense(), logical)
  assert got.nbytes == base.nbytes
  np.testing.assert_array_equal(got.order, order)
  np.testing.assert_array_equal(got.outliers["values"], values)


def test_rotated_inputs_stay_rotated():
  """The sum is packed as its base is: rotated, and its inputs rounded.

  SciPy's Hadamard matrix gives what is packed, of the base and update decoded.
  """
  rotated = rotate.Rotate(residual=False, values=False, model=MODEL)
  op, format = activations.Round(bits=8), Affine(block=32)
  start = activations.Inputs(op=op)(rotated(original(), jax.random.key(3)))
  params = adapted(format, 0.3, start)
  got = merge.merge_as(params, "requantized")["run0"]["layer0"]["mlp"]["down"]
  assert (got.op, got.w.op) == (rotate.Hadamard(), op)
  down = params["run0"]["layer0"]["mlp"]["down"]
  a, b = (np.float64(down.trained[name]) for name in "ab")
  update = down.method.scale * np.einsum("lri,lro->lio", a, b)
  packed = np.float64(weights.inner(down.w).dense())
  h = scipy.linalg.hadamard(64) / 8
  want = packed + np.einsum("ij,lio->ljo", h, update)
  step = np.asarray(weights.inner(got).parts["scale"], np.float64)
  assert np.abs(update).max() > 2 * step.max()
  error = np.abs(weights.inner(got).dense() - want).reshape(2, 2, 32, 64)
  assert (error <= 0.51 * step[..., None, :]).all()


def scaled(params):
  """Returns the model with half of `up`'s outputs 2, and `down` with 1 / 2."""

  def layer(flat, block, where):
    s = jnp.where(jnp.arange(64) % 2, 1.0, 2.0)
    up, down = flat["mlp/up"] * s, flat["mlp/down"] / s[:, None]
    return flat | {"mlp/up": up, "mlp/down": down}

  return folding.map_layers(layer, MODEL, params)


@pytest.mark.parametrize(
  ("start", "words"),
  [
    (rotate.Rotate(values=False, hidden=False, model=MODEL), "0.0"),
    (lambda params, key: scaled(params), "half of its inputs"),
  ],
  ids=["rotated", "scaled"],
)
def test_an_original_of_another_basis_is_refused(start, words):
  """Updates are of the weights that were packed, rotated or scaled."""
  changed = start(original(), jax.random.key(3))
  params = adapted(Affine(block=32), 0.3, changed)
  with pytest.raises(UserError, match=f"not rounded from.*{words}"):
    merge.merge_as(params, "original", original())
  # The one that was packed is taken, also if its inputs rotate.
  merge.merge_as(params, "original", changed)
  hidden = rotate.Rotate(residual=False, values=False, model=MODEL)
  params = adapted(Affine(block=32), 0.3, hidden(original(), jax.random.key(3)))
  merge.merge_as(params, "original", original())


@pytest.mark.parametrize("first", ["factors", "codes"])
def test_an_update_that_the_original_has_is_refused(first):
  """QPiSSA's base and its update are the original: their sum has it twice."""
  fitted = loftq.LoftQ(
    quantize=Quantize(format=Affine(block=32)),
    adapt=support_lora.adapting(rank=8, targets=("q", "up", "down")),
    first=first,
  )(original())
  rng = np.random.default_rng(0)

  def trained(path, x):
    if "/trained/" not in path:
      return x
    noise = rng.standard_normal(x.shape) * jnp.std(x)
    return x + jnp.asarray(0.3 * noise, x.dtype)

  for params in (fitted, tree.map_paths(trained, fitted)):
    with pytest.raises(UserError, match="would have its update twice"):
      merge.merge_as(params, "original", original())
    merge.merge_as(params, "decoded")


def test_mistakes():
  params = adapted(Affine(block=32), 0.3)
  with pytest.raises(UserError, match="mode is 'half', expected one of"):
    merge.merge_as(params, "half")
  with pytest.raises(UserError, match="needs the unpacked tree"):
    merge.merge_as(params, "original")
  other = jax.tree.map(lambda x: x[..., :8], original())
  with pytest.raises(UserError, match=r"q is \[2, 64, .*the original has a"):
    merge.merge_as(params, "original", other)
  with pytest.raises(UserError, match="the original has nothing there"):
    merge.merge_as(params, "original", {"embed": other["embed"]})
