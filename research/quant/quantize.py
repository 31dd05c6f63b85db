"""Round-to-nearest quantization and casting of a parameter tree."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.quant import qtensor
from research.quant.format import Format
from research.quant.formats.codebook import Codebook
from research.quant.numerics import finite
from research.typing import Params, PRNGKey, UserError

ALL_LINEAR = "all-linear"
_ROUTER = re.compile(r"/mlp/router$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
  """Transform that packs the layers' matrices, see `research.quant.qtensor`.

  Attributes:
    targets: `"all-linear"`, every matrix of a layer except the router, whose
      discrete choices rounding could change; or names such as `("q",
      "mlp/up")` matched at the end of paths. Embedding, head and norms are not
      packed, as in QLoRA.
  """

  format: Format = Codebook()
  targets: str | Sequence[str] = ALL_LINEAR

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with packed matrices; shares all other arrays.

    Raises:
      UserError: a target matches nothing, an adapted matrix, or one that is
        not finite.
    """
    del key
    chosen = set(self.selected_paths(params))

    def one(path: str, w: Any) -> Any:
      if path not in chosen:
        return w
      return weights.map_inner(w, functools.partial(self._packed, path))

    return tree.map_paths(one, params, is_leaf=weights.is_weight)

  def _packed(self, path: str, w: Any) -> qtensor.QTensor:
    if weights.unwrap(w) is not None:
      raise UserError(
        f"Quantize: {path} is adapted; quantize first, then adapt"
      )
    return self.pack(w, path)

  def selected_paths(self, params: Params) -> list[str]:
    """Returns the paths of the matrices to pack, each a stack of layers."""
    if not tree.runs(params):
      raise UserError(tree.no_layers("Quantize", params))
    paths = [
      path
      for path, w in weights.named_weights(params)
      if path.startswith("run") and len(w.shape) > 2
    ]
    if self.targets == ALL_LINEAR:
      return [path for path in paths if not _ROUTER.search(path)]
    if isinstance(self.targets, str):
      raise UserError(
        f"Quantize: targets is {self.targets!r}, expected {ALL_LINEAR!r} or a "
        "list of names"
      )
    for name in self.targets:
      if not any(path.endswith(f"/{name}") for path in paths):
        names = sorted({path.split("/", 2)[-1] for path in paths})
        raise UserError(
          f"Quantize: targets {name!r} matches no matrix of the layers.\n"
          f"Names: {', '.join(names)}."
        )
    return [
      path
      for path in paths
      if any(path.endswith(f"/{name}") for name in self.targets)
    ]

  def pack(self, w: Any, where: str = "Quantize") -> qtensor.QTensor:
    """Packs one weight or a stack; compiles once per shape."""
    if not self.format.traceable:
      dense = np.asarray(weights.dense(w))
      return qtensor.pack(dense, self.format, where=where)
    packed, fine = _packed(w, self.format)
    if not isinstance(fine, jax.core.Tracer) and not fine:
      finite.check(weights.dense(w), where)
    return packed


@functools.partial(jax.jit, static_argnames=("format",))
def _packed(w, format):
  """Returns (packed, whether all weights are finite)."""
  dense = weights.dense(w)
  return qtensor.pack(dense, format), jnp.isfinite(dense).all()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
  """Transform that casts every array of a tree, such as a base to 16 bits."""

  dtype: str = "bfloat16"

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` in that dtype; packed weights are unchanged."""
    del key

    def one(w: Any) -> Any:
      return w if weights.is_weight(w) else jnp.asarray(w, self.dtype)

    return jax.tree.map(one, params, is_leaf=weights.is_weight)
