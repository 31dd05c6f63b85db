"""The transforms that pack or round a tree's weights, before adapters."""

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
  """Packs the layers' matrices, see `research.quant.qtensor`.

  Attributes:
    format: that they are kept in.
    targets: `"all-linear"`, every matrix of a layer but the router, whose
      choices are all or nothing; or names such as `("q", "mlp/up")` for the
      end of paths. Embedding, head and norms stay as they are, as in QLoRA.
  """

  format: Format = Codebook()
  targets: str | Sequence[str] = ALL_LINEAR

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` with packed matrices; the others are shared.

    Raises:
      UserError: a target matches nothing, or what is adapted already, or
        what is not finite.
    """
    del key
    chosen = set(self.chosen(params))

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

  def chosen(self, params: Params) -> list[str]:
    """Returns the paths of the matrices that are packed, runs as they are."""
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
    """Returns one weight, or a stack of them, packed; compiled once a shape.

    Args:
      w: any weight.
      where: its address, for messages.
    """
    if not self.format.traced:
      dense = np.asarray(weights.dense(w))
      return qtensor.pack(dense, self.format, where=where)
    packed, fine = _packed(w, self.format)
    if not isinstance(fine, jax.core.Tracer) and not fine:
      finite.check(weights.dense(w), where)
    return packed


@functools.partial(jax.jit, static_argnames=("format",))
def _packed(w, format):
  """Returns (packed, whether all was finite); a packed one is decoded once."""
  dense = weights.dense(w)
  return qtensor.pack(dense, format), jnp.isfinite(dense).all()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
  """Rounds every array of a tree, as a base that is stored in 16 bits.

  Attributes:
    dtype: such as `"bfloat16"`.
  """

  dtype: str = "bfloat16"

  def __call__(self, params: Params, key: PRNGKey | None = None) -> Any:
    """Returns `params` in that dtype; what is packed stays as it is."""
    del key

    def one(w: Any) -> Any:
      return w if weights.is_weight(w) else jnp.asarray(w, self.dtype)

    return jax.tree.map(one, params, is_leaf=weights.is_weight)
