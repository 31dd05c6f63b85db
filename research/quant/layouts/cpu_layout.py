"""Panel weight layout for fast decoding on CPUs.

`for_decoding` converts a tree once, before generation: matrices, packed or not,
become panels, with separate arrays per layer. Panels reorder the weights in
memory for a C++ matmul kernel (`kernels_pallas.quantized_matmul`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized_matmul import cpu, gpu
from kernels_pallas.quantized_matmul.cpu import panels as layout
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
"""Paths of matrices that multiply tokens, with or without an adapter."""

_FUSED = {"attention": ("q", "k", "v"), "mlp": ("gate", "up")}
"""Matrices with the same input, which are fused into one product."""

FEW_ROWS = 32
"""Number of rows from which XLA with the original weights is faster."""

_EMBED = re.compile(r"(^|/)embed(/w)?$")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PanelTensor(KernelLayout):
  """A matrix in panel layout; frozen: its parts receive no gradient.

  Attributes:
    panels: the stored matrix `[..., I, O]`.
    source: int32 `[..., I]` or None: index in the matrix of each stored row
      (act-order). Activations are permuted to the stored order, so that panels
      are read sequentially.
    axis: -2 if the stored matrix is the logical one, -1 if it is its transpose
      (an embedding `[V, D]`, stored `[D, V]`).
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
    return self.panels.inputs

  @property
  def rows(self) -> int:
    return self.panels.outputs

  @property
  def operand(self) -> Any:
    return self.panels

  def decode_stored(self) -> Float[Array, "... I O"]:
    return layout.dense(self.panels).astype(self.dtype)

  def take(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns rows; an embedding decodes only those."""
    if self.axis == -2:
      return jnp.take(self.dense(), ids, axis=0)
    found = layout.take(self.panels, ids).astype(self.dtype)
    if self.source is None:
      return found
    return jnp.take(found, jnp.argsort(self.source), axis=-1)

  def axes(self, names: tuple[str | None, ...]) -> "PanelTensor":
    """Panels have the outputs' logical axis, words and groups the inputs'."""
    *lead, first, second = names
    inputs, outputs = (first, second) if self.axis == -2 else (second, first)
    part_names = (*lead, outputs, inputs, None)
    parts = jax.tree.map(
      lambda part: weights.axes(part, part_names), self.panels
    )
    source = weights.axes(self.source, (*lead, None))
    return dataclasses.replace(self, panels=parts, source=source)


def is_supported(w: QTensor) -> bool:
  """Whether the panel layout supports the packed matrix `w`.

  It supports codes of at most 4 bits, integers of up to 8 bits, and groups of
  whole words; no outlier rows.
  """
  kind = kernel_codes.kind(w)
  return kind is not None and kind.group % (32 // kind.bits) == 0


@jax.jit
def from_qtensor(w: QTensor) -> PanelTensor:
  """Converts a supported packed matrix to panels.

  Decodes to float32 numbers, before rounding to a 16-bit dtype. A zero that
  differs by group becomes an offset, rounded once in float32.
  """
  codes, scale, offset, rest = kernel_codes.kernel_operands(w)
  packed = layout.pack(codes, scale, offset, **rest)
  return PanelTensor(packed, kernel_codes.source_rows(w), w.axis)


def from_array(w: Float[Array, "... I O"], axis: int = -2) -> PanelTensor:
  """Returns a bfloat16 or float32 matrix in panels."""
  stored = w if axis == -2 else jnp.swapaxes(w, -1, -2)
  return PanelTensor(jax.jit(layout.pack)(stored), axis=axis)


def to_panels(
  params: Params, key: PRNGKey | None = None, dtype: str = "float32"
) -> Params:
  """Returns `params` with matrices in panel layout, layers unrolled.

  A Transform. Converts packed matrices of supported formats and matrices in
  bfloat16 or float32, also under adapters; experts are unchanged. Layers are
  unrolled, since a scan over stacked panels would copy each before its use.
  A warning names unsupported packed matrices, which are decoded for every
  product. Queries, keys and values of a layer are fused into one matrix, and so
  are gate and up, if they have the same kind and row order and no adapters.

  Args:
    dtype: dtype that the model computes in; float32 matrices are rounded to
      it, as in `weights.einsum`.
  """
  del key
  left: set[str] = set()

  def one(path: str, leaf: Any) -> Any:
    ndim = 3 if path.startswith("run") else 2
    if leaf.ndim != ndim:
      return leaf
    if isinstance(leaf, QTensor):
      if is_supported(leaf):
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
  kernel_codes.warn_unsupported("panels", "CPUs", left, cost)
  return tree.unroll(_fuse(found))


def _fuse(part: Any) -> Any:
  """Returns a subtree with the matrices of `_FUSED` fused."""
  if not isinstance(part, dict):
    return part
  out = {name: _fuse(inner) for name, inner in part.items()}
  for module, names in _FUSED.items():
    found = out.get(module, {})
    leaves = [found.get(name) for name in names]
    if not all(isinstance(x, PanelTensor) and x.axis == -2 for x in leaves):
      continue
    if not _same_row_order([leaf.source for leaf in leaves]):
      continue
    joined = layout.concatenate([leaf.panels for leaf in leaves])
    if joined is not None:
      rest = {name: x for name, x in found.items() if name not in names}
      one = PanelTensor(joined, leaves[0].source)
      out[module] = rest | {weights.fused_name(names): one}
  return out


def _same_row_order(sources: Sequence[Any]) -> bool:
  if any(x is None for x in sources):
    return all(x is None for x in sources)
  if any(isinstance(x, jax.core.Tracer) for x in sources):
    return False  # unknown under `eval_shape`
  return all(bool(jnp.array_equal(x, sources[0])) for x in sources)


def _kernel(params: Params, dtype: str) -> Callable[[QTensor], bool] | None:
  """Returns which packed matrices `for_decoding` converts for a kernel.

  Returns:
    a predicate, or None if there is no kernel.
  """
  leaves = jax.tree.leaves(params)
  many = jax.process_count() > 1 or any(
    len(x.devices()) > 1 for x in leaves if isinstance(x, jax.Array)
  )
  if many:
    return None
  if accelerator_layout.has_kernel():
    return functools.partial(
      accelerator_layout.is_supported, gpu=gpu.is_for(), dtype=dtype
    )
  if jax.default_backend() != "cpu" or not cpu.available():
    return None
  return is_supported


def decode_unsupported(params: Params, dtype: str = "float32") -> Params:
  """Returns `params` with packed matrices decoded unless a kernel reads them.

  Other packed matrices, such as experts, would be decoded for every product.

  Args:
    dtype: dtype that the model computes in, and of decoded matrices.
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


def for_reading(params: Params, model: Transformer, rows: int) -> Params:
  """Returns `params` in a kernel layout if that scores or prefills faster.

  Products of few rows are limited by reading weights, where panels and planes
  help. Products of many rows in bfloat16 on CPU are 1.2 times as fast with
  panels as with XLA; otherwise the parameters are unchanged.

  Args:
    model: a Transformer that computes in float32 or bfloat16.
  """
  cpu_bf16 = model.dtype == "bfloat16" and jax.default_backend() == "cpu"
  if rows >= FEW_ROWS and (not cpu_bf16 or _any_packed(params)):
    return params
  return generate.prepare(for_decoding(params, model.dtype), model)


def for_decoding(params: Params, dtype: str = "float32") -> Params:
  """Returns `params` in the layout with the fastest decoding on this device.

  Panels on CPU, with one device and a C++ compiler. Planes
  (`accelerator_layout`) for packed matrices on one TPU or GPU, if the kernels
  support the model's dtype. Otherwise `params` itself.

  Args:
    dtype: dtype that the model computes in, float32 or bfloat16.
  """
  if _kernel(params, dtype) is None:
    return params
  if not accelerator_layout.has_kernel():
    return to_panels(params, dtype=dtype)
  if all(x.dtype == jnp.float32 for x in jax.tree.leaves(params)):
    return params
  return accelerator_layout.to_planes(params, dtype=dtype)
