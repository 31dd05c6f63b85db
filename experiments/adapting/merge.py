"""The operation that merges adapters into the packed base below them."""

import dataclasses
import pathlib
import warnings
from typing import Any, Literal

from experiments.adapting.operation import ComparesLogits, Reports
from experiments.core import cli
from experiments.core.choices import option
from research.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge(ComparesLogits, Reports):
  """How merging over a packed base changes logits on --text, by mode: into the
  dequantized base, requantized in the base's format, or into --original, the
  model that was quantized. --mode and --to write one, as our checkpoint. --from
  is a run, whose config.gin packs the base again, or our checkpoint: an
  adapter's directory does not say how its base was packed.
  """

  to: str | None = option(None, "The directory to write; it must not exist.")
  mode: Literal["decoded", "requantized", "original"] = option(
    "decoded", "The mode that is written to --to.", needs="to"
  )
  original: str | None = option(
    None, "The model that the base was quantized from."
  )

  def __post_init__(self) -> None:
    if len(self.from_) != 1:
      raise UserError("--op=merge: expected one model with adapters in --from")
    if self.to is None:
      cli.required(text=self.text)
    elif self.mode == "original":
      cli.required(original=self.original)
    if self.original and self.text is None and self.mode != "original":
      raise UserError(
        "--original: is for --mode=original, or to compare on --text; found "
        f"--mode={self.mode} and no --text. Leave it out"
      )

  def run(self) -> dict[str, Any]:
    """Returns what each mode does to logits, and which one was written."""
    from research.interop import convert, sources
    from research.interop.quantized import compressed_activations
    from research.lora import wrap
    from research.lora.merge.merge import merge_as, report_modes

    text = None if self.text is None else cli.read_text(self.text, "text")
    unpacked = None
    if self.original is not None:
      unpacked = sources.open_source(self.original)
    source = open_as_trained(self.only)
    params = source.params()
    if not wrap.adapters(params, lambda w: w.trained):
      raise UserError("--op=merge: expected one model with adapters in --from")
    original = None if unpacked is None else unpacked.params()
    rows, result = {}, {}
    if text is not None:
      tokens = self.read_tokens(text, source, self.only)
      found = report_modes(source.model, params, original, tokens)
      rows = {mode: dataclasses.asdict(x) for mode, x in found.items()}
      result["outputs"] = rows
    if self.to is not None:
      made = merge_as(params, self.mode, original)
      # No adapter any more, which would have a base.
      whole = dataclasses.replace(
        source,
        params=lambda: made,
        base_name=None,
        activations=compressed_activations.rounding(made, source.activations),
      )
      if source.activations and self.mode != "requantized":
        warnings.warn(
          f"{self.only}: its base rounds activations, which merged matrices"
          " do not.",
          RuntimeWarning,
          stacklevel=2,
        )
      convert.to_orbax(whole, pathlib.Path(self.to))
      result |= dict(mode=self.mode, to=self.to)
    self.summary(rows)
    return result


def open_as_trained(name: str) -> Any:
  """Returns a source whose base is as it was when adapters were trained.

  Args:
    name: a run's working directory, or our checkpoint.

  Raises:
    UserError: it is an adapter's directory.
  """
  from experiments.converting import source as converting
  from research.interop import sources

  path = pathlib.Path(name)
  if (path / "config.gin").is_file():
    return converting.open_checkpoint(path)
  source = sources.open_source(name)
  if source.base is not None:
    raise UserError(
      f"--from={name}: an adapter's directory names its base, but not how the"
      " base was quantized for training.\nExpected the run's working directory,"
      " whose config.gin has it, or our checkpoint of model and adapter."
    )
  return source
