"""adapter_config.json: which weights get adapters of which form.

lora.md sections 6.4 and 6.5. A field that is not understood and does not say
"off" is an error: it may change what the adapter computes.
"""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.interop import safetensors
from research.interop.fields import Fields
from research.lora import adapt, match, peft_whole
from research.typing import UserError

CONFIG = "adapter_config.json"

_DEFAULTS = dict(r=8, lora_alpha=8, lora_dropout=0.0)
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")

_OFF: dict[str, tuple[Any, ...]] = {
  "use_dora": (None, False),
  "trainable_token_indices": (None, [], {}),
  "target_parameters": (None, []),
  "layer_replication": (None, []),
  "lora_bias": (None, False),
  "fan_in_fan_out": (None, False),
}
"""Features that are not supported: field -> values that mean "off"."""

_UNDERSTOOD = {
  *_OFF,
  *_DEFAULTS,
  "peft_type",
  "use_rslora",
  "rank_pattern",
  "alpha_pattern",
  "target_modules",
  "exclude_modules",
  "layers_to_transform",
  "layers_pattern",
  "init_lora_weights",
  "base_model_name_or_path",
  "modules_to_save",
  "bias",
  "ensure_weight_tying",
}
_HARMLESS = {
  "task_type",
  "inference_mode",
  "auto_mapping",
  "revision",
  "peft_version",
  "megatron_core",
  "qalora_group_size",
  "loftq_config",
  "eva_config",
  "corda_config",
  "lora_ga_config",
}
BIASES = ("none", "all", "lora_only")
"""Which biases of the base an adapter brings along."""


def _texts(fields: Fields, name: str) -> match.Names:
  x = fields.get(name)
  if isinstance(x, list) and all(isinstance(t, str) for t in x):
    return tuple(x)
  if x is None or isinstance(x, str):
    return x
  raise fields.wrong(name, "a list of names or a regular expression")


def _values(fields: Fields, name: str) -> dict[str, Any]:
  inner = fields.object(name)
  if inner is None:
    return {}
  read = inner.integer if name == "rank_pattern" else inner.number
  return {key: read(key) for key in inner.values}


def _targets(fields: Fields) -> match.Targets:
  layers = fields.get("layers_to_transform")
  layers = [layers] if type(layers) is int else layers
  if layers is not None and not (
    isinstance(layers, list) and all(type(i) is int for i in layers)
  ):
    raise fields.wrong("layers_to_transform", "whole numbers")
  containers = _texts(fields, "layers_pattern")
  if isinstance(containers, str):
    containers = (containers,)
  targets = match.Targets(
    target=_texts(fields, "target_modules"),
    exclude=_texts(fields, "exclude_modules"),
    layers=None if layers is None else tuple(layers),
    containers=containers or None,
  )
  if layers and isinstance(targets.target, str):
    raise fields.wrong("layers_to_transform", "null beside a pattern")
  return targets


def whole_modules(fields: Fields) -> tuple[str, ...]:
  """Returns modules_to_save: the ends of names of modules."""
  found = fields.get("modules_to_save")
  if found is None:
    return ()
  ok = isinstance(found, list) and all(isinstance(m, str) for m in found)
  if not ok or "" in found:
    raise fields.wrong("modules_to_save", "a list of names, or null")
  return tuple(found)


def bias_mode(fields: Fields) -> str:
  """Returns which biases are trained."""
  found = fields.get("bias") or "none"
  if found not in BIASES:
    raise fields.wrong("bias", f"one of {', '.join(BIASES)}")
  return found


def read_config(directory: pathlib.Path) -> Fields:
  """Returns adapter_config.json; what it asks for is supported here.

  Raises:
    UserError: it is damaged, or names a method or feature that is not.
  """
  path = directory / CONFIG
  fields = Fields(safetensors.read_json(path), str(path), _DEFAULTS)
  if fields.get("peft_type") != "LORA":
    raise fields.wrong("peft_type", "'LORA'")
  fields.neutral(_OFF)
  init = fields.get("init_lora_weights")
  if init not in _INITS:
    raise fields.wrong(
      "init_lora_weights",
      "true: such methods change the base, which this adapter lacks; convert "
      "it with PEFT's path_initial_model_for_weight_conversion",
    )
  for name in sorted(set(fields.values) - _UNDERSTOOD - _HARMLESS):
    if fields.get(name) not in (None, False, [], {}, ""):
      raise fields.wrong(name, "no such field, or null: it is not supported")
  return fields


def read_specs(
  fields: Fields, modules: Mapping[str, str]
) -> dict[str, adapt.Spec]:
  """Returns what a configuration adapts, and how, by address.

  Args:
    fields: the configuration.
    modules: module names by address.
  """
  targets, whole = _targets(fields), whole_modules(fields)
  ranks = _values(fields, "rank_pattern")
  alphas = _values(fields, "alpha_pattern")
  rank, alpha = fields.integer("r"), fields.number("lora_alpha")
  dropout = fields.get("lora_dropout")
  if type(dropout) not in (int, float) or not 0 <= dropout < 1:
    raise fields.wrong("lora_dropout", "at least 0 and below 1")
  rslora = fields.flag("use_rslora")
  specs = {}
  for path, module in modules.items():
    if targets.match(module) and not peft_whole.not_adapted(module, whole):
      r = match.by_pattern(module, ranks, rank, "rank_pattern")
      a = match.by_pattern(module, alphas, alpha, "alpha_pattern")
      scale = a / (r**0.5 if rslora else r)
      specs[path] = adapt.Spec(rank=r, scale=scale, dropout=float(dropout))
  if not specs and not whole:
    raise fields.wrong("target_modules", "names of modules of the base model")
  return specs


def make_config(
  forms: Mapping[str, tuple[int, float, float]],
  modules: Sequence[str],
  base_name: str,
  use_rslora: bool,
  whole: Sequence[str] = (),
  bias: str = "none",
  tied: bool = False,
) -> dict[str, Any]:
  """Returns adapter_config.json.

  Args:
    forms: (rank, alpha, dropout) of each adapted module, by its name.
    modules: names of all modules that could be adapted.
    base_name: of the base model.
    use_rslora: whether the scale is `alpha / sqrt(r)`.
    whole: modules_to_save.
    bias: which of `BIASES` are brought along.
    tied: ensure_weight_tying.
  """
  dropouts = {dropout for _, _, dropout in forms.values()}
  if len(dropouts) > 1:
    raise UserError(f"PEFT has one dropout an adapter, found {dropouts}")

  def usual(i):
    return collections.Counter(f[i] for f in forms.values()).most_common(1)[0][
      0
    ]

  def exact(module):
    # Sorted on writing, and the first match wins: only keys that match one
    # module each mean the same afterwards.
    return f"^{re.escape(module)}"

  def number(x):
    return int(x) if x == int(x) else x

  rank, alpha = usual(0), usual(1)
  suffixes = sorted({module.rsplit(".", 1)[-1] for module in forms})
  covered = {m for m in modules if m.rsplit(".", 1)[-1] in suffixes}
  # Older versions of PEFT stop at a field that they do not know.
  rest = dict(ensure_weight_tying=True) if tied else {}
  return rest | dict(
    peft_type="LORA",
    task_type="CAUSAL_LM",
    base_model_name_or_path=base_name,
    inference_mode=True,
    r=rank,
    lora_alpha=number(alpha),
    lora_dropout=dropouts.pop(),
    bias=bias,
    fan_in_fan_out=False,
    use_rslora=use_rslora,
    use_dora=False,
    init_lora_weights=True,
    modules_to_save=sorted(whole) or None,
    target_modules=suffixes if covered == set(forms) else sorted(forms),
    rank_pattern={exact(m): f[0] for m, f in forms.items() if f[0] != rank},
    alpha_pattern={
      exact(m): number(f[1]) for m, f in forms.items() if f[1] != alpha
    },
  )
