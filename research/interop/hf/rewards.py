"""Reward models in Hugging Face's format, both ways.

A body under the usual names, and a head under those of its layout:

  classification  transformers' ForTokenClassification and
                  ForSequenceClassification: `score.weight`, `score.bias`
  mlp             Qwen2.5-Math-PRM: `score.0`, `score.2`
  value           TRL's value head, Skywork's: `v_head.summary`

The tensors decide which it is. `lm_head` is kept where a file has it, since it
is then part of the file, and never read.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop import parts as all_parts
from research.interop import quantized
from research.interop.hf import read, write
from research.interop.hf.families import MODEL_TYPES
from research.interop.hf.names import HEAD, Row
from research.interop.parts import DTYPES
from research.io import safetensors, unread
from research.lora.merge import changes
from research.prm.heads import SCORE, Head, LinearHead, MlpHead
from research.prm.model import RewardModel
from research.typing import Params, UserError

_HEAD = re.compile(r"(score|v_head)\.")
_DROPOUT = 0.1
"""Of transformers' token classifiers and TRL's value heads, by default."""
_DROPOUT_FIELDS = {
  "classification": "classifier_dropout",
  "value": "summary_dropout_prob",
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of a head's tensors, and the end of its class's name.

  Attributes:
    rows: our paths and their names.
    suffix: after the family, in `architectures`.
  """

  rows: tuple[Row, ...]
  suffix: str


LAYOUTS = {
  "classification": Layout(
    (
      Row("score/out", "score.weight", transposed=True),
      Row("score/out_bias", "score.bias"),
    ),
    "ForTokenClassification",
  ),
  "mlp": Layout(
    (
      Row("score/up", "score.0.weight", transposed=True),
      Row("score/up_bias", "score.0.bias"),
      Row("score/out", "score.2.weight", transposed=True),
      Row("score/out_bias", "score.2.bias"),
    ),
    "ForProcessRewardModel",
  ),
  "value": Layout(
    (
      Row("score/out", "v_head.summary.weight", transposed=True),
      Row("score/out_bias", "v_head.summary.bias"),
    ),
    "ForCausalLMWithValueHead",
  ),
}


def load_reward_model(
  directory: str | pathlib.Path,
  dtype: str = "float32",
  shardings: unread.Shardings | None = None,
) -> tuple[RewardModel, dict[str, Any], dict[str, Any]]:
  """Returns (model, params, source) of a reward model's directory.

  Args:
    dtype: of the body's parameters and of the computation; the head's are
      float32.

  Raises:
    UserError: there is no head, or anything is missing, damaged or of another
      shape.
  """
  directory = pathlib.Path(directory)
  if dtype not in DTYPES:
    raise UserError(f"dtype: found {dtype!r}, expected one of {DTYPES}")
  backbone, tensors, source = read.open_model(directory, dtype)
  own = {k: v for k, v in tensors.items() if _HEAD.match(k)}
  body = {k: v for k, v in tensors.items() if k not in own}
  name = _layout(own, directory)
  if HEAD not in body:
    backbone = backbone.clone(tied=True)
  rows = {row.ours: row for row in LAYOUTS[name].rows if row.theirs in own}
  config = source["config"]
  head = _head(name, rows, own, config, str(directory / "config.json"))
  _check_shapes(backbone.width, rows, own, head)
  described = read.unread_params(backbone, body, dtype, directory)
  filled = dict(described)
  filled[SCORE] = {
    path.removeprefix(f"{SCORE}/"): unread.stacked(
      [read.filler(own[row.theirs], row.transposed)],
      (),
      own[row.theirs].shape[:: -1 if row.transposed else 1],
      np.dtype("float32"),
    )
    for path, row in rows.items()
  }
  model = RewardModel(backbone=backbone, head=head)
  return model, unread.place(filled, shardings), source | {"layout": name}


def write_reward_model(
  directory: str | pathlib.Path,
  model: RewardModel,
  params: Params,
  config: Mapping[str, Any] | None = None,
  layout: str | None = None,
  dtype: str | None = None,
  shard_size: int = safetensors.SHARD_SIZE,
) -> changes.Log:
  """Writes a reward model; adapters are merged, packed weights decoded.

  Args:
    config: the source's config.json, or None.
    layout: a key of `LAYOUTS`; None for the head's own.

  Raises:
    UserError: the layout has no names for this head.
  """
  directory, log = pathlib.Path(directory), changes.Log()
  own_layout = "mlp" if isinstance(model.head, MlpHead) else "classification"
  name = layout or own_layout
  if name not in LAYOUTS:
    raise UserError(
      f"layout: found {layout!r}, expected one of {', '.join(LAYOUTS)}"
    )
  every = all_parts.from_params(params)
  scored = f"{SCORE}/"
  own = {a: p for a, p in every.items() if a.path.startswith(scored)}
  body = {a: p for a, p in every.items() if a not in own}
  rows = {row.ours: row for row in LAYOUTS[name].rows}
  if not {a.path for a in own} <= set(rows):
    raise UserError(
      f"layout {name}: has no names for"
      f" {', '.join(sorted({a.path for a in own} - set(rows)))}; expected a"
      " layout of this head, see rewards.LAYOUTS."
    )
  found = write.tensors(model.backbone, body, dtype, log)
  for address, part in own.items():
    row = rows[address.path]
    found[row.theirs] = write.pending(row, part, dtype, log)
  safetensors.write_directory(directory, found, shard_size)
  bias = any(a.path == f"{SCORE}/out_bias" for a in own)
  described = _config(model, name, config, dtype, bias)
  safetensors.write_json(directory / "config.json", described)
  return log


def _layout(
  own: Mapping[str, quantized.Tensor], directory: pathlib.Path
) -> str:
  for name, layout in LAYOUTS.items():
    names = {row.theirs for row in layout.rows}
    # Only a classifier's bias may be missing.
    optional = {"score.bias"}
    if own and names - optional <= set(own) <= names:
      return name
  found = ", ".join(sorted(own)) or "no tensor of a head"
  raise UserError(
    f"{directory}: found {found}, expected those of a reward model:"
    f" {'; '.join(x.rows[0].theirs for x in LAYOUTS.values())}."
  )


def _head(
  name: str,
  rows: Mapping[str, Row],
  own: Mapping[str, quantized.Tensor],
  config: Mapping[str, Any],
  where: str,
) -> Head:
  outputs = own[rows["score/out"].theirs].shape[0]
  if name == "mlp":
    return MlpHead(outputs=outputs)
  bias, dropout = "score/out_bias" in rows, 0.0
  if bias:
    field = _DROPOUT_FIELDS[name]
    given = config.get(field)
    dropout = _DROPOUT if given is None else given
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
      raise UserError(
        f"{where}: {field} is {given!r:.60}, expected a share from 0 to below 1"
      )
  return LinearHead(outputs=outputs, bias=bias, dropout=float(dropout))


def _check_shapes(
  width: int,
  rows: Mapping[str, Row],
  own: Mapping[str, quantized.Tensor],
  head: Head,
) -> None:
  sizes = {
    "score/out": (head.outputs, width),
    "score/out_bias": (head.outputs,),
    "score/up": (width, width),
    "score/up_bias": (width,),
  }
  for path, row in rows.items():
    tensor = own[row.theirs]
    if tensor.shape != sizes[path]:
      raise UserError(
        f"{tensor.file}: {row.theirs} has shape {list(tensor.shape)}, expected"
        f" {list(sizes[path])} by config.json"
      )


def _config(
  model: RewardModel,
  name: str,
  given: Mapping[str, Any] | None,
  dtype: str | None,
  bias: bool,
) -> dict[str, Any]:
  backbone = model.backbone
  if given is not None and given.get("tie_word_embeddings") is False:
    backbone = backbone.clone(tied=False)  # whose head the file left out
  config = write.config_json(backbone, given, dtype)
  suffix = LAYOUTS[name].suffix
  if name == "classification" and not bias:
    suffix = "ForSequenceClassification"
  known = MODEL_TYPES.get(config["model_type"])
  if known is not None:
    family = re.sub(r"For\w+$|LMHeadModel$", "", known.architecture)
    config["architectures"] = [family + suffix]
  labels = [f"LABEL_{i}" for i in range(model.head.outputs)]
  if len(config.get("id2label", ())) != len(labels):
    config["id2label"] = {str(i): name for i, name in enumerate(labels)}
    config["label2id"] = {name: i for i, name in enumerate(labels)}
  if isinstance(model.head, LinearHead) and bias:
    field = _DROPOUT_FIELDS[name]
    if config.get(field, _DROPOUT) != model.head.dropout:
      config[field] = model.head.dropout
  return config
