"""Products with packed weights equal those of the decoded ones."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import cpu_library
from kernels_pallas.quantized_matmul import api, cpu
from kernels_pallas.quantized_matmul.cpu import panels
from tests.kernels_pallas.panel_cases import KINDS, case

BACKENDS = ("reference", "xla", "cpu", "auto")


@pytest.fixture(scope="module", autouse=True)
def compiled(cxx):
  """Skips tests that need a compiler where there is none."""
  assert cpu.available(), cxx


def inputs_of(kind, rows, dtype=np.float32):
  rng = np.random.default_rng(rows)
  x = rng.standard_normal((rows, KINDS[kind][2]))
  return jnp.asarray(x, dtype)


def bound(x, w, eps=2.0**-24):
  """Returns the error bound of sums of that many terms in float32.

  Codes are multiplied before scale and offset are: their cancellation adds.
  """
  terms = np.abs(np.float64(x)) @ np.abs(w) + np.abs(np.float64(x)).sum(
    -1, keepdims=True
  ) * np.abs(w).max(0)
  return x.shape[-1] * eps * terms


@pytest.mark.parametrize("rows", [1, 3, 13])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cover(1)
def test_products(kind, backend, rows):
  w, matrix = case(kind)
  x = inputs_of(kind, rows)
  product = jax.jit(functools.partial(api.quantized_matmul, backend=backend))
  got = np.float64(product(x, w))
  assert np.all(np.abs(got - np.float64(x) @ matrix) <= bound(x, matrix))


@pytest.mark.parametrize("kind", ["affine", "int8", "bfloat16"])
def test_hundreds_of_rows(kind):
  w, matrix = case(kind)
  x = inputs_of(kind, 517)
  got = np.float64(jax.jit(api.quantized_matmul)(x, w))
  assert np.all(np.abs(got - np.float64(x) @ matrix) <= bound(x, matrix))


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cover(1)
def test_every_instruction_set(kind, isa):
  w, matrix = case(kind)
  for rows in (1, 2, 8, 21, 130):
    x = inputs_of(kind, rows)
    try:
      got = np.float64(cpu.cpu_matmul(x, w, isa))
    except jax.errors.JaxRuntimeError as error:
      assert "none of that name for this W" in str(error)
      continue
    assert np.all(np.abs(got - np.float64(x) @ matrix) <= bound(x, matrix))


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("kind", ["affine", "bfloat16"])
def test_bfloat16_activations_are_rounded_once(kind, backend):
  w, matrix = case(kind)
  x = inputs_of(kind, 3, jnp.bfloat16)
  got = api.quantized_matmul(x, w, backend=backend)
  assert got.dtype == jnp.bfloat16
  want = np.float64(x) @ matrix
  # XLA multiplies weights that were rounded to bfloat16.
  eps = 2.0**-8 if backend == "xla" else 2.0**-24
  slack = bound(x, matrix, eps) + 2.0**-8 * np.abs(want)
  assert np.all(np.abs(np.float64(got) - want) <= slack)


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("rows", [1, 8, 20])
def test_bfloat16_halves_go_to_even(rows, isa):
  """Sums that are exact in float32 and lie between two bfloat16."""
  rng = np.random.default_rng(rows)
  w = np.stack([1 + rng.integers(0, 127, 37) / 128, np.full(37, 2.0**-8)])
  w = jnp.asarray(w * rng.choice([-1, 1], 37), jnp.bfloat16)
  x = jnp.ones((rows, 2), jnp.bfloat16)
  try:
    got = np.asarray(cpu.cpu_matmul(x, panels.pack(w), isa))
  except jax.errors.JaxRuntimeError as error:
    assert "none of that name for this W" in str(error)
    return
  want = np.asarray(w, np.float32).sum(0).astype(jnp.bfloat16)
  np.testing.assert_array_equal(got, np.tile(want, (rows, 1)))
  assert not np.array_equal(want, np.asarray(w)[0])


@pytest.mark.parametrize("isa", cpu.ISAS)
@pytest.mark.parametrize("rows", [1, 5, 8, 13, 18, 131])
def test_pairs_of_bfloat16_on_every_instruction_set(rows, isa):
  rng = np.random.default_rng(rows)
  w = jnp.asarray(rng.standard_normal((46, 87)), jnp.bfloat16)
  x = jnp.asarray(rng.standard_normal((rows, 46)), jnp.bfloat16)
  try:
    got = np.float64(cpu.cpu_matmul(x, panels.pack(w), isa))
  except jax.errors.JaxRuntimeError as error:
    assert "none of that name for this W" in str(error)
    return
  want = np.float64(x) @ np.float64(w)
  slack = bound(x, np.float64(w)) + 2.0**-8 * np.abs(want)
  assert np.all(np.abs(got - want) <= slack)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["nf4", "int8, affine", "bfloat16"])
def test_the_input_gradient(kind, backend):
  w, matrix = case(kind)
  x = inputs_of(kind, 5)
  dy = jnp.asarray(
    np.random.default_rng(9).standard_normal((5, matrix.shape[1])), np.float32
  )
  f = functools.partial(api.quantized_matmul, backend=backend)
  dx = jax.jit(lambda x, w: jax.vjp(lambda x: f(x, w), x)[1](dy)[0])(x, w)
  want = np.float64(dy) @ matrix.T
  slack = bound(dy, matrix.T)
  assert np.all(np.abs(np.float64(dx) - want) <= slack)


def test_the_backward_pass_saves_only_packed_weights():
  w = panels.pack(np.zeros((256, 512), np.int8), np.ones((8, 512), np.float32))
  x = jnp.ones((3, 256))

  def pull(x, w):
    return jax.vjp(lambda x: api.quantized_matmul(x, w), x)[1]

  kept = sum(part.size * part.dtype.itemsize for part in jax.tree.leaves(
    jax.eval_shape(pull, x, w)
  ))  # fmt: skip
  assert kept <= sum(part.nbytes for part in jax.tree.leaves(w))


def test_large_matrices_are_decoded_in_chunks():
  codes = np.random.default_rng(0).integers(0, 16, (64, 40_000), np.uint8)
  w = panels.pack(codes, np.ones((2, 40_000), np.float16))
  x = jnp.ones((1, 64))
  compiled = jax.jit(
    functools.partial(api.quantized_matmul, backend="xla")
  ).lower(x, w).compile()  # fmt: skip
  # As a whole it would be 10 MB, and its codes several times as much.
  assert compiled.memory_analysis().temp_size_in_bytes < 9 << 20
  np.testing.assert_array_equal(compiled(x, w)[0], codes.sum(0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_values_propagate(value):
  w, _ = case("affine")
  x = inputs_of("affine", 2).at[1, 7].set(value)
  for isa in ("auto", "portable"):
    got = cpu.cpu_matmul(x, w, isa)
    assert np.isfinite(got[0]).all()
    assert not np.isfinite(got[1]).any()


def test_activations_of_any_size():
  w, matrix = case("signed")
  rows = np.array([[1e-38], [1e-20], [1e30]], np.float32)
  x = jnp.asarray(rows) * jnp.ones((3, 100))
  got = np.float64(cpu.cpu_matmul(x, w))
  want = np.float64(x) @ matrix
  # A product below 1e-29 may be lost.
  assert np.all(np.abs(got - want) <= bound(x, matrix) + 1e-29)


def test_batching_and_empty_inputs():
  w, _ = case("affine")
  x = inputs_of("affine", 6)
  apart = jax.vmap(lambda x: api.quantized_matmul(x, w, backend="cpu"))(
    x.reshape(3, 2, -1)
  )
  np.testing.assert_array_equal(
    apart.reshape(6, -1)[:2],
    api.quantized_matmul(x[:2], w, backend="cpu"),
  )
  assert api.quantized_matmul(x[:0], w).shape == (0, 33)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(inputs=95), r"found x \(2, 96\)"),
    (dict(backend="gpu"), "backend: found 'gpu'"),
    (dict(lead=True), "quantized_matmul: found"),
    (dict(x="float16", backend="cpu"), "found float16"),
  ],
)
def test_mismatched_products_raise(change, message):
  w, _ = case("affine")
  x = inputs_of("affine", 2, change.get("x", np.float32))
  if "inputs" in change:
    x = x[:, : change["inputs"]] if change["inputs"] > 96 else x
    w = panels.pack(np.zeros((95, 8), np.int8), np.ones((3, 8), "f4"), group=32)
  if "lead" in change:
    w = jax.tree.map(lambda part: part[None], w)
  with pytest.raises(ValueError, match=message):
    api.quantized_matmul(x, w, backend=change.get("backend", "auto"))


BUFFERS = dict(
  x=((2, 64), "float32"),
  words=((2, 8, 16), "uint32"),
  scale=((2, 2, 16), "float32"),
  offset=((0,), "float32"),
)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(bits=5), "bits"),
    (dict(x=((2, 65), "float32")), "more inputs"),
    (dict(x=((3, 64), "float32")), "number of rows"),
    (dict(x=((2, 64), "int32")), "x: type"),
    (dict(words=((1, 8, 16), "uint32")), "number of outputs"),
    (dict(words=((3, 8, 16), "uint32")), "number of outputs"),
    (dict(words=((2, 8, 8), "uint32")), r"\[P, W, 16\]"),
    (dict(group=24), "group"),
    (dict(group=0), "group"),
    (dict(group=-32), "group"),
    (dict(scale=((2, 1, 16), "float32")), "groups, 16"),
    (dict(scale=((2, 2, 16), "int32")), "no floats"),
    (dict(offset=((2, 2, 15), "float32")), "groups, 16"),
    (dict(codebook=15), "codebook"),
    (dict(isa="mmx"), "isa"),
  ],
)
def test_the_library_checks_every_buffer(change, message):
  buffers = {
    name: jnp.zeros(*change.get(name, default))
    for name, default in BUFFERS.items()
  }
  call = jax.ffi.ffi_call(
    cpu.TARGET, jax.ShapeDtypeStruct((2, 32), jnp.float32)
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match=message):
    call(
      *buffers.values(),
      codebook=np.zeros(change.get("codebook", 16), np.float32),
      bits=np.int64(change.get("bits", 4)),
      group=np.int64(change.get("group", 32)),
      isa=change.get("isa", "auto"),
    )


@pytest.mark.parametrize(
  ("variables", "message"),
  [
    (dict(CXX="no-such-compiler"), "no C.. compiler .looked for no-such"),
    (dict(CXX="false"), "returned non-zero|failed"),
    (dict(PATH=""), "no C.. compiler .looked for c"),
  ],
)
def test_without_a_compiler_xla_computes(
  variables, message, monkeypatch, tmp_path
):
  w, matrix = case("affine")
  x = inputs_of("affine", 2)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("CXX", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  cpu_library.available.cache_clear()
  try:
    with pytest.warns(RuntimeWarning, match=message):
      got = jax.jit(lambda x, w: api.quantized_matmul(x, w))(x, w)
    with warnings.catch_warnings():
      warnings.simplefilter("error")  # the warning was issued once
      again = api.quantized_matmul(x, w)
    with pytest.raises(ValueError, match="needs a C"):
      api.quantized_matmul(x, w, backend="cpu")
  finally:
    cpu_library.available.cache_clear()
  for y in (got, again):
    off = np.abs(np.float64(y) - np.float64(x) @ matrix)
    assert np.all(off <= bound(x, matrix))
