"""A conversion from any source to one format, and the result of it."""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from experiments.core import cli
from experiments.core.choices import option
from research.errors import UserError


@dataclasses.dataclass(frozen=True)
class Written:
  """What writing a format found.

  Attributes:
    log: a `changes.Log` of what changed, tensor by tensor.
    no_tokenizer: why the tokenizer was left out; "" if it was not.
    extra: entries of the result besides those of every format.
  """

  log: Any
  no_tokenizer: str = ""
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Writer = Callable[[Any, pathlib.Path], Written]
"""(source, path that does not exist) -> what was found."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
  """A value of --format, with its options."""

  has_tokenizer: ClassVar[bool] = True

  from_: str = option(
    None,
    cli.MODEL,
    flag="from",
    required=True,
  )
  to: str = option(
    None,
    "The directory (for gguf the file) to write; it must not exist yet.",
    required=True,
  )
  report: str | None = option(
    None, "A JSON file that lists every tensor's type and errors."
  )

  def open(self) -> Any:
    from experiments.converting import source

    return source.open_source(self.from_)

  def writer(self) -> Writer:
    """Returns what writes the format, once the options are checked."""
    raise NotImplementedError

  def run(self) -> dict[str, Any]:
    """Converts; returns the result, which the command prints as JSON."""
    to, start = pathlib.Path(self.to), time.perf_counter()
    write = self.writer()
    if self.report is not None:  # written at the end
      cli.directory(report=str(pathlib.Path(self.report).parent))
    cli.loading(self.from_)
    source = self.open()
    written = write(source, to)
    log = written.log
    cli.say(log.table())
    if written.no_tokenizer:
      cli.say(f"the tokenizer is not in the file: {written.no_tokenizer}")
    if self.report is not None:
      rows = [dataclasses.asdict(c) for c in log.changes]
      cli.write_json(self.report, rows)
    from research.training import memory

    has_tokenizer = self.has_tokenizer and source.tokenizer is not None
    return {
      **log.summary(),
      **written.extra,
      "bytes": bytes_on_disk(to),
      "tokenizer": has_tokenizer and not written.no_tokenizer,
      "from": self.from_,
      "to": self.to,
      "seconds": time.perf_counter() - start,
      "peak_memory_bytes": memory.peak_memory_bytes(),
    }


def bytes_on_disk(path: pathlib.Path) -> int:
  """Returns the bytes of a file, or of all files in a directory."""
  files = path.rglob("*") if path.is_dir() else [path]
  return sum(f.stat().st_size for f in files if f.is_file())


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergesAdapters(Conversion):
  """A conversion to a format that has no adapters: they are merged."""

  lossy: bool = option(
    False, "Merge even where most of the adapter's update is rounded away."
  )

  @property
  def least_kept(self) -> float | None:
    """The share of an update that rounding must leave; None for any."""
    from research.lora.merge import changes

    return None if self.lossy else changes.LEAST_KEPT


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritesShards(Conversion):
  """A conversion to a directory of safetensors."""

  dtype: Literal["float32", "bfloat16", "float16"] | None = option(
    None,
    "Type of what is not packed; by default each tensor keeps its own.",
  )
  shard_size: str = option("5GB", "Bytes a file, e.g. 500MB.")

  def __post_init__(self) -> None:
    parse_bytes(self.shard_size)

  @property
  def shard_bytes(self) -> int:
    """Bytes a file at most."""
    return parse_bytes(self.shard_size)


def parse_bytes(text: str) -> int:
  """Returns the number of bytes of `500MB`, `5GB` or `123`."""

  found = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B?", text.strip(), re.I)
  if not found or not int(found[1]):
    raise UserError(
      f"--shard_size={text}: expected a number of bytes such as 500MB or 5GB"
    )
  power = " KMGT".index(found[2].upper() or " ")
  return int(found[1]) * (1024 if found[3] else 1000) ** power


@dataclasses.dataclass(frozen=True, kw_only=True)
class SupportsDiffusion(Conversion):
  """A conversion whose format can say that the model fills in masks."""

  mask_token: str | None = option(
    None,
    "Make a masked diffusion model of it: the token that hides others, by its "
    "text or id, one that texts do not use; or new, for a row of its own.",
  )
  block: int | None = option(
    None,
    "With --mask_token: tokens of a block, which attends to itself and to the "
    "blocks before it. By default all tokens attend to each other.",
    needs="mask_token",
    least=1,
  )

  def open(self) -> Any:
    from experiments.converting import source

    opened = super().open()
    if self.mask_token is None:
      return opened
    return source.as_diffusion(opened, self.mask_token, self.block)
