"""Decoding attention against NumPy, and against JAX's own references."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.paged_attention import util as paged_util
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as rpa

from kernels_pallas.decode_attention.api import (
  choose,
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import (
  Pages,
  append_to_pages,
  empty_pages,
  quantize,
)
from kernels_pallas.decode_attention.spec import Blocks
from kernels_pallas.flash_attention.api import flash_attention
from tests.support_pairwise import pairwise

# Interpreted kernels are large programs over tiny arrays.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)
BACKENDS = {
  "reference": {"backend": "reference"},
  "xla": {"backend": "xla"},
  "mosaic_tpu": {"backend": "mosaic_tpu", "interpret": True},
}
# Float32 sums of some ten products of numbers near 1, in another order.
CLOSE = dict(rtol=1e-5, atol=1e-5)

COUNT, SIZE, WIDTH = 18, 4, 5
# Rows that decode, read a prompt, go on with one, are padding; one is full.
LENS = np.array([7, 6, 20, 0, 13, 1], np.int32)
STARTS = np.array([0, 1, 7, 10, 11, 12, 13], np.int32)
TOKENS = 15  # the last two are nobody's


def draw(*shape, seed=0, dtype=np.float32):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def tables(lens=LENS, width=WIDTH, seed=0):
  """Distinct pages for every row, in random order; elsewhere no pages."""
  order = np.random.default_rng(seed).permutation(COUNT)
  table, used = np.full((len(lens), width), -7, np.int32), 0
  for row, n in enumerate(-(-lens // SIZE)):
    table[row, :n] = order[used : used + n]
    used += n
  return table


def pool(K, H, Hv, dtype=jnp.float32):
  kv = draw(COUNT, K, SIZE, H + Hv, seed=1)
  if dtype == jnp.float32:
    return Pages(kv, None, H)
  (k, k_scale), (v, v_scale) = (
    quantize(x, dtype) for x in (kv[..., :H], kv[..., H:])
  )
  scale = jnp.stack([k_scale, v_scale], axis=1)
  return Pages(jnp.concatenate([k, v], -1), scale, H)


def plain(pages):
  """Keys and values of pages as float64 [pages, K, size, .]."""
  kv, H = np.asarray(pages.kv).astype(np.float64), pages.head_dim
  k, v = kv[..., :H], kv[..., H:]
  if pages.scale is not None:
    scale = np.asarray(pages.scale, np.float64)[..., None]
    k, v = k * scale[:, 0], v * scale[:, 1]
  return k, v


def truth(q, k, v, window=None, softcap=None, sinks=None, scale=None):
  """One sequence: q [t, N, H] are the last of k, v [s, K, .]; in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (t, N, H), (s, K) = q.shape, k.shape[:2]
  o, lse = np.zeros((t, N, v.shape[-1])), np.full((t, N), -np.inf)
  for i in range(t):
    at = s - t + i
    keys = range(0 if window is None else max(0, at - window + 1), at + 1)
    for n in range(N):
      kn, vn = k[keys, n // (N // K)], v[keys, n // (N // K)]
      logits = kn @ q[i, n] * (H**-0.5 if scale is None else scale)
      if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
      extra = [] if sinks is None else [float(sinks[n])]
      if not len(keys) and not extra:
        continue
      every = np.concatenate([logits, extra])
      lse[i, n] = every.max() + np.log(np.exp(every - every.max()).sum())
      o[i, n] = np.exp(logits - lse[i, n]) @ vn
  return o, lse


def paged_truth(q, pages, table, lens, starts, **options):
  k, v = plain(pages)
  o, lse = np.zeros((*q.shape[:2], v.shape[-1])), np.full(q.shape[:2], -np.inf)
  sinks = options.get("sinks")
  if sinks is not None:
    lse[:] = sinks
  for row, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
    n = lens[row]
    used = table[row, : -(-n // SIZE)]
    rows = (x[used].swapaxes(1, 2).reshape(-1, *x.shape[1::2]) for x in (k, v))
    if n:
      o[a:b], lse[a:b] = truth(q[a:b], *(x[:n] for x in rows), **options)
  return o, lse


FACTORS = {
  "backend": ["xla", "mosaic_tpu"],
  "pages": {"float32": jnp.float32, "int8": jnp.int8,
            "float8": jnp.float8_e4m3fn},
  "heads": {"grouped": (4, 2, 8, 8), "one": (4, 1, 8, 4), "each": (2, 2, 8, 8),
            "apart": (2, 1, 128, 128)},
  "window": {"none": None, "short": 5, "one": 1},
  "softcap": {"none": None, "some": 1.5},
  "sinks": {"no": False, "yes": True},
  "blocks": {"default": None, "split": Blocks(2, 8, 3),
             "token": Blocks(1, 4, 2), "row": Blocks(16, 12, 1)},
}  # fmt: skip
ROWS = pairwise(FACTORS)


def options_of(choice, N):
  found = {name: choice[name] for name in ("window", "softcap")}
  found["sinks"] = draw(N, seed=3) if choice["sinks"] else None
  return found


def chosen(row):
  return {
    name: value if name == "backend" else FACTORS[name][value]
    for name, value in row.items()
  }


@pytest.mark.parametrize("row", ROWS, ids=lambda r: "-".join(r.values()))
def test_mixed_rows_agree_with_numpy(row):
  choice = chosen(row)
  N, K, H, Hv = choice["heads"]
  q, pages = draw(TOKENS, N, H), pool(K, H, Hv, choice["pages"])
  table, options = tables(), options_of(choice, N)
  ours = {**options, **BACKENDS[choice["backend"]], "blocks": choice["blocks"]}
  run = quick(functools.partial(paged_attention, return_lse=True, **ours))
  found = run(q, pages, *map(jnp.asarray, (table, LENS, STARTS)))
  expected = paged_truth(q, pages, table, LENS, STARTS, **options)
  chex.assert_trees_all_close(found, expected, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_float64_agrees_with_numpy(backend):
  with jax.enable_x64(True):
    q, kv = (draw(*s, dtype=np.float64) for s in (
      (TOKENS, 4, 8), (COUNT, 2, SIZE, 14)))  # fmt: skip
    pages, table = Pages(kv, None, 8), tables()
    options = {"window": 6, "softcap": 2.0, "sinks": draw(4, dtype=np.float64)}
    found = paged_attention(
      q, pages, *map(jnp.asarray, (table, LENS, STARTS)), return_lse=True,
      blocks=Blocks(2, 8, 2), **options, **BACKENDS[backend],
    )  # fmt: skip
    expected = paged_truth(q, pages, table, LENS, STARTS, **options)
    chex.assert_trees_all_close(found, expected, rtol=1e-13, atol=1e-13)


@functools.partial(quick, static_argnames="window")
def every_backend(q, pages, table, lens, starts, window=None):
  return [
    paged_attention(
      q, pages, table, lens, starts, window=window, return_lse=True,
      blocks=Blocks(2, 8, 2), **backend,
    ) for backend in BACKENDS.values()
  ]  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float8_e4m3fn])
@pytest.mark.parametrize("window", [None, 5])
def test_what_no_token_sees_may_hold_anything(dtype, window):
  """NaN in free pages, behind ends and, with a window, before its start."""
  q, pages, table = draw(TOKENS, 4, 8), pool(2, 8, 8, dtype), tables()
  first = np.zeros_like(LENS)
  if window is not None:
    first = np.maximum(LENS - np.diff(STARTS) - window + 1, 0)
  alive, dirty = np.zeros((COUNT, SIZE), bool), table.copy()
  for row in range(len(LENS)):
    for token in range(first[row], LENS[row]):
      alive[table[row, token // SIZE], token % SIZE] = True
    dirty[row, : first[row] // SIZE] = 10**9
  nan = ~alive[:, None, :, None]
  poisoned = Pages(
    jnp.where(nan, jnp.asarray(np.nan).astype(dtype), pages.kv),
    None if pages.scale is None
    else jnp.where(nan[:, None, :, :, 0], jnp.nan, pages.scale),
    8,
  )  # fmt: skip
  where = jnp.asarray(LENS), jnp.asarray(STARTS)
  clean = every_backend(q, pages, jnp.asarray(table), *where, window)
  found = every_backend(q, poisoned, jnp.asarray(dirty), *where, window)
  chex.assert_trees_all_equal(found, clean)
  for o, lse in found:
    chex.assert_tree_all_finite(o)
    # Token 10 belongs to padding, 13 and 14 to nobody.
    empty = np.flatnonzero(np.all(np.isneginf(lse), axis=1))
    assert empty.tolist() == [10, 13, 14] and not np.any(o[empty])


def test_agrees_with_the_ragged_reference_of_jax():
  q, pages, table = draw(13, 4, 8), pool(2, 8, 8), np.maximum(tables(), 0)
  k, v = (jnp.asarray(x, jnp.float32) for x in plain(pages))
  interleaved = jnp.stack([k, v], axis=2)  # [pages, K, 2, size, H]
  interleaved = jnp.moveaxis(interleaved, 3, 1).reshape(COUNT, SIZE, 4, 8)
  # It knows no empty rows: the padding row becomes a row of one token.
  lens = np.maximum(LENS, 1)
  args = [jnp.asarray(x) for x in (lens, table, STARTS, [len(lens)])]
  for options in ({}, {"sliding_window": 5, "soft_cap": 1.5}):
    expected = rpa.ref_ragged_paged_attention(
      q, interleaved, *args, sm_scale=8**-0.5, **options
    )
    found = paged_attention(
      q, pages, args[1], args[0], args[2],
      window=options.get("sliding_window"), softcap=options.get("soft_cap"),
      backend="xla",
    )  # fmt: skip
    chex.assert_trees_all_close(found, expected, **CLOSE)


B, S = 4, 24
LENGTHS = np.array([24, 1, 0, 13], np.int32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", [None, Blocks(1, 10, 3)])
def test_one_token_a_row_from_a_cache(backend, blocks):
  """Against JAX's reference for decoding, and our attention in float32.

  Blocks of 10 do not divide the cache: the last one is moved back.
  """
  q, k, v = draw(B, 4, 8), draw(B, S, 2, 8, seed=1), draw(B, S, 2, 8, seed=2)
  options = {"softcap": 2.0, "scale": 0.7}
  run = functools.partial(decode_attention, return_lse=True, blocks=blocks)
  run = quick(functools.partial(run, **options, **BACKENDS[backend]))
  o, lse = run(q, k, v, jnp.asarray(LENGTHS))
  # Its scale is 1, and so is its soft cap's.
  theirs = paged_util.grouped_query_attention_reference(
    q * 0.7, *(x.swapaxes(1, 2) for x in (k, v)), LENGTHS, soft_cap=2.0
  )
  alive = LENGTHS > 0
  chex.assert_trees_all_close(o[alive], theirs[alive], **CLOSE)
  expected, expected_lse = flash_attention(
    q[:, None], k, v, kv_lens=jnp.asarray(LENGTHS), causal=True,
    backend="reference", return_lse=True, **options,
  )  # fmt: skip
  chex.assert_trees_all_close(o, expected[:, 0], **CLOSE)
  chex.assert_trees_all_close(lse, expected_lse[..., 0], **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_a_cache(backend):
  q, k, v = draw(B, 2, 8), draw(B, S, 2, 8, seed=1), draw(B, S, 2, 6, seed=2)
  found = quick(functools.partial(
    decode_attention, window=7, blocks=Blocks(1, 10, 2), **BACKENDS[backend]
  ))(q, k, v, jnp.asarray(LENGTHS))  # fmt: skip
  for row, n in enumerate(LENGTHS):
    expected, _ = truth(q[row, None], k[row, :n], v[row, :n], window=7)
    chex.assert_trees_all_close(found[row], expected[0], **CLOSE)


@hypothesis.settings(max_examples=12)
@hypothesis.given(
  st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 8)), min_size=4, max_size=4
  )
)
def test_any_lengths(lengths):
  """Rows of (tokens before, new tokens); both backends, one compilation."""
  new = np.array([n for _, n in lengths], np.int32)
  lens = (np.array([old for old, _ in lengths], np.int32) + new) * (new > 0)
  starts = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
  q, pages, table = draw(32, 2, 8), pool(1, 8, 8), tables(lens)
  expected = paged_truth(q, pages, table, lens, starts)
  for found in every_backend(
    q, pages, *map(jnp.asarray, (table, lens, starts))
  ):
    chex.assert_trees_all_close(found, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8,
                                   jnp.float8_e4m3fn])  # fmt: skip
def test_tokens_are_appended_where_they_are_read(dtype):
  """Token by token and all at once give the same pages, and the right ones."""
  k, v = draw(TOKENS, 2, 8, seed=5), draw(TOKENS, 2, 8, seed=6)
  lens, starts = (
    np.array([6, 0, 9], np.int32),
    np.array([0, 6, 6, 15], np.int32),
  )
  table = jnp.asarray(tables(lens))
  start = empty_pages(COUNT, 2, SIZE, 8, dtype)
  append = jax.jit(append_to_pages)
  once = append(start, k, v, table, jnp.asarray(lens), jnp.asarray(starts))
  step = start
  for t in range(9):
    at = np.minimum(starts[:-1] + t, TOKENS - 1)
    now = np.where(t < lens, t + 1, 0).astype(np.int32)
    step = append(step, k[at], v[at], table, jnp.asarray(now))
  chex.assert_trees_all_equal(step, once)
  held_k, held_v = plain(once)
  worst = {jnp.float32: 0, jnp.bfloat16: 2**-8, jnp.int8: 0.5 / 127,
           jnp.float8_e4m3fn: 2**-4}[dtype]  # fmt: skip
  written = np.zeros((COUNT, SIZE), bool)
  for row, first in ((0, 0), (2, 6)):
    for t in range(lens[row]):
      at = int(table[row, t // SIZE]), t % SIZE
      written[at] = True
      for x, held in ((k, held_k), (v, held_v)):
        x = np.asarray(x[first + t], np.float64)
        most = np.abs(x).max(-1, keepdims=True) * worst * (1 + 1e-6)
        assert np.all(np.abs(held[at[0], :, at[1]] - x) <= most)
  assert not np.any(
    np.asarray(once.kv).astype(np.float32).swapaxes(1, 2)[~written]
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8,
                                   jnp.float8_e4m3fn])  # fmt: skip
def test_the_kernel_appends_what_a_scatter_does(dtype):
  """Rows that begin and end anywhere in a group, none's tokens, empty rows."""
  count, size, K, H = 5, 32, 2, 8
  table = jnp.array([[3, 0], [1, -1], [4, -1], [2, -1]], jnp.int32)
  lens = jnp.array([41, 3, 0, 32], jnp.int32)
  starts = jnp.array([0, 22, 25, 25, 26], jnp.int32)
  k, v = draw(28, K, H), draw(28, K, H, seed=1)
  held = empty_pages(count, K, size, H, dtype)
  kv = draw(count, K, size, 2 * H, seed=2)
  held = Pages(kv.astype(dtype), held.scale, H)

  @quick
  def both(held, k, v, table, lens, starts):
    return [
      append_to_pages(held, k, v, table, lens, starts, **options)
      for options in (BACKENDS["xla"], BACKENDS["mosaic_tpu"])
    ]

  for where in ((lens, starts), (0 * lens, starts), (lens, 0 * starts)):
    expected, found = both(held, k, v, table, *where)
    chex.assert_trees_all_equal(found, expected)
    changed = np.asarray(found.kv != held.kv).any((1, 3)).sum()
    assert changed == (26 if where[0][0] and where[1][-1] else 0)


def test_rounding_is_at_most_twice_that_of_plain_bfloat16():
  """The rule of the flash-attention authors; see kernels.md 14.1."""
  q, k, v = (draw(B, *s, dtype=jnp.bfloat16) for s in (
    (4, 32), (S, 2, 32), (S, 2, 32)))  # fmt: skip
  lengths = jnp.asarray([24, 1, 7, 13], jnp.int32)

  def naive(dtype):
    x, y = (jnp.repeat(x, 2, axis=2).astype(dtype) for x in (k, v))
    s = jnp.einsum("bnh,bsnh->bns", q.astype(dtype), x) * 32**-0.5
    seen = jnp.arange(S) < lengths[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    return jnp.einsum("bns,bsnh->bnh", p.astype(dtype), y).astype(jnp.float32)

  exact, rough = naive(jnp.float32), naive(jnp.bfloat16)
  for name in ("xla", "mosaic_tpu"):
    run = functools.partial(decode_attention, **BACKENDS[name])
    found = quick(run)(q, k, v, lengths)
    assert found.dtype == jnp.bfloat16
    error = float(jnp.abs(found.astype(jnp.float32) - exact).max())
    assert error <= 2 * float(jnp.abs(rough - exact).max()) + 1e-5


@pytest.mark.parametrize("kind", ["float32", "int8", "cache"])
def test_kernels_do_not_race_or_read_what_nobody_wrote(tpu_interpreter, kind):
  """Two cores, parallel steps in random order, memory full of NaN."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  options = {"window": 9, "return_lse": True}
  ours = {"backend": "mosaic_tpu", "interpret": tpu_interpreter}
  if kind == "cache":
    x = draw(B, 2, 8), draw(B, S, 1, 8), draw(B, S, 1, 8, seed=1)
    call = functools.partial(decode_attention, *x, jnp.asarray(LENGTHS))
    blocks = Blocks(1, 8, 2)
  else:
    table = tables()
    args = map(jnp.asarray, (table, LENS, STARTS))
    pages = pool(1, 8, 8, jnp.dtype(kind).type)
    call = functools.partial(paged_attention, draw(TOKENS, 2, 8), pages, *args)
    blocks = Blocks(2, 8, 2)
  found = call(blocks=blocks, **ours, **options)
  expected = call(backend="reference", **options)
  assert not interpret_pallas_call.races.races_found
  chex.assert_trees_all_close(found, expected, **CLOSE)


def fails(message, *, q=None, pages=None, table=None, lens=None, starts=None,
          **options):  # fmt: skip
  q = draw(TOKENS, 4, 8) if q is None else q
  pages = pool(2, 8, 8) if pages is None else pages
  table = tables() if table is None else table
  lens = LENS if lens is None else np.array(lens, np.int32)
  starts = STARTS if starts is None else np.array(starts, np.int32)
  # Where annotations are checked, they may be first.
  with pytest.raises((ValueError, TypeError), match=f"{message}|Type-check"):
    paged_attention(
      q, pages, *map(jnp.asarray, (table, lens, starts)), **options
    )


def test_bad_input_is_named():
  fails("N % K = 0", q=draw(TOKENS, 3, 8))
  fails("equal head dims", q=draw(TOKENS, 4, 6))
  fails(r"expected \[6, W\]", table=tables()[:4])
  fails("expected \\(7,\\)", starts=STARTS[:-1])
  fails("row 2 has 21 tokens, expected 0 to 20", lens=[7, 6, 21, 0, 13, 1])
  fails("row 4 has -1", lens=[7, 6, 20, 0, -1, 1])
  fails("row 1 has 5 tokens, 6 of them new", lens=[7, 5, 20, 0, 13, 1])
  fails("row 0 starts at 3", starts=[3, 1, 7, 10, 11, 12, 13])
  fails("within the 15 tokens", starts=[0, 1, 7, 10, 11, 12, 16])
  for bad in (-1, COUNT):
    table = tables()
    table[2, 3] = bad
    fails(f"row 2 has page {bad} for its tokens from 12 on", table=table)
  fails("window: found 0", window=0)
  fails("softcap: found -1", softcap=-1.0)
  fails("scale", scale=float("nan"))
  fails("sinks", sinks=draw(3))
  fails("backend: found 'cuda'", backend="cuda")
  fails("has no use for it", backend="xla", interpret=True)
  fails("no 0", pages=Pages(pool(2, 8, 8).kv, None, 16))
  fails("scale: found None with int8", pages=Pages(
    pool(2, 8, 8).kv.astype(jnp.int8), None, 8))  # fmt: skip
  fails("float16, expected bfloat16", q=draw(TOKENS, 4, 8).astype(jnp.float16),
        backend="mosaic_tpu")  # fmt: skip
  fails("multiples of 8 in float32", backend="mosaic_tpu")
  with pytest.raises(ValueError, match="at least 1 of each"):
    Blocks(keys=0)
  with pytest.raises(ValueError, match="token for each of 6 rows"):
    paged_attention(draw(TOKENS, 4, 8), pool(2, 8, 8), *map(
      jnp.asarray, (tables(), LENS)))  # fmt: skip
  with pytest.raises(ValueError, match="row 1 has 25"):
    decode_attention(draw(2, 2, 8), draw(2, S, 1, 8), draw(2, S, 1, 8),
                     jnp.array([24, 25]))  # fmt: skip
  with pytest.raises((ValueError, TypeError), match="one B|Type"):
    decode_attention(draw(2, 2, 8), draw(3, S, 1, 8), draw(3, S, 1, 8),
                     jnp.array([24, 2, 2]))  # fmt: skip
  with pytest.raises(ValueError, match="append_to_pages: found"):
    append_to_pages(pool(2, 8, 8), draw(1, 2, 8), draw(1, 2, 4),
                    jnp.asarray(tables()[:1]), jnp.array([3]))  # fmt: skip
  with pytest.raises(ValueError, match="at least 1"):
    empty_pages(0, 2, 4, 8)


def test_pages_beyond_the_table_are_not_read_where_nobody_can_check():
  """Traced lengths and tables: bounded, finite, and other rows unharmed."""
  q, pages, table = draw(TOKENS, 4, 8), pool(2, 8, 8), tables()
  clean = every_backend(q, pages, *map(jnp.asarray, (table, LENS, STARTS)))
  lens, wrong = LENS.copy(), table.copy()
  lens[2], wrong[0, 0] = 10**6, 10**9
  found = every_backend(q, pages, *map(jnp.asarray, (wrong, lens, STARTS)))
  for (o, _), (expected, _) in zip(found, clean, strict=True):
    chex.assert_tree_all_finite(o)
    others = np.r_[1:7, 10:13]
    chex.assert_trees_all_equal(o[others], expected[others])


def test_the_backend_is_that_of_the_platform_compiled_for():
  device = jax.sharding.AbstractDevice("TPU v5", None, platform="tpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  assert choose(jnp.bfloat16)[0] == "xla"
  with jax.sharding.use_abstract_mesh(mesh):
    assert choose(jnp.bfloat16)[0] == "mosaic_tpu"
    assert choose(jnp.float16)[0] == "xla"
