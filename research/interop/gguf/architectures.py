"""llama.cpp's architectures: one row each. A new one goes here.

What the keys of a file say of a model is in `config`, what its tensors are
called in `names`, and the model types are those of Hugging Face
(`research.interop.hf.families`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from research.interop.gguf.names import ROPE_FACTORS, ROWS
from research.interop.hf.families import MODEL_TYPES
from research.nn import presets
from research.typing import UserError

_LLAMAS = (
  ROPE_FACTORS,
  *(r.name for r in ROWS if r.when in ("out_bias", "mlp_bias")),
)
"""Tensors that "llama" alone may have."""


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a `general.architecture` says without saying it.

  Attributes:
    model_types: that are stored as it, first the one that a file is where its
      keys say nothing else (`model_type`).
    interleaved: whether the converter reordered query and key rows.
    local_theta: of windowed layers, where llama.cpp hard-codes it.
    window, attention_softcap, logit_softcap: of a file without these keys, as
      the first ones of Gemma 2 are.
    scaled_by_width: depths whose logits are scaled by `(D/N)^-0.5` (27B).
    expert_size: whether experts have a size of their own.
    unknown: names of tensors that llama.cpp does not know there.
  """

  model_types: tuple[str, ...]
  interleaved: bool = False
  local_theta: float | None = None
  window: int | None = None
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  scaled_by_width: tuple[int, ...] = ()
  expert_size: bool = False
  unknown: tuple[str, ...] = _LLAMAS

  @property
  def pattern(self) -> tuple[str, ...]:
    """The kinds of layers where a file does not say."""
    return presets.FAMILIES[MODEL_TYPES[self.model_types[0]].preset].pattern


ARCHITECTURES = {
  "llama": Architecture(
    ("llama", "mistral", "mixtral"), interleaved=True, unknown=()
  ),
  "qwen2": Architecture(("qwen2",)),
  "qwen3": Architecture(("qwen3",)),
  "qwen3moe": Architecture(("qwen3_moe",), expert_size=True),
  "gemma": Architecture(("gemma",), unknown=(*_LLAMAS, "output.weight")),
  "gemma2": Architecture(
    ("gemma2",),
    window=4_096,
    attention_softcap=50.0,
    logit_softcap=30.0,
    scaled_by_width=(46,),
    unknown=(*_LLAMAS, "output.weight"),
  ),
  "gemma3": Architecture(
    ("gemma3_text",), local_theta=1e4, scaled_by_width=(62,)
  ),
}

OF_MODEL_TYPE = {
  kind: name for name, row in ARCHITECTURES.items() for kind in row.model_types
}
"""model_type -> `general.architecture`."""


def model_type(metadata: Mapping[str, Any]) -> str | None:
  """Returns the model_type that a config.json would have, if one is meant."""
  name = str(metadata.get("general.architecture"))
  if name == "llama" and metadata.get("llama.expert_count"):
    return "mixtral"
  if name == "llama" and "llama.attention.sliding_window" in metadata:
    return "mistral"
  return ARCHITECTURES[name].model_types[0] if name in ARCHITECTURES else name


def check_known(name: str, architecture: str) -> None:
  """Raises UserError where llama.cpp would not open a file with a tensor."""
  known = ARCHITECTURES.get(architecture)
  if known is not None and name in known.unknown:
    raise UserError(
      f"GGUF: {name}: llama.cpp has none in architecture {architecture!r}, and "
      "does not open a file with one.\nKeep the model as --format=hf"
    )
