"""A model's keys and values in few bits, in many ways: what is lost.

A `Table` is a model, a text, and ways to pack, as `--kv` has them. Perplexity
is that of decoding: a window is read through the cache, a few tokens at a time,
so that what was packed is what later tokens read.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.core.experiment import Source
from experiments.studies.claims import Verdict
from research.data.sources import Documents
from research.generation.perplexity import perplexity
from research.quant.kv import kv_error, kv_memory
from research.quant.kv.kv_quantizer import parse
from research.text import special_tokens
from research.typing import UserError

WHOLE = "whole"
"""Name of the row in which nothing is packed."""

Rows = list[dict[str, Any]]
"""Plain values by column."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """Ways to pack, beside each other.

  Attributes:
    model: whose cache it is.
    text: documents that are read one after the other, from the first.
    caches: rows of perplexity.
    attention: rows of attention's errors, all tokens packed.
    window: tokens of a window.
    windows: how many are read.
    batch: windows that are read at a time.
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
  batch: int = 4
  chunk: int = 32
  tokens: int = 256

  def __post_init__(self):
    for text in (*self.caches, *self.attention):
      if parse(text) is None:
        raise UserError("Table: found '' among its rows, expected e.g. k4v4")


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


def perplexities(table: Table, loaded: Any, ids: Sequence[int]) -> Rows:
  """Returns a row for each cache, after one of nothing packed.

  Args:
    table: what to measure.
    loaded: the model.
    ids: tokens of the text.
  """
  rows = []
  for name in (WHOLE, *table.caches):
    kv = None if name == WHOLE else parse(name)
    found = perplexity(
      loaded.model,
      loaded.params,
      ids,
      table.window,
      table.windows,
      table.batch,
      table.chunk,
      kv,
      special_tokens.from_tokenizer(loaded.tokenizer).row_begin,
    )
    took = kv_memory.memory(loaded.model, loaded.params, 1, table.window, kv)
    rows.append(
      {
        "kv": name,
        "bits": took.bits_per_number,
        "bytes_per_token": took.bytes_per_token,
        "cache_bytes": took.cache_bytes,
        "perplexity": found.perplexity,
        "nll": found.nll,
        "more": found.nll - rows[0]["nll"] if rows else 0.0,
      }
    )
  return rows


def errors(table: Table, loaded: Any, ids: Sequence[int]) -> Rows:
  """Returns a row for each way to pack: its layers' mean error and the worst.

  Args:
    table: what to measure.
    loaded: the model.
    ids: tokens of the text.
  """
  if not table.attention:
    return []
  first = special_tokens.from_tokenizer(loaded.tokenizer).row_begin
  tokens = jnp.asarray(np.array([[*first, *ids][: table.tokens]], np.int32))
  kvs = [parse(name) for name in table.attention]
  found = kv_error.attention_errors(loaded.model, loaded.params, tokens, kvs)
  return [
    {"kv": name, "mean": float(x.mean()), "worst": float(x.max())}
    for name, x in zip(table.attention, found.T, strict=True)
  ]


def verdicts(caches: Rows, attention: Rows) -> list[Verdict]:
  """Returns what the rows that are there say of the claims known of caches."""
  out = []
  lost = {row["kv"]: row["more"] for row in caches}
  error = {row["kv"]: row["mean"] for row in attention}
  for claim, rows, less, more in (
    ("Keys go per channel (KIVI)", error, "k4v16", "k4v16,key=per_token"),
    ("Values go per token (KIVI)", error, "k16v4", "k16v4,value=per_channel"),
    (
      "A rotation helps keys per token",
      error,
      "k4v16,key=hadamard+per_token",
      "k4v16,key=per_token",
    ),
    ("Keys need more bits than values", lost, "k8v4", "k4v8"),
    ("Recent tokens should be whole", lost, "k2v2", "k2v2,residual=0"),
    (
      "The first tokens should be whole",
      lost,
      "k2v2,residual=0,sink_tokens=32",
      "k2v2,residual=0",
    ),
  ):
    if less in rows and more in rows:
      found = f"{less} {rows[less]:.4f}, {more} {rows[more]:.4f}"
      out.append(Verdict(claim, found, rows[less] < rows[more]))
  return out
