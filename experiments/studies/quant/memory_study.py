"""What a model takes in few bits, from shapes alone.

Every format, an arm, packs the shapes of all layers' matrices; nothing is drawn
or read, so that a model of any size fits. Embedding, head and norms stay in 16
bits, and keys and values of a context are counted, too. A step of generation is
compiled for this machine's CPU, and what its program says it needs stands
beside.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core.from_scratch import FromScratch
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.nn import presets
from research.nn.transformer import init_cache
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.quantize import Quantize
from research.quant.reports import report_errors
from research.typing import UserError

BUDGETS = (24, 40, 48, 80)
"""Gigabytes of one accelerator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory(protocol.Study):
  """Formats of a model that does not exist; claims are those of 70B.

  Attributes:
    source: sizes and family.
    context: tokens whose keys and values are counted.
    compiled: whether a step of generation is compiled.
  """

  source: FromScratch
  context: int = 4096
  compiled: bool = True

  def __post_init__(self):
    if self.context < 1:
      raise UserError(
        f"Memory.context: found {self.context}, expected 1 or more"
      )

  @property
  def arms(self) -> list[str]:
    """The formats."""
    return list(formats())

  def prepare(self, workdir: pathlib.Path) -> tuple[Any, Any]:
    """Returns the model, and the shapes of its weights."""
    del workdir
    return shapes_of(self.source)

  def run(self, arm: str, before: Rows, shared: tuple[Any, Any]) -> Row:
    """Returns what the model takes in a format."""
    del before
    return row(*shared, formats()[arm], self.context, self.compiled)

  def table(self, rows: Rows) -> Lines:
    """Returns a line a format, most bits first."""
    lines = [{"format": name, **found} for name, found in rows.items()]
    return sorted(lines, key=lambda x: -x["bits"])

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what is said of a 70B model, and whether it holds here."""
    return verdicts(self.table(rows))


def shapes_of(source: Any) -> tuple[Any, Any]:
  """Returns a model that does not exist, and the shapes of its weights."""
  family = presets.FAMILIES[source.family]
  model = presets.transformer(family, source.sizes, "bfloat16")
  tokens = jnp.zeros((1, 2), jnp.int32)

  def init(key):
    params = model.init(key, tokens)["params"]
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

  return model, jax.eval_shape(init, jax.random.key(0))


def formats() -> Mapping[str, Any]:
  """Returns what is counted; None is 16 bits."""
  some = [
    *(Affine(bits=b, block=128) for b in (8, 4, 3, 2)),
    Affine(bits=4, block=64),
    Codebook(block=64),
    Microscaling(),
    NVFP4(),
  ]
  return {"bfloat16": None} | {f.name: f for f in some}


def row(
  model: Any, shapes: Any, format: Any, context: int, compiled: bool
) -> Row:
  """Returns gigabytes, bits a packed weight, and the budget that they fit.

  Args:
    model: the network.
    shapes: of its weights.
    format: of the layers' matrices; None for 16 bits.
    context: tokens whose keys and values are counted.
    compiled: whether a step of generation is compiled.
  """
  cache = jax.eval_shape(lambda p: init_cache(model, p, 1, context), shapes)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  params = shapes
  if format is not None:
    params = jax.eval_shape(Quantize(format=format), shapes)
  sizes = report_errors.sizes(params)
  out = {
    "bits": 16.0 if format is None else sizes.bits_per_weight,
    "packed GB": None if format is None else sizes.packed_bytes / 1e9,
    "weights GB": sizes.nbytes / 1e9,
    "with cache GB": (sizes.nbytes + held) / 1e9,
  }
  if compiled:
    out["step GB"] = step_bytes(model, params, cache) / 1e9
  need = out.get("step GB", out["with cache GB"])
  fits = [b for b in BUDGETS if need <= b]
  return out | {"fits GB": fits[0] if fits else None}


def step_bytes(model: Any, params: Any, cache: Any) -> int:
  """Returns what a compiled step of generation says that it takes."""

  @functools.partial(jax.jit, donate_argnums=2)
  def step(params, token, cache):
    hidden, cache = model.apply({"params": params}, token, cache=cache)
    return model.apply({"params": params}, hidden, method="logits"), cache

  token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  found = step.lower(params, token, cache).compile().memory_analysis()
  return (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
    + found.temp_size_in_bytes
  )


def verdicts(lines: Sequence[Mapping[str, Any]]) -> list[Verdict]:
  """Returns what is said of a 70B model, and whether it holds here."""
  by = {line["format"]: line for line in lines}
  whole = by["bfloat16"]["weights GB"]
  four = {n: x["weights GB"] for n, x in by.items() if 4 <= x["bits"] < 5}
  needs = {n: by[n].get("step GB", by[n]["with cache GB"]) for n in four}
  bare, held = bits_within(lines, 24)
  return [
    Verdict(
      "16 bits take 140 GB (within 3%)",
      f"{whole:.1f} GB",
      abs(whole - 140) < 0.03 * 140,
    ),
    Verdict(
      "4 bits, scales and the unpacked rest counted, take 35 to 40 GB",
      ", ".join(f"{n} {x:.1f}" for n, x in four.items()),
      all(35 <= x <= 40 for x in four.values()),
    ),
    Verdict(
      "with keys and values, or as a compiled step, they fit 40 GB",
      ", ".join(f"{n} {x:.1f}" for n, x in needs.items()),
      all(x <= 40 for x in needs.values()),
    ),
    Verdict(
      "no 4-bit format fits 24 GB",
      f"24 GB would take {bare:.2f} bits a packed weight, {held:.2f} with keys"
      " and values beside",
      all(x > 24 for x in four.values()),
    ),
  ]


def bits_within(
  lines: Sequence[Mapping[str, Any]], gigabytes: int
) -> tuple[float, float]:
  """Returns the bits a packed weight that a budget allows.

  What is not packed stays in 16 bits and is taken off first.

  Args:
    lines: of `Memory.table`; at least one is packed.
    gigabytes: in all.

  Returns:
    Without and with the keys and values that the lines hold.
  """
  line = next(x for x in lines if x["packed GB"])
  weights = 8 * line["packed GB"] / line["bits"]
  rest = line["weights GB"] - line["packed GB"]
  held = line["with cache GB"] - line["weights GB"]
  left = gigabytes - rest
  return 8 * left / weights, 8 * (left - held) / weights
