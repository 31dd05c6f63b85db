"""Compiles a float32 product for tensor cores of GPUs that are not present.

    .venv-chips/bin/python -m tests.kernels_pallas.chips_float32_gpu

prints the outcome. `--job=CHIP` is one compilation, in a child process, because
Mosaic GPU reads from the environment where to dump.
"""

import argparse
import pathlib
import re
import sys
import tempfile

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.inspect import gpu

M, N, K = 128, 64, 32


def operands(target: str) -> str:
  """Returns the operand type of the chip's product, from its PTX.

  Raises:
    ValueError: The compiler rejects it; contains the compiler's message.
  """
  with tempfile.TemporaryDirectory() as scratch:
    folder = pathlib.Path(scratch)
    gpu.compiled(
      ["tests.kernels_pallas.chips_float32_gpu", "--job", target], folder
    )
    (dump,) = folder.glob("*.ptx")
    (found,) = set(
      re.findall(
        r"(?:wgmma\.mma_async\S*f32|tcgen05\.mma\S*kind::)\.?(tf32)",
        dump.read_text(),
      )
    )
    return found


def _warps(a, b, o):
  left = plgpu.load(a, layout=plgpu.Layout.MMA_LHS(a.dtype))
  right = plgpu.load(b.transpose((1, 0)), layout=plgpu.Layout.MMA_RHS(b.dtype))
  zeros = plgpu.layout_cast(jnp.zeros((M, N)), plgpu.Layout.WGMMA)
  o[...] = plgpu.mma(zeros, left, right)


def _hopper(a, b, o):
  def run(acc):
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    return acc[...]

  o[...] = pl.run_scoped(run, plgpu.ACC((M, N), jnp.float32))


def _blackwell(a, b, o):
  def run(acc, barrier):
    plgpu.tcgen05_mma(acc, a, b.transpose((1, 0)), barrier, accumulate=False)
    plgpu.barrier_wait(barrier)
    o[...] = plgpu.async_load_tmem(acc)
    plgpu.wait_load_tmem()

  pl.run_scoped(
    run,
    plgpu.TMEM((M, N), jnp.float32),
    plgpu.Barrier(orders_tensor_core=True),
  )


PRODUCTS = {"mma": _warps, "wgmma": _hopper, "tcgen05": _blackwell}
"""Products by the instruction that `gpu.TARGETS` names."""


def compile_here(target: str) -> None:
  """Compiles the product in this process."""
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  device = gpu.devices(target)[0]
  whole = NamedSharding(Mesh([device], ("x",)), PartitionSpec())
  swizzled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))

  call = plgpu.kernel(
    lambda a, b, o, *smem: _run(PRODUCTS[gpu.TARGETS[target]], a, b, o, smem),
    out_type=jax.ShapeDtypeStruct((M, N), jnp.float32),
    scratch_types=[
      plgpu.SMEM((M, K), jnp.float32, transforms=swizzled),
      plgpu.SMEM((N, K), jnp.float32, transforms=swizzled),
    ],
    kernel_name="product_in_float32",
  )
  a, b = (
    jax.ShapeDtypeStruct((n, K), jnp.float32, sharding=whole) for n in (M, N)
  )
  with jax.default_device(device):
    jax.jit(call).lower(a, b).compile()


def _run(product, a, b, o, smem):
  # The contents of the operands do not matter.
  del a, b
  product(*smem, o)


def main() -> int:
  """Prints each chip's result, or compiles a job."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--job", choices=gpu.TARGETS)
  job = parser.parse_args().job
  if job:
    compile_here(job)
    return 0
  if problem := gpu.missing():
    print(problem, file=sys.stderr)
    return 1
  for target in gpu.TARGETS:
    try:
      print(f"{target}: operands are {operands(target)}", flush=True)
    except ValueError as refusal:
      print(f"{target}: {refusal}", flush=True)
  return 0


if __name__ == "__main__":
  sys.exit(main())
