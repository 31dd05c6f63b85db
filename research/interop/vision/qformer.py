"""BLIP-2's Q-Former in Hugging Face's files, by itself.

The vision tower and the language model of a BLIP-2 file (EVA-CLIP's, and OPT or
T5) are not read: the Q-Former connects any two others.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.interop import hf, quantized
from research.interop.vision import names
from research.interop.vision.tower_params import read_tower, tower_tensors
from research.interop.vision.towers import ACTIVATIONS
from research.io.fields import Fields
from research.typing import Params, UserError
from research.vlm.bootstrapping.model import CaptionHead, ImageTextModel
from research.vlm.connectors.qformer import QFormer, qformer

_LAYER = names.LAYER
_THEIRS = "qformer.encoder.layer.<i>."


def _attention(ours: str, theirs: str) -> tuple[names.Row, ...]:
  parts = zip("qkv", ("query", "key", "value"), strict=True)
  inner = _THEIRS + theirs
  return (
    *(
      row
      for x, part in parts
      for row in names.linear(
        f"{_LAYER}{ours}/{x}", f"{inner}.attention.{part}"
      )
    ),
    *names.linear(f"{_LAYER}{ours}/o", f"{inner}.output.dense"),
    *names.norm(f"{_LAYER}{ours}_norm", f"{inner}.output.LayerNorm"),
  )


def _mlp(ours: str, suffix: str) -> tuple[names.Row, ...]:
  enter, leave = f"{_THEIRS}intermediate{suffix}", f"{_THEIRS}output{suffix}"
  return (
    *names.linear(f"{_LAYER}{ours}/up", f"{enter}.dense"),
    *names.linear(f"{_LAYER}{ours}/down", f"{leave}.dense"),
    *names.norm(f"{_LAYER}{ours}_norm", f"{leave}.LayerNorm"),
  )


QFORMER = (
  names.Row("latents", "query_tokens", names.FIRST_OF_ONE),
  *names.norm("input_norm", "qformer.layernorm"),
  *_attention("attention", "attention"),
  *_attention("cross_attention", "crossattention"),
  *_mlp("mlp", "_query"),
  *_mlp("text_mlp", ""),
  *names.linear("projection", "language_projection"),
)
"""The connector of Blip2ForConditionalGeneration."""

TEXTS = (
  names.Row("embed", "embeddings.word_embeddings.weight"),
  names.Row("positions", "embeddings.position_embeddings.weight"),
  *names.linear("image_projection", "vision_projection"),
  *names.linear("text_projection", "text_projection"),
  *names.linear("match_projection", "itm_head"),
  names.Row("temperature", "temp", names.SCALAR),
  *names.linear("caption/projection", "cls.predictions.transform.dense"),
  *names.norm("caption/norm", "cls.predictions.transform.LayerNorm"),
  names.Row("caption/bias", "cls.predictions.bias"),
)
"""The rest of Blip2ForImageTextRetrieval, which has no temperature and no
caption head: those have the authors' names (LAVIS)."""

_OTHERS = re.compile(r"(vision_model|language_model)\.")

_DEFAULTS = dict(
  vocab_size=30_522,
  hidden_size=768,
  num_hidden_layers=12,
  num_attention_heads=12,
  intermediate_size=3_072,
  hidden_act="gelu",
  max_position_embeddings=512,
  layer_norm_eps=1e-12,
  cross_attention_frequency=2,
  use_qformer_text_input=False,
)


def qformer_from_config(
  config: Mapping[str, Any], where: str, size: int, *, text: bool = False
) -> QFormer:
  """Returns the Q-Former of a config.json of model type blip-2.

  Args:
    config: the object.
    where: its file, for messages.
    size: width of the language model.
    text: whether it takes texts.
  """
  if config.get("model_type") != "blip-2":
    raise UserError(
      f"{where}: model_type is {config.get('model_type')!r}, expected 'blip-2'"
    )
  inner = dict(config.get("qformer_config") or {})
  fields = Fields(inner, f"{where}: qformer_config", _DEFAULTS)
  if ACTIVATIONS.get(fields.get("hidden_act")) != "gelu":
    raise fields.wrong("hidden_act", "gelu")
  width = fields.integer("hidden_size")
  heads = fields.divisor("num_attention_heads", width)
  outer = Fields(config, where, dict(num_query_tokens=32))
  return qformer(
    size,
    width=width,
    depth=fields.integer("num_hidden_layers", most=hf.config.MAX_DEPTH),
    heads=heads,
    hidden=fields.integer("intermediate_size"),
    queries=outer.integer("num_query_tokens"),
    every=fields.integer("cross_attention_frequency"),
    text=text,
    eps=fields.number("layer_norm_eps"),
  )


def image_text_model(
  config: Mapping[str, Any], where: str, *, caption: CaptionHead | None = None
) -> ImageTextModel:
  """Returns the first stage's model of a config.json of model type blip-2.

  Args:
    config, where: as for `qformer_from_config`.
    caption: head of the captioning objective, which files of transformers do
      not have.
  """
  inner = dict(config.get("qformer_config") or {})
  fields = Fields(inner, f"{where}: qformer_config", _DEFAULTS)
  outer = Fields(config, where, dict(image_text_hidden_size=256))
  return ImageTextModel(
    qformer=qformer_from_config(config, where, 1, text=True),
    vocab_size=fields.integer("vocab_size"),
    length=fields.integer("max_position_embeddings"),
    size=outer.integer("image_text_hidden_size"),
    caption=caption,
  )


def qformer_params(
  model: QFormer,
  tensors: Mapping[str, quantized.Tensor],
  features: int,
  dtype: str = "float32",
  where: Any = "model",
) -> dict[str, Any]:
  """Returns a Q-Former's parameters out of a BLIP-2 file's tensors.

  Args:
    model: what to fill.
    tensors: by their names; those of other towers are left alone.
    features: width of the encoder's features.
    dtype: of the result.
    where: the file or directory, for messages.

  Raises:
    UserError: its tensors are not exactly the model's.
  """
  x = jnp.zeros((1, 1, features))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), x, (1, 1))["params"]
  )
  own = {k: x for k, x in tensors.items() if not _OTHERS.match(k)}
  return read_tower(shapes, QFORMER, own, model, dtype, where)


def image_text_params(
  model: ImageTextModel,
  tensors: Mapping[str, quantized.Tensor],
  features: int,
  dtype: str = "float32",
  where: Any = "model",
) -> dict[str, Any]:
  """Returns the first stage's parameters; arguments as for `qformer_params`.

  A temperature that the file lacks is the model's initial one.
  """
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0),
      jnp.zeros((1, 1, features)),
      jnp.zeros((1, 1), jnp.int32),
      jnp.ones((1, 1), bool),
    )["params"]
  )
  own = {k: x for k, x in tensors.items() if not _OTHERS.match(k)}
  start = {}
  if "temp" not in own:
    start["temperature"] = jnp.asarray(model.temperature, dtype)
    shapes = {k: x for k, x in shapes.items() if k != "temperature"}
  inner = {row.theirs.split("<i>")[0] for row in QFORMER}
  of_qformer = {k: x for k, x in own.items() if k.startswith(tuple(inner))}
  rest = {k: x for k, x in own.items() if k not in of_qformer}
  outside = {k: x for k, x in shapes.items() if k != "qformer"}
  out = read_tower(outside, TEXTS, rest, None, dtype, where)
  out["qformer"] = read_tower(
    shapes["qformer"], QFORMER, of_qformer, model.qformer, dtype, where
  )
  return out | start


def qformer_tensors(
  params: Params, dtype: str = "float32"
) -> dict[str, np.ndarray]:
  """Returns a Q-Former's tensors under the names of a BLIP-2 file.

  Args:
    params: of a `QFormer`; packed weights are decoded.
    dtype: of the tensors.
  """
  return tower_tensors(QFORMER, params, dtype)


def image_text_tensors(
  params: Params, dtype: str = "float32"
) -> dict[str, np.ndarray]:
  """Returns the first stage's tensors; arguments as for `qformer_tensors`."""
  outside = {k: x for k, x in params.items() if k != "qformer"}
  out = tower_tensors(TEXTS, outside, dtype)
  return out | qformer_tensors(params["qformer"], dtype)
