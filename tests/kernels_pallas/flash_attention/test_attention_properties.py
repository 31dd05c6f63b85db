"""Properties of attention that hold for every backend."""

import collections
import functools
import itertools

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from tests.support_pairwise import first_of_each

B, T, S, H = 2, 5, 8, 4
BACKENDS = {
  "reference": {"backend": "reference"},
  "unrolled": {"backend": "xla_blockwise", "config": Blocks(q=3)},
  "looped": {
    "backend": "xla_blockwise", "config": Blocks(q=3, k=4, unroll=0)},
  "mosaic_tpu": {
    "backend": "mosaic_tpu", "config": Tiles(*[Tile(4, 8, 4, 4)] * 3),
    "interpret": True},
}  # fmt: skip
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape))


# --- Gradients against finite differences -----------------------------------

FACTORS = (
  "causal", "window", "segments", "prefix", "bias", "softcap", "sinks",
  "dropout", "grouped", "other_width", "lse", "ragged",
)  # fmt: skip


def on(run: int, factor: int) -> bool:
  """An orthogonal array of strength 2: columns of a Hadamard matrix of 16."""
  return (run & (factor + 1)).bit_count() % 2 == 1


ROWS = [
  {name for n, name in enumerate(FACTORS) if on(run, n)} for run in range(16)
]


def test_every_pair_of_features_is_in_four_rows():
  for a, b in itertools.combinations(FACTORS, 2):
    count = collections.Counter((a in row, b in row) for row in ROWS)
    assert len(count) == 4 and set(count.values()) == {4}


def problem(row):
  """Differentiable arrays, mask and options of a row."""
  has = row.__contains__
  N, K = (4, 2) if has("grouped") else (2, 2)
  x = {
    "q": draw(B, T, N, H),
    "k": draw(B, S, K, H),
    "v": draw(B, S, K, 6 if has("other_width") else H, seed=1),
  }
  x |= {"bias": draw(1, N, T, S)} if has("bias") else {}
  x |= {"sinks": draw(N)} if has("sinks") else {}
  rng = np.random.default_rng(7)
  segments = None
  if has("segments"):
    segments = tuple(
      jnp.asarray(rng.integers(-1, 2, (B, n)), jnp.int32) for n in (T, S)
    )
  common = {
    "window": (4, 2) if has("window") else (None, None),
    "segments": segments,
  }
  if has("ragged"):
    # Queries at 2, 3, ..., keys of different lengths.
    keys = jnp.arange(S)[None]
    common["q_positions"] = jnp.arange(T)[None] + 2
    common["kv_positions"] = jnp.where(keys < jnp.array([[7], [3]]), keys, -1)
  if has("prefix"):
    common["offset"] = None if has("causal") else 0
    mask = Mask.prefix_lm(jnp.array([4, 0]), **common)
  else:
    mask = (Mask.causal if has("causal") else Mask.full)(**common)
  options = {
    "softcap": 1.5 if has("softcap") else None,
    "dropout_rate": 0.3 if has("dropout") else 0.0,
    "dropout_seed": 5,
  }
  return x, mask, options


# Until every feature was both on and off.
CASES = first_of_each(
  ROWS,
  ["-".join(sorted(row)) for row in ROWS],
  [{(name, name in row) for name in FACTORS} for row in ROWS],
)


@pytest.mark.parametrize("row", CASES)
@pytest.mark.sample(5, 1)
def test_gradients_are_differences(row):
  """Custom gradients along random directions, by a stencil of 5 points."""
  x, mask, options = problem(row)
  step = 1e-3

  def loss(x, mask, backend):
    o, lse = flash_attention(
      **x, mask=mask, **options, return_lse=True, **BACKENDS[backend]
    )
    total = jnp.sum(jnp.sin(3 * o))
    if "lse" not in row:
      return total
    return total + jnp.sum(jnp.cos(jnp.where(lse == -jnp.inf, 0, lse)))

  @quick
  def run(x, mask):
    def slope(name):
      u = draw(*x[name].shape, seed=3)
      at = lambda e: loss({**x, name: x[name] + e * u}, mask, "reference")  # noqa: E731
      f = jax.vmap(at)(step * jnp.array([-2.0, -1.0, 1.0, 2.0]))
      return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * step)

    def inner(g):
      return {k: jnp.sum(y * draw(*y.shape, seed=3)) for k, y in g.items()}

    ours = inner(jax.grad(loss)(x, mask, "looped"))
    return {name: slope(name) for name in x}, ours

  expected, found = run(x, mask)
  assert any(abs(float(y)) > 1e-2 for y in expected.values())
  # The stencil's error is 4e-14 times a fifth derivative, of up to 3^5 N^5.
  chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=1e-7)


# --- Invariances -----------------------------------------------------------


@functools.cache
def attend(backend):
  """One program per backend: any bias over the keys, any lengths."""
  return quick(
    lambda q, k, v, bias, lens: flash_attention(
      q, k, v, bias=bias, kv_lens=lens, return_lse=True, **BACKENDS[backend]
    )
  )


def sample(seed):
  """q, k, v, bias, and lengths, of which none is 0."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
  lens = jnp.asarray(rng.integers(1, S + 1, B), jnp.int32)
  return (
    normal(B, T, 4, H), normal(B, S, 2, H), normal(B, S, 2, H),
    normal(B, 1, 1, S), lens, rng,
  )  # fmt: skip


def close(a, b):
  # Sums of some ten terms near 1 in float64.
  chex.assert_trees_all_close(a, b, rtol=1e-12, atol=1e-12)


every_backend = pytest.mark.parametrize("backend", BACKENDS)
examples = hypothesis.settings(max_examples=15)
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.slow
@every_backend
@examples
@hypothesis.given(seed=seeds)
@pytest.mark.sample(4)
def test_order_of_keys_does_not_matter(backend, seed):
  q, k, v, bias, _, rng = sample(seed)
  whole, order = jnp.full(B, S), rng.permutation(S)
  close(
    attend(backend)(q, k[:, order], v[:, order], bias[..., order], whole),
    attend(backend)(q, k, v, bias, whole),
  )


@every_backend
@examples
@hypothesis.given(
  seed=seeds, junk=st.sampled_from([0.0, 1e300, np.nan, np.inf])
)
@pytest.mark.sample(3)
def test_memory_after_the_last_key_does_not_matter(backend, seed, junk):
  q, k, v, bias, lens, _ = sample(seed)
  dead = (jnp.arange(S) >= lens[:, None])[:, :, None, None]
  chex.assert_trees_all_equal(
    attend(backend)(q, *(jnp.where(dead, junk, x) for x in (k, v)), bias, lens),
    attend(backend)(q, k, v, bias, lens),
  )


@every_backend
@examples
@hypothesis.given(seed=seeds, constant=st.floats(-50, 50))
def test_a_constant_on_the_logits_only_shifts_the_log_sum_exp(
  backend, seed, constant
):
  q, k, v, bias, lens, _ = sample(seed)
  o, lse = attend(backend)(q, k, v, bias, lens)
  moved = attend(backend)(q, k, v, bias + constant, lens)
  # Logits near 50 are rounded more coarsely than those near 1.
  chex.assert_trees_all_close(moved, (o, lse + constant), rtol=0, atol=1e-12)


@every_backend
@examples
@hypothesis.given(seed=seeds)
def test_linear_in_values(backend, seed):
  q, k, v, bias, lens, rng = sample(seed)
  a, b = rng.standard_normal(2)
  other = jnp.asarray(rng.standard_normal(v.shape))
  f = lambda v: attend(backend)(q, k, v, bias, lens)[0]  # noqa: E731
  close(f(a * v + b * other), a * f(v) + b * f(other))


@every_backend
@examples
@hypothesis.given(seed=seeds, share=st.floats(0, 1))
def test_parts_combine_to_the_whole(backend, seed, share):
  """Two halves of the keys, one possibly empty (kernels_pallas/MATH.md 2.2)."""
  q, k, v, bias, lens, rng = sample(seed)
  first = jnp.asarray(rng.random(S) < share)
  parts = [
    attend(backend)(q, k, v, jnp.where(chosen, bias, -jnp.inf), lens)
    for chosen in (first, ~first)
  ]
  total = jnp.logaddexp(parts[0][1], parts[1][1])
  shares = [jnp.exp(lse - total).swapaxes(1, 2)[..., None] for _, lse in parts]
  o = sum(s * p[0] for s, p in zip(shares, parts, strict=True))
  close((o, total), attend(backend)(q, k, v, bias, lens))


@every_backend
@pytest.mark.sample(3)
def test_grouped_heads_are_repeated_heads(backend):
  q, k, v, bias, lens, _ = sample(0)
  k2, v2 = (jnp.repeat(x, 2, axis=2) for x in (k, v))
  close(
    attend(backend)(q, k2, v2, bias, lens), attend(backend)(q, k, v, bias, lens)
  )


# --- Other implementations ---------------------------------------------------


@pytest.mark.parametrize("window", [(2, 1), None])
@pytest.mark.sample(3)
def test_agrees_with_jax_nn(window):
  """Windows, lengths of queries and keys, and gradients."""
  q, k, v = (draw(B, S, n, H, seed=n).astype(jnp.float32) for n in (4, 2, 2))
  lens = jnp.array([S, 5], jnp.int32)
  live = (jnp.arange(S) < lens[:, None])[:, :, None, None]

  def theirs(q, k, v):
    o = jax.nn.dot_product_attention(
      q, k, v, query_seq_lengths=lens, key_value_seq_lengths=lens,
      local_window_size=window,
    )  # fmt: skip
    return jnp.sum(jnp.where(live, jnp.sin(3 * o), 0))

  def ours(q, k, v):
    ids = jnp.where(live[:, :, 0, 0], 0, -1)
    o = flash_attention(
      q, k, v, segment_ids=ids, window=window or (None, None),
      **BACKENDS["mosaic_tpu"],
    )  # fmt: skip
    return jnp.sum(jnp.sin(3 * o))

  found, expected = (
    quick(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (ours, theirs)
  )
  # Float32, sums of some ten terms near 1; gradients up to 30.
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_agrees_with_splash():
  """Causal, packed documents, grouped heads, soft cap; both interpreted."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  n, softcap = 256, 2.0
  with jax.enable_x64(False):
    q, k, v = (draw(1, n, h, 128, seed=h).astype(jnp.float32)
               for h in (2, 1, 1))  # fmt: skip
    ids = jnp.where(jnp.arange(n) < 100, 0, 1).astype(jnp.int32)
    splash = kernel.make_splash_mha(
      masks.MultiHeadMask([masks.CausalMask((n, n))] * 2),
      block_sizes=kernel.BlockSizes(
        block_q=128, block_kv=128, block_q_dkv=128, block_kv_dkv=128,
        block_kv_dkv_compute=128, block_q_dq=128, block_kv_dq=128,
      ),
      head_shards=1, q_seq_shards=1, interpret=True,
      attn_logits_soft_cap=softcap,
    )  # fmt: skip
    scale = 128**-0.5

    def theirs(q, k, v):
      q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
      o = splash(q * scale, k, v, kernel.SegmentIds(ids, ids))
      return jnp.sum(jnp.sin(3 * o))

    def ours(q, k, v):
      o = flash_attention(
        q, k, v, causal=True, segment_ids=ids[None], softcap=softcap,
        backend="mosaic_tpu", config=Tiles(*[Tile(256, 256, 256, 256)] * 3),
        interpret=True,
      )  # fmt: skip
      return jnp.sum(jnp.sin(3 * o))

    found, expected = (
      quick(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (ours, theirs)
    )
  # Float32 sums of up to 256 terms near 1; the loss has 65,536.
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
