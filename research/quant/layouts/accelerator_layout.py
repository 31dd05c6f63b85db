"""Weights that TPUs and GPUs decode in their kernels: planes as a leaf.

`kernels_pallas.quantized_matmul.planar` puts codes in the order in which a
register decodes them, so that the product reads packed bits alone. As panels do
for CPUs, `to_planes` rewrites a tree once, before text is generated, each
layer's matrices in arrays of their own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul import planar
from kernels_pallas.quantized_matmul.gpu import mosaic_gpu
from kernels_pallas.quantized_matmul.planar import BLOCK, Planar
from kernels_pallas.quantized_matmul.tpu import mosaic_tpu
from research import tree, weights
from research.quant.layouts import kernel_codes
from research.quant.layouts.kernel_layout import KernelLayout
from research.quant.qtensor import QTensor
from research.typing import Array, Float, Int, Params, PRNGKey

GROUPS = (16, 32, 64)
"""Groups below a block of inputs that a register has whole."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlanarTensor(KernelLayout):
  """A matrix in planes; frozen: no gradient reaches its parts.

  Attributes:
    planes: `[..., I, O]` as stored.
    source: int32 `[..., I]` or None: the matrix' row that each stored row is.
    axis: -2 if that is the logical order, -1 if its transpose is.
  """

  planes: Planar
  source: Any = None
  axis: int = dataclasses.field(default=-2, metadata=dict(static=True))

  @property
  def dtype(self) -> Any:
    return np.dtype(jnp.float32)

  @property
  def held(self) -> Any:
    return self.planes

  def decoded(self) -> Float[Array, "... I O"]:
    return planar.dense(self.planes)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of an embedding; only those are decoded."""
    if self.axis == -2:
      return jnp.take(self.dense(), ids, axis=0)
    some = jax.tree.map(
      lambda x: jnp.take(x, ids.reshape(-1), axis=-1), self.planes
    )
    some = dataclasses.replace(some, outputs=ids.size)
    found = dataclasses.replace(self, planes=some).dense()
    return found.reshape(*ids.shape, found.shape[-1])

  def axes(self, names: tuple[str | None, ...]) -> "PlanarTensor":
    """Planes keep the names of inputs and outputs."""
    *lead, first, second = names
    stored = (first, second) if self.axis == -2 else (second, first)
    planes = jax.tree.map(
      lambda part: weights.axes(part, (*lead, *stored)), self.planes
    )
    source = weights.axes(self.source, (*lead, None))
    return dataclasses.replace(self, planes=planes, source=source)


def has_kernel() -> bool:
  """Whether programs of this process are for a device with these kernels."""
  return jax.default_backend() == "tpu" or mosaic_gpu.is_for()


def fits(w: QTensor, gpu: bool = False, dtype: str = "bfloat16") -> bool:
  """Whether the kernels multiply what `w` holds.

  Args:
    w: a packed matrix.
    gpu: for GPUs, whose kernels take 8 bits in words.
    dtype: of the rows that it multiplies. bfloat16 is what every kernel takes,
      float32 TPUs' alone, float16 GPUs' alone.
  """
  kind = kernel_codes.kind(w)
  if kind is None:
    return False
  group = kind.group
  if not (group in GROUPS or group % BLOCK == 0 or group == w.inputs):
    return False
  made = jax.eval_shape(functools.partial(from_qtensor, gpu=gpu), w).planes
  kernels = mosaic_gpu if gpu else mosaic_tpu
  return kernels.unsupported(jnp.dtype(dtype), made) is None


@functools.partial(jax.jit, static_argnames="gpu")
def from_qtensor(w: QTensor, gpu: bool = False) -> PlanarTensor:
  """Returns a packed matrix that `fits`, 8 bits in words where for a GPU."""
  codes, scale, offset, rest = kernel_codes.normal(w)
  planes = planar.pack(codes, scale, offset, **rest)
  if gpu:
    planes = planar.in_words(planes)
  return PlanarTensor(planes, kernel_codes.source_of(w), w.axis)


def to_planes(
  params: Params,
  key: PRNGKey | None = None,
  gpu: bool | None = None,
  dtype: str = "float32",
) -> Params:
  """Returns `params` with packed matrices in planes, layer by layer.

  A Transform. What does not fit, experts, and what is not packed stay as they
  are; the first are named in a warning. Layers are unrolled, since a scan would
  copy each matrix before its use, unless nothing fits: then it is `params`.

  Args:
    params: of a Transformer.
    key: unused.
    gpu: whether for a GPU; None for what this process runs on.
    dtype: that the model computes in.
  """
  del key
  gpu = mosaic_gpu.is_for() if gpu is None else gpu
  left: set[str] = set()
  made: list[str] = []

  def one(path: str, leaf: Any) -> Any:
    ndim = 3 if path.startswith("run") else 2
    if not is_packed(leaf) or leaf.ndim != ndim:
      return leaf
    if not fits(leaf, gpu, dtype):
      left.add(_reason(leaf, gpu, dtype))
      return leaf
    made.append(path)
    return from_qtensor(leaf, gpu)

  def is_packed(x: Any) -> bool:
    return isinstance(x, QTensor)

  found = tree.map_paths(one, params, is_leaf=is_packed)
  cost = "slower than those of 4 bits or of integers in bfloat16"
  kernel_codes.tell("planes", "GPUs" if gpu else "TPUs", left, cost)
  return tree.unroll(found) if made else params


def _reason(w: QTensor, gpu: bool, dtype: str) -> str:
  """Returns the name of what does not fit, and the dtype if that is why."""
  why = f" in {dtype}" if fits(w, gpu) else ""
  return f"{kernel_codes.name(w)}{why}"
