"""The C++ decoding kernel against NumPy, and independence of rows."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import cpu_library
from kernels_pallas.decode_attention import cpu
from kernels_pallas.decode_attention.api import (
  choose,
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.spec import Blocks, Spec
from kernels_pallas.decode_attention.work import Cache
from kernels_pallas.flash_attention.api import flash_attention
from research.nn import flops
from tests.support_cpu import supported
from tests.support_decode import CLOSE, LENS, draw, pool, tables, truth
from tests.support_pairwise import pairwise

pytestmark = pytest.mark.usefixtures("cxx")

# Rows of no key, one, some, and more than one task's.
LENGTHS = np.array([0, 1, 37, 1300], np.int32)
B, S = len(LENGTHS), 1311

FACTORS = {
  "isa": cpu.ISAS[1:],
  "dtype": ("float32", "bfloat16"),
  "heads": ((2, 2), (4, 2), (6, 2), (4, 1), (7, 1)),
  "dims": ((64, 64), (16, 80), (128, 16)),
  "window": (None, 1, 20, 700),
  "softcap": (None, 1.5),
}
CASES = pairwise(FACTORS)


def operands(heads, dims, dtype="float32", lengths=LENGTHS, room=S):
  """Queries, and a cache which holds NaN where rows have no keys."""
  (N, K), (H, Hv), rows = heads, dims, len(lengths)
  q, k = draw(rows, N, H), draw(rows, K, S, H, seed=1)
  beyond = np.arange(S) >= lengths[:, None, None, None]
  k, v = (
    jnp.where(beyond.swapaxes(2, 3), jnp.nan, x)[:, :, :room]
    for x in (k, draw(rows, K, S, Hv, seed=2))
  )
  return tuple(x.astype(dtype) for x in (q, k, v))


def run(q, k, v, lengths=LENGTHS, isa="auto", **options):
  spec = Spec(q.shape[-1] ** -0.5, **options)
  call = functools.partial(cpu.cpu_decode, spec, isa=isa)
  return jax.jit(lambda q, k, v, n: call(q, Cache(k, v), n))(
    q, k, v, jnp.asarray(lengths)
  )


@pytest.mark.parametrize(
  "case", CASES, ids=lambda c: "-".join(map(str, c.values()))
)
@pytest.mark.sample(4)
def test_agrees_with_numpy(case):
  isa, options = case["isa"], {x: case[x] for x in ("window", "softcap")}
  supported(isa)
  q, k, v = operands(case["heads"], case["dims"], case["dtype"])
  o, lse = map(np.asarray, run(q, k, v, isa=isa, **options))
  assert o.dtype == lse.dtype == np.float32
  for b, n in enumerate(LENGTHS):
    keys, values = (np.asarray(x[b, :, :n], float) for x in (k, v))
    want = truth(
      np.asarray(q[b, None], float), keys.swapaxes(0, 1),
      values.swapaxes(0, 1), **options
    )  # fmt: skip
    # Of float32 sums of H products, and of at most 1,300 probabilities.
    chex.assert_trees_all_close((o[b], lse[b]), (want[0][0], want[1][0]),
                                rtol=1e-5, atol=3e-6)  # fmt: skip


@pytest.mark.parametrize("isa", cpu.ISAS[1:])
def test_a_row_is_independent_of_others_and_of_unused_slots(isa):
  supported(isa)
  heads, dims = (6, 2), (64, 48)
  together = run(*operands(heads, dims), isa=isa)
  for b, n in enumerate(LENGTHS):
    one = [x[b : b + 1] for x in operands(heads, dims, room=max(n, 1))]
    alone = run(*one, lengths=LENGTHS[b : b + 1], isa=isa)
    row = [x[b : b + 1] for x in together]
    chex.assert_trees_all_equal(list(alone), row)


@pytest.mark.parametrize("isa", cpu.ISAS[1:])
@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_visible_nan_propagates(isa, where, softcap):
  supported(isa)
  q, k, v = operands((4, 2), (16, 16))
  x = {"k": k, "v": v}
  x[where] = x[where].at[2, 1, 30, 3].set(jnp.nan)
  o, _ = map(np.asarray, run(q, **x, isa=isa, softcap=softcap))
  nan = np.isnan(o).any(-1)
  assert nan[2].tolist() == [False, False, True, True]
  assert not nan[[0, 1, 3]].any()


def test_large_logits_only_shift_the_log_sum_exp():
  """Adds a constant to all logits whose exponential is inf or 0."""
  q, k, v = operands((4, 2), (16, 16))
  level = (3000 * 16**0.5) ** 0.5
  o, lse = run(q.at[..., 0].set(0), k, v)
  for sign in (1, -1):
    x = q.at[..., 0].set(sign * level), k.at[..., 0].set(level), v
    # Float32 of 3000 in base 2 is accurate to 2.4e-4: so are probabilities.
    chex.assert_trees_all_close(
      run(*x), (o, lse + 3000 * sign), rtol=2e-3, atol=2e-3
    )


def test_a_soft_cap_of_any_logits():
  """Far above it all logits are the cap; far below they are unchanged."""
  q, k, v = operands((4, 2), (64, 16))
  o, lse = run(q * 1e6, k, v, softcap=5.0)
  alive = LENGTHS > 0
  assert np.isfinite(o).all()
  want = decode_attention(
    q * 1e6, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(LENGTHS),
    softcap=5.0, backend="reference", return_lse=True,
  )  # fmt: skip
  chex.assert_trees_all_close(
    (o[alive], lse[alive]), tuple(x[alive] for x in want), **CLOSE
  )
  chex.assert_trees_all_close(run(q, k, v, softcap=1e5), run(q, k, v), **CLOSE)


def test_logits_that_are_all_minus_infinity_see_nothing():
  """In a row of one task, and in a row of several."""
  q, k, v = operands((4, 2), (16, 16))
  dead = jnp.full_like(k, -jnp.inf)
  o, lse = map(np.asarray, run(jnp.abs(q), dead, v))
  assert not o.any() and np.isneginf(lse).all()
  # Only one key of the second task.
  some = dead.at[3, :, 700].set(k[3, :, 700])
  o, _ = run(jnp.abs(q), some, v)
  want = jnp.repeat(v[3, :, 700], 2, axis=0)
  chex.assert_trees_all_close(o[3], want, **CLOSE)


def test_invalid_lengths_are_clipped():
  """Invalid lengths that are unknown while the program is traced."""
  x = operands((4, 2), (16, 16))
  found = run(*x, lengths=np.array([-3, 1, 37, 1300], np.int32))
  chex.assert_trees_all_equal(found, run(*x))
  k, v = (jnp.nan_to_num(y) for y in x[1:])
  found = run(x[0], k, v, lengths=np.full(4, S + 50, np.int32))
  want = run(x[0], k, v, lengths=np.full(4, S, np.int32))
  chex.assert_trees_all_equal(found, want)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.sample(2)
def test_auto_has_the_gradients_and_flops_of_attention(mesh):
  """As a cache of 1,311 slots, in blocks of 512, with one query."""
  q, k, v = operands((4, 2), (16, 16))
  k, v = (jnp.nan_to_num(x.swapaxes(1, 2)) for x in (k, v))
  lengths = jnp.asarray(LENGTHS)

  def step(q, k, v):
    return decode_attention(q, k, v, lengths, sinks=jnp.ones(4))

  def attention(q, k, v):
    return flash_attention(
      q[:, None], k, v, kv_lens=lengths, sinks=jnp.ones(4), causal=True,
      backend="reference",
    )[:, 0]  # fmt: skip

  def gradients(run):
    return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), (0, 1, 2)))

  one = jax.make_mesh((1,), ("data",))
  with jax.set_mesh(one) if mesh else contextlib.nullcontext():
    chex.assert_trees_all_close(
      gradients(step)(q, k, v), gradients(attention)(q, k, v), **CLOSE
    )
    program = jax.jit(step).lower(q, k, v)
    found = flops.count_flops(step, q, k, v)
  assert cpu.TARGET in program.as_text()
  assert found == 2 * 2 * B * 4 * 16 * 3 * 512


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(k=(2, 2, 9, 32)), "k, v: other shapes"),
    (dict(k=(2, 3, 9, 16)), "k, v: other shapes"),
    (dict(v=(2, 2, 8, 16)), "k, v: other shapes"),
    (dict(v=(1, 2, 9, 16)), "k, v: other shapes"),
    (dict(q=(2, 3, 16)), "k, v: other shapes"),
    (dict(q=(2, 4)), "not \\[B, N, H\\]"),
    (dict(lengths=(3,)), "lengths: not"),
    (dict(o=(2, 4, 32)), "o, lse: not"),
    (dict(lse=(2, 5)), "o, lse: not"),
  ],
)
def test_the_library_rejects_mismatched_shapes(change, message):
  """It checks shapes itself, before it reads or writes anything."""
  assert cpu.available()
  shapes = dict(q=(2, 4, 16), k=(2, 2, 9, 16), v=(2, 2, 9, 16), lengths=(2,),
                o=(2, 4, 16), lse=(2, 4)) | change  # fmt: skip
  call = jax.ffi.ffi_call(
    cpu.TARGET,
    [jax.ShapeDtypeStruct(shapes[x], jnp.float32) for x in ("o", "lse")],
  )
  x = [jnp.ones(shapes[name]) for name in ("q", "k", "v")]
  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    call(
      *x, jnp.ones(shapes["lengths"], jnp.int32), scale=np.float32(1),
      softcap=np.float32(0), window=np.int64(0), isa="auto",
    )  # fmt: skip


def test_bfloat16_is_rounded_once():
  """Sums and probabilities are float32; only the output is rounded."""
  q, k, v = operands((6, 2), (64, 64), "bfloat16")
  x = q, *(y.swapaxes(1, 2) for y in (k, v)), jnp.asarray(LENGTHS)
  found = decode_attention(*x, backend="cpu")
  wide = [y.astype("float32") for y in x[:3]]
  want = decode_attention(*wide, x[3], backend="reference")
  assert found.dtype == jnp.bfloat16
  error = np.abs(np.asarray(found, float) - np.asarray(want, float))
  assert np.all(error <= 2.0**-8 * np.abs(want) + 1e-6)


def test_a_vmap_is_more_rows():
  q, k, v = (jnp.stack([x, x + 1]) for x in operands((4, 2), (16, 16)))
  two = jnp.stack([jnp.asarray(LENGTHS), jnp.asarray(LENGTHS[::-1])])
  found = jax.vmap(run)(q, k, v, two)
  for i in range(2):
    alone = run(q[i], k[i], v[i], two[i])
    chex.assert_trees_all_equal([x[i] for x in found], list(alone))
  shared = jax.vmap(run, in_axes=(0, None, None, None))(q, k[0], v[0], two[0])
  alone = run(q[1], k[0], v[0], two[0])
  chex.assert_trees_all_equal([x[1] for x in shared], list(alone))


def test_auto_takes_the_cpu_kernel_for_supported_calls():
  def taken(dtype="float32", dims=(16, 16), pages=False, **options):
    q, k, v = operands((2, 1), dims)
    lengths = jnp.asarray(LENGTHS)
    if pages:
      held, table = pool(1, 8, 8), jnp.asarray(tables())
      call = lambda q: paged_attention(q, held, table, jnp.asarray(LENS))  # noqa: E731
      program = jax.jit(call).lower(draw(6, 2, 8))
    else:
      q, k, v = (
        x.astype(dtype) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))
      )
      call = functools.partial(decode_attention, **options)
      program = jax.jit(call).lower(q, k, v, lengths)
    return cpu.TARGET in program.as_text()

  assert taken() and taken("bfloat16") and taken(softcap=1.0, window=3)
  assert taken(sinks=jnp.zeros(2))
  assert not taken("float16") and not taken(dims=(16, 8))
  assert not taken(pages=True) and not taken(backend="xla")
  assert choose(jnp.float32, S)[0] == "cpu" and choose(jnp.float32)[0] == "xla"


def test_results_do_not_depend_on_blocks():
  q, k, v = operands((2, 1), (16, 16))
  x = q, *(y.swapaxes(1, 2) for y in (k, v)), jnp.asarray(LENGTHS)
  call = functools.partial(decode_attention, *x, backend="cpu")
  chex.assert_trees_all_equal(call(blocks=Blocks(1, 4, 3)), call())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(dtype="float16"), "not support float16.*backend='xla'"),
    (dict(dims=(16, 8)), "whole 16s, found 8"),
    (dict(k="bfloat16"), "one dtype, found float32 and bfloat16"),
    (dict(precision="F64_F64_F64"), "not support precision 'F64_F64_F64'"),
  ],
)
def test_unsupported_calls_raise(change, message):
  dtype, dims = change.get("dtype", "float32"), change.get("dims", (16, 16))
  q, k, v = operands((2, 1), dims, dtype)
  k = k.astype(change.get("k", dtype))
  with pytest.raises(ValueError, match=message):
    decode_attention(
      q, k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.asarray(LENGTHS),
      backend="cpu", precision=change.get("precision"),
    )  # fmt: skip


def test_pages_raise():
  with pytest.raises(ValueError, match="caches, no pages"):
    paged_attention(
      draw(6, 2, 8), pool(1, 8, 8), jnp.asarray(tables()), jnp.asarray(LENS),
      backend="cpu",
    )  # fmt: skip


def test_without_a_compiler_xla_decodes(monkeypatch):
  monkeypatch.setattr(cpu_library, "available", lambda library: False)
  q, k, v = operands((2, 1), (16, 16))
  x = q, *(y.swapaxes(1, 2) for y in (k, v)), jnp.asarray(LENGTHS)
  assert choose(jnp.float32, S)[0] == "xla"
  # A separate function: the other one's program is compiled already.
  program = jax.jit(lambda *x: decode_attention(*x)).lower(*x)
  assert cpu.TARGET not in program.as_text()
  with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
    decode_attention(*x, backend="cpu")
