"""Planar weight layout for the quantized matmul kernels of TPUs and GPUs.

`kernels_pallas.quantized_matmul.planar` orders codes as registers decode them,
so that the kernel reads packed bits only. `to_planes` converts a tree once,
before generation, with separate arrays per layer. `cpu_layout` does the same
for CPUs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.gpu import support as gpu_support
from kernels_pallas.quantized_matmul.planar import BLOCK, Planar
from kernels_pallas.quantized_matmul.tpu import support as tpu_support
from research import tree, weights
from research.quant.layouts import kernel_codes
from research.quant.layouts.kernel_layout import KernelLayout
from research.quant.qtensor import QTensor
from research.typing import Array, Float, Int, Params, PRNGKey

GROUPS = (16, 32, 64)
"""Supported group sizes below a block of inputs."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlanarTensor(KernelLayout):
  """A matrix in planar layout; frozen: its parts receive no gradient.

  Attributes:
    planes: the stored matrix `[..., I, O]`.
    source: int32 `[..., I]` or None: index in the matrix of each stored row.
    axis: -2 if the stored matrix is the logical one, -1 if it is its
      transpose.
  """

  planes: Planar
  source: Any = None
  axis: int = dataclasses.field(default=-2, metadata=dict(static=True))

  @property
  def dtype(self) -> Any:
    return np.dtype(jnp.float32)

  @property
  def operand(self) -> Any:
    return self.planes

  def decode_stored(self) -> Float[Array, "... I O"]:
    return planar.dense(self.planes)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows; an embedding decodes only those."""
    if self.axis == -2:
      return jnp.take(self.dense(), ids, axis=0)
    some = jax.tree.map(
      lambda x: jnp.take(x, ids.reshape(-1), axis=-1), self.planes
    )
    some = dataclasses.replace(some, outputs=ids.size)
    found = dataclasses.replace(self, planes=some).dense()
    return found.reshape(*ids.shape, found.shape[-1])

  def axes(self, names: tuple[str | None, ...]) -> "PlanarTensor":
    *lead, first, second = names
    stored = (first, second) if self.axis == -2 else (second, first)
    planes = jax.tree.map(
      lambda part: weights.axes(part, (*lead, *stored)), self.planes
    )
    source = weights.axes(self.source, (*lead, None))
    return dataclasses.replace(self, planes=planes, source=source)


def has_kernel() -> bool:
  """Whether this process runs on a device with these kernels."""
  return jax.default_backend() == "tpu" or gpu_support.is_for()


def is_supported(
  w: QTensor, gpu: bool = False, dtype: str = "bfloat16"
) -> bool:
  """Whether the kernels support the packed matrix `w`.

  Args:
    gpu: for GPUs, whose kernels read 8-bit codes in words.
    dtype: dtype of the activations. All kernels support bfloat16, TPUs also
      float32, GPUs also float16.
  """
  kind = kernel_codes.kind(w)
  if kind is None:
    return False
  group = kind.group
  if not (group in GROUPS or group % BLOCK == 0 or group == w.inputs):
    return False
  made = jax.eval_shape(functools.partial(from_qtensor, gpu=gpu), w).planes
  kernels = gpu_support if gpu else tpu_support
  return kernels.unsupported(jnp.dtype(dtype), made) is None


@functools.partial(jax.jit, static_argnames="gpu")
def from_qtensor(w: QTensor, gpu: bool = False) -> PlanarTensor:
  """Converts a supported packed matrix to planes."""
  codes, scale, offset, rest = kernel_codes.kernel_operands(w)
  planes = planar.pack(codes, scale, offset, **rest)
  if gpu:
    planes = planar.in_words(planes)
  return PlanarTensor(planes, kernel_codes.source_rows(w), w.axis)


def to_planes(
  params: Params,
  key: PRNGKey | None = None,
  gpu: bool | None = None,
  dtype: str = "float32",
) -> Params:
  """Returns `params` with packed matrices in planar layout, layers unrolled.

  A Transform. Unsupported matrices, experts and unpacked weights are unchanged;
  a warning names the unsupported ones. Layers are unrolled, since a scan would
  copy each matrix before its use. If no matrix is supported it returns
  `params`.

  Args:
    gpu: whether for a GPU; None for the device of this process.
  """
  del key
  gpu = gpu_support.is_for() if gpu is None else gpu
  left: set[str] = set()
  made: list[str] = []

  def one(path: str, leaf: Any) -> Any:
    ndim = 3 if path.startswith("run") else 2
    if not is_packed(leaf) or leaf.ndim != ndim:
      return leaf
    if not is_supported(leaf, gpu, dtype):
      left.add(_reason(leaf, gpu, dtype))
      return leaf
    made.append(path)
    return from_qtensor(leaf, gpu)

  def is_packed(x: Any) -> bool:
    return isinstance(x, QTensor)

  found = tree.map_paths(one, params, is_leaf=is_packed)
  cost = "slower than those of 4 bits or of integers in bfloat16"
  kernel_codes.warn_unsupported("planes", "GPUs" if gpu else "TPUs", left, cost)
  return tree.unroll(found) if made else params


def _reason(w: QTensor, gpu: bool, dtype: str) -> str:
  """Returns an unsupported matrix's format, and the dtype if that is why."""
  why = f" in {dtype}" if is_supported(w, gpu) else ""
  return f"{kernel_codes.name(w)}{why}"
