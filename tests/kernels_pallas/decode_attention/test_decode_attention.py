"""Decoding attention against NumPy, and against JAX's own references."""

import dataclasses
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
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.spec import Blocks
from kernels_pallas.flash_attention.api import flash_attention
from tests.support_decode import (
  BACKENDS,
  CLOSE,
  COUNT,
  LENGTHS,
  LENS,
  SIZE,
  STARTS,
  TOKENS,
  B,
  S,
  draw,
  every_backend,
  paged_truth,
  plain,
  pool,
  quick,
  tables,
  truth,
)
from tests.support_pairwise import cases

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
ROWS = cases(FACTORS)


def options_of(choice, N):
  found = {name: choice[name] for name in ("window", "softcap")}
  found["sinks"] = draw(N, seed=3) if choice["sinks"] else None
  return found


def chosen(row):
  return {
    name: value if name == "backend" else FACTORS[name][value]
    for name, value in row.items()
  }


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.sample(1, 0, 4)
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
    run = quick(functools.partial(
      paged_attention, return_lse=True, blocks=Blocks(2, 8, 2), **options,
      **BACKENDS[backend],
    ))  # fmt: skip
    found = run(q, pages, *map(jnp.asarray, (table, LENS, STARTS)))
    expected = paged_truth(q, pages, table, LENS, STARTS, **options)
    chex.assert_trees_all_close(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
  ("dtype", "window"),
  [
    (jnp.float32, None),
    (jnp.float8_e4m3fn, 5),
    pytest.param(jnp.float32, 5, marks=pytest.mark.slow),
    pytest.param(jnp.float8_e4m3fn, None, marks=pytest.mark.slow),
  ],
)
@pytest.mark.sample(2)
def test_invisible_memory_may_contain_nan(dtype, window):
  """NaN in free pages, after a row's end and, with a window, before it."""
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
    np.where(nan, np.asarray(np.nan).astype(dtype), pages.kv),
    None if pages.scale is None
    else np.where(nan[:, None, :, :, 0], np.float32(np.nan), pages.scale),
    8,
  )  # fmt: skip
  where = jnp.asarray(LENS), jnp.asarray(STARTS)
  clean = every_backend(q, pages, jnp.asarray(table), *where, window)
  found = every_backend(q, poisoned, jnp.asarray(dirty), *where, window)
  chex.assert_trees_all_equal(found, clean)
  for o, lse in jax.tree.map(np.asarray, found):
    chex.assert_tree_all_finite(o)
    # Token 10 belongs to padding, 13 and 14 to no row.
    empty = np.flatnonzero(np.all(np.isneginf(lse), axis=1))
    assert empty.tolist() == [10, 13, 14] and not np.any(o[empty])


def test_agrees_with_the_ragged_reference_of_jax():
  q, pages, table = draw(13, 4, 8), pool(2, 8, 8), np.maximum(tables(), 0)
  interleaved = np.stack(plain(pages), axis=2)  # [pages, K, 2, size, H]
  interleaved = np.moveaxis(interleaved, 3, 1).reshape(COUNT, SIZE, 4, 8)
  # It does not support empty rows: the padding row becomes a row of one token.
  lens = np.maximum(LENS, 1)
  args = lens, table, STARTS, np.array([len(lens)], np.int32)
  for options in ({}, {"sliding_window": 5, "soft_cap": 1.5}):
    # It slices by lengths, which cannot be arguments then.
    theirs = functools.partial(
      lambda q, kv, **options: rpa.ref_ragged_paged_attention(
        q, kv, *args, **options
      ),
      sm_scale=8**-0.5, **options,
    )  # fmt: skip
    expected = quick(theirs)(q, interleaved.astype(np.float32))
    run = quick(functools.partial(
      paged_attention, window=options.get("sliding_window"),
      softcap=options.get("soft_cap"), backend="xla",
    ))  # fmt: skip
    found = run(q, pages, args[1], args[0], args[2])
    chex.assert_trees_all_close(found, expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("blocks", [None, Blocks(1, 10, 3)])
@pytest.mark.cover(1)
def test_one_token_a_row_from_a_cache(backend, blocks):
  """Against JAX's reference for decoding, and our attention in float32.

  Blocks of 10 do not divide the cache: the last one is moved back.
  """
  q, k, v = draw(B, 4, 8), draw(B, S, 2, 8, seed=1), draw(B, S, 2, 8, seed=2)
  options = {"softcap": 2.0, "scale": 0.7}
  run = functools.partial(decode_attention, return_lse=True, blocks=blocks)
  run = quick(functools.partial(run, **options, **BACKENDS[backend]))
  o, lse = map(np.asarray, run(q, k, v, LENGTHS))
  theirs, expected, expected_lse = map(np.asarray, one_token(q, k, v, options))
  alive = LENGTHS > 0
  chex.assert_trees_all_close(o[alive], theirs[alive], **CLOSE)
  chex.assert_trees_all_close(o, expected[:, 0], **CLOSE)
  chex.assert_trees_all_close(lse, expected_lse[..., 0], **CLOSE)


def one_token(q, k, v, options):
  """Returns JAX's output, and our output and log-sum-exp."""

  @quick
  def both(q, k, v):
    # Its scale is 1, and so is its soft cap's.
    theirs = paged_util.grouped_query_attention_reference(
      q * options["scale"], *(x.swapaxes(1, 2) for x in (k, v)), LENGTHS,
      soft_cap=options["softcap"],
    )  # fmt: skip
    ours = flash_attention(
      q[:, None], k, v, kv_lens=jnp.asarray(LENGTHS), causal=True,
      backend="reference", return_lse=True, **options,
    )  # fmt: skip
    return theirs, *ours

  return both(q, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_a_cache(backend):
  q, k, v = draw(B, 2, 8), draw(B, S, 2, 8, seed=1), draw(B, S, 2, 6, seed=2)
  found = quick(functools.partial(
    decode_attention, window=7, blocks=Blocks(1, 10, 2), **BACKENDS[backend]
  ))(q, k, v, LENGTHS)  # fmt: skip
  q, k, v, found = map(np.asarray, (q, k, v, found))
  for row, n in enumerate(LENGTHS):
    expected, _ = truth(q[row, None], k[row, :n], v[row, :n], window=7)
    chex.assert_trees_all_close(found[row], expected[0], **CLOSE)


@pytest.mark.slow
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


def test_large_logits_only_shift_the_log_sum_exp():
  """Adds a constant to all logits whose exponential is inf or 0."""
  q, pages, where = draw(TOKENS, 4, 8), pool(2, 8, 8), (tables(), LENS, STARTS)
  level = (3000 * 8**0.5) ** 0.5

  def at(one, other):
    to, kv = np.array(q), np.array(pages.kv)
    to[..., 0], kv[..., 0] = one * level, other * level
    return to, dataclasses.replace(pages, kv=kv)

  o, lse = paged_truth(*at(0, 0), *where)
  for sign in (1, -1):
    x = at(1, sign)
    for found in every_backend(*x, *map(jnp.asarray, where)):
      # Float32 of 3000 in base 2 is accurate to 2.4e-4: so are probabilities.
      chex.assert_trees_all_close(
        found, (o, lse + 3000 * sign), rtol=2e-3, atol=2e-3
      )


@pytest.mark.slow
def test_rounding_is_at_most_twice_that_of_plain_bfloat16():
  """The rule of the flash-attention authors; see kernels_pallas/MATH.md 8."""
  q, k, v = (draw(B, *s, dtype=jnp.bfloat16) for s in (
    (4, 32), (S, 2, 32), (S, 2, 32)))  # fmt: skip
  lengths = jnp.asarray([24, 1, 7, 13], jnp.int32)

  # Every step is rounded, as without compilation.
  @functools.partial(
    jax.jit,
    static_argnums=0,
    compiler_options={"xla_allow_excess_precision": False},
  )
  def naive(dtype):
    x, y = (jnp.repeat(x, 2, axis=2).astype(dtype) for x in (k, v))
    s = jnp.einsum("bnh,bsnh->bns", q.astype(dtype), x) * 32**-0.5
    seen = jnp.arange(S) < lengths[:, None, None]
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
    return jnp.einsum("bns,bsnh->bnh", p.astype(dtype), y).astype(jnp.float32)

  exact, rough = map(np.asarray, map(naive, (jnp.float32, jnp.bfloat16)))
  for name in ("xla", "mosaic_tpu"):
    run = functools.partial(decode_attention, **BACKENDS[name])
    found = quick(run)(q, k, v, lengths)
    assert found.dtype == jnp.bfloat16
    error = np.abs(np.asarray(found, np.float32) - exact).max()
    assert error <= 2 * np.abs(rough - exact).max() + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float32", "int8", "cache"])
@pytest.mark.sample(3)
def test_kernels_do_not_race_or_read_uninitialized_memory(
  tpu_interpreter, kind
):
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
  found = quick(lambda: call(blocks=blocks, **ours, **options))()
  expected = quick(lambda: call(backend="reference", **options))()
  jax.block_until_ready(found)
  assert not interpret_pallas_call.races.races_found
  chex.assert_trees_all_close(found, expected, **CLOSE)
