"""The operation that reads an adapter's rules, and not its weights."""

import dataclasses
import pathlib
from typing import Any

from experiments.adapting.operation import Operation
from experiments.core import cli
from research.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Validate(Operation):
  """Rules of adapter_config.json that match nothing, or overlap."""

  def run(self) -> dict[str, Any]:
    """Returns the findings: rules can be wrong that no weight shows."""
    from research.interop import load, peft, sources
    from research.interop.peft import (
      full_weights,
      validate,
    )
    from research.interop.peft import (
      names as peft_names,
    )
    from research.io import safetensors

    path = pathlib.Path(self.only)
    folder = load.adapter_directory(path) if path.is_dir() else None
    if folder is None:
      raise UserError(f"--from={path}: expected a directory with an adapter")
    base = sources.open_source(str(load.adapter_base(folder)[1]))
    params = base.params()
    naming = peft_names.naming_of_config(base.config)
    file = folder / peft.WEIGHTS
    if naming.language and file.is_file():
      # Of a model with images, or of its language model's own class.
      naming = peft_names.naming_of_keys(safetensors.open_file(file))
    everything = full_weights.base_weights(params, base.model, naming)
    found = validate.findings(
      safetensors.read_json(folder / load.ADAPTER_CONFIG),
      list(peft_names.modules(params, base.model, naming).values()),
      [w.module for w in everything.values()],
    )
    for f in found:
      cli.say(f"{f.kind}: {f.field} {f.rule!r}: {f.text}")
    return dict(findings=[dataclasses.asdict(f) for f in found])
