"""What a model takes in few bits, from shapes alone.

  python -m experiments.studies.quant.quant_memory \
      --config=models/llama2_70b.gin

Every format packs the shapes of all layers' matrices; nothing is drawn or read,
so that a model of any size fits. Embedding, head and norms stay in 16 bits, and
keys and values of --context tokens are counted, too. With --compile a step of
generation is compiled for this machine's CPU, and what its program says it
needs is printed beside. Ends with claims and a JSON line.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.core import cli

FLAGS = cli.new_flags()

_CONFIG = flags.DEFINE_string(
  "config",
  "models/llama2_70b.gin",
  "Gin file of a from_scratch.FromScratch, here or under configs/.",
  flag_values=FLAGS,
)
_CONTEXT = flags.DEFINE_integer(
  "context", 4096, "Tokens whose keys and values are held.", flag_values=FLAGS
)
_COMPILE = flags.DEFINE_bool(
  "compile", True, "Compile a step of generation.", flag_values=FLAGS
)
_SET = cli.define_set(FLAGS)

BUDGETS = (24, 40, 48, 80)
"""Gigabytes of one accelerator."""


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Counts; returns the result, which the command prints as JSON."""
  del argv
  from experiments.core import config, from_scratch, runtime, tables
  from research.typing import UserError

  if _CONTEXT.value < 1:
    raise UserError(f"--context={_CONTEXT.value}: expected at least 1")
  runtime.setup()
  bindings = ["SEED = 0", *_SET.value]
  read = config.read(_CONFIG.value, bindings, root=from_scratch.FromScratch)
  model, shapes = shapes_of(read.experiment)
  lines = rows(model, shapes, formats(), _CONTEXT.value, _COMPILE.value)
  cli.say(f"\n{tables.text(tables.without_empty(lines))}\n")
  found = verdicts(lines)
  for verdict in found:
    cli.say(f"{verdict.state}: {verdict.claim}\n  {verdict.found}")
  return {
    "rows": lines,
    "verdicts": [v._asdict() | {"verdict": v.state} for v in found],
  }


def shapes_of(source: Any) -> tuple[Any, Any]:
  """Returns a model that does not exist, and the shapes of its weights."""
  from research.nn import presets

  family = presets.FAMILIES[source.family]
  model = presets.transformer(family, source.sizes, "bfloat16")
  tokens = jnp.zeros((1, 2), jnp.int32)

  def init(key):
    params = model.init(key, tokens)["params"]
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

  return model, jax.eval_shape(init, jax.random.key(0))


def formats() -> Mapping[str, Any]:
  """Returns what is counted; None is 16 bits."""
  from research.quant.formats.affine import Affine
  from research.quant.formats.codebook import Codebook
  from research.quant.formats.microscaling import Microscaling
  from research.quant.formats.nvfp4 import NVFP4

  some = [
    *(Affine(bits=b, block=128) for b in (8, 4, 3, 2)),
    Affine(bits=4, block=64),
    Codebook(block=64),
    Microscaling(),
    NVFP4(),
  ]
  return {"bfloat16": None} | {f.name: f for f in some}


def rows(
  model: Any,
  shapes: Any,
  kept: Mapping[str, Any],
  context: int,
  compiled: bool,
) -> list[dict[str, Any]]:
  """Returns a line a format, most bits first.

  Args:
    model: the network.
    shapes: of its weights.
    kept: name -> format of the layers' matrices; None for 16 bits.
    context: tokens whose keys and values are held.
    compiled: whether a step of generation is compiled.
  """
  from research.nn.transformer import init_cache
  from research.quant.quantize import Quantize
  from research.quant.reports import report_errors

  cache = jax.eval_shape(lambda p: init_cache(model, p, 1, context), shapes)
  held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  out = []
  for name, format in kept.items():
    params = shapes
    if format is not None:
      params = jax.eval_shape(Quantize(format=format), shapes)
    sizes = report_errors.sizes(params)
    line = {
      "format": name,
      "bits": 16.0 if format is None else sizes.bits_per_weight,
      "packed GB": None if format is None else sizes.packed_bytes / 1e9,
      "weights GB": sizes.nbytes / 1e9,
      "with cache GB": (sizes.nbytes + held) / 1e9,
    }
    if compiled:
      line["step GB"] = step_bytes(model, params, cache) / 1e9
    need = line.get("step GB", line["with cache GB"])
    fits = [b for b in BUDGETS if need <= b]
    line["fits GB"] = fits[0] if fits else None
    out.append(line)
  return sorted(out, key=lambda x: -x["bits"])


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


def verdicts(lines: Sequence[Mapping[str, Any]]) -> list[Any]:
  """Returns what is said of a 70B model, and whether it holds here."""
  from experiments.studies.protocol import Verdict

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
    lines: as `rows` returns them; at least one is packed.
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


if __name__ == "__main__":
  cli.run(main)
