"""Adapters on convolutions: PEFT's numbers, and the laws of other layers."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.interop.peft import conv as peft_conv
from research.lora import adapt, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.method import MatrixSpec
from research.lora.methods import (
  dora,
  hira,
  loha,
  lokr,
  lora,
  mora,
  svd_init,
  vera,
)
from research.nn import conv
from research.quant.quantize import Quantize
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "conv.npz"
METHODS = {
  "lora": lora.LoRA(rank=3, alpha=5.0),
  "rslora": lora.LoRA(rank=3, alpha=5.0, rslora=True),
  "dora": dora.DoRA(rank=3, alpha=5.0),
  "loha": loha.LoHa(rank=3, alpha=5.0),
  "lokr": lokr.LoKr(rank=8, alpha=5.0, window=6),
  "lokr_low": lokr.LoKr(rank=1, alpha=5.0, factor=2, window=6),
}
LAYERS = {
  "any": dict(strides=(2, 1), padding=((1, 1), (2, 2))),
  "patch": dict(strides=(2, 3)),
}
PLACE, WINDOW = MatrixSpec(24, 6), (2, 3)


@functools.cache
def golden():
  with np.load(GOLDEN) as file:
    return dict(file)


def kernel():
  return jnp.asarray(golden()["kernel"].transpose(2, 3, 1, 0))


def tensors(layer, name):
  start = f"{layer}/{name}/tensors/"
  found = golden()
  return {k.removeprefix(start): found[k] for k in found if start in k}


def close(got, want):
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.sample(5)
def test_pefts_tensors_compute_what_they_do_there(layer, name):
  method, theirs = METHODS[name], tensors(layer, name)
  base = conv.kernel_to_matrix(kernel())
  arrays = peft_conv.from_peft(method, theirs, PLACE, WINDOW, base.matrix)
  arrays = jax.tree.map(jnp.asarray, arrays)
  w = conv.ConvTensor(
    AdaptedTensor(base.matrix, *arrays, method=method), WINDOW
  )
  x = jnp.asarray(golden()["x"].transpose(0, 2, 3, 1))
  y = conv.conv(x, w, **LAYERS[layer]) + golden()["bias"]
  close(y.transpose(0, 3, 1, 2), golden()[f"{layer}/{name}/y"])
  merged = wrap.merge({"kernel": w})["kernel"]
  assert isinstance(merged.matrix, jax.Array)
  close(
    merged.dense().transpose(3, 2, 0, 1), golden()[f"{layer}/{name}/merged"]
  )
  again = peft_conv.to_peft(method, w.matrix.arrays, PLACE, WINDOW)
  assert set(again) == set(theirs)
  for key, value in theirs.items():
    np.testing.assert_array_equal(again[key], value)


@pytest.mark.parametrize("name", METHODS)
def test_fresh_ones_have_pefts_shapes(name):
  method = METHODS[name]
  held = conv.AsMatrices()({"patch": {"kernel": kernel()}})
  params = adapt.Adapt(method=method, targets=["matrix"])(
    held, jax.random.key(0)
  )
  arrays = params["patch"]["kernel"].matrix.arrays
  got = peft_conv.to_peft(method, arrays, PLACE, WINDOW)
  want = tensors("any", name)
  shapes = [{k: x.shape for k, x in t.items()} for t in (got, want)]
  assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
  "method",
  [*METHODS.values(), hira.HiRA(rank=2), mora.MoRA(rank=2), vera.VeRA(rank=5)],
  ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.cover(1)
def test_merging_is_the_forward_pass(method, packed):
  module = conv.Conv(6, WINDOW, (1, 2), "SAME")
  x = jnp.asarray(golden()["x"].transpose(0, 2, 3, 1))
  params = {"kernel": kernel(), "bias": jnp.asarray(golden()["bias"])}
  plain = module.apply({"params": params}, x)
  held = conv.AsMatrices()(params)
  if packed:
    w = Quantize().pack(held["kernel"].matrix)
    held = dict(held, kernel=conv.ConvTensor(w, WINDOW))
    plain = module.apply({"params": held}, x)
  adapted = adapt.Adapt(method=method, targets=["matrix"])(
    held, jax.random.key(0)
  )
  close(module.apply({"params": adapted}, x), plain)  # all start at zero
  trained, rest = tree.partition(adapted, wrap.TRAINABLE)
  moved = jax.tree.map(
    lambda a: a + 0.3 * jnp.cos(jnp.arange(a.size)).reshape(a.shape), trained
  )

  @jax.jit
  def loss(trained):
    y = module.apply({"params": tree.combine(trained, rest)}, x)
    return (y**2).mean(), y

  (_, y), slopes = jax.value_and_grad(loss, has_aux=True)(moved)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(slopes))
  merged = wrap.merge(tree.combine(moved, rest))
  close(module.apply({"params": merged}, x), y)
  assert np.abs(y - plain).max() > 0.01


def test_what_is_exported_as_lora_is_here_too():
  held = conv.AsMatrices()({"kernel": kernel()})
  params = adapt.Adapt(method=svd_init.PiSSA(rank=2), targets=["matrix"])(
    held, jax.random.key(0)
  )
  w = params["kernel"].matrix
  got = peft_conv.to_peft(w.method, w.arrays, PLACE, WINDOW)
  assert got["lora_A.weight"].shape == (4, 4, 2, 3)


@pytest.mark.parametrize("name", METHODS)
def test_every_tensor_has_the_shape_of_this_kernel(name):
  theirs = tensors("any", name)

  def read(found, window=WINDOW):
    base = conv.kernel_to_matrix(kernel())
    peft_conv.from_peft(METHODS[name], found, PLACE, window, base.matrix)

  for key, x in theirs.items():
    # As many numbers in another order, fewer, and none.
    turned = x.transpose(1, 0, *range(2, x.ndim))
    for other in (turned, x[..., None], x[:-1], x[:, :-1]):
      if other.shape != x.shape:
        with pytest.raises(UserError, match=rf"{key}: found shape \["):
          read(theirs | {key: other})
    with pytest.raises(UserError, match=f"{key}: found no such tensor"):
      read({k: v for k, v in theirs.items() if k != key})
  with pytest.raises(UserError, match=r"more: .*, expected no such tensor"):
    read(theirs | {"more": np.ones((1, 1))})
  windowed = {k for k, x in theirs.items() if x.shape[2:] == WINDOW}
  if windowed:
    with pytest.raises(UserError, match=r"2, 3\], expected shape .*3, 2\]"):
      read(theirs, WINDOW[::-1])


def test_bad_use():
  with pytest.raises(UserError, match="HiRA: PEFT has no such method on conv"):
    peft_conv.to_peft(hira.HiRA(), {}, PLACE, WINDOW)
  theirs = {"hada_t1": np.ones((3, 3, 2, 3))}
  with pytest.raises(UserError, match="hada_t1: found the factors of use_eff"):
    peft_conv.from_peft(loha.LoHa(), theirs, PLACE, WINDOW, None)
  with pytest.raises(UserError, match="LoKr.window: found 1, expected 6 of a"):
    peft_conv.to_peft(lokr.LoKr(), {}, PLACE, WINDOW)
  with pytest.raises(UserError, match="5 x 1 places do not divide the 24 inp"):
    peft_conv.to_peft(lora.LoRA(), {}, PLACE, (5, 1))
  with pytest.raises(UserError, match="5 does not divide the 24 inputs"):
    lokr.LoKr(window=5).init_arrays(jax.random.key(0), PLACE, None)
