"""Vision language models as tensors of Hugging Face's files."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research import tree, weights
from research.interop import parts
from research.interop.hf import write as hf_write
from research.interop.vision import names, read
from research.lora.merge import changes
from research.typing import Params
from research.vlm.model import VisionLanguageModel

_INNER = {
  "model.": "language_model.model.",
  "lm_head.": "language_model.lm_head.",
}
_LANGUAGE = {
  "llava": _INNER,
  "paligemma": _INNER,
  "idefics3": {"model.": "model.text_model.", "lm_head.": "lm_head."},
}
_LANGUAGE["smolvlm"] = _LANGUAGE["idefics3"]


def vision_language_tensors(
  model: VisionLanguageModel, kind: str, params: Params, dtype: str = "float32"
) -> dict[str, np.ndarray]:
  """Returns every tensor under the name that the Hub's files have.

  Args:
    model: whose parameters `params` are.
    kind: one of `config.FAMILIES`.
    params: of all three towers; packed weights are decoded, adapters merged.
    dtype: of the tensors.
  """
  vision, connector = read.WRITTEN[kind]
  out = _prefixed(vision, _tower(names.VISION, params["vision"], dtype))
  out |= _prefixed(
    connector, _tower(read.CONNECTOR_ROWS[kind], params["connector"], dtype)
  )
  pending = hf_write.tensors(
    model.language, parts.from_params(params["language"]), dtype, changes.Log()
  )
  for name, tensor in pending.items():
    plain = next(p for p in _LANGUAGE[kind] if name.startswith(p))
    theirs = _LANGUAGE[kind][plain] + name.removeprefix(plain)
    out[theirs] = np.asarray(tensor.make())
  return out


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
  return {prefix + name: x for name, x in tensors.items()}


def _tower(rows: Any, params: Params, dtype: str) -> dict[str, np.ndarray]:
  def flat(subtree: Any) -> dict[str, np.ndarray]:
    return {
      path: np.asarray(weights.dense(w)).astype(dtype)
      for path, w in weights.named_weights(subtree)
    }

  layers = [flat(jax.tree.map(np.asarray, x)) for x in tree.layers(params)]
  return names.write_tower(rows, flat(tree.outer_params(params)), layers)
