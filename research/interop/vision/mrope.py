"""Language models that rotate by time, row and column, in config.json.

They are Qwen2's and Qwen3's but for `Rope.axes`. Of Qwen2-VL and Qwen2.5-VL the
Hub's files have the language model's fields in the outermost object; those that
transformers writes since have them in `text_config`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from research.interop.hf import config as hf_config
from research.interop.vision.families.family import (
  Config,
  Language,
  field_of,
  language_model,
)
from research.io.fields import Fields
from research.nn.multimodal import with_axes
from research.nn.rope import InterleavedSections, Sections
from research.nn.transformer import Transformer
from research.typing import UserError

_ROPE_FIELDS = {
  *("type", "rope_type", "rope_theta"),
  *("mrope_section", "mrope_interleaved"),
}


@dataclasses.dataclass(frozen=True)
class TextKind:
  """How a family's files describe such a language model.

  Attributes:
    model_type: of the text fields.
    base: the model type of the same layers with one coordinate.
    axes: the kind of rotary axes.
    sections: of a file that says none.
    defaults: of fields that a file leaves out.
  """

  model_type: str
  base: str
  axes: type[Sections] | type[InterleavedSections]
  sections: tuple[int, int, int]
  defaults: Mapping[str, Any]

  def language(self) -> Language:
    return Language(self.model_type, _fields, self.read, self.write)

  def read(self, text: Config, where: str, dtype: str) -> Transformer:
    """Returns the language model of its text fields.

    Raises:
      UserError: another model type, or a rotation that is not M-RoPE's.
    """
    fields = Fields(text, where, self.defaults)
    if text.get("model_type") != self.model_type:
      raise fields.wrong("model_type", self.model_type)
    theta, sections = self._rotation(fields)
    plain = {**self.defaults, **text, "model_type": self.base}
    plain |= dict(rope_theta=theta, rope_scaling=None, rope_parameters=None)
    model = language_model(plain, where, dtype)
    head_dim = model.stack.blocks[0].attention.head_dim
    if sum(sections) != head_dim // 2:
      raise UserError(
        f"{where}: mrope_section is {list(sections)}, expected"
        f" {head_dim // 2} in total, half of a head's dimensions"
      )
    return with_axes(model, self.axes(sizes=sections))

  def _rotation(self, fields: Fields) -> tuple[float, tuple[int, ...]]:
    given = fields.object("rope_scaling") or fields.object("rope_parameters")
    given = given or Fields({}, fields.where)
    unknown = sorted(set(given.values) - _ROPE_FIELDS)
    if unknown:
      raise given.wrong(unknown[0], "no such field beside mrope_section")
    for name in ("type", "rope_type"):
      given.neutral({name: (None, "default", "mrope")})
    if self.axes is InterleavedSections:
      given.neutral({"mrope_interleaved": (None, True)})
    else:
      given.neutral({"mrope_interleaved": (None, False)})
    sections = given.get("mrope_section")
    sections = self.sections if sections is None else sections
    ok = isinstance(sections, list | tuple) and len(sections) == 3
    if not ok or any(type(x) is not int or x < 1 for x in sections):
      raise given.wrong("mrope_section", "three whole numbers")
    source = given if given.get("rope_theta") is not None else fields
    return source.number("rope_theta"), tuple(sections)

  def write(self, model: Transformer) -> dict[str, Any]:
    """Returns the text fields of a language model; inverts `read`.

    Raises:
      UserError: it is none of this kind.
    """
    attention = model.stack.blocks[0].attention
    axes = attention.rope and attention.rope.axes
    if type(axes) is not self.axes or len(axes.sizes) != 3:
      raise UserError(
        f"{self.model_type}: found rotary axes {axes}, expected"
        f" {self.axes.__name__} of three sizes"
      )
    values = hf_config.config_from_model(with_axes(model, None), self.base)
    rotation: dict[str, Any] = {"mrope_section": list(axes.sizes)}
    if self.axes is InterleavedSections:
      rotation |= dict(rope_type="default", mrope_interleaved=True)
    else:
      rotation["type"] = "mrope"
    return values | dict(model_type=self.model_type, rope_scaling=rotation)


def _fields(config: Config) -> dict[str, Any]:
  """Returns the text fields of a config.json, wherever they are."""
  if config.get("text_config"):
    return field_of(config, "text_config")
  outer = ("model_type", "vision_config", "architectures")
  return {k: v for k, v in config.items() if k not in outer}


_QWEN2 = dict(
  hidden_act="silu",
  rms_norm_eps=1e-5,
  rope_theta=1_000_000.0,
  vocab_size=152_064,
  hidden_size=8_192,
  intermediate_size=29_568,
  num_hidden_layers=80,
  num_attention_heads=64,
  num_key_value_heads=8,
  max_position_embeddings=32_768,
  max_window_layers=80,
  sliding_window=4_096,
)

_qwen2 = functools.partial(
  TextKind,
  base="qwen2",
  axes=Sections,
  sections=(16, 24, 24),
  defaults=_QWEN2,
)

QWEN2_VL = _qwen2("qwen2_vl_text")
QWEN2_5_VL = _qwen2("qwen2_5_vl_text")
QWEN3_VL = TextKind(
  "qwen3_vl_text",
  base="qwen3",
  axes=InterleavedSections,
  sections=(24, 20, 20),
  defaults=dict(
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=500_000.0,
    vocab_size=151_936,
    hidden_size=4_096,
    intermediate_size=22_016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=128_000,
    use_sliding_window=False,
  ),
)
