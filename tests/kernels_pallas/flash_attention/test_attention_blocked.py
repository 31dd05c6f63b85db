"""Blockwise attention against the reference, and both against mathematics."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import subjaxprs
from jax.test_util import check_grads

from kernels_pallas.flash_attention import dropout
from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.masks import Mask
from tests.support_pairwise import cases, pairwise
from tests.support_rounding import assert_no_rougher, in_low_precision

B, T, S = 2, 6, 9
BLOCKS = {
  "one": Blocks(),
  "unrolled": Blocks(q=4),
  "looped": Blocks(q=4, k=3, unroll=0),
  "looped_ragged": Blocks(q=5, k=4, unroll=0),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0, dtype=jnp.float64):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def ids(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.integers(-1, 2, shape), jnp.int32)


def bounds():
  """Two intervals a query, that overlap or are empty here and there."""
  rng = np.random.default_rng(3)
  return jnp.asarray(rng.integers(0, S + 2, (B, 4, T)), jnp.int32)


FACTORS = {
  "mask": {
    "causal": lambda: Mask.causal(),
    "window": lambda: Mask.causal((2, None), (ids(B, T), ids(B, S))),
    "empty_rows": lambda: Mask.causal(offset=-2),
    "prefix": lambda: Mask.prefix_lm(jnp.array([5, 0])),
    "positions": lambda: Mask.full((3, 1), None, ids(B, T) * 4, ids(1, S) * 3),
    "function": lambda: Mask.where(lambda q, k: (q - k) % 3 < 2),
    "intervals": lambda: Mask.intervals(bounds(), (5, None)),
  },
  "bias": {
    "none": lambda N: None,
    "keys": lambda N: draw(B, 1, 1, S),
    "heads": lambda N: draw(1, N, T, S),
  },
  "heads": {"grouped": (4, 2, 4, 4), "one": (3, 1, 4, 2), "all": (2, 2, 4, 6)},
  "softcap": {"none": {}, "first": {"softcap": 1.5}, "last": {
    "softcap": 1.5, "bias_before_softcap": True}},
  "sinks": {"no": False, "yes": True},
  "dropout": {"no": {}, "yes": {"dropout_rate": 0.3, "dropout_seed": 5}},
}  # fmt: skip


ROWS = pairwise(FACTORS)


def problem(row):
  """Returns arguments and options of a row of `ROWS`."""
  choice = {name: FACTORS[name][value] for name, value in row.items()}
  N, K, H, Hv = choice["heads"]
  x = {"q": draw(B, T, N, H), "k": draw(B, S, K, H), "v": draw(B, S, K, Hv)}
  bias = choice["bias"](N)
  x |= {} if bias is None else {"bias": bias}
  x |= {"sinks": draw(N)} if choice["sinks"] else {}
  return x, {"mask": choice["mask"](), **choice["softcap"], **choice["dropout"]}


def loss(x, backend, config, options):
  o, lse = flash_attention(
    **x, **options, return_lse=True, backend=backend, config=config
  )
  lse = jnp.where(jnp.isneginf(lse), 0, lse)
  return jnp.sum(jnp.sin(3 * o)) + jnp.sum(jnp.cos(lse)), (o, lse)


@pytest.mark.parametrize("row", cases(FACTORS))
@pytest.mark.sample(2, 0, 2)
def test_blocks_agree_with_the_reference(row):
  x, options = problem(row)
  step = jax.value_and_grad(loss, has_aux=True)
  used = {name: BLOCKS[name] for name in ("unrolled", "looped_ragged")}

  @jax.jit
  def run(x, mask):
    rest = {**options, "mask": mask}
    blocks = {n: step(x, "auto", c, rest) for n, c in used.items()}
    return step(x, "reference", None, rest), blocks

  expected, found = run(x, options.pop("mask"))
  assert max(np.abs(g).max() for g in expected[1].values()) > 1e-3
  for value in found.values():
    # A few hundred roundings of numbers near 1 in float64.
    chex.assert_trees_all_close(value, expected, rtol=1e-12, atol=1e-12)


def test_every_pair_of_features_is_covered():
  assert 15 <= len(ROWS) <= 24
  values = {(n, v) for row in ROWS for n, v in row.items()}
  assert values == {(n, v) for n, vs in FACTORS.items() for v in vs}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.sample(2)
def test_gradients_are_finite_differences(backend):
  x, options = problem(
    {
      "mask": "window",
      "bias": "heads",
      "heads": "grouped",
      "softcap": "first",
      "sinks": "yes",
      "dropout": "yes",
    }
  )
  scalar = jax.jit(lambda x: loss(x, backend, Blocks(q=4), options)[0])
  check_grads(scalar, (x,), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_unrolled_blocks_have_second_derivatives():
  x = {n: draw(1, 3, 1, 2, seed=i) for i, n in enumerate("qkv")}

  def hessian(backend):
    f = lambda x: loss(x, backend, Blocks(q=2), {"causal": True})[0]  # noqa: E731
    return jax.jit(jax.jacrev(jax.grad(f)))(x)

  chex.assert_trees_all_close(
    hessian("auto"), hessian("reference"), rtol=1e-10, atol=1e-11
  )


@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_jax_nn(causal):
  q, k, v = draw(B, T, 4, 8), draw(B, T, 2, 8), draw(B, T, 2, 8, seed=1)
  bias = draw(1, 4, T, T)
  run = jax.jit(functools.partial(flash_attention, causal=causal))
  theirs = jax.jit(
    functools.partial(jax.nn.dot_product_attention, is_causal=causal)
  )(q, k, v, bias)
  # jax.nn computes its softmax in float32.
  chex.assert_trees_all_close(run(q, k, v, bias=bias), theirs, atol=2e-6)


attend = jax.jit(
  functools.partial(flash_attention, config=Blocks(q=4)),
  static_argnames=("causal", "window", "softcap", "return_lse", "scale"),
)


def qkv(dtype=jnp.float64):
  return (
    draw(B, T, 4, 4, dtype=dtype),
    draw(B, S, 2, 4, seed=1, dtype=dtype),
    draw(B, S, 2, 4, seed=2, dtype=dtype),
  )


def test_order_of_keys_does_not_matter():
  q, k, v = map(np.asarray, qkv())
  order = np.random.default_rng(0).permutation(S)
  chex.assert_trees_all_close(
    attend(q, k, v), attend(q, k[:, order], v[:, order]), atol=1e-13
  )


def test_grouped_heads_are_repeated_heads():
  q, k, v = qkv()
  repeat = functools.partial(np.repeat, repeats=2, axis=2)
  chex.assert_trees_all_close(
    attend(q, k, v), attend(q, repeat(k), repeat(v)), atol=1e-13
  )


def test_a_constant_on_all_logits_only_shifts_the_log_sum_exp():
  q, k, v = qkv()
  o, lse = map(np.asarray, attend(q, k, v, return_lse=True))
  bias = np.full((1, 1, 1, 1), 2.5)
  o2, lse2 = attend(q, k, v, bias=bias, return_lse=True)
  chex.assert_trees_all_close((o2, lse2), (o, lse + 2.5), atol=1e-13)


def test_linear_in_values():
  q, k, v = qkv()
  both = attend(q, k, 2 * np.asarray(v) + 1)
  one = np.asarray(attend(q, k, v))
  chex.assert_trees_all_close(both, 2 * one + 1, atol=1e-13)


def test_a_window_open_to_the_left_is_causal():
  q, k, v = qkv()
  chex.assert_trees_all_close(
    attend(q, k, v, window=(None, 0)), attend(q, k, v, causal=True), atol=1e-13
  )


def test_an_infinite_soft_cap_has_no_effect():
  q, k, v = qkv()
  chex.assert_trees_all_close(
    attend(q, k, v, softcap=1e6), attend(q, k, v), atol=1e-10
  )


def test_parts_of_the_keys_combine_to_the_whole():
  q, k, v = map(np.asarray, qkv())
  whole, lse = attend(q, k, v, return_lse=True)
  parts = [
    [np.asarray(y) for y in attend(q, k[:, a:b], v[:, a:b], return_lse=True)]
    for a, b in ((0, 5), (5, S))
  ]
  total = np.logaddexp(parts[0][1], parts[1][1])
  shares = [np.exp(l - total).swapaxes(1, 2)[..., None] for _, l in parts]
  o = sum(s * p[0] for s, p in zip(shares, parts, strict=True))
  chex.assert_trees_all_close((o, total), (whole, lse), atol=1e-13)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.sample(2)
def test_padding_may_contain_nan(name):
  """NaN in padding reaches neither outputs nor gradients."""
  lens = np.array([5, 8])
  queries = np.array([[0] * 4 + [-1] * 2, [0] * 6], np.int32)
  keys = np.where(np.arange(S) < lens[:, None], np.int32(0), np.int32(-1))
  q, k, v = qkv()

  @jax.jit
  def run(q, k, v):
    def f(q, k, v):
      segments = jnp.asarray(queries), jnp.asarray(keys)
      o = flash_attention(q, k, v, segment_ids=segments, config=BLOCKS[name])
      return jnp.sum(jnp.sin(o)), o

    return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)

  dead_q, dead_k = (queries < 0)[:, :, None, None], (keys < 0)[:, :, None, None]
  (_, clean), _ = expected = run(q, k, v)
  nan = run(*(np.where(d, np.nan, x) for d, x in (
    (dead_q, q), (dead_k, k), (dead_k, v))))  # fmt: skip
  chex.assert_trees_all_equal(nan, expected)
  chex.assert_tree_all_finite(expected)
  assert not np.any(np.asarray(clean)[0, 4:])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.sample(3)
def test_rows_without_keys_are_zero(name):
  q, k, v = qkv()
  f = jax.jit(
    lambda q, k, v: jax.vjp(
      lambda *a: flash_attention(
        *a,
        mask=Mask.causal(offset=-2),
        return_lse=True,
        config=BLOCKS[name],
      ),
      q,
      k,
      v,
    )
  )
  (o, lse), pull = f(q, k, v)
  o, lse = np.asarray(o), np.asarray(lse)
  assert not np.any(o[:, :2]) and np.all(np.isneginf(lse[:, :, :2]))
  assert np.all(np.isfinite(lse[:, :, 2:]))
  gradients = jax.jit(pull)((np.ones_like(o), np.ones_like(lse)))
  chex.assert_tree_all_finite(gradients)
  assert not np.any(np.asarray(gradients[0])[:, :2])


def test_large_logits_do_not_overflow():
  scaled = zip((30, 30, 1), qkv(), strict=True)
  x = [n * np.asarray(y, np.float32) for n, y in scaled]
  o, lse = attend(*x, return_lse=True)
  plain = functools.partial(
    flash_attention, return_lse=True, backend="reference"
  )
  expected = jax.jit(plain)(*(y.astype(np.float64) for y in x))
  # Logits reach 1e4, whose spacing in float32 is 1e-3.
  assert np.abs(lse).max() > 500
  chex.assert_trees_all_close(lse, expected[1], rtol=1e-6)
  chex.assert_trees_all_close(o, expected[0], atol=5e-3)


def results(*x, backend="reference", config=None):
  """Returns the output and gradients of a sum of its sines."""

  def f(*x):
    o = flash_attention(*x, causal=True, backend=backend, config=config)
    return jnp.sum(jnp.sin(o.astype(jnp.float64))), o

  (_, o), gradients = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*x)
  return o, *gradients


@functools.cache
def rough_and_exact(dtype):
  """Results of plain attention, in one dtype throughout and in float64."""
  x = qkv(dtype)
  exact = jax.jit(results)(*(np.asarray(y, np.float64) for y in x))
  return in_low_precision(results, *x), exact


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.cover(1)
def test_rounding_is_that_of_the_dtype(dtype, name):
  ours = functools.partial(results, backend="auto", config=BLOCKS[name])
  found = jax.jit(ours)(*qkv(dtype))
  assert {y.dtype for y in found} == {jnp.dtype(dtype)}
  assert_no_rougher(found, *rough_and_exact(dtype), dtype)


def test_dropout_keeps_its_share_independently():
  n = 64
  grid = jnp.ogrid[:2, :3, :n, :n]
  keep = jax.jit(lambda seed: dropout.keep(seed, 0.3, *grid))
  masks = np.stack([keep(7), keep(8)]).astype(np.float64)
  count = masks[0].size
  # Five standard deviations of a binomial share.
  tolerance = 5 * np.sqrt(0.3 * 0.7 / count)
  np.testing.assert_allclose(masks.mean((1, 2, 3, 4)), 0.7, atol=tolerance)
  centred = masks - 0.7
  for other in (
    centred[1],  # another seed
    np.roll(centred[0], 1, 0),  # another row of the batch
    np.roll(centred[0], 1, 1),  # another head
    np.roll(centred[0], 1, 2),  # the next query
    np.roll(centred[0], 1, 3),  # the next key
    centred[0].swapaxes(2, 3),  # i and j exchanged
  ):
    correlation = np.mean(centred[0] * other) / 0.21
    assert abs(correlation) < 6 / np.sqrt(count)


def test_dropout_is_unbiased_and_ignores_block_sizes():
  q, k, v = qkv()
  options = {"dropout_rate": 0.4, "return_lse": True}
  run = lambda seed, config: flash_attention(  # noqa: E731
    q, k, v, dropout_seed=seed, config=config, **options
  )
  many = jax.jit(jax.vmap(lambda s: run(s, Blocks())))(jnp.arange(1500))
  one = jax.jit(lambda s: run(s, BLOCKS["looped_ragged"]))(3)
  many = jax.tree.map(np.asarray, many)
  chex.assert_trees_all_close(
    one, jax.tree.map(lambda x: x[3], many), atol=1e-13
  )
  o, lse = map(np.asarray, attend(q, k, v, return_lse=True))
  spread = many[0].std(0) / np.sqrt(1500)
  assert np.max(np.abs(many[0].mean(0) - o) / spread) < 5
  chex.assert_trees_all_close(many[1][0], lse, atol=1e-13)


def temporaries(length, config):
  """Bytes of temporaries of a forward and backward pass."""
  q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  k = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

  def f(q, k, v):
    return jnp.sum(flash_attention(q, k, v, causal=True, config=config) ** 2)

  compiled = jax.jit(jax.grad(f, (0, 1, 2))).lower(q, k, k).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_linear_in_length():
  config = Blocks(q=64, k=64)  # so that these lengths are looped over
  short, long = (temporaries(n, config) for n in (8192, 16384))
  assert 1.5 < long / short < 2.1
  assert long < 16384**2 * 4 / 100  # one head's scores would be 1 GiB


def test_unrolled_blocks_hold_one_block_of_scores():
  length = 1024
  scores = 2 * length * length * 4
  assert temporaries(length, Blocks(q=128)) < scores


def test_a_checkpoint_policy_can_keep_the_output():
  q, k, v = qkv()

  def products(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    f = jax.checkpoint(
      lambda q, k, v: jnp.sum(attend(q, k, v) ** 2), policy=policy
    )
    return dots(jax.make_jaxpr(jax.grad(f, (0, 1, 2)))(q, k, v).jaxpr)

  def dots(jaxpr):
    # Over all calls: a jaxpr that is called twice is printed once.
    found = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
    return found + sum(map(dots, subjaxprs(jaxpr)))

  # Two blocks: 2 products forward, 5 backward, 2 more to recompute forward.
  assert products("attn_out", "attn_lse") == 2 * (2 + 5)
  assert products() == 2 * (2 + 5 + 2)
