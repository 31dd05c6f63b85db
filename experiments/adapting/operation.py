"""What operations on adapters share: inputs, a report, an adapter to write."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.core import cli
from experiments.core.choices import option
from research.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
  """A value of --op, with its options."""

  from_: tuple[str, ...] = option(
    (),
    "An adapter: PEFT's directory, a run's working directory, or a .gguf file.",
    flag="from",
    required=True,
  )

  def run(self) -> dict[str, Any]:
    """Does it; returns the result, which the command prints as JSON."""
    raise NotImplementedError

  @property
  def only(self) -> str:
    """The one adapter of an operation that takes no more.

    Raises:
      UserError: there are several.
    """

    if len(self.from_) != 1:
      raise UserError(f"--from: found {len(self.from_)} adapters, expected one")
    return self.from_[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reports(Operation):
  """An operation whose result sums up a row for each matrix."""

  report: str | None = option(
    None, "A JSON file to write, with a row for each matrix."
  )

  def summary(self, rows: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Writes the report; returns the result."""
    if self.report is not None:
      cli.write_json(self.report, dict(rows))
    return dict(matrices=len(rows), **values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadsAdapters(Reports):
  """An operation on adapters that are opened over the base that they name."""

  base: str | None = option(
    None,
    "The model that a .gguf adapter is for, or that full training began with.",
  )

  def open(self, name: str) -> Any:
    """Returns an adapter as a source that knows its base.

    Args:
      name: PEFT's directory, a run's working directory, or a .gguf file.

    Raises:
      UserError: it is a model, or a .gguf file without --base.
    """
    from research.interop import adapters, sources
    from research.interop.gguf import adapter as gguf_adapter

    path = pathlib.Path(name)
    if path.suffix == ".gguf":
      cli.required(base=self.base)
      base = sources.open_source(self.base)
      params = gguf_adapter.load(path, base.params(), base.model)
      origin = dict(format="gguf-adapter", path=name)
      return sources.with_params(base, base.model, params, origin, self.base)
    source = sources.open_source(adapters.locate(name))
    if source.base is None:
      raise UserError(f"--from={name}: found a model, expected an adapter")
    return source


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritesAdapter(ReadsAdapters):
  """An operation that makes one adapter, written in PEFT's format."""

  to: str = option(
    None, "The directory to write; it must not exist.", required=True
  )

  def make(self) -> tuple[Any, Any, dict[str, Any]]:
    """Returns a source over the base, the new parameters, and the result."""
    raise NotImplementedError

  def run(self) -> dict[str, Any]:
    from research.interop import convert

    to = pathlib.Path(self.to)
    source, params, result = self.make()
    convert.to_peft(dataclasses.replace(source, params=lambda: params), to)
    return result | dict(to=self.to)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComparesLogits:
  """What logits are compared on."""

  text: str | None = option(
    None, "A text file in UTF-8, on whose tokens logits are compared."
  )
  tokens: int = option(256, "How many tokens of --text.", needs="text")

  def read_tokens(self, text: str, source: Any, name: str) -> Any:
    """Returns the first tokens of a text, `[1, T]`.

    Raises:
      UserError: the source has no tokenizer.
    """
    import jax.numpy as jnp

    if source.tokenizer is None:
      raise UserError(f"--from={name}: its base has no tokenizer")
    tokens = source.tokenizer.prompt(text)[: self.tokens]
    return jnp.asarray([tokens], jnp.int32)
