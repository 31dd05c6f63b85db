"""Tests ggml blocks as a weight: the same numbers in a sixth of the memory."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.interop.gguf import tensor_types
from research.quant import qtensor
from research.quant.formats import ggml
from research.quant.layouts import products
from tests import support
from tests.support_lora import lora

KINDS = ["Q4_1", "Q4_0", "Q5_0", "Q5_1", "Q8_0"]
BITS = dict(Q4_1=5.0, Q4_0=4.5, Q5_0=5.5, Q5_1=6.0, Q8_0=8.5)


def raw(kind, n, rows, columns, seed=0):
  """Returns `n` random matrices' blocks, each `[rows, bytes]`."""
  rng = np.random.default_rng(seed)
  x = 0.3 * rng.standard_normal((n, rows, columns)).astype(np.float32)
  return list(tensor_types.encode(kind, x).reshape(n, rows, -1))


def decoded(kind, matrix, columns):
  shape = (matrix.shape[0], columns)
  return tensor_types.decode(kind, matrix.reshape(-1), shape)


def leaf(kind="Q4_1", inputs=64, outputs=24, seed=0):
  """Returns one `[inputs, outputs]` weight."""
  return ggml.from_ggml(kind, raw(kind, 1, outputs, inputs, seed), -2).squeeze()


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_bitwise_ggmls_and_blocks_come_back(kind, axis):
  matrices = raw(kind, 3, 24, 64)
  w = ggml.from_ggml(kind, matrices, axis)
  want = np.stack([decoded(kind, m, 64) for m in matrices])
  want = want.swapaxes(1, 2) if axis == -2 else want
  assert w.shape == want.shape
  assert w.dtype == np.float32
  np.testing.assert_array_equal(jax.jit(weights.dense)(w), want)
  assert tree.nbytes(w) * 8 == BITS[kind] * want.size
  np.testing.assert_array_equal(ggml.to_ggml(w), np.stack(matrices))
  one = jax.tree.map(lambda part: part[1], w)
  np.testing.assert_array_equal(ggml.to_ggml(one), matrices[1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_decodes_to_its_value(kind):
  format = ggml.TYPES[kind]
  noise = np.random.default_rng(0).integers(
    0, 256, (16, format.nbytes * 4), np.uint8
  )
  parts = format.split(noise)
  for name in parts.keys() & {"scale", "offset"}:
    parts[name] = np.full_like(parts[name], 0.75)
  matrix = format.join(parts)
  for axis in (-1, -2):
    w = ggml.from_ggml(kind, [matrix], axis).squeeze()
    want = decoded(kind, matrix, 128)
    got = np.asarray(w.dense())
    np.testing.assert_array_equal(got if axis == -1 else got.T, want)
    np.testing.assert_array_equal(ggml.to_ggml(w), matrix)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("eq", ["...i,io->...o", "...o,io->...i"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_products_and_their_gradients_are_the_dense_ones(eq, axis, dtype):
  matrices = raw("Q4_1", 1, 32, 64)
  w = ggml.from_ggml("Q4_1", matrices, axis).squeeze()
  contracted = w.shape[0 if eq.startswith("...i") else 1]
  rng = np.random.default_rng(1)
  x = jnp.asarray(rng.standard_normal((2, 5, contracted)), dtype)

  @functools.partial(jax.jit, static_argnums=0)
  def both(multiply, x, w):
    def total(x):
      y = multiply(x, w)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    return jax.value_and_grad(total, has_aux=True)(x)

  (_, got), dx = both(lambda x, w: weights.einsum(eq, x, w), x, w)
  (_, want), want_dx = both(
    lambda x, w: jnp.einsum(eq, x, w.astype(x.dtype)), x, w.dense()
  )
  assert got.dtype == dtype
  assert dx.dtype == dtype
  # The same sums of up to 64 terms of size 1, perhaps in another order.
  eps = float(jnp.finfo(dtype).eps)
  chex.assert_trees_all_close(got, want, atol=8 * eps * 4)
  chex.assert_trees_all_close(dx, want_dx, atol=8 * eps * 4)


@pytest.mark.parametrize("eq", ["bi,io->bo", "bo,io->bi"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_a_large_matrix_is_decoded_in_pieces(eq, axis, monkeypatch):
  w = ggml.from_ggml("Q4_1", raw("Q4_1", 1, 96, 64), axis).squeeze()
  monkeypatch.setattr(products, "PIECE", 96 * 64 * 4 // 5)
  assert products.piece_count(w, products.PIECE) == 6
  contracted = w.shape[0 if eq.startswith("bi") else 1]
  x = np.random.default_rng(3).standard_normal((4, contracted))
  x = jnp.asarray(x, jnp.float32)

  def total(x, multiply):
    y = multiply(x)
    return jnp.sum(jnp.sin(y)), y

  f = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=1)
  got = f(x, lambda x: weights.einsum(eq, x, w))
  want = f(x, lambda x: jnp.einsum(eq, x, w.dense()))
  chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-5)


def test_take_decodes_rows():
  w = ggml.from_ggml("Q8_0", raw("Q8_0", 1, 50, 64), -1).squeeze()
  ids = jnp.array([[3, 49, 0], [7, 7, 3]])
  want = np.asarray(w.dense())[np.asarray(ids)]
  np.testing.assert_array_equal(jax.jit(weights.take)(w, ids), want)
  columns = ggml.from_ggml("Q8_0", raw("Q8_0", 1, 50, 64), -2).squeeze()
  got = weights.take(columns, ids)
  np.testing.assert_array_equal(got, np.asarray(columns.dense())[ids])


def test_experts_and_their_gradient():
  w = ggml.from_ggml("Q4_1", raw("Q4_1", 3, 24, 32), -2)
  x = jnp.asarray(np.random.default_rng(2).standard_normal((10, 32)), "float32")
  sizes = jnp.array([4, 0, 6])

  def total(x, w):
    return jnp.sum(jnp.sin(weights.ragged_dot(x, w, sizes)))

  got = jax.jit(jax.grad(total))(x, w)
  want = jax.jit(jax.grad(total))(x, w.dense())
  chex.assert_trees_all_close(got, want, atol=1e-5)
  by_hand = jnp.concatenate([x[:4] @ w.dense()[0], x[4:] @ w.dense()[2]])
  chex.assert_trees_all_close(
    weights.ragged_dot(x, w, sizes), by_hand, atol=1e-5
  )


def test_axes_follow_the_blocked_axis():
  w = ggml.from_ggml("Q5_1", raw("Q5_1", 3, 24, 32), -2)
  named = weights.axes(w, ("in", "out"))
  assert (
    named.parts["codes"] == named.parts["high"] == (None, "in", None, "out")
  )
  assert named.parts["scale"] == named.parts["offset"] == (None, "in", "out")
  experts = weights.axes(w, ("expert", "in", "out"))
  assert experts.parts["scale"] == ("expert", "in", "out")
  e = ggml.from_ggml("Q8_0", raw("Q8_0", 1, 24, 32), -1).squeeze()
  named = weights.axes(e, ("vocab", "embed"))
  assert named.parts["codes"] == ("embed", None, "vocab")
  assert named.parts["scale"] == ("embed", "vocab")
  assert "high" not in named.parts
  for part, names in zip(
    jax.tree.leaves(w),
    jax.tree.leaves(
      weights.axes(w, ("in", "out")), is_leaf=lambda x: isinstance(x, tuple)
    ),
    strict=True,
  ):
    assert part.ndim == len(names)


# In a model ------------------------------------------------------------------

SIZES = dict(depth=2, width=32, hidden=64, head_dim=8, vocab=64)


def packed_params(model, kind="Q4_1"):
  """Returns random parameters with every matrix in blocks."""

  def pack(path, x):
    if x.ndim < 2 or path.endswith("scale"):
      return x
    axis = -1 if path == "embed" else -2
    x = np.asarray(x)
    x = x[None] if path in ("embed", "head") else x
    stored = x if axis == -1 else x.swapaxes(1, 2)
    n, rows, _ = stored.shape
    matrices = list(tensor_types.encode(kind, stored).reshape(n, rows, -1))
    w = ggml.from_ggml(kind, matrices, axis)
    return w.squeeze() if path in ("embed", "head") else w

  return tree.map_paths(pack, support.params(model))


def unpacked(params):
  return jax.tree.map(weights.dense, params, is_leaf=weights.is_weight)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
  variables = {"params": params}
  hidden, _ = model.apply(variables, tokens)
  return model.apply(variables, hidden, method="logits")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "tied"), [("Q4_1", True), ("Q5_0", False), ("Q8_0", True)]
)
@pytest.mark.sample(3)
def test_packed_logits_are_the_decoded_models(kind, tied):
  model = support.model(tied=tied, **SIZES)
  params = packed_params(model, kind)
  tokens = support.tokens(vocab=64)
  want = logits(model, unpacked(params), tokens)
  # Decoding is exact; only the order of fp32 sums may differ.
  chex.assert_trees_all_close(
    logits(model, params, tokens), want, atol=1e-5 * float(jnp.ptp(want))
  )


@pytest.mark.slow
def test_an_unrolled_packed_stack_is_the_scanned_one():
  model = support.model(**SIZES)
  params = packed_params(model)
  tokens = support.tokens(vocab=64)
  want = logits(model, params, tokens)
  chex.assert_trees_all_close(
    logits(model, tree.unroll(params), tokens),
    want,
    atol=1e-5 * float(jnp.ptp(want)),
  )


def adapted(params, rank=4):
  """Returns `params` with a LoRA over every packed matrix of the layers."""
  rng = np.random.default_rng(5)

  def wrap(path, w):
    if not isinstance(w, qtensor.QTensor) or not path.startswith("run"):
      return w
    n, inputs, outputs = w.shape
    a = jnp.asarray(rng.uniform(-0.2, 0.2, (n, rank, inputs)), jnp.float32)
    return lora(w, a, jnp.zeros((n, rank, outputs)), scale=2.0)

  return tree.map_paths(wrap, params, is_leaf=weights.is_weight)


def loss(model, trainable, frozen, tokens):
  y = logits(model, tree.combine(trainable, frozen), tokens[:, :-1])
  losses = optax.softmax_cross_entropy_with_integer_labels(y, tokens[:, 1:])
  return losses.mean()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "names"])
@pytest.mark.sample(2, 1)
def test_lora_trains_over_a_packed_base_that_stays_what_it_is(remat):
  model = support.model(**SIZES).clone(remat=remat)
  base = packed_params(model)
  before = jax.tree.map(np.asarray, base)
  params = adapted(base)
  tokens = support.tokens(vocab=64)
  np.testing.assert_array_equal(
    logits(model, params, tokens), logits(model, base, tokens)
  )
  trainable, frozen = tree.partition(params, r"/trained/")
  optimizer = optax.adam(1e-2)

  @jax.jit
  def step(trainable, frozen, state):
    value, grads = jax.value_and_grad(loss, argnums=1)(
      model, trainable, frozen, tokens
    )
    updates, state = optimizer.update(grads, state)
    return optax.apply_updates(trainable, updates), state, value

  state, values = optimizer.init(trainable), []
  for _ in range(20):
    trainable, state, value = step(trainable, frozen, state)
    values.append(float(value))
  assert values[-1] < 0.7 * values[0]
  after = [x for _, x in tree.flatten_paths(frozen)]
  chex.assert_trees_all_equal(after, jax.tree.leaves(before))


@pytest.mark.slow
def test_gradients_over_blocks_are_those_over_the_decoded_base():
  model = support.model(**SIZES)
  params = adapted(packed_params(model))
  trainable, frozen = tree.partition(params, r"/trained/")
  trainable = jax.tree.map(lambda x: x + 0.05, trainable)
  tokens = support.tokens(vocab=64)
  dense = jax.tree.map(
    lambda w: w.dense() if isinstance(w, qtensor.QTensor) else w,
    tree.combine(trainable, frozen),
    is_leaf=lambda w: isinstance(w, qtensor.QTensor),
  )
  f = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
  got = f(model, trainable, frozen, tokens)
  want = f(model, *tree.partition(dense, r"/trained/"), tokens)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
  chex.assert_trees_all_close(
    jax.tree.leaves(got), jax.tree.leaves(want), atol=1e-5 * scale
  )


def test_no_decoded_matrix_outlives_its_product():
  """Temporaries of a step over n layers hold one decoded layer, not n."""
  layers, width = 16, 256
  w = ggml.from_ggml("Q4_1", raw("Q4_1", layers, width, width), -2)
  x = jnp.ones((4, width))

  def temporaries(multiply):
    def total(x, w):
      def body(x, w):
        return jnp.tanh(multiply(x, w)), None

      return jnp.sum(jax.lax.scan(body, x, w)[0])

    compiled = jax.jit(jax.grad(total)).lower(x, w).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  matrix = width * width * 4
  # Forward and backward may each hold one decoded layer and its codes.
  assert temporaries(lambda x, w: weights.einsum("bi,io->bo", x, w)) < (
    4 * matrix
  )
  # What autodiff does with a product of the decoded matrix: it keeps it.
  assert temporaries(lambda x, w: x @ w.dense()) >= layers * matrix
