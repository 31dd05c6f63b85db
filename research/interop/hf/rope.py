"""Rotations in config.json: the old spelling and the new one.

The old one is `rope_theta` with `rope_scaling`; since transformers 5 it is
`rope_parameters`, flat or with one object a layer type.
"""

import dataclasses
from typing import Any

from research.io.fields import Fields
from research.nn import rope
from research.nn.attention import Attention
from research.typing import UserError

KINDS = {"full_attention": "global", "sliding_attention": "local"}
"""Their layer type -> the kind of layer in `presets`."""

_ROPE_FIELDS = {
  "default": set(),
  "linear": {"factor"},
  "dynamic": {"factor", "original_max_position_embeddings"},
  "llama3": {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  },
  "yarn": {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "finetuned",
  },
}


def from_config(
  fields: Fields, separate_local: bool
) -> tuple[float, float | None, rope.Scaling | None]:
  """Returns theta, the local layers' theta (None if shared), the scaling.

  Args:
    separate_local: whether windowed layers always have a rotation of their
      own, unscaled (Gemma 3).

  Raises:
    UserError: an unknown or incomplete scaling.
  """
  given = fields.object("rope_scaling") or fields.object("rope_parameters")
  given = given or Fields({}, fields.where)
  if not set(given.values) & set(KINDS):
    theta, scaling = _one_rotation(fields, given)
    local = None
    if separate_local:
      local = fields.number("rope_local_base_freq")
    return theta, local, scaling
  unknown = set(given.values) - set(KINDS)
  if unknown:
    raise given.wrong(sorted(unknown)[0], f"only {' and '.join(KINDS)} here")
  empty = Fields({}, given.where)
  full = given.object("full_attention") or empty
  local_fields = given.object("sliding_attention") or empty
  local_fields = dataclasses.replace(
    local_fields,
    defaults=dict(
      rope_theta=fields.get("rope_local_base_freq") or fields.get("rope_theta")
    ),
  )
  theta, scaling = _one_rotation(fields, full)
  local, local_scaling = _one_rotation(fields, local_fields)
  if not separate_local and (local, local_scaling) == (theta, scaling):
    return theta, None, scaling
  if local_scaling is not None:
    raise UserError(
      f"{local_fields.where}: rope_type of windowed layers is "
      f"{local_fields.get('rope_type')!r}, expected 'default'"
    )
  return theta, local, scaling


def _one_rotation(
  fields: Fields, given: Fields
) -> tuple[float, rope.Scaling | None]:
  if given.get("rope_theta") is not None:
    theta = given.number("rope_theta")
  else:
    theta = fields.number("rope_theta")
  return theta, _scaling(fields, given)


def _scaling(fields: Fields, given: Fields) -> rope.Scaling | None:
  name = "rope_type" if "rope_type" in given.values else "type"
  kind = given.get(name) or "default"
  if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
    raise given.wrong(name, f"one of {', '.join(_ROPE_FIELDS)}")
  given.neutral({"partial_rotary_factor": (None, 1.0)})
  known = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
  unknown = set(given.values) - known - _ROPE_FIELDS[kind]
  if unknown:
    raise given.wrong(
      sorted(unknown)[0], f"no such field in rope_type {kind!r}"
    )
  if kind == "default":
    return None
  longest = fields.integer("max_position_embeddings")
  name = "original_max_position_embeddings"
  source = fields if fields.get(name) is not None else given
  original = source.maybe_integer(name) or longest
  if kind == "yarn" and given.get("factor") is None:
    factor = longest / original
  else:
    factor = given.number("factor")
  if kind == "linear":
    return rope.Linear(factor=factor)
  if kind == "dynamic":
    # Its length is the configured one, whatever `original` says.
    return rope.Dynamic(factor=factor, original=longest)
  if kind == "llama3":
    low = given.number("low_freq_factor")
    high = given.number("high_freq_factor")
    if high <= low:
      raise given.wrong("high_freq_factor", f"more than {low}")
    return rope.Llama3(factor=factor, low=low, high=high, original=original)
  return rope.Yarn(
    factor=factor,
    original=original,
    fast=given.maybe_number("beta_fast") or 32.0,
    slow=given.maybe_number("beta_slow") or 1.0,
    attention=given.maybe_number("attention_factor"),
    mscale=given.maybe_number("mscale"),
    mscale_all=given.maybe_number("mscale_all_dim"),
    truncate=given.get("truncate") is None or given.flag("truncate"),
  )


def to_config(value: rope.Rope) -> dict[str, Any]:
  """Returns the fields of config.json for a rotation, in the old spelling.

  Every version of transformers reads that one.
  """
  return dict(
    rope_theta=value.theta, rope_scaling=_scaling_to_config(value.scaling)
  )


def _scaling_to_config(scaling: rope.Scaling | None) -> dict[str, Any] | None:
  original = "original_max_position_embeddings"
  match scaling:
    case None:
      return None
    case rope.Linear():
      return dict(rope_type="linear", factor=scaling.factor)
    case rope.Dynamic():
      return dict(rope_type="dynamic", factor=scaling.factor)
    case rope.Llama3():
      return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        original: scaling.original,
      }
  optional = dict(
    attention_factor=scaling.attention,
    mscale=scaling.mscale,
    mscale_all_dim=scaling.mscale_all,
    truncate=None if scaling.truncate else False,
  )
  return {
    "rope_type": "yarn",
    "factor": scaling.factor,
    original: scaling.original,
    "beta_fast": scaling.fast,
    "beta_slow": scaling.slow,
  } | {k: v for k, v in optional.items() if v is not None}


def layer_type(attention: Attention) -> str:
  """Returns their name for a layer with or without a window."""
  kind = "global" if attention.window is None else "local"
  return {v: k for k, v in KINDS.items()}[kind]
