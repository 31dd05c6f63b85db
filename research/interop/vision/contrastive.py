"""CLIP and SigLIP in Hugging Face's format: configuration and tensors."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.interop import hf, quantized
from research.interop.vision import names, towers
from research.interop.vision.tower_params import read_tower
from research.io.fields import Fields
from research.typing import Params
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.encoders import presets, vit
from research.vlm.encoders.text import TextEncoder

MODEL_TYPES = ("clip", "siglip")

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


def dual_encoder(
  config: Mapping[str, Any], where: str, dtype: str = "float32"
) -> DualEncoder:
  """Returns the contrastive model of a config.json of one of `MODEL_TYPES`."""
  kind = config["model_type"]
  fields = Fields(config, where, dict(projection_dim=512))
  vision, text = (
    dict(config.get(name) or {}) for name in ("vision_config", "text_config")
  )
  at_vision, at_text = f"{where}: vision_config", f"{where}: text_config"
  expected = f"{kind}_vision_model"
  if vision.setdefault("model_type", expected) != expected:
    raise Fields(vision, at_vision).wrong("model_type", expected)
  if kind == "clip":
    size = fields.integer("projection_dim")
    return DualEncoder(
      image=towers.clip(vision, at_vision, dtype, size=size),
      text=_clip_text(text, at_text, dtype, size),
    )
  return DualEncoder(
    image=towers.siglip(vision, at_vision, dtype),
    text=_siglip_text(text, at_text, dtype),
    bias=0.0,
  )


def _clip_text(config, where, dtype, size) -> TextEncoder:
  fields = Fields(config, where, _CLIP_TEXT)
  end = fields.get("eos_token_id")
  tower = presets.clip_text(
    towers.sizes(fields),
    size=size,
    vocab=fields.integer("vocab_size"),
    length=fields.integer("max_position_embeddings"),
    # Configurations of before transformers 4.31 say 2, and mean the greatest.
    end=None if end == 2 else end,
  )
  return tower.clone(dtype=dtype)


def _siglip_text(config, where, dtype) -> TextEncoder:
  fields = Fields(config, where, _SIGLIP_TEXT)
  tower = presets.siglip_text(
    towers.sizes(fields),
    vocab=fields.integer("vocab_size"),
    length=fields.integer("max_position_embeddings"),
    size=fields.maybe_integer("projection_size"),
  )
  return tower.clone(dtype=dtype)


def contrastive_params(
  model: DualEncoder,
  kind: str,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str = "float32",
  where: Any = "model",
) -> dict[str, Any]:
  """Returns the parameters of CLIP or SigLIP out of a file's tensors.

  Args:
    model: what to fill.
    kind: one of `MODEL_TYPES`.
    tensors: by their names; exactly the model's.
    dtype: of the result.
    where: the file or directory, for messages.

  Raises:
    UserError: the tensors are not exactly the model's.
  """
  image: dict[str, Any] = {}
  text: dict[str, Any] = {}
  scalars: dict[str, Any] = {}
  for name, tensor in tensors.items():
    if name in ("logit_scale", "logit_bias"):
      scalars[name] = tensor
    elif name in ("visual_projection.weight", "text_projection.weight"):
      into = image if name.startswith("visual") else text
      into["projection.weight"] = tensor
    elif name.startswith("vision_model."):
      image[name.removeprefix("vision_model.")] = tensor
    elif name.startswith("text_model."):
      text[name.removeprefix("text_model.")] = tensor
    else:
      raise hf.mismatch(where, [], [name])
  text_rows = names.CLIP_TEXT if kind == "clip" else names.SIGLIP_TEXT
  expected = {"logit_scale"} | ({"logit_bias"} if kind == "siglip" else set())
  if set(scalars) != expected:
    raise hf.mismatch(
      where, sorted(expected - set(scalars)), sorted(set(scalars) - expected)
    )
  shapes = jax.eval_shape(
    lambda: vit.new_params(model.image, jax.random.key(0))
  )
  text_shapes = jax.eval_shape(lambda: _init_text(model.text))
  out = {
    "image": read_tower(shapes, names.VISION, image, model.image, dtype, where),
    "text": read_tower(text_shapes, text_rows, text, model.text, dtype, where),
  }
  for name, tensor in scalars.items():
    out[name] = jnp.asarray(tensor.read(), dtype).reshape(())
  return out


def _init_text(model: TextEncoder) -> Params:
  tokens = jnp.zeros((1, model.length), jnp.int32)
  return model.init(jax.random.key(0), tokens)["params"]
