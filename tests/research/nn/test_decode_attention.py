"""A decoding step by the decode kernel equals plain attention."""

import contextlib
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import jaxpr_as_fun

from kernels_pallas.common import target_platform
from kernels_pallas.decode_attention import cpu
from kernels_pallas.masks import Mask
from research import sharding
from research.nn import attention_context, decode_attention, presets
from research.nn import cache as caches
from research.nn import transformer as transformers

SIZES = presets.Sizes(
  vocab=61,
  width=16,
  depth=2,
  heads=4,
  kv_heads=2,
  hidden=24,
  head_dim=8,
  window=16,
)
SLOTS = 16


@contextlib.contextmanager
def programs_for(kind, platform, tensor=1):
  """Programs choose their kernels as if they were compiled for such chips."""
  device = jax.sharding.AbstractDevice(kind, None, platform=platform)
  axes, auto = ("data", "tensor"), (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.sharding.AbstractMesh(
    (1, tensor), axes, auto, abstract_device=device
  )
  with jax.sharding.use_abstract_mesh(mesh):
    yield


programs_for_a_tpu = functools.partial(programs_for, "TPU v5 lite", "tpu")


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
  "backend",
  [
    {"backend": "xla"},
    {"backend": "cpu"},
    {"backend": "mosaic_tpu", "interpret": True},
  ],
  ids=lambda x: x["backend"],
)
@pytest.mark.parametrize(("softcap", "heads"), [(None, (6, 3)), (2.0, (4, 2))])
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_a_step_is_attention_with_one_query(backend, softcap, heads):
  """Rows that are short, full, in a wrapped ring buffer, and padding."""
  if backend["backend"] == "cpu" and not cpu.available():
    pytest.skip("no C++ kernel can be compiled here")
  positions = jnp.array([[2], [SLOTS - 1], [37], [-1]])
  N, K = heads
  size = (4, SLOTS, K, 16)
  q, k, v = draw(4, 1, N, 16), draw(*size), draw(*size, seed=1)
  held = caches.slot_positions(positions[:, 0] + 1, SLOTS)
  mask = attention_context.with_positions(
    Mask.causal((SLOTS - 1, None)), positions, held
  )
  options = {"scale": 0.5, "softcap": softcap}
  want = attention_context.attend(q, k, v, mask=mask, **options)
  got = decode_attention.attend_one(q, k, v, positions, **options, **backend)
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)
  assert not np.any(got[3])


@pytest.mark.slow
def test_keys_that_no_row_has_do_not_matter():
  positions = jnp.array([[2], [9]])
  q, k, v = draw(2, 1, 4, 8), draw(2, SLOTS, 2, 8), draw(2, SLOTS, 2, 8, seed=1)
  beyond = (jnp.arange(SLOTS) > positions)[..., None, None]
  run = functools.partial(decode_attention.attend_one, q, positions=positions)
  chex.assert_trees_all_equal(
    run(jnp.where(beyond, jnp.nan, k), jnp.where(beyond, jnp.nan, v)),
    run(k, v),
  )


@pytest.mark.parametrize(
  ("mask", "slots", "dtype", "expected"),
  [
    (Mask.causal(), 32, "float32", True),
    (Mask.causal((31, None)), 32, "bfloat16", True),
    (Mask.causal((30, None)), 32, "float32", False),  # slots out of sight
    (Mask.causal(segments=jnp.zeros((2, 1), jnp.int32)), 32, "float32", False),
    (Mask.full(), 32, "float32", False),
    (Mask.block_causal(4), 32, "float32", False),
    (Mask.causal(), 20, "float32", False),  # not whole registers
    (Mask.causal(), 32, "float16", False),
  ],
)
def test_which_steps_have_a_kernel(mask, slots, dtype, expected):
  q, k = jnp.zeros((2, 1, 4, 8), dtype), jnp.zeros((2, slots, 2, 8), dtype)
  assert not decode_attention.has_kernel(q, k, mask)
  with programs_for_a_tpu():
    assert decode_attention.has_kernel(q, k, mask) == expected


@pytest.mark.parametrize(
  ("mask", "slots", "dtype", "head_dim", "expected"),
  [
    (Mask.causal(), 20, "float32", 16, True),
    (Mask.causal((19, None)), 20, "bfloat16", 80, True),
    (Mask.causal((18, None)), 20, "float32", 16, False),
    (Mask.full(), 20, "float32", 16, False),
    (Mask.causal(), 20, "float16", 16, False),
    (Mask.causal(), 20, "float32", 8, False),  # not whole vectors
  ],
)
def test_which_steps_have_a_kernel_on_a_cpu(
  mask, slots, dtype, head_dim, expected
):
  q = jnp.zeros((2, 1, 4, head_dim), dtype)
  k = jnp.zeros((2, slots, 2, head_dim), dtype)
  assert decode_attention.has_kernel(q, k, mask) == (
    expected and cpu.available()
  )


@pytest.mark.parametrize(
  ("head_dim", "held", "expected"),
  [
    (64, "bfloat16", True),
    (256, "bfloat16", True),
    (80, "bfloat16", False),
    (8, "bfloat16", False),
    (64, "float32", False),
  ],
)
def test_a_gpus_step_has_a_kernel_where_decoding_takes_it(
  head_dim, held, expected
):
  """Else the step is attention with one query, not decoding by plain lax."""
  expected = expected and target_platform.NO_GPU_KERNELS is None
  q = jnp.zeros((2, 1, 4, head_dim), "bfloat16")
  k = jnp.zeros((2, 24, 2, head_dim), held)
  positions = jnp.array([[3], [23]])

  def step(q, k):
    # A new function each time: what is traced depends on the mesh.
    return decode_attention.attend_one(q, k, k, positions)

  with programs_for("NVIDIA H100 80GB HBM3", "gpu"):
    assert decode_attention.has_kernel(q, k, Mask.causal()) == expected
    taken = "decode_attention_mma" in str(jax.make_jaxpr(step)(q, k))
  assert taken == expected


def test_heads_are_cut_where_key_heads_can_be():
  q, k = jnp.zeros((2, 1, 8, 8)), jnp.zeros((2, SLOTS, 2, 8))
  for devices, expected in ((2, True), (4, False)):
    with programs_for_a_tpu(devices):
      assert decode_attention.has_kernel(q, k, Mask.causal()) == expected


def test_a_mesh_computes_the_same():
  positions = jnp.array([[2], [15], [37], [-1]])
  x = draw(4, 1, 4, 8), draw(4, SLOTS, 2, 8), draw(4, SLOTS, 2, 8, seed=1)
  run = jax.jit(functools.partial(decode_attention.attend_one, backend="xla"))
  want = run(*x, positions)
  with jax.set_mesh(sharding.Layout(data=2, fsdp=2, tensor=2).mesh()):
    compiled = run.lower(*x, positions).compile()
  got = compiled(*x, positions)
  assert not re.search(r"all-(gather|reduce)", compiled.as_text())
  chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-6)


@functools.cache
def case(family):
  model = presets.transformer(presets.FAMILIES[family], SIZES)
  tokens = jax.random.randint(jax.random.key(3), (2, 21), 0, SIZES.vocab)
  params = jax.jit(model.init)(jax.random.key(1), tokens[:, :2])["params"]
  return model, params, tokens


def _step(model, params, token, cache):
  hidden, cache = model.apply({"params": params}, token, cache=cache)
  return model.apply({"params": params}, hidden, method="logits"), cache


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.sample(2)
def test_programs_for_a_tpu_decode_by_the_kernel(family):
  """Each layer that a program has, once in a scan; a prefill has none."""
  model, params, tokens = case(family)
  cache = transformers.init_cache(model, params, 2, 32)

  def kernels(n, cache):
    traced = jax.jit(_step, static_argnums=0).trace(
      model, params, tokens[:, :n], cache
    )
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    return text.count('kernel_name = "decode_attention"')

  grown = jax.eval_shape(
    functools.partial(_step, model), params, tokens[:, :5], cache
  )[1]
  with programs_for_a_tpu():
    assert kernels(5, cache) == 0
    assert kernels(1, grown) == {"llama": 1, "gemma2": 2}[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.sample(2, 1)
def test_the_model_says_the_same_by_the_kernel(family):
  """After a prefill of 14, through a ring of 16 that goes round."""
  model, params, tokens = case(family)
  cache = transformers.init_cache(model, params, 2, 32)

  def run(params, tokens, cache):
    lengths = jnp.array([14, 9])
    hidden, cache = model.apply(
      {"params": params}, tokens[:, :14], cache=cache, lengths=lengths
    )

    def one(cache, token):
      logits, cache = _step(model, params, token[:, None], cache)
      return cache, logits

    return jax.lax.scan(one, cache, tokens[:, 14:].T)[1]

  want = jax.jit(run)(params, tokens, cache)
  with programs_for_a_tpu(), pltpu.force_tpu_interpret_mode():
    traced = jax.make_jaxpr(run)(params, tokens, cache)
  assert "name=decode_attention" in str(traced)
  arguments = jax.tree.leaves((params, tokens, cache))
  (got,) = jax.jit(jaxpr_as_fun(traced))(*arguments)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
