"""A model's keys and values in few bits, in many ways: what is lost.

A `Table` is a model, a text, and ways to pack, as `--kv` has them. Perplexity
is that of decoding: a window is read through the cache, a few tokens at a time,
so that what was packed is what later tokens read. Ways are compared by layers,
or by windows, of one text: intervals are Student's over these.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.core.experiment import Source
from experiments.core.stats import above, paired
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.sources import Documents
from research.generation import perplexity as of_text
from research.quant.kv import kv_error, kv_memory
from research.quant.kv.kv_quantizer import parse
from research.text import special_tokens
from research.typing import UserError

WHOLE = "whole"
"""Name of the arm in which nothing is packed."""

ATTENTION = "attention"
"""Name of the arm of attention's errors, all ways at once."""

CLAIMS = (
  (
    "Keys go per channel (KIVI)",
    "layers",
    ("k4v16", "k4v16,key=per_token"),
  ),
  (
    "Values go per token (KIVI)",
    "layers",
    ("k16v4", "k16v4,value=per_channel"),
  ),
  (
    "A rotation helps keys per token",
    "layers",
    ("k4v16,key=hadamard+per_token", "k4v16,key=per_token"),
  ),
  ("Keys need more bits than values", "windows", ("k8v4", "k4v8")),
  ("Recent tokens should be whole", "windows", ("k2v2", "k2v2,residual=0")),
  (
    "The first tokens should be whole",
    "windows",
    ("k2v2,residual=0,sink_tokens=32", "k2v2,residual=0"),
  ),
)
"""Claim, what is compared, and the way that has less of it, before the other:
attention's error in each layer, or nats a token in each window."""


class Shared(NamedTuple):
  """The model, and tokens of the text."""

  loaded: Any
  ids: list[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(protocol.Study):
  """Ways to pack, beside each other.

  Attributes:
    model: whose cache it is.
    text: documents that are read one after the other, from the first.
    caches: arms of perplexity.
    attention: ways whose attention errors are measured, all tokens packed.
    window: tokens of a window.
    windows: how many are read, one after the other.
    chunk: tokens that are read at a time, whole among themselves; 1 is what
      decoding does.
    tokens: what attention's errors are measured on.
  """

  model: Source
  text: Documents
  caches: Sequence[str]
  attention: Sequence[str]
  window: int = 1024
  windows: int = 4
  chunk: int = 32
  tokens: int = 256

  def __post_init__(self):
    for text in (*self.caches, *self.attention):
      if parse(text) is None:
        raise UserError("Table: found '' among its rows, expected e.g. k4v4")
    protocol.distinct(self.caches, "Table.caches")

  @property
  def arms(self) -> list[str]:
    """Attention's errors, then caches, the first with nothing packed."""
    return [*([ATTENTION] if self.attention else []), WHOLE, *self.caches]

  def settings(self, arm: str) -> str:
    """Returns the model and the text: other caches may come and go."""
    of = (*self.attention, self.tokens) if arm == ATTENTION else arm
    shared = protocol.describe(self, "caches", "attention", "tokens")
    return f"{protocol.describe(of)}, {shared}"

  def prepare(self, workdir: pathlib.Path) -> Shared:
    """Returns the model, and the tokens that are needed."""
    del workdir
    loaded = self.model.load()
    return Shared(loaded, read(self, loaded.tokenizer))

  def run(self, arm: str, before: Rows, shared: Shared) -> Row:
    """Returns a cache's perplexity and bytes, or all ways' errors."""
    del before
    if arm == ATTENTION:
      return {"errors": errors(self, *shared)}
    return perplexity_of(self, arm, *shared)

  def summary(self, row: Row) -> str:
    """Returns the perplexity, where there is one."""
    if "errors" in row:
      return f"{len(row['errors'])} ways"
    return f"perplexity {row['perplexity']:.3f}"

  def table(self, rows: Rows) -> Lines:
    """Returns a line a cache, then one for each other way of attention's."""
    error = {n: _shown(x) for n, x in _errors(rows).items()}
    caches = {n: _shown(r) for n, r in rows.items() if n != ATTENTION}
    out = []
    for name, row in caches.items():
      line = {"kv": name, **row}
      if WHOLE in caches:
        line["more"] = row["nll"] - caches[WHOLE]["nll"]
      out.append(line | error.get(name, {}))
    others = {n: found for n, found in error.items() if n not in caches}
    return out + [{"kv": n, **found} for n, found in others.items()]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what is said of the claims known of caches."""
    measured, out = {"layers": _errors(rows), "windows": rows}, []
    for claim, what, names in CLAIMS:
      found = [measured[what].get(name, {}).get(what) for name in names]
      if None not in found:
        less, more = found
        said = ", ".join(
          f"{n} {np.mean(x):.4f}" for n, x in zip(names, found, strict=True)
        )
        apart = paired(more, less)
        said = f"{said}: {apart} less, over {len(less)} {what}"
        out.append(Verdict(claim, said, above(apart)))
    return out


def _errors(rows: Rows) -> Rows:
  """Returns each way's errors of attention, if they are there."""
  return rows.get(ATTENTION, {"errors": {}})["errors"]


def _shown(row: Row) -> Row:
  """Returns what a line has of a row: no values of layers or windows."""
  return {n: x for n, x in row.items() if n not in ("layers", "windows")}


def read(table: Table, tokenizer: Any) -> list[int]:
  """Returns the tokens of the text that the table needs.

  Raises:
    UserError: the text has fewer.
  """
  if tokenizer is None:
    raise UserError("Table.model: found no tokenizer in it, expected one")
  wanted, found = table.window * table.windows, []
  for i in range(len(table.text)):
    found += tokenizer.encode(table.text[i])
    if len(found) >= max(wanted, table.tokens):
      return found[: max(wanted, table.tokens)]
  raise UserError(
    f"Table.text: found {len(found)} tokens, expected at least {wanted}: ask "
    "for fewer windows"
  )


def perplexity_of(
  table: Table, name: str, loaded: Any, ids: Sequence[int]
) -> Row:
  """Returns what a cache costs: bits, bytes, perplexity.

  Args:
    table: how it is measured.
    name: of the cache.
    loaded: the model.
    ids: tokens of the text.
  """
  kv = None if name == WHOLE else parse(name)
  begin = special_tokens.from_tokenizer(loaded.tokenizer).row_begin
  each = [
    of_text.perplexity(
      loaded.model,
      loaded.params,
      one,
      table.window,
      chunk=table.chunk,
      kv=kv,
      begin=begin,
    ).nll
    for one in of_text.windows(ids, table.window, table.windows)
  ]
  nll = float(np.mean(each))  # all windows have as many tokens
  took = kv_memory.memory(loaded.model, loaded.params, 1, table.window, kv)
  return {
    "bits": took.bits_per_number,
    "bytes_per_token": took.bytes_per_token,
    "cache_bytes": took.cache_bytes,
    "perplexity": float(np.exp(nll)),
    "nll": nll,
    "windows": each,
  }


def errors(table: Table, loaded: Any, ids: Sequence[int]) -> dict[str, Row]:
  """Returns each way's error of attention: by layer, their mean, the worst.

  Args:
    table: what to measure.
    loaded: the model.
    ids: tokens of the text.
  """
  first = special_tokens.from_tokenizer(loaded.tokenizer).row_begin
  tokens = jnp.asarray(np.array([[*first, *ids][: table.tokens]], np.int32))
  kvs = [parse(name) for name in table.attention]
  found = kv_error.attention_errors(loaded.model, loaded.params, tokens, kvs)
  return {
    name: {
      "error": float(x.mean()),
      "worst": float(x.max()),
      "layers": x.tolist(),
    }
    for name, x in zip(table.attention, found.T, strict=True)
  }
