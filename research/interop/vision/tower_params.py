"""A tower's parameters out of a file's tensors, and back."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.interop import hf, quantized
from research.interop.vision import names
from research.io import unread
from research.typing import Params, UserError
from research.vlm.encoders.clipped import Clipped


def read_tower(
  shapes: Params,
  rows: Iterable[names.Row],
  tensors: Mapping[str, quantized.Tensor],
  model: Any,
  dtype: str,
  where: Any,
) -> dict[str, Any]:
  """Returns a tower's parameters, its layers as runs.

  Raises:
    UserError: the tensors are not exactly the tower's.
  """
  outside, of_layers = layer_shapes(shapes)
  try:
    outside, layers, used = names.read_tower(
      rows, outside, of_layers, tensors, dtype
    )
  except UserError as e:
    raise UserError(f"{where}: {e}") from e
  extra = [n for n in tensors if n not in used and n not in names.BUFFERS]
  if extra:
    raise hf.mismatch(where, [], extra)
  kinds = model.layer_kinds() if layers else ()
  params = tree.stack(
    unread.nested(outside), [unread.nested(layer) for layer in layers], kinds
  )
  # Leaves that are more than an array have a path for each of their arrays.
  arrays = dict(tree.flatten_paths(params))
  return tree.map_paths(lambda path, _: jnp.asarray(arrays[path]), shapes)


def layer_shapes(
  shapes: Params,
) -> tuple[dict[str, tuple[int, ...]], list[dict[str, tuple[int, ...]]]]:
  """Returns the shapes outside of layers, and those of each layer, by path."""

  def flat(params, lead):
    return {k: x.shape[lead:] for k, x in tree.flatten_paths(params)}

  numbered = {
    number: flat(shapes[run][layer], 1)
    for run, layer, numbers in (
      (*name.split("/"), numbers)
      for name, numbers in tree.layer_indices(shapes).items()
    )
    for number in numbers
  }
  layers = [numbered[i] for i in range(len(numbered))]
  return flat(tree.outer_params(shapes), 0), layers


def tower_tensors(
  rows: Iterable[names.Row], params: Params, dtype: str
) -> dict[str, np.ndarray]:
  """Returns a tower's tensors, by their names within it."""

  def flat(subtree: Any) -> dict[str, np.ndarray]:
    arrays = {}
    for path, w in weights.named_weights(subtree):
      if isinstance(w, Clipped):
        arrays |= {f"{path}/{name}": x for name, x in w.bounds().items()}
        path, w = f"{path}/w", w.w
      arrays[path] = weights.dense(w)
    return {k: np.asarray(x).astype(dtype) for k, x in arrays.items()}

  layers = [flat(jax.tree.map(np.asarray, x)) for x in tree.layers(params)]
  return names.write_tower(rows, flat(tree.outer_params(params)), layers)
