"""What `experiments.adapters --op=merge` does, over packed bases."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from experiments.core import cli, convert_sources
from research.interop import convert, sources
from research.lora import wrap
from research.lora.merge.merge import merge_as, report_modes
from research.typing import UserError


def check(
  names: Sequence[str],
  to: str | None,
  mode: str,
  original: str | None,
  text: str | None,
) -> None:
  """Raises UserError for flags that would fail only once models are read."""
  if len(names) != 1:
    raise UserError("--op=merge: expected one model with adapters in --from")
  if to is None:
    cli.required(text=text)
  else:
    convert.check_free(pathlib.Path(to))
    if mode == "original":
      cli.required(original=original)
  if text is not None:
    cli.read_text(text, "text")


def merge(
  name: str,
  *,
  to: str | None,
  mode: str,
  original: str | None,
  tokens: Callable[[Any], Any] | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Returns what each mode does to logits, by mode, and the command's result.

  Args:
    name: a run, or our checkpoint of a model with adapters.
    to: a new directory for one of them, merged; None for none.
    mode: which one.
    original: the model that the base was rounded from, or None.
    tokens: from the source to a row to look at; None not to look.
  """
  unpacked = None if original is None else sources.open_source(original)
  source = opened(name)
  params = source.params()
  if not wrap.adapters(params, lambda w: w.trained):
    raise UserError("--op=merge: expected one model with adapters in --from")
  like = None if unpacked is None else unpacked.params()
  rows, out = {}, {}
  if tokens is not None:
    found = report_modes(source.model, params, like, tokens(source))
    rows = {mode: dataclasses.asdict(x) for mode, x in found.items()}
    out["outputs"] = rows
  if to is not None:
    made = merge_as(params, mode, like)
    # No adapter any more, which would have a base.
    whole = dataclasses.replace(source, params=lambda: made, base_name=None)
    convert.to_orbax(whole, pathlib.Path(to))
    out |= dict(mode=mode, to=to)
  return rows, out


def opened(name: str) -> sources.Source:
  """Returns a source whose base is as it was when adapters were trained.

  Args:
    name: of it.
  """
  path = pathlib.Path(name)
  if (path / "config.gin").is_file():
    return convert_sources.trained(path)
  source = sources.open_source(name)
  if source.base is not None:
    raise UserError(
      f"--from={name}: an adapter's directory names its base, not how that"
      " was packed when it was trained.\nExpected the run's working directory,"
      " whose config.gin says it, or our checkpoint of both."
    )
  return source
