"""'auto': resolved by the platform that a program is lowered for, at no cost.

The expected results are those of `xla_blockwise`, called by name: 'auto' on a
CPU has to agree with it under every transformation.
"""

import collections
import functools
import logging
import re
import types
from contextlib import nullcontext

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.common import target_platform
from kernels_pallas.common.by_platform import by_platform
from kernels_pallas.flash_attention import dispatch
from kernels_pallas.flash_attention.api import choose, flash_attention
from kernels_pallas.flash_attention.gpu.tile_sizes import GpuTiles
from kernels_pallas.flash_attention.spec import Blocks, Operands, Spec
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from research.nn import flops
from tests.support_gpu import needs_kernels

T, H = 128, 8
KERNELS = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}


def shapes(dtype=jnp.bfloat16, T=T, H=64, K=2):
  q = jax.ShapeDtypeStruct((1, T, 2, H), dtype)
  return q, q.update(shape=(1, T, K, H)), q.update(shape=(1, T, K, H))


def draw(*shape, seed=0, dtype=np.float32):
  return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype)


def qkv(dtype=np.float32):
  keys = [draw(2, T, 1, H, seed=seed, dtype=dtype) for seed in (1, 2)]
  return [jnp.asarray(x) for x in (draw(2, T, 2, H, dtype=dtype), *keys)]


def calls(f, platform, *args):
  """Names of custom calls in the program for `platform`, lowered here."""
  low = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,))
  return set(re.findall(r"custom_call @(\w+)", low.as_text()))


def loss(*args, backend="auto", **more):
  o = flash_attention(*args, backend=backend, **more)
  return jnp.sum(jnp.sin(o.astype(jnp.float32)))


causal = functools.partial(loss, causal=True)


def same(make, *args, rtol=1e-6):
  """Compares `make(loss)` of 'auto' with xla_blockwise on this CPU."""
  ours, theirs = (
    jax.jit(make(functools.partial(loss, backend=name)))(*args)
    for name in ("auto", "xla_blockwise")
  )
  # The same operations, fused differently by XLA, or the C++ kernel's.
  chex.assert_trees_all_close(ours, theirs, rtol=rtol, atol=rtol)


@needs_kernels
@pytest.mark.parametrize("platform", KERNELS)
def test_a_cpu_lowers_the_kernels_of_other_platforms(platform):
  for f in (causal, jax.grad(causal, (0, 1, 2))):
    assert calls(f, platform, *shapes()) == {KERNELS[platform]}
    assert not calls(f, "cpu", *shapes()) & set(KERNELS.values())
  assert not calls(functools.partial(causal, config=Blocks()), platform,
                   *shapes())  # fmt: skip


def test_a_cpu_traces_no_kernel_and_compiles_none():
  f = functools.partial(causal, softcap=2.0)  # the C++ kernel has none
  gradient = jax.grad(f, (0, 1, 2))
  assert "pallas" not in str(jax.make_jaxpr(gradient)(*shapes()))

  def compiled(name):
    one = jax.grad(functools.partial(f, backend=name), (0, 1, 2))
    text = jax.jit(one).lower(*shapes()).compile().as_text()
    return collections.Counter(re.findall(r" = \S+ ([\w-]+)\(", text))

  ours = compiled("auto")
  assert ours == compiled("xla_blockwise") and ours["dot"] >= 7


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_one_export_serves_all_platforms(dtype):
  """A CPU's contains no call of this machine's C++ library."""
  exported = jax.export.export(jax.jit(causal), platforms=("cpu", "tpu"))
  whole = exported(*shapes(dtype))
  assert whole.platforms == ("cpu", "tpu")
  assert "tpu_custom_call" in whole.mlir_module()
  args = [jnp.asarray(draw(*x.shape), x.dtype) for x in shapes(dtype)]
  chex.assert_trees_all_close(whole.call(*args), causal(*args), rtol=1e-2)


EVERY_OTHER = Mask.where(lambda q, k: (q - k) % 2 == 0)


@needs_kernels
@pytest.mark.parametrize(
  "platform, why, args, more",
  [
    ("tpu", "float16", shapes(jnp.float16), {}),
    ("tpu", "pad T to 128", shapes(T=64), {}),
    ("cuda", "dtype", shapes(jnp.float32), {}),
    ("cuda", "pad T to 64", shapes(T=63), {}),
    ("cuda", "bias", shapes(), {"bias": jnp.zeros((T, T))}),
    ("cuda", "precision", shapes(), {"precision": "highest"}),
    ("cuda", "up to 256, found 320", shapes(H=320), {}),
    ("tpu", "more than 8 intervals", shapes(), {"mask": EVERY_OTHER}),
    ("cuda", "more than 8 intervals", shapes(), {"mask": EVERY_OTHER}),
  ],
)
def test_unsupported_calls_are_lowered_as_xla_blockwise(
  platform, why, args, more, caplog
):
  target_platform.log_choice.cache_clear()
  with caplog.at_level(logging.INFO, "kernels_pallas"):
    assert not calls(functools.partial(loss, **more), platform, *args)
  assert f"xla_blockwise on {platform}" in caplog.text and why in caplog.text


def test_reasons_are_logged_once_and_only_at_info(caplog):
  target_platform.log_choice.cache_clear()
  with caplog.at_level(logging.WARNING, "kernels_pallas"):
    calls(loss, "cpu", *shapes())
  assert not caplog.records
  target_platform.log_choice.cache_clear()
  with caplog.at_level(logging.INFO, "kernels_pallas"):
    for platform in ("cpu", "tpu", "tpu"):
      calls(jax.grad(loss), platform, *shapes())
  assert [record.getMessage() for record in caplog.records] == [
    "attention: auto is cpu on cpu: the program is for a CPU",
    "attention: auto is mosaic_tpu on tpu: the program is for a TPU",
  ]


def test_sizes_are_those_of_the_backend_taken():
  tiles = Tiles(Tile(128, 128, 128, 128))
  chex.assert_trees_all_close(loss(*qkv(), config=tiles), loss(*qkv()))
  with pytest.raises(ValueError, match="multiples of 128"):
    small = Tiles(Tile(64, 64, 64, 64))
    calls(functools.partial(loss, config=small), "tpu", *shapes())
  few = GpuTiles()
  assert calls(functools.partial(loss, config=few), "tpu", *shapes())


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("config", ["nonsense", 128, Tile(), Blocks])
def test_an_unknown_config_type_raises(config, mesh):
  """Also where types are not checked, as in users' calls."""
  device = jax.sharding.AbstractDevice("TPU v5", None, platform="tpu")
  known = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  context = jax.sharding.use_abstract_mesh(known) if mesh else nullcontext()
  x = Operands(*shapes(), Mask.causal())
  with context, pytest.raises(ValueError, match="config: found .* GpuTiles"):
    dispatch.resolve_auto(x, config, Spec(scale=1.0))


@needs_kernels
def test_the_gpu_kind_is_the_local_one_else_hopper(monkeypatch):
  q, k, v = shapes()

  def cores():
    x = Operands(q, k, v, Mask.causal())
    _, sizes = dispatch.resolve_auto(x, None, Spec(scale=1.0))
    return dict(sizes.kernels)["cuda"].cores

  assert cores() == "wgmma" and "none is here" in target_platform.device_kind(
    "cuda"
  )
  a100 = types.SimpleNamespace(device_kind="NVIDIA A100-SXM4-80GB")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "devices", lambda: [a100])
  assert cores() == "mma"
  if target_platform.NO_TCGEN05 is None:
    a100.device_kind = "NVIDIA B200"
    assert cores() == "tcgen05"
  a100.device_kind = "NVIDIA GeForce RTX 5090"
  with pytest.raises(KeyError, match="cuda"):
    cores()


@needs_kernels
def test_auto_takes_the_kernel_of_supported_gpus():
  q = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)

  def chosen(kind, q=q, **more):
    device = jax.sharding.AbstractDevice(kind, None, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
      (1,), ("data",), abstract_device=device
    )  # fmt: skip
    found = []
    with jax.sharding.use_abstract_mesh(mesh):
      jax.eval_shape(lambda q: found.append(choose(q, **more)) or q, q)
    return found[0]

  assert chosen("NVIDIA H100 80GB HBM3")[0] == "mosaic_gpu"
  for kind in ("NVIDIA A100-SXM4-80GB", "NVIDIA L4", "NVIDIA GeForce RTX 4090"):
    name, why = chosen(kind)
    assert name == "mosaic_gpu" and kind in why
  if target_platform.NO_TCGEN05 is None:
    assert chosen("NVIDIA B200")[0] == chosen("NVIDIA GB300")[0] == "mosaic_gpu"
  few = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.bfloat16)
  for name, why in (
    (chosen("NVIDIA GeForce RTX 5090"), "Hopper"),
    (chosen("NVIDIA H100", q.update(dtype=jnp.float32)), "dtype"),
    (chosen("NVIDIA H100", few), "pad T to 64"),
    (chosen("NVIDIA H100", bias=jnp.zeros((1, 1, 1, 1))), "bias"),
  ):
    assert name[0] == "xla_blockwise" and why in name[1]


TRANSFORMS = {
  "grad": lambda f: jax.grad(f, (0, 1, 2)),
  "twice": lambda f: jax.grad(
    lambda *x: sum(map(jnp.vdot, jax.grad(f, (0, 1, 2))(*x), x)), (0, 1, 2)
  ),
  "forward over reverse": lambda f: (
    lambda *x: jax.jvp(jax.grad(f, (0, 1, 2)), x, x)[1]
  ),
  "jacobian": lambda f: jax.jacrev(lambda q, k, v: f(q, k, v)),
  "vmap": lambda f: jax.vmap(
    jax.grad(lambda q, k, v: f(q[None], k[None], v[None]), (0, 1, 2))
  ),
  "vmap of some": lambda f: jax.vmap(
    lambda q, k, v: f(q[None], k, v), (0, None, None)
  ),
  "checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2)),
  "scan": lambda f: (
    lambda *x: jax.lax.scan(lambda c, _: (c + f(*x), None), 0.0, length=2)[0]
  ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.sample(3)
def test_transformations_agree_with_xla_blockwise(name):
  x = qkv()
  if name == "vmap of some":
    x[1:] = (y[:1] for y in x[1:])
  same(TRANSFORMS[name], *x, rtol=1e-5)


ARGUMENTS = {
  "float64": {},
  "segments": {"segment_ids": jnp.arange(2 * T).reshape(2, T) // 40},
  "positions": {"mask": Mask.causal(q_positions=jnp.arange(T)[None])},
  "sinks": {"sinks": jnp.asarray(draw(2))},
  "bias": {"bias": jnp.asarray(draw(T, T))},
  "dropout": {"dropout_rate": 0.5, "dropout_seed": 3},
  "soft cap": {"softcap": 2.0, "window": (9, 3)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.sample(3)
def test_every_argument_agrees_with_xla_blockwise(name):
  with jax.enable_x64(name == "float64"):
    x = qkv(np.float64 if name == "float64" else np.float32)
    bound = lambda f: functools.partial(f, **ARGUMENTS[name])  # noqa: E731
    same(lambda f: jax.grad(bound(f), (0, 1, 2)), *x)
    if name in ("positions", "segments"):
      twice = TRANSFORMS["twice"]
      same(lambda f: twice(bound(f)), *x, rtol=1e-5)


@pytest.mark.slow
def test_without_jit_results_are_the_same():
  x = qkv()
  value = jax.grad(causal, (0, 1, 2))(*x)
  theirs = jax.grad(functools.partial(causal, backend="xla_blockwise"),
                    (0, 1, 2))(*x)  # fmt: skip
  chex.assert_trees_all_close(value, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("checked", [True, False])
def test_inside_a_shard_map_without_devices(checked):
  """An abstract mesh has no platform, but types vary over it all the same."""
  mesh = jax.sharding.AbstractMesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  cut = jax.sharding.PartitionSpec("data")

  def f(q, k, v):
    o = jax.shard_map(
      functools.partial(flash_attention, causal=True),
      mesh=mesh, in_specs=(cut,) * 3, out_specs=cut, check_vma=checked,
    )(q, k, v)  # fmt: skip
    return jnp.sum(o.astype(jnp.float32) ** 2)

  args = [x.update(shape=(2, *x.shape[1:])) for x in shapes()]
  for platform, kernel in KERNELS.items():
    assert kernel in calls(jax.grad(f, (0, 1, 2)), platform, *args)


def test_a_checkpoint_saves_named_residuals():
  def products(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    f = jax.grad(jax.checkpoint(causal, policy=policy), (0, 1, 2))
    return str(jax.make_jaxpr(f)(*shapes())).count("by_platform[")

  assert products("attn_out", "attn_lse") == 2  # forward, backward
  assert products() == 3  # and forward again


def test_flops_are_those_of_the_default():
  x = shapes(jnp.float32)
  both = [
    flops.count_flops(jax.grad(functools.partial(causal, backend=name)), *x)
    for name in ("auto", "xla_blockwise")
  ]
  assert both[0] == both[1] > 0


def test_a_platform_runs_its_own_function():
  """`by_platform` itself runs the implementation of this platform."""
  x = jnp.arange(3.0)

  def f(x):
    return by_platform(jnp.sin, {"cpu": jnp.cos, "tpu": jnp.tan}, x)

  for g in (f, jax.jit(f), jax.vmap(f), jax.jit(jax.vmap(f))):
    chex.assert_trees_all_close(g(x), jnp.cos(x), rtol=1e-6)
  for platform, name in (("cpu", "cosine"), ("tpu", "tan"), ("cuda", "sine")):
    low = jax.jit(f).trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"stablehlo.(\w+) %", low) == [name]
