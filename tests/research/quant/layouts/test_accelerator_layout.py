"""Tests the planar layout: the same numbers and the same model."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized_matmul import gpu
from research import sharding, tree, weights
from research.generation import generate
from research.lora.adapted import AdaptedTensor
from research.quant import qtensor
from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.int8 import Int8
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.layouts import accelerator_layout, cpu_layout
from research.quant.quantize import Quantize
from tests import support
from tests.support_lora import adapting

FORMATS = {
  "int4": Affine(block=32),
  "int4 symmetric": Affine(block=64, symmetric=True),
  "int3": Affine(bits=3, block=16),
  "int8": Affine(bits=8, block=32, symmetric=True),
  "int8 asymmetric": Affine(bits=8, block=64),
  "int8 of rows": Int8(),
  "nf4": Codebook(),
  "nvfp4": NVFP4(),
  "mxfp4": Microscaling(),
  "Q4_1": ggml.TYPES["Q4_1"],
  "Q8_0": ggml.TYPES["Q8_0"],
}
every = pytest.mark.parametrize("name", FORMATS)
SIZES = dict(depth=2, width=64, hidden=96, head_dim=16, vocab=64)


def leaf(name, axis=-2, layers=(), ordered=False):
  rng = np.random.default_rng(0)
  w = rng.normal(size=(*layers, 192, 40)).astype(np.float32)
  w = jax.tree.map(jnp.asarray, qtensor.pack(w, FORMATS[name]))
  order = None
  if ordered:
    order = jnp.asarray(np.argsort(rng.normal(size=w.shape[:-1]), -1), "int32")
  return dataclasses.replace(w, axis=axis, order=order)


def close(got, want, eps=2e-6):
  want = np.asarray(want)
  np.testing.assert_allclose(got, want, atol=eps * float(np.ptp(want)))


@pytest.mark.parametrize("gpu", [False, True])
@every
@pytest.mark.cover(1)
@pytest.mark.sample(6)
def test_planes_hold_the_same_numbers(name, gpu):
  w = leaf(name, layers=(2,))
  assert accelerator_layout.is_supported(w) and accelerator_layout.is_supported(
    w, dtype="float32"
  )
  # Each chip has two types of rows, and they share one.
  assert accelerator_layout.is_supported(
    w, gpu=True
  ) and accelerator_layout.is_supported(w, True, "float16")
  assert not accelerator_layout.is_supported(w, gpu=True, dtype="float32")
  assert not accelerator_layout.is_supported(w, dtype="float16")
  got = accelerator_layout.from_qtensor(w, gpu)
  assert (got.shape, got.dtype, got.ndim) == (w.shape, w.dtype, w.ndim)
  close(jax.jit(weights.dense)(got), w.dense())
  # Where there is no padding, codes take as many bits as panels' do.
  assert got.planes.bits == (8 if "8" in name else 4)


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.cover(1)
def test_einsum_and_its_gradient_are_those_of_the_blocks(axis, gpu, ordered):
  w = leaf("int4", axis, ordered=ordered)
  got = accelerator_layout.from_qtensor(w, gpu)
  rng = np.random.default_rng(1)

  def both(w, eq, x):
    y, pull = jax.vjp(lambda x: weights.einsum(eq, x, w), x)
    return y, pull(jnp.sin(y))[0]

  sides = {-2: ("...d,df->...f", 0), -1: ("...d,vd->...v", 1)}
  others = {-2: ("...f,df->...d", 1), -1: ("...v,vd->...d", 0)}
  for eq, n in (sides[axis], others[axis]):
    x = jnp.asarray(rng.normal(size=(2, 3, w.shape[n])), jnp.float32)
    f = jax.jit(functools.partial(both, eq=eq))
    for a, b in zip(f(got, x=x), f(w, x=x), strict=True):
      close(a, b, 1e-5)
  ids = jnp.array([[3, 0], [20, 3]])
  close(weights.take(got, ids), w.dense()[ids])


def test_parts_are_named_after_the_axes_they_cut():
  for axis, names in ((-2, ("in", "out")), (-1, ("out", "in"))):
    named = weights.axes(
      accelerator_layout.from_qtensor(leaf("int4", axis)), names
    )
    assert named.planes.codes == named.planes.scale == ("in", "out")


@pytest.mark.slow
def test_unsupported_matrices():
  w = np.random.default_rng(0).normal(size=(192, 40)).astype(np.float32)
  for format in (FP8(), Affine(block=8), Affine(block=96), Codebook(block=512)):
    assert not accelerator_layout.is_supported(qtensor.pack(w, format)), (
      format.name
    )
  w = leaf("int4")
  rows, values = jnp.zeros(1, jnp.int32), jnp.zeros((1, 40))
  outliers = {"rows": rows, "values": values}
  assert not accelerator_layout.is_supported(
    dataclasses.replace(w, outliers=outliers)
  )


def packed():
  model = support.model(tied=True, **SIZES)
  params = Quantize(format=Affine(block=32))(support.params(model))
  return model, params


def logits(model, params, tokens):
  def read(params):
    hidden, _ = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, hidden, method="logits")

  return jax.jit(read)(params)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.sample(2, 1)
def test_a_packed_model_is_the_same_in_planes(gpu):
  model, params = packed()
  params = adapting(rank=2, targets=("q",))(params, jax.random.key(0))
  # The types kernels take; here the sums are XLA's, in the model's float32.
  dtype = "bfloat16" if gpu else "float32"
  got = accelerator_layout.to_planes(params, gpu=gpu, dtype=dtype)
  assert tree.run_length(got["run0"]) == 1
  attention = got["run0"]["layer0"]["attention"]
  assert isinstance(attention["q"], AdaptedTensor)
  assert isinstance(attention["q"].w, accelerator_layout.PlanarTensor)
  assert got["embed"] is params["embed"]
  tokens = support.tokens(vocab=64)
  close(logits(model, got, tokens), logits(model, params, tokens), 1e-5)
  prompts = [[3, 5, 7], [11]]
  want = generate.generate(model, params, prompts, 4)
  assert generate.generate(model, got, prompts, 4) == want


def test_for_decoding_selects_the_layout(monkeypatch):
  _, params = packed()
  monkeypatch.setattr(accelerator_layout, "has_kernel", lambda: True)
  up = cpu_layout.for_decoding(params)["run0"]["layer0"]["mlp"]["up"]
  assert isinstance(up, accelerator_layout.PlanarTensor)
  mesh = sharding.Layout(data=1, fsdp=2, tensor=2).mesh()
  with jax.set_mesh(mesh):
    many = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
  assert cpu_layout.for_decoding(many) is many


def test_for_decoding_leaves_unsupported_matrices(monkeypatch):
  """On GPUs, whose kernels do not support float32, generate's default."""
  model, params = packed()
  monkeypatch.setattr(accelerator_layout, "has_kernel", lambda: True)
  plain = support.params(model)
  assert cpu_layout.for_decoding(plain) is plain
  monkeypatch.setattr(gpu.support, "is_for", lambda *_: True)
  with pytest.warns(RuntimeWarning, match="GPUs.* int4-asym-g32 in float32;"):
    assert cpu_layout.for_decoding(params, "float32") is params
  for dtype in ("bfloat16", "float16"):
    up = cpu_layout.for_decoding(params, dtype)["run0"]["layer0"]["mlp"]["up"]
    assert isinstance(up, accelerator_layout.PlanarTensor)


@pytest.mark.parametrize("gpu", [False, True])
def test_a_warning_names_unsupported_formats(gpu):
  model = support.model(tied=True, **SIZES)
  params = Quantize(format=FP8())(support.params(model))
  with pytest.warns(RuntimeWarning, match=f"planes: .*{FP8().name};"):
    assert (
      accelerator_layout.to_planes(params, gpu=gpu, dtype="bfloat16") is params
    )
  # What does fit is not said, and becomes planes beside the rest.
  layer = params["run0"]["layer0"]
  layer["mlp"] = packed()[1]["run0"]["layer0"]["mlp"]
  with pytest.warns(RuntimeWarning) as told:
    got = accelerator_layout.to_planes(params, gpu=gpu, dtype="bfloat16")
  assert len(told) == 1 and "int4" not in str(told[0].message)
  layer = got["run1"]["layer0"]
  assert isinstance(layer["mlp"]["up"], accelerator_layout.PlanarTensor)
  assert isinstance(layer["attention"]["q"], qtensor.QTensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted(Affine):
  """A symmetric grid whose zero is any number."""

  middle: float = 100.0


@pytest.mark.parametrize("bits, middle", [(8, 100.0), (8, 127.5), (6, 31.5)])
def test_any_zero_of_8_bits_is_supported(bits, middle):
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(192, 40)), jnp.float32)
  format = Shifted(bits=bits, symmetric=True, block=32, middle=middle)
  w = qtensor.pack(w, format)
  assert w.normal_form().zero == middle
  assert (
    accelerator_layout.is_supported(w, gpu=True)
    and accelerator_layout.is_supported(w)
    and cpu_layout.is_supported(w)
  )
  close(accelerator_layout.from_qtensor(w).dense(), w.dense())
  close(cpu_layout.from_qtensor(w).dense(), w.dense())


@pytest.mark.parametrize("tokens", [1, 200])
@pytest.mark.sample(2)
def test_products_go_to_the_kernels(tokens):
  """Each of a layer's seven in a program for a TPU: of few rows, of many."""
  model, params = packed()

  def kernels(params, platform):
    def read(params):
      ids = jnp.zeros((1, tokens), jnp.int32)
      return model.apply({"params": params}, ids)[0]

    traced = jax.jit(read).trace(params)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return re.findall(r'kernel_name = "(quantized_matmul\w*)"', text)

  got = accelerator_layout.to_planes(params, gpu=False)
  which = "quantized_matmul_few" if tokens == 1 else "quantized_matmul_many"
  assert kernels(got, "tpu") == 7 * SIZES["depth"] * [which]
  assert not kernels(got, "cpu") and not kernels(params, "tpu")
