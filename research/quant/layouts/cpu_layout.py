"""Weights that CPU decoding reads fastest: `kernels_pallas`' panels as a leaf.

`decoding` rewrites a tree once, before text is generated: matrices, packed or
not, become panels, each layer's in arrays of its own. What changes is their
order in memory, and that a C++ kernel multiplies them
(`kernels_pallas.quantized_matmul`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul import cpu
from kernels_pallas.quantized_matmul.cpu import panels as layout
from kernels_pallas.quantized_matmul.gpu import mosaic_gpu
from research import tree, weights
from research.generation import generate
from research.nn.transformer import Transformer
from research.quant.layouts import accelerator_layout, kernel_codes
from research.quant.layouts.kernel_layout import KernelLayout
from research.quant.qtensor import QTensor
from research.typing import Array, Float, Int, Params, PRNGKey

_MATRIX = re.compile(
  r"(^|/)(embed|head|attention/[qkvo]|(?<!experts/)(gate|up|down))(/w)?$"
)
"""Paths of what tokens are multiplied with, alone or under an adapter."""

_BESIDE = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}
"""Matrices of the same input, which one product multiplies."""

FEW = 32
"""Rows of products from which on XLA reads weights as they were loaded."""

_EMBED = re.compile(r"(^|/)embed(/w)?$")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PanelTensor(KernelLayout):
  """A matrix in panels; frozen: no gradient reaches its parts.

  Attributes:
    panels: `[..., I, O]` as stored.
    source: int32 `[..., I]` or None: the matrix' row that each stored row is,
      as act-order leaves them. What is multiplied is put in that order, once;
      the panels are read front to back as ever.
    axis: -2 if that is the logical order, -1 if its transpose is (an
      embedding `[V, D]`, stored `[D, V]`).
  """

  panels: layout.Panels
  source: Any = None
  axis: int = dataclasses.field(default=-2, metadata=dict(static=True))

  @property
  def dtype(self) -> Any:
    wide = self.panels.bits == 16
    return np.dtype(jnp.bfloat16 if wide else jnp.float32)

  @property
  def columns(self) -> int:
    """Returns `I` of the stored matrix."""
    return self.panels.inputs

  @property
  def rows(self) -> int:
    """Returns `O` of the stored matrix."""
    return self.panels.outputs

  @property
  def held(self) -> Any:
    return self.panels

  def decoded(self) -> Float[Array, "... I O"]:
    return layout.dense(self.panels).astype(self.dtype)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows of an embedding; only those are decoded."""
    if self.axis == -2:
      return jnp.take(self.dense(), ids, axis=0)
    found = layout.take(self.panels, ids).astype(self.dtype)
    if self.source is None:
      return found
    return jnp.take(found, jnp.argsort(self.source), axis=-1)

  def axes(self, names: tuple[str | None, ...]) -> "PanelTensor":
    """Panels keep the outputs' name, words and groups the inputs'."""
    *lead, first, second = names
    inputs, outputs = (first, second) if self.axis == -2 else (second, first)
    part_names = (*lead, outputs, inputs, None)
    parts = jax.tree.map(
      lambda part: weights.axes(part, part_names), self.panels
    )
    source = weights.axes(self.source, (*lead, None))
    return dataclasses.replace(self, panels=parts, source=source)


def fits(w: QTensor) -> bool:
  """Whether panels can hold what `w` holds.

  Codes of at most 4 bits, or integers of up to 8; groups of whole words; no
  rows in other precision.
  """
  kind = kernel_codes.kind(w)
  return kind is not None and kind.group % (32 // kind.bits) == 0


@jax.jit
def from_qtensor(w: QTensor) -> PanelTensor:
  """Returns a packed matrix that `fits` in panels.

  Numbers are those before they are rounded to a dtype of 16 bits; a zero that
  differs by group becomes an offset, rounded once in float32.
  """
  codes, scale, offset, rest = kernel_codes.normal(w)
  packed = layout.pack(codes, scale, offset, **rest)
  return PanelTensor(packed, kernel_codes.source_of(w), w.axis)


def from_array(w: Float[Array, "... I O"], axis: int = -2) -> PanelTensor:
  """Returns a bfloat16 or float32 matrix in panels.

  Args:
    w: the matrix.
    axis: see `PanelTensor`.
  """
  stored = w if axis == -2 else jnp.swapaxes(w, -1, -2)
  return PanelTensor(jax.jit(layout.pack)(stored), axis=axis)


def to_panels(
  params: Params, key: PRNGKey | None = None, dtype: str = "float32"
) -> Params:
  """Returns `params` with their matrices in panels, layer by layer.

  A Transform. Packed matrices of a format that `fits`, and those in bfloat16
  or float32, are rewritten, also those under an adapter; experts stay as they
  are.
  Layers are unrolled: a scan over stacked panels would copy each before its
  use. Packed ones that do not fit are named in a warning: they are decoded as
  they are used, which is slower.
  Queries, keys and values of a layer become one matrix, and so do gate and up,
  where they are of one kind and order and without adapters.

  Args:
    params: of a Transformer.
    key: unused.
    dtype: that the model computes in; float32 matrices are rounded to it, as
      `weights.einsum` rounds them.
  """
  del key
  left: set[str] = set()

  def one(path: str, leaf: Any) -> Any:
    ndim = 3 if path.startswith("run") else 2
    if leaf.ndim != ndim:
      return leaf
    if isinstance(leaf, QTensor):
      if fits(leaf):
        return from_qtensor(leaf)
      left.add(kernel_codes.name(leaf))
      return leaf
    if leaf.dtype not in (jnp.bfloat16, jnp.float32):
      return leaf
    if not _MATRIX.search(path):
      return leaf
    if leaf.dtype == jnp.float32:
      leaf = leaf.astype(dtype)
    return from_array(leaf, -1 if _EMBED.search(path) else -2)

  found = tree.map_paths(one, params, is_leaf=_is_packed)
  cost = "several times slower than those of 4 bits or of integers"
  kernel_codes.tell("panels", "CPUs", left, cost)
  return tree.unroll(_beside(found))


def _beside(part: Any) -> Any:
  """Returns `part` of a tree with the matrices of `_BESIDE` side by side."""
  if not isinstance(part, dict):
    return part
  out = {name: _beside(inner) for name, inner in part.items()}
  for module, names in _BESIDE.items():
    found = out.get(module, {})
    leaves = [found.get(name) for name in names]
    if not all(isinstance(x, PanelTensor) and x.axis == -2 for x in leaves):
      continue
    if not _alike([leaf.source for leaf in leaves]):
      continue
    joined = layout.beside([leaf.panels for leaf in leaves])
    if joined is not None:
      rest = {name: x for name, x in found.items() if name not in names}
      one = PanelTensor(joined, leaves[0].source)
      out[module] = rest | {weights.fused_name(names): one}
  return out


def _alike(sources: Sequence[Any]) -> bool:
  """Whether matrices take the same inputs in the same order."""
  if any(x is None for x in sources):
    return all(x is None for x in sources)
  if any(isinstance(x, jax.core.Tracer) for x in sources):
    return False  # of shapes alone nobody knows
  return all(bool(jnp.array_equal(x, sources[0])) for x in sources)


def _kernel(params: Params, dtype: str) -> Callable[[QTensor], bool] | None:
  """Returns what says which matrices `decoding` lays out for a kernel.

  None if it lays out none.
  """
  leaves = jax.tree.leaves(params)
  many = jax.process_count() > 1 or any(
    len(x.devices()) > 1 for x in leaves if isinstance(x, jax.Array)
  )
  if many:
    return None
  if accelerator_layout.has_kernel():
    return functools.partial(
      accelerator_layout.fits, gpu=mosaic_gpu.is_for(), dtype=dtype
    )
  if jax.default_backend() != "cpu" or not cpu.available():
    return None
  return fits


def decoded_elsewhere(params: Params, dtype: str = "float32") -> Params:
  """Returns `params`, packed where `decoding` has a kernel for it alone.

  Other packed matrices, experts among them, would be decoded for every product:
  they are decoded now.

  Args:
    params: of a Transformer.
    dtype: that the model computes in; of decoded matrices.
  """

  if not _any_packed(params):
    return params
  takes = _kernel(params, dtype)

  def one(path: str, leaf: Any) -> Any:
    if not _is_packed(leaf):
      return leaf
    ndim = 3 if path.startswith("run") else 2
    if takes is not None and leaf.ndim == ndim and takes(leaf):
      return leaf
    return leaf.dense().astype(dtype)

  return tree.map_paths(one, params, is_leaf=_is_packed)


def _is_packed(x: Any) -> bool:
  return isinstance(x, QTensor)


def _any_packed(params: Params) -> bool:
  return any(map(_is_packed, jax.tree.leaves(params, is_leaf=_is_packed)))


def reading(params: Params, model: Transformer, rows: int) -> Params:
  """Returns `params` laid out to be decoded by, where that reads rows faster.

  Few rows wait for the bytes of weights, which panels and planes are for. Many
  of 16 bits are multiplied 1.2 times as fast from panels as by XLA; others are
  left as they are.

  Args:
    params: of the model.
    model: it computes in float32 or bfloat16.
    rows: tokens that are read at a time.
  """
  cpu_bf16 = model.dtype == "bfloat16" and jax.default_backend() == "cpu"
  if rows >= FEW and (not cpu_bf16 or _any_packed(params)):
    return params
  return generate.prepare(decoding(params, model.dtype), model)


def decoding(params: Params, dtype: str = "float32") -> Params:
  """Returns `params` in panels where this process decodes faster so.

  That is on CPU, on one device, with a C++ compiler. On a TPU or a GPU,
  alone as well, packed matrices become planes (`layouts.planes`), where
  their kernels take what the model computes in. Elsewhere it is `params`.

  Args:
    params: of a Transformer.
    dtype: that the model computes in, float32 or bfloat16.
  """
  if _kernel(params, dtype) is None:
    return params
  if not accelerator_layout.has_kernel():
    return to_panels(params, dtype=dtype)
  if all(x.dtype == jnp.float32 for x in jax.tree.leaves(params)):
    return params
  return accelerator_layout.to_planes(params, dtype=dtype)
