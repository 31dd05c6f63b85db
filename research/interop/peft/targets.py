"""Which modules a PEFT configuration means, bit for bit as PEFT decides it.

Names are those inside the base model: `model.layers.0.self_attn.q_proj`.
research/lora/MATH.md 7.3; PEFT's `check_target_module_exists` and
`get_pattern_key`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from research.typing import UserError

ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's choice for every family here where a file names no targets."""

Names = str | Sequence[str] | None
"""A regular expression for whole names, or names to compare with the end."""


def search(pattern: str, flags_match: Any, text: str, field: str) -> Any:
  """Returns `flags_match(pattern, text)`; a bad pattern is a UserError."""
  try:
    return flags_match(pattern, text)
  except re.error as e:
    raise UserError(
      f"{field}: {pattern[:80]!r} is not a regular expression: {e}"
    ) from e


def _named(name: str, names: Names, field: str) -> bool:
  if names is None:
    return False
  if isinstance(names, str):
    return bool(search(names, re.fullmatch, name, field))
  return any(name == w or name.endswith(f".{w}") for w in names)


@dataclasses.dataclass(frozen=True)
class Targets:
  """The fields of adapter_config.json that choose modules.

  Attributes:
    target, exclude: target_modules and exclude_modules.
    layers: layers_to_transform; None or empty for all.
    containers: layers_pattern: names of lists of layers, or None.
  """

  target: Names
  exclude: Names = None
  layers: tuple[int, ...] | None = None
  containers: tuple[str, ...] | None = None

  def match(self, name: str) -> bool:
    if _named(name, self.exclude, "exclude_modules"):
      return False
    target = DEFAULT_TARGETS if self.target is None else self.target
    if isinstance(target, str):
      if target.lower() == ALL_LINEAR:
        return name.startswith("model.layers.")
      return _named(name, target, "target_modules")
    if name in target:
      return True  # whole names pass the filter of layers
    return _named(name, target, "target_modules") and self._in_layers(name)

  def _in_layers(self, name: str) -> bool:
    if not self.layers:
      return True
    patterns = [r".*?\.[^.]*\.(\d+)\."]
    if self.containers:
      patterns = [rf"(?:^|.*?\.){c}\.(\d+)\." for c in self.containers]
    for pattern in patterns:
      found = search(pattern, re.match, name, "layers_pattern")
      if found:
        return int(found[1]) in self.layers
    return False


def by_pattern(
  name: str, patterns: Mapping[str, Any], default: Any, field: str
) -> Any:
  """Returns the value of the first key that matches the end of `name`."""
  for key, value in patterns.items():
    if search(rf"(.*\.)?({key})$", re.match, name, field):
      return value
  return default


def is_saved(module: str, saved: Sequence[str]) -> bool:
  """Whether modules_to_save covers a module: by the end of a name above it."""
  parts = module.split(".")
  above = [".".join(parts[: i + 1]) for i in range(len(parts))]
  return any(name.endswith(w) for name in above for w in saved)


def not_adapted(module: str, saved: Sequence[str]) -> bool:
  """Whether modules_to_save keeps adapters off a module."""
  return any(
    search(rf"(^|.*\.){w}($|\..*)", re.match, module, "modules_to_save")
    for w in saved
  )
