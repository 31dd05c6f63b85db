"""Tests that rows with different adapters compute the same as alone."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.generation import generate
from research.interop.gguf import tensor_types
from research.lora import adapt
from research.lora.methods.lora import LoRA
from research.lora.serving import adapter_slots, batched, pool
from research.lora.serving.batched import NONE, BatchedTensor
from research.quant.formats import ggml
from research.quant.layouts import cpu_layout
from research.typing import UserError
from tests import support

WAYS = (
  batched.by_gather,
  batched.by_masking,
  batched.by_grouping,
  batched.rowwise_lora,
)
EPS = float(jnp.finfo(jnp.float32).eps)


def draw(*shape, seed=0):
  x = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(x, jnp.float32)


def truth(x, first, second, ids):
  """Row by row, in fp64."""
  x, first, second = (np.asarray(t, np.float64) for t in (x, first, second))
  zero = np.zeros((x.shape[1], second.shape[-1]))
  rows = [
    zero if i == NONE else x[k] @ first[i].T @ second[i]
    for k, i in enumerate(np.asarray(ids))
  ]
  return np.stack(rows)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("time", [1, 3])
@pytest.mark.parametrize(
  "ids", [[2, NONE, 0, 2, 1, NONE], [NONE] * 6, [1] * 6], ids=str
)
def test_every_implementation_equals_row_by_row(way, time, ids):
  x, first, second = draw(6, time, 12), draw(3, 4, 12), draw(3, 4, 20)
  got = jax.jit(way)(x, first, second, jnp.array(ids))
  want = truth(x, first, second, ids)
  chex.assert_trees_all_close(got, want, rtol=0, atol=8 * 12 * 4 * EPS)
  alone = np.asarray(ids) == NONE
  assert not np.asarray(got)[alone].any()


@pytest.mark.parametrize("rank", [0, 4, batched.MAX_UNROLLED_RANK + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_per_row_of_any_rank(rank, dtype):
  """Unrolled sums are in float32, and rounded once."""
  x, first, second = (
    t.astype(dtype)
    for t in (draw(6, 1, 12), draw(3, rank, 12), draw(3, rank, 20))
  )
  ids = [2, NONE, 0, 2, 1, NONE]
  got = np.asarray(batched.by_gather(x, first, second, jnp.array(ids)))
  want = truth(x, first, second, ids)
  eps = float(jnp.finfo(dtype).eps)
  size = truth(*(np.abs(t) for t in (x, first, second)), ids)
  inner = EPS if rank <= batched.MAX_UNROLLED_RANK else eps
  bound = eps * np.abs(want) + (12 + rank) * inner * size
  assert (np.abs(got.astype(np.float64) - want) <= bound).all()


@pytest.mark.parametrize(
  "rows, time, n, rank, way",
  [
    (32, 1, 32, 8, "by_gather"),
    (8, 64, 2, 8, "by_gather"),
    (32, 1, 4, 8, "by_gather"),
    (32, 1, 2, 64, "by_masking"),
    (256, 1, 16, 16, "by_grouping"),
    (64, 1, 8, 64, "by_grouping"),
  ],
)
def test_the_shape_selects_the_implementation(
  monkeypatch, rows, time, n, rank, way
):
  called = []
  for name in ("by_gather", "by_masking", "by_grouping"):

    def called_as(x, first, second, ids, name=name):
      called.append(name)
      return jnp.zeros((*x.shape[:2], second.shape[-1]))

    monkeypatch.setattr(batched, name, called_as)
  shapes = (rows, time, 3), (n, rank, 3), (n, rank, 5)
  batched.rowwise_lora(*map(jnp.zeros, shapes), jnp.zeros(rows, jnp.int32))
  assert called == [way]


def test_embeddings_and_tied_heads_by_row():
  table = draw(11, 6)
  a, b = draw(2, 3, 11, seed=1), draw(2, 3, 6, seed=2)
  bound = weights.bind(
    {"w": BatchedTensor(table, a, b)}, ids=jnp.array([1, NONE, 0])
  )["w"]
  tokens = jnp.array([[0, 3], [3, 3], [10, 1]])
  got, logits = jax.jit(
    lambda w, x: (w.take(tokens), weights.einsum("...d,vd->...v", x, w))
  )(bound, draw(3, 6))
  for row, i in enumerate([1, NONE, 0]):
    merged = table if i == NONE else table + a[i].T @ b[i]
    close = functools.partial(chex.assert_trees_all_close, atol=64 * EPS)
    close(got[row], merged[tokens[row]])
    close(logits[row], draw(3, 6)[row] @ merged.T)


def test_ids_are_one_for_each_row():
  leaf = BatchedTensor(draw(4, 4), draw(2, 1, 4), draw(2, 1, 4))
  bound = weights.bind({"w": leaf}, ids=jnp.array([0, 1]))["w"]
  with pytest.raises(UserError, match="3 rows, but adapters are bound for 2"):
    weights.einsum("...d,df->...f", draw(3, 1, 4), bound)


def test_factors_are_sharded_like_the_matrix():
  leaf = BatchedTensor(draw(3, 4, 8), draw(3, 2, 1, 4), draw(3, 2, 1, 8))
  bound = weights.bind({"w": leaf}, ids=jnp.array([0, 1]))["w"]
  up = weights.axes(bound, ("width", "hidden"))
  assert up.a == (None, None, None, "width")
  assert up.b == (None, None, None, "hidden")
  assert up.ids == (None, "batch")


MODEL = support.model(width=32, hidden=64, head_dim=8)
NAMES = ["b", pool.BASE, "a", "b"]
PROMPTS = [[5, 6, 7], [5, 6, 7], [9, 8, 7, 6, 5], [1]]


def to_blocks(path, x):
  """A matrix in ggml's 4-bit blocks."""
  if x.ndim != 3:
    return x
  rows = tensor_types.encode("Q4_1", np.asarray(x).swapaxes(1, 2).copy())
  return ggml.from_ggml("Q4_1", list(rows.reshape(len(x), x.shape[2], -1)), -2)


@functools.cache
def base(kind):
  params = support.params(MODEL)
  if kind == "packed":
    return tree.map_paths(to_blocks, params)
  return params


@functools.cache
def adapted(kind, name):
  """Returns the base under one of three adapters; ranks and targets differ."""
  targets, rank = dict(
    a=("all-linear", 2), b=(("q", "down", "up"), 4), c=(("v",), 3)
  )[name]
  made = adapt.Adapt(method=LoRA(rank=rank, alpha=3.0), targets=targets)(
    base(kind), jax.random.key(ord(name))
  )
  return tree.map_paths(
    lambda p, x: (
      0.3 * draw(*x.shape, seed=ord(name)) if p.endswith("trained/b") else x
    ),
    made,
  )


@functools.cache
def mixed(kind, layout):
  """Returns parameters bound for NAMES, and the pool."""
  held = pool.create(base(kind), MODEL, slots=3, rank=5)
  for name in "ab":
    held = pool.add_tree(held, name, adapted(kind, name))
  held, ids = pool.use(held, NAMES)
  return weights.bind(layout(held.params), ids=ids), held


def scanned(params):
  return params


def decoding(params):
  return cpu_layout.to_panels(params)


ways = pytest.mark.parametrize(
  "kind, layout",
  [
    pytest.param("array", scanned, marks=pytest.mark.slow),
    pytest.param("packed", scanned, marks=pytest.mark.slow),
    ("packed", decoding),
  ],
)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
  hidden, _ = model.apply({"params": params}, tokens)
  return model.apply({"params": params}, hidden, method="logits")


@pytest.mark.slow
@ways
def test_a_mixed_batch_is_its_rows(kind, layout):
  tokens = support.tokens(len(NAMES), 9)
  params, held = mixed(kind, layout)
  got = logits(MODEL, params, tokens)
  below = logits(MODEL, layout(adapter_slots.base(held.params)), tokens)
  chex.assert_trees_all_equal(got[1], below[1])
  for row, name in enumerate(NAMES):
    if name != pool.BASE:
      want = logits(MODEL, layout(adapted(kind, name)), tokens)[row]
      scale = float(jnp.abs(want).max())
      # Sums of some 100 terms through seven layers' matrices.
      chex.assert_trees_all_close(got[row], want, atol=200 * EPS * scale)
      assert jnp.abs(want - below[row]).max() > 0.01 * scale


@pytest.mark.slow
@ways
def test_generated_text_is_each_rows_own(kind, layout):
  params, held = mixed(kind, layout)
  got = generate.generate(MODEL, params, PROMPTS, 12).tokens
  for name, rows in (("b", (0, 3)), (pool.BASE, (1,))):
    alone = adapter_slots.base(held.params)
    if name != pool.BASE:
      alone = adapted(kind, name)
    want = generate.generate(MODEL, layout(alone), PROMPTS, 12).tokens
    for row in rows:
      assert got[row] == want[row]
  assert got[0] != got[1]


def test_unbound_computes_the_base():
  _, held = mixed("array", scanned)
  tokens = support.tokens()
  chex.assert_trees_all_equal(
    logits(MODEL, held.params, tokens), logits(MODEL, base("array"), tokens)
  )
  chex.assert_trees_all_equal(adapter_slots.base(held.params), base("array"))
