"""adapter_config.json: which weights get adapters of which form.

research/lora/MATH.md 7.2, 7.3. A field that is not understood and does not say
"off" is an error: it may change what the adapter computes.

A new field is named in `_UNDERSTOOD`, or in `_HARMLESS` if it changes nothing
that is computed; a function here reads it, and `make_config` writes it. Fields
of one method are its own file's, in `research/lora/methods` (`PEFT_DEFAULTS`,
`from_fields`, `peft_fields`).
"""

import collections
import dataclasses
import pathlib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from research.interop.loaded import ADAPTER_CONFIG as CONFIG
from research.interop.peft.names import Naming
from research.interop.peft.targets import (
  Names,
  Targets,
  by_pattern,
  is_saved,
  not_adapted,
)
from research.io import safetensors
from research.io.fields import Fields
from research.lora.method import Method
from research.lora.methods import all_methods, of_peft_type
from research.lora.methods import tokens as token_rows
from research.lora.methods.tokens import Tokens
from research.typing import UserError

TOKENS = "trainable_token_indices"
"""Which tokens get rows of their own."""

EXPERTS = "target_parameters"
"""Which stacked experts get adapters, see `experts`."""

_INITS = (None, True, False, "gaussian", "orthogonal", "eva")

_OFF: dict[str, tuple[Any, ...]] = {
  "layer_replication": (None, []),
  "lora_bias": (None, False),
}
"""Features that are not supported: field -> values that mean "off"."""

_LORA_ONLY: dict[str, tuple[Any, ...]] = {
  TOKENS: (None, [], {}),
  EXPERTS: (None, []),
}
"""Those that PEFT has for LoRA alone."""

_UNDERSTOOD = {
  *_OFF,
  *_LORA_ONLY,
  "fan_in_fan_out",
  "peft_type",
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
  "init_weights",
  "init_ia3_weights",
}
BIASES = ("none", "all", "lora_only")
"""Which biases of the base an adapter brings along."""


def read_names(fields: Fields, name: str) -> Names:
  """Returns a field that holds names, or a regular expression."""
  x = fields.get(name)
  if isinstance(x, list) and all(isinstance(t, str) for t in x):
    return tuple(x)
  if x is None or isinstance(x, str):
    return x
  raise fields.wrong(name, "a list of names or a regular expression")


def _values(fields: Fields, name: str, whole: bool) -> dict[str, Any]:
  inner = fields.object(name)
  if inner is None:
    return {}
  read = inner.integer if whole else inner.number
  return {key: read(key) for key in inner.values}


def read_targets(fields: Fields) -> Targets:
  """Returns which modules a configuration chooses."""
  layers = fields.get("layers_to_transform")
  layers = [layers] if type(layers) is int else layers
  if layers is not None and not (
    isinstance(layers, list) and all(type(i) is int for i in layers)
  ):
    raise fields.wrong("layers_to_transform", "whole numbers")
  containers = read_names(fields, "layers_pattern")
  if isinstance(containers, str):
    containers = (containers,)
  return Targets(
    target=read_names(fields, "target_modules"),
    exclude=read_names(fields, "exclude_modules"),
    layers=None if layers is None else tuple(layers),
    containers=containers or None,
  )


def modules_to_save(fields: Fields) -> tuple[str, ...]:
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


def read_config(directory: pathlib.Path) -> tuple[Fields, type[Method]]:
  """Returns adapter_config.json and its method; all it asks for is supported.

  Raises:
    UserError: it is damaged, or names a method or feature that is not.
  """
  path = directory / CONFIG
  fields = Fields(safetensors.read_json(path), str(path))
  kind = _kind(fields)
  fields = dataclasses.replace(fields, defaults=kind.PEFT_DEFAULTS)
  fields.neutral(_OFF if kind.PEFT == "LORA" else _OFF | _LORA_ONLY)
  if fields.flag("fan_in_fan_out"):
    warnings.warn(
      f"{path}: fan_in_fan_out is true, which is of weights [in, out] in the "
      "base's file; taken for false, as PEFT does of linear layers",
      RuntimeWarning,
      stacklevel=3,
    )
  init = fields.get("init_lora_weights")
  if init not in _INITS:
    raise fields.wrong(
      "init_lora_weights",
      "true: such methods change the base, which this adapter lacks; convert "
      "it with PEFT's path_initial_model_for_weight_conversion",
    )
  understood = {
    *(_UNDERSTOOD | _HARMLESS),
    *kind().peft_fields({}),
    *kind.PEFT_IGNORED,
    *kind.PEFT_PATTERNS.values(),
  }
  for name in sorted(set(fields.values) - understood):
    if fields.get(name) not in (None, False, [], {}, ""):
      raise fields.wrong(name, "no such field, or null: it is not supported")
  return fields, kind


def _kind(fields: Fields) -> type[Method]:
  name = fields.get("peft_type")
  for kind in of_peft_type(name) if isinstance(name, str) else ():
    flag = kind.PEFT_FLAG
    if flag is None or _on(fields, flag):
      return kind
  known = sorted({k.PEFT for k in all_methods().values() if k.PEFT})
  raise fields.wrong("peft_type", " or ".join(map(repr, known)))


def _on(fields: Fields, name: str) -> bool:
  if name.endswith("_config") or name == "use_bdlora":
    return fields.object(name) is not None
  if name.endswith("_tokens"):
    return fields.get(name) is not None
  return fields.flag(name)


def pattern_rule(
  fields: Fields, kind: type[Method]
) -> Callable[[str, Method, Method], Method]:
  """Returns (module, its method, the usual one) -> it at its rank and alpha.

  They are those of the first pattern that matches, else of the usual one.
  """
  names = kind.PEFT_PATTERNS
  values = {
    f: _values(fields, names[f], f == "rank") if f in names else {}
    for f in ("rank", "alpha")
  }

  def rule(module: str, method: Method, usual: Method) -> Method:
    own = {
      f: by_pattern(module, values[f], getattr(usual, f), names.get(f, ""))
      for f in values
    }
    return dataclasses.replace(method, **own)

  return rule


def read_methods(
  fields: Fields,
  kind: type[Method],
  modules: Mapping[str, str],
  sizes: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Method]:
  """Returns what a configuration adapts, and how, by address.

  Args:
    sizes: (in, out) of each matrix by address, where methods are to be used.
  """
  chooses, whole = read_targets(fields), modules_to_save(fields)
  if kind is Tokens and chooses.target is None:
    raise fields.wrong("target_modules", "the embedding's name")
  if chooses.layers and isinstance(chooses.target, str):
    raise fields.wrong("layers_to_transform", "null beside a pattern")
  rule, usual, out = pattern_rule(fields, kind), kind.from_fields(fields), {}
  chosen = {
    path: module
    for path, module in modules.items()
    if chooses.match(module) and not not_adapted(module, whole)
  }
  named = {m: sizes[p] for p, m in chosen.items()} if sizes else {}
  for path, module in chosen.items():
    own = usual.for_matrix(module, named).for_module(
      module, list(chosen.values())
    )
    out[path] = rule(module, own, usual)
  if not out and not whole and not fields.get(EXPERTS):
    raise fields.wrong("target_modules", "names of modules of the base model")
  return out


def read_token_rows(
  fields: Fields, taken: Mapping[str, Method], tied: bool, naming: Naming
) -> dict[str, Tokens]:
  """Returns which tokens get rows of their own, by address.

  PEFT takes a list for the embedding, or lists by modules' names; where the
  head is tied to the embedding, it has the embedding's rows.

  Args:
    tied: whether the base's head is its embedding; both then have the rows.
  """
  sides = {"embed": naming.embedding, "head": naming.head}
  name = TOKENS
  found = fields.get(name)
  if found in (None, [], {}):
    return {}
  if isinstance(found, list):
    found = {naming.embedding: found}
  inner = dataclasses.replace(fields, values={name: found}).object(name)
  out: dict[str, tuple[int, ...]] = {}
  for key in inner.values if inner else ():
    matched = [a for a, m in sides.items() if f".{m}".endswith(f".{key}")]
    if len(matched) != 1:
      raise fields.wrong(name, "token ids by the embedding's or head's name")
    out[matched[0]] = token_rows.read_ids(inner, key)
  if tied and "head" in out and out.pop("head") != out.get("embed"):
    raise fields.wrong(name, "the same of the embedding, to which it is tied")
  whole = modules_to_save(fields)
  for address in out:
    module = sides[address]
    if address in taken or is_saved(module, whole):
      raise fields.wrong(
        name, f"none of {module}, which target_modules or modules_to_save name"
      )
  return {
    address: Tokens(ids=ids, beside=True).for_matrix(sides[address], {})
    for address, ids in out.items()
  }


def check_token_rows(
  fields: Fields, found: Mapping[str, Method], count: int
) -> None:
  """Raises UserError for rows of tokens that a vocabulary has not."""
  for address, method in found.items():
    if isinstance(method, Tokens) and max(method.ids) >= count:
      raise UserError(
        f"{fields.where}: rows of token {max(method.ids)} for {address}, "
        f"expected ids below {count}; the file holds no longer embedding"
      )


def expert_parameters(fields: Fields) -> Sequence[str]:
  """Returns the ends of parameters' names that a configuration adapts."""
  found = fields.get(EXPERTS)
  if found is None:
    return ()
  if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
    raise fields.wrong(EXPERTS, "a list of names, or null")
  return tuple(found)


def make_config(
  methods: Mapping[str, Method],
  modules: Sequence[str],
  base_name: str,
  whole: Sequence[str] = (),
  bias: str = "none",
  tied: bool = False,
  rows: Mapping[str, Sequence[int]] | None = None,
  experts: tuple[Mapping[str, Method], Sequence[str]] = ({}, ()),
  full_names: bool = False,
) -> dict[str, Any]:
  """Returns adapter_config.json.

  Args:
    whole: modules_to_save.
    rows: which tokens have rows of their own, by module.
    experts: methods of stacked experts' parameters, by name, and what stands
      for these names in target_parameters.
    full_names: whether the base has further modules, whose names may end as
      these do; targets are full names then.

  Raises:
    UserError: the methods differ in more than rank and alpha.
  """
  parameters, names = experts
  all_of_them = {**methods, **parameters}
  ranks = {m: method.rank for m, method in all_of_them.items()}
  alphas = {m: float(f"{x.alpha:.12g}") for m, x in all_of_them.items()}
  rank, alpha = _usual(ranks.values()), _usual(alphas.values())
  kinds = {_common_method(x, rank, alpha) for x in all_of_them.values()}
  if len(kinds) > 1:
    first, second, *_ = sorted(map(str, kinds))
    raise UserError(
      f"PEFT has one method an adapter, found {first}\nand {second}"
    )
  kind = kinds.pop()
  suffixes = sorted({module.rsplit(".", 1)[-1] for module in methods})
  covered = {m for m in modules if m.rsplit(".", 1)[-1] in suffixes}
  by_suffix = covered == set(methods) and not full_names
  targets = suffixes if by_suffix else sorted(methods)
  own = kind.peft_fields(all_of_them)
  own = {k: _number(x) for k, x in own.items()}
  if by_input := own.get("feedforward_modules"):
    # PEFT wants a part of target_modules, whose names may be whole ones.
    own["feedforward_modules"] = [
      name for name in targets if name.rsplit(".", 1)[-1] in by_input
    ]
  differing = dict(
    rank={_exact(m): r for m, r in ranks.items() if r != rank},
    alpha={_exact(m): _number(a) for m, a in alphas.items() if a != alpha},
  )
  patterns = {
    name: differing[field] for field, name in kind.PEFT_PATTERNS.items()
  }
  return (
    own
    | _more_fields(kind, bias, tied, rows)
    | (dict(target_parameters=list(names)) if names else {})
    | {name: x for name, x in patterns.items() if x}
    | dict(
      peft_type=kind.PEFT,
      task_type="CAUSAL_LM",
      base_model_name_or_path=base_name,
      inference_mode=True,
      modules_to_save=sorted(whole) or None,
      target_modules=targets,
    )
  )


def _more_fields(
  kind: Method,
  bias: str,
  tied: bool,
  rows: Mapping[str, Sequence[int]] | None,
) -> dict[str, Any]:
  """Returns fields of what comes beside a method's own arrays."""
  # Older versions of PEFT stop at a field that they do not know.
  out = dict(ensure_weight_tying=True) if tied else {}
  if kind.PEFT == "LORA":
    out["bias"] = bias
    return out | (
      {TOKENS: {m: list(ids) for m, ids in rows.items()}} if rows else {}
    )
  if rows:
    raise UserError(
      f"PEFT cannot combine trained token rows with {kind.PEFT}; save them as "
      "a separate adapter, or merge both into the model"
    )
  if bias != "none":
    raise UserError(
      f"biases were trained, which PEFT's {kind.PEFT} cannot store; "
      "merge the adapter into the model instead"
    )
  return out


def _common_method(method: Method, rank: int, alpha: float) -> Method:
  """Returns the method without what differs from module to module."""
  usual = dict(rank=rank, alpha=alpha)
  varies = {
    f: usual.get(f, getattr(type(method)(), f)) for f in method.PER_MODULE
  }
  return dataclasses.replace(method, **varies)


def _usual(values: Iterable[Any]) -> Any:
  return collections.Counter(values).most_common(1)[0][0]


def _exact(module: str) -> str:
  # Sorted on writing, and the first match wins: only keys that match one
  # module each mean the same afterwards.
  return f"^{re.escape(module)}"


def _number(x: Any) -> Any:
  return int(x) if isinstance(x, float) and x == int(x) and x else x
