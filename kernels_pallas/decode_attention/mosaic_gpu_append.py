"""Appending to pages on a GPU, in place: rows and their scales in one kernel.

A block of threads moves a token of a head. `auto` leaves it to XLA's scatter,
which on a GPU is in place, too, and rounds and finds its places by itself: one
kernel for 16 bits and 4 for codes, where this one and what feeds it are 3 and
5, by the compiler for an H100.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas import gpu_memory, lowering

THREADS = 128
CHUNK = 16
"""The most bytes that a thread moves at a time."""


def refused(dtype: Any, width: int) -> str | None:
  """Why the kernel cannot write such pages, or None.

  Args:
    dtype: Of the pages.
    width: H + Hv.
  """
  if lowering.NO_GPU_KERNELS is not None:
    return lowering.NO_GPU_KERNELS
  if jnp.dtype(dtype).itemsize > 2:  # noqa: PLR2004
    return f"GPU kernels write pages of 8 or 16 bits, found {dtype}"
  if width % THREADS:
    return f"found {width} numbers a token, expected a multiple of {THREADS}"
  return None


def mosaic_gpu_append(
  held: Shaped[Array, "pages K size W"],
  scale: Float[Array, "pages 2 K size"] | None,
  new: Shaped[Array, "T K W"],
  new_scale: Float[Array, "2 T K"] | None,
  places: tuple[Int[Array, " T"], Int[Array, " T"]],
  interpret: Any = None,
) -> tuple[Array, Array | None]:
  """`held` and `scale` with new tokens in their places.

  Args:
    held: Pages.
    scale: Of the pages, if they are quantized.
    new: Tokens, in the dtype of the pages.
    new_scale: Of keys and of values.
    places: Pages and slots of the tokens; a page that there is not is nowhere.
    interpret: None or False to compile, or a `plgpu.InterpretGPUParams`.
  """
  T, K, W = new.shape
  if not T:
    return held, scale
  arrays = {"places": jnp.stack(places).astype(jnp.int32), "new": new}
  into = {"held": jax.new_ref(held)}
  if scale is not None:
    arrays["new_scale"], into["scale"] = new_scale, jax.new_ref(scale)
  # Thread by thread of neighbouring numbers: as many as a row leaves each.
  each = math.gcd(W // THREADS, CHUNK // held.dtype.itemsize)
  plgpu.kernel(
    functools.partial(_kernel, held.shape[0], each),
    out_type=(),
    grid=(K, T),
    grid_names=("head", "token"),
    interpret=interpret or False,
    kernel_name="append_to_pages",
  )(arrays, into)
  found = {name: ref[...] for name, ref in into.items()}
  return found["held"], found.get("scale")


def _kernel(pages, each, arrays, into):
  h, t = lax.axis_index("head"), lax.axis_index("token")
  page, slot = (arrays["places"][n, t] for n in (0, 1))

  @pl.when((page >= 0) & (page < pages))
  def _write():
    new, held = arrays["new"].at[t, h], into["held"].at[page, h, slot]
    layout = plgpu.Layout.WG_STRIDED(held.shape, each)
    row = plgpu.load(new, layout=layout, optimized=False)
    gpu_memory.store(held, row)
    if "scale" in into:
      for n in (0, 1):
        into["scale"][page, n, h, slot] = arrays["new_scale"][n, t, h]
