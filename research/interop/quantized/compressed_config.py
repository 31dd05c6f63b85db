"""The `quantization_config` of compressed-tensors: which module is kept how.

A config has groups, each with a scheme of its weights and the modules that it
is for, by class (`Linear`), by name or by a regular expression (`re:...`); and
modules that are left alone. Whatever a scheme says that we do not understand
is refused, not skipped: numbers would come out wrong, silently.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.io.fields import Fields
from research.typing import UserError

METHOD = "compressed-tensors"
KV_CACHE = "kv_cache_scheme"

FORMATS = {  # format -> what its weights are: (type, bits, strategies)
  "pack-quantized": ("int", range(2, 9), ("tensor", "channel", "group")),
  "int-quantized": ("int", range(2, 9), ("tensor", "channel", "group")),
  "float-quantized": ("float", (8,), ("tensor", "channel", "group", "block")),
  "nvfp4-pack-quantized": ("float", (4,), ("tensor_group",)),
  "mxfp4-pack-quantized": ("float", (4,), ("group",)),
  "mxfp6-pack-quantized": ("float", (6,), ("group",)),
  "mxfp8-quantized": ("float", (8,), ("group",)),
}
"""`naive-quantized` is either of the plain ones."""

_GROUPS = {"nvfp4-pack-quantized": 16} | dict.fromkeys(
  ("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"), 32
)

_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")

_WEIGHTS = {  # fields that a scheme's weights may have
  *("num_bits", "type", "symmetric", "group_size", "strategy"),
  *("block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype"),
  *("observer", "observer_kwargs"),
}
_TOP = {
  *("quant_method", "format", "config_groups", "ignore", KV_CACHE),
  *("quantization_status", "global_compression_ratio", "version"),
  *("sparsity_config", "transform_config", "moe_sparsity_config"),
}
_GROUP = {
  *("targets", "weights", "format"),
  *("input_activations", "output_activations"),
}


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a module's weight is kept.

  Attributes:
    format: of its tensors, a key of `FORMATS`.
    bits: of a code.
    symmetric: whether there are no zero points.
    strategy: what shares a scale: `"tensor"`, `"channel"` (an output),
      `"group"` (of inputs), `"block"`, or `"tensor_group"` (groups, and the
      matrix).
    group: inputs that share a scale, of groups.
    tile: outputs and inputs that share one, of blocks.
    act_order: whether groups are not of neighbours (`weight_g_idx`).
    activations: how activations are to be rounded, as its config says it; see
      `compressed_inputs`.
  """

  format: str
  bits: int
  symmetric: bool = True
  strategy: str = "group"
  group: int | None = None
  tile: tuple[int, int] | None = None
  act_order: bool = False
  activations: str | None = None

  @property
  def kind(self) -> str:
    return FORMATS[self.format][0]


@dataclasses.dataclass(frozen=True)
class Config:
  """Which module is kept how.

  Attributes:
    groups: (targets, scheme), in the order of the file.
    ignore: modules that are not quantized, by name, class or `re:` expression.
  """

  groups: tuple[tuple[tuple[str, ...], Scheme], ...]
  ignore: tuple[str, ...] = ()

  @functools.cached_property
  def _schemes(self) -> dict[str, Scheme]:
    return {name: found for names, found in self.groups for name in names}

  def scheme(self, module: str, kind: str = "Linear") -> Scheme | None:
    """Returns a module's scheme, None where it is left alone.

    As in the package (`match_targets`), a name goes before expressions, and
    those, in alphabetical order, before its class.
    """
    if any(_matches(module, kind, name) for name in self.ignore):
      return None
    if module in self._schemes:
      return self._schemes[module]
    for name in sorted(self._schemes, key=lambda x: (x == kind, "re:" in x, x)):
      if _matches(module, kind, name):
        return self._schemes[name]
    return None


def _matches(module: str, kind: str, target: str) -> bool:
  if target.startswith("re:"):
    return re.match(target[3:], module) is not None
  return target in (module, kind)


def parse(values: Mapping[str, Any], where: str) -> Config:
  """Returns what a `quantization_config` says.

  Raises:
    UserError: it is another method's, or says what is not understood.
  """
  top = Fields(values, where)
  if top.get("quant_method") != METHOD:
    hint = ""
    if str(top.get("quant_method")).startswith("modelopt"):
      hint = "; ModelOpt's scale of a matrix is the reciprocal: convert first"
    raise top.wrong("quant_method", repr(METHOD) + hint)
  top.known(_TOP)
  for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
    found = top.object(name)
    if found is not None and set(found.values) != {"format"}:
      raise top.wrong(name, "nothing: this feature is not supported")
    if found is not None and found.get("format") != "dense":
      raise found.wrong("format", "'dense': sparse weights are not supported")
  if top.get("quantization_status") not in (None, "compressed"):
    raise top.wrong("quantization_status", "'compressed'")
  groups = top.object("config_groups")
  if groups is None:
    raise top.wrong("config_groups", "at least one group")
  ignore = _names(top, "ignore") if top.get("ignore") is not None else ()
  return Config(
    tuple(_group(groups, name, top.get("format")) for name in groups.values),
    ignore,
  )


def _group(groups: Fields, name: str, default: Any):
  group = groups.object(name)
  if group is None:
    raise groups.wrong(name, "an object with targets and weights")
  group.known(_GROUP)
  targets = _names(group, "targets")
  weights = group.object("weights")
  if weights is None:
    raise group.wrong(
      "weights", "an object: what rounds activations alone is not supported"
    )
  if group.get("output_activations") is not None:
    raise group.wrong("output_activations", "null")
  inputs = group.object("input_activations")
  activations = None
  if inputs is not None:
    activations = f"{inputs.get('type')}{inputs.get('num_bits')}"
    activations += f" by {inputs.get('strategy')}"
  return targets, _scheme(weights, group.get("format") or default, activations)


def _scheme(weights: Fields, form: Any, activations: str | None) -> Scheme:
  weights.known(_WEIGHTS)
  kind = str(weights.get("type") or "int").lower()
  bits = weights.integer("num_bits", 1, 8) if weights.get("num_bits") else 8
  if kind not in ("int", "float"):
    raise weights.wrong("type", "'int' or 'float'")
  group = weights.get("group_size")
  strategy = weights.get("strategy")
  if strategy is None:
    strategy = "tensor" if group is None else "group"
    strategy = "channel" if group == -1 else strategy
  if strategy not in _STRATEGIES:
    raise weights.wrong("strategy", f"one of {', '.join(_STRATEGIES)}")
  form = _format(weights, form, kind)
  want_kind, want_bits, strategies = FORMATS[form]
  if kind != want_kind:
    raise weights.wrong("type", f"{want_kind!r}, as the format {form} is")
  if bits not in want_bits:
    shown = ", ".join(map(str, want_bits))
    raise weights.wrong("num_bits", f"{shown}, as the format {form} has")
  if strategy not in strategies:
    raise weights.wrong("strategy", f"{' or '.join(strategies)} in {form}")
  if weights.get("dynamic") not in (None, False):
    raise weights.wrong("dynamic", "false: weights are stored")
  symmetric = weights.get("symmetric")
  if symmetric not in (None, True, False):
    raise weights.wrong("symmetric", "true or false")
  if symmetric is False and kind == "float":
    raise weights.wrong("symmetric", "true, of floats")
  return Scheme(
    format=form,
    bits=bits,
    symmetric=symmetric is not False,
    strategy=strategy,
    group=_group_size(weights, form, strategy),
    tile=_tile(weights, strategy),
    act_order=_act_order(weights, form, strategy),
    activations=activations,
  )


def _format(weights: Fields, form: Any, kind: str) -> str:
  if form == "naive-quantized":
    return f"{kind}-quantized"
  if form == "mixed-precision":
    raise UserError(
      f"{weights.where}: the group names no format, which mixed-precision needs"
    )
  if not isinstance(form, str) or form not in FORMATS:
    raise UserError(
      f"{weights.where}: format is {str(form)[:60]!r}, expected one of "
      f"{', '.join(FORMATS)}"
    )
  return form


def _group_size(weights: Fields, form: str, strategy: str) -> int | None:
  if strategy not in ("group", "tensor_group"):
    if weights.get("group_size") not in (None, -1):
      raise weights.wrong("group_size", f"null, of the strategy {strategy}")
    return None
  size = weights.integer("group_size", 1, 2**20)
  want = _GROUPS.get(form, size)
  if size != want:
    raise weights.wrong("group_size", f"{want}, as {form} has")
  return size


def _tile(weights: Fields, strategy: str) -> tuple[int, int] | None:
  tile = weights.get("block_structure")
  if strategy != "block":
    if tile is not None:
      raise weights.wrong("block_structure", f"null, of {strategy}")
    return None
  good = isinstance(tile, list) and len(tile) == 2
  if not good or not all(type(n) is int and 0 < n < 2**20 for n in tile):
    raise weights.wrong("block_structure", "two positive numbers")
  return tile[0], tile[1]


def _act_order(weights: Fields, form: str, strategy: str) -> bool:
  order = weights.get("actorder")
  if order not in (None, False, True, "static", "weight", "group", "dynamic"):
    raise weights.wrong("actorder", "'static', 'weight', 'group' or null")
  scattered = order in (True, "group", "dynamic")
  if scattered and (form, strategy) != ("pack-quantized", "group"):
    raise weights.wrong("actorder", "null, 'static' or 'weight' here")
  return scattered


def _names(fields: Fields, name: str) -> tuple[str, ...]:
  found = fields.get(name)
  if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
    raise fields.wrong(name, "a list of names")
  for x in found:
    if x.startswith("re:"):
      try:
        re.compile(x[3:])
      except re.error as error:
        raise UserError(
          f"{fields.where}: {name}: {x[:60]!r} is no regular expression: "
          f"{error}"
        ) from error
  return tuple(found)


def write(
  schemes: Mapping[str, Scheme],
  ignore: Sequence[str] = (),
  activations: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the `quantization_config` of modules; `parse` inverts it.

  Args:
    activations: `input_activations` of all modules, or None.

  Raises:
    UserError: there is none.
  """
  if not schemes:
    raise UserError("compressed-tensors: no module is quantized")
  distinct = list(dict.fromkeys(schemes.values()))
  groups = {}
  for i, scheme in enumerate(distinct):
    # A class where all are alike; modules by their names where they differ.
    targets = [name for name, found in schemes.items() if found == scheme]
    groups[f"group_{i}"] = {
      "targets": targets if len(distinct) > 1 else ["Linear"],
      "weights": _weights(scheme),
      "input_activations": activations,
      "output_activations": None,
      "format": scheme.format,
    }
  forms = {scheme.format for scheme in distinct}
  return {
    "quant_method": METHOD,
    "quantization_status": "compressed",
    "format": forms.pop() if len(forms) == 1 else "mixed-precision",
    "config_groups": groups,
    "ignore": list(ignore),
    KV_CACHE: None,
  }


def _weights(scheme: Scheme) -> dict[str, Any]:
  out: dict[str, Any] = {
    "num_bits": scheme.bits,
    "type": scheme.kind,
    "symmetric": scheme.symmetric,
    "strategy": scheme.strategy,
    "group_size": scheme.group,
    "dynamic": False,
  }
  if scheme.tile:
    out["block_structure"] = list(scheme.tile)
  if scheme.act_order:
    out["actorder"] = "group"
  if scheme.format.startswith("mx"):
    out |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
  if scheme.format.startswith("nv"):
    out |= dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
  return out
