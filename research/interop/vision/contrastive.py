"""CLIP, SigLIP and SigLIP 2 in Hugging Face's format, both ways.

A new family is a row of `KINDS`: its towers, and what its files call tensors.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.interop import hf, quantized
from research.interop.vision import names, towers
from research.interop.vision.tower_params import read_tower, tower_tensors
from research.io.fields import Fields
from research.typing import Params, UserError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import presets, vit
from research.vlm.encoders.text import TextEncoder

Config = Mapping[str, Any]

_CLIP_TEXT = dict(
  vocab_size=49_408,
  hidden_size=512,
  intermediate_size=2048,
  num_hidden_layers=12,
  num_attention_heads=8,
  max_position_embeddings=77,
  hidden_act="quick_gelu",
  layer_norm_eps=1e-5,
  eos_token_id=49_407,
)
_SIGLIP_TEXT = _CLIP_TEXT | dict(
  vocab_size=32_000,
  hidden_size=768,
  intermediate_size=3072,
  num_attention_heads=12,
  max_position_embeddings=64,
  hidden_act="gelu_pytorch_tanh",
  layer_norm_eps=1e-6,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
  """A model type of two towers.

  Attributes:
    architecture: the class of transformers.
    image: the image tower, but for a projection.
    text: (the file's outermost fields, `text_config`, its place, dtype) -> the
      text tower.
    image_rows, text_rows: what the towers' tensors are called.
    projected: whether both end in a matrix to a shared space, which config.json
      has the size of and files keep outside of the towers (CLIP).
  """

  architecture: str
  image: towers.Tower
  text: Callable[[Fields, Config, str, str], TextEncoder]
  image_rows: Sequence[names.Row] = names.VISION
  text_rows: Sequence[names.Row] = names.SIGLIP_TEXT
  projected: bool = False

  @property
  def scalars(self) -> tuple[str, ...]:
    """Names of the scale and, for the sigmoid loss, the bias."""
    return ("logit_scale",) if self.projected else ("logit_scale", "logit_bias")


def _clip_text(outer: Fields, config, where, dtype) -> TextEncoder:
  fields = Fields(config, where, _CLIP_TEXT)
  end = fields.get("eos_token_id")
  tower = presets.clip_text(
    towers.sizes(fields),
    size=outer.integer("projection_dim"),
    vocab=fields.integer("vocab_size"),
    length=fields.integer("max_position_embeddings"),
    # Configurations of before transformers 4.31 say 2, and mean the greatest.
    end=None if end == 2 else end,
  )
  return tower.clone(dtype=dtype)


def _siglip_text(outer: Fields, config, where, dtype) -> TextEncoder:
  del outer
  fields = Fields(config, where, _SIGLIP_TEXT)
  tower = presets.siglip_text(
    towers.sizes(fields),
    vocab=fields.integer("vocab_size"),
    length=fields.integer("max_position_embeddings"),
    size=fields.maybe_integer("projection_size"),
  )
  return tower.clone(dtype=dtype)


KINDS: Mapping[str, Kind] = {
  "clip": Kind(
    architecture="CLIPModel",
    image=towers.CLIP,
    text=_clip_text,
    text_rows=names.CLIP_TEXT,
    projected=True,
  ),
  "siglip": Kind(
    architecture="SiglipModel", image=towers.SIGLIP, text=_siglip_text
  ),
  "siglip2": Kind(
    architecture="Siglip2Model",
    image=towers.NAFLEX,
    text=_siglip_text,
    image_rows=names.NAFLEX,
  ),
}
"""Model type -> its row. Files of SigLIP 2 without NaFlex are SigLIP's."""

_PROJECTIONS = {
  "image": "visual_projection.weight",
  "text": "text_projection.weight",
}
_INNER = "projection.weight"
"""A projection's name within its tower."""


def dual_encoder(
  config: Config, where: str, dtype: str = "float32"
) -> DualEncoder:
  """Returns the contrastive model of a config.json of one of `KINDS`."""
  kind = KINDS[config["model_type"]]
  outer = Fields(config, where, dict(projection_dim=512))
  vision, text = (
    dict(config.get(name) or {}) for name in ("vision_config", "text_config")
  )
  at_vision, at_text = f"{where}: vision_config", f"{where}: text_config"
  expected = kind.image.model_type
  if vision.setdefault("model_type", expected) != expected:
    raise Fields(vision, at_vision).wrong("model_type", expected)
  size = {"size": outer.integer("projection_dim")} if kind.projected else {}
  return DualEncoder(
    image=kind.image.read(vision, at_vision, dtype, **size),
    text=kind.text(outer, text, at_text, dtype),
    bias=None if kind.projected else 0.0,
  )


def contrastive_config(model: DualEncoder) -> dict[str, Any]:
  """Returns the config.json of a model; inverts `dual_encoder`.

  Raises:
    UserError: none of `KINDS` can describe it.
  """
  for name, kind in KINDS.items():
    if not kind.image.describes(model.image):
      continue
    config = _described(model, name, kind)
    again = dual_encoder(config, "the model's configuration", model.image.dtype)
    if (again.image, again.text) == (model.image, model.text):
      return config
  raise UserError(
    f"no config.json describes this model; tried {', '.join(KINDS)}.\n"
    "Expected the towers of one of these families."
  )


def _described(model: DualEncoder, name: str, kind: Kind) -> dict[str, Any]:
  text = model.text
  own = towers.written_sizes(text) | dict(
    vocab_size=text.vocab_size, max_position_embeddings=text.length
  )
  config = dict(
    model_type=name,
    architectures=[kind.architecture],
    text_config=own,
    vision_config={"model_type": kind.image.model_type}
    | kind.image.write(model.image),
    torch_dtype=model.image.dtype,
  )
  if kind.projected:
    end = getattr(text.read, "token", None)
    own |= dict(
      projection_dim=text.size, eos_token_id=2 if end is None else end
    )
    return config | dict(projection_dim=text.size)
  own["projection_size"] = text.size
  return config


def contrastive_params(
  model: DualEncoder,
  kind: str,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str = "float32",
  where: Any = "model",
) -> dict[str, Any]:
  """Returns a contrastive model's parameters out of a file's tensors.

  Raises:
    UserError: the tensors are not exactly the model's.
  """
  row = KINDS[kind]
  found: dict[str, dict[str, Any]] = {"image": {}, "text": {}, "": {}}
  outside = {name: part for part, name in _PROJECTIONS.items()}
  for name, tensor in tensors.items():
    if name in ("logit_scale", "logit_bias"):
      found[""][name] = tensor
    elif name in outside:
      found[outside[name]][_INNER] = tensor
    elif name.startswith("vision_model."):
      found["image"][name.removeprefix("vision_model.")] = tensor
    elif name.startswith("text_model."):
      found["text"][name.removeprefix("text_model.")] = tensor
    else:
      raise hf.mismatch(where, [], [name])
  scalars, expected = found[""], set(row.scalars)
  if set(scalars) != expected:
    raise hf.mismatch(
      where, sorted(expected - set(scalars)), sorted(set(scalars) - expected)
    )
  shapes = jax.eval_shape(
    lambda: vit.new_params(model.image, jax.random.key(0))
  )
  text_shapes = jax.eval_shape(lambda: _init_text(model.text))
  given = dtype, where
  out = {
    "image": read_tower(
      shapes, row.image_rows, found["image"], model.image, *given
    ),
    "text": read_tower(
      text_shapes, row.text_rows, found["text"], model.text, *given
    ),
  }
  for name, tensor in scalars.items():
    x = np.asarray(tensor.read())
    if x.size != 1:
      raise UserError(
        f"{where}: {name}: found shape {list(x.shape)}, expected one number"
      )
    out[name] = jnp.asarray(x, dtype).reshape(())
  return out


def contrastive_tensors(
  kind: str, params: Params, dtype: str = "float32"
) -> dict[str, np.ndarray]:
  """Returns every tensor under its name; inverts `contrastive_params`."""
  row, out = KINDS[kind], {}
  for part, prefix, rows in (
    ("image", "vision_model.", row.image_rows),
    ("text", "text_model.", row.text_rows),
  ):
    for name, x in tower_tensors(rows, params[part], dtype).items():
      outside = row.projected and name == _INNER
      out[_PROJECTIONS[part] if outside else prefix + name] = x
  for name in row.scalars:
    # CLIP's scale has no axis, SigLIP's has one.
    shape = () if row.projected else (1,)
    out[name] = np.asarray(params[name]).astype(dtype).reshape(shape)
  return out


def _init_text(model: TextEncoder) -> Params:
  tokens = jnp.zeros((1, model.length), jnp.int32)
  return model.init(jax.random.key(0), tokens)["params"]
