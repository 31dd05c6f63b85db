"""Lists every method of adaptation: file, size, PEFT's name, score, speed.

  python -m experiments.studies.lora.lora_methods [--bench=FILE] [--scores=FILE]

`--bench` is what `make bench ARGS='method_...'` printed; `--scores` the result
of `claims_methods`, by default the one that is stored. What was not measured is
"-". Trained parameters are those on SmolLM2-135M's linear layers at the
method's own defaults; nothing is computed but shapes. Prints the table of
methods of `research/lora/RESULTS.md` and ends with a JSON line.

With --memory it is that page's other table: what ways to fine-tune
Llama-2-7B hold in memory.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import functools
import inspect
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from experiments.core import cli, stats
from experiments.studies import results
from experiments.studies.lora import lora_abilities, lora_memory
from research import tables, tree
from research.lora import adapt, wrap
from research.lora.method import Method
from research.lora.methods import all_methods
from research.nn import presets
from research.typing import UserError

FLAGS = cli.new_flags()

_BENCH = flags.DEFINE_string(
  "bench", None, "What `make bench` printed.", flag_values=FLAGS
)

_SCORES = flags.DEFINE_string(
  "scores", None, "A result.json of claims_methods.", flag_values=FLAGS
)

_MEMORY = flags.DEFINE_bool(
  "memory", False, "Print what setups hold in memory.", flag_values=FLAGS
)

CLAIMS = "runs/lora/claims_methods.gin"
"""The study whose result has the swept scores."""

SPEEDS = ("times PEFT", "step / LoRA's", "memory / PEFT's")
"""Columns that a bench fills."""

SWEPT = {"held out": "swept score", "against LoRA": "against LoRA"}
"""Columns of the table of claims, and their names here."""

SMOLLM2 = presets.Sizes(
  vocab=49152,
  width=576,
  depth=30,
  heads=9,
  kv_heads=3,
  head_dim=64,
  hidden=1536,
  tied=True,
)
"""Of SmolLM2-135M; every matrix has a side of 192, 576 or 1536."""

OPTIONS: Mapping[str, dict[str, Any]] = {
  "C3A": dict(block=64),
  "ALoRA": dict(invocation=(0,)),
  "Tokens": dict(ids=(0,)),
}
"""What these need; for all others, defaults."""

TARGETS = {"Tokens": "embed"}
"""What these are for; all others are counted on the linear layers."""

ABSTRACT = ("DecompositionInit", "Rotation")
MEASURED = {"CorDA": "PiSSA", "LoRAGA": "PiSSA", "EVA": "LoRA"}
"""Their start needs data; their arrays are those of another method."""


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Prints the table, or that of memory."""
  del argv
  if _MEMORY.value:
    head, *cells = lora_memory.table()
    cli.say(tables.markdown(head, cells))
    return {"setups": len(cells)}
  speeds = _speeds(_BENCH.value) if _BENCH.value else {}
  found = rows(speeds, _scores(_SCORES.value or results.path_of(CLAIMS)))
  names = list(found[0])
  cells = [[_cell(row[name]) for name in names] for row in found]
  cli.say(tables.markdown(names, cells))
  return {"methods": len(found)}


def rows(
  speeds: Mapping[str, Mapping[str, float]] | None = None,
  scores: Mapping[str, Mapping[str, str]] | None = None,
) -> list[dict]:
  """Returns a row a method, as plain values, fewest parameters first.

  Args:
    speeds, scores: class's name in lower case -> columns that were measured.
  """
  kinds = {n: k for n, k in all_methods().items() if n not in ABSTRACT}
  shapes = _shapes()
  total, out = tree.count(shapes), []
  for name, kind in kinds.items():
    file = pathlib.Path(inspect.getfile(kind))
    method = kind(**OPTIONS.get(name, {}))
    count = trained(name, method, shapes)
    row = {
      "method": name,
      "file": file.name,
      "lines": len(file.read_text("utf-8").splitlines()),
      "trained": count,
      "share %": round(100 * count / total, 2),
      "PEFT": _peft(kind),
      **lora_abilities.columns(method),
    }
    row |= dict.fromkeys((*SWEPT.values(), *SPEEDS))
    for measured in (scores or {}, speeds or {}):
      row |= measured.get(name.lower(), {})
    out.append(row)
  return sorted(out, key=lambda row: row["trained"])


def trained(name: str, method: Method, shapes: Any) -> int:
  """Returns how many parameters a method trains on all linear layers."""
  if name in MEASURED:
    method = all_methods()[MEASURED[name]](rank=method.rank)
  targets = TARGETS.get(name, adapt.ALL_LINEAR)
  transform = adapt.Adapt(method=method, targets=targets)
  adapted = jax.eval_shape(transform, shapes, jax.random.key(0))
  chosen, _ = tree.partition(adapted, wrap.TRAINABLE)
  return tree.count(chosen)


@functools.cache
def _shapes() -> Any:
  model = presets.transformer(presets.FAMILIES["llama"], SMOLLM2)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def _peft(kind: type[Method]) -> str:
  if kind.PEFT is None:
    plain = kind.exported is not Method.exported
    return "as LORA" if plain else "-"
  return f"{kind.PEFT}, {kind.PEFT_FLAG}" if kind.PEFT_FLAG else kind.PEFT


def _scores(path: str | pathlib.Path) -> dict[str, dict[str, str]]:
  """Returns swept scores by method, from a study's result."""
  try:
    [table] = json.loads(pathlib.Path(path).read_text("utf-8"))["tables"]
    lines = [dict(zip(table["header"], x, strict=True)) for x in table["rows"]]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"--scores={path}: cannot be read as a result: {error}"
    ) from error
  if not {"method", *SWEPT} <= set(table["header"]):
    raise UserError(
      f"--scores={path}: has no table with columns method, "
      f"{', '.join(SWEPT)}, as the result of {CLAIMS} has"
    )
  return {
    line["method"].replace("-", "").lower(): {
      ours: _swept(line[theirs]) for theirs, ours in SWEPT.items()
    }
    for line in lines
  }


def _swept(cell: Any) -> str:
  if isinstance(cell, list):
    return str(stats.Mean(*cell))
  return "" if cell is None else str(cell)


def _speeds(path: str) -> dict[str, dict[str, float]]:
  """Returns columns of speed by method, from the bench's last lines."""
  found = []
  try:
    for line in pathlib.Path(path).read_text("utf-8").splitlines():
      if line.startswith('{"rows"'):
        found += json.loads(line)["methods"]
  except (OSError, ValueError, KeyError) as error:
    raise UserError(f"--bench={path}: cannot be read: {error}") from error
  lora = [r["ours_tokens_per_s"] for r in found if r["row"] == "method_lora"]
  if not lora:
    raise UserError(f"--bench={path}: has no row method_lora, expected one")
  return {
    row["row"].removeprefix("method_"): dict(
      zip(
        SPEEDS,
        (
          round(row["ratio"], 2),
          round(lora[-1] / row["ours_tokens_per_s"], 2),
          round(row["ours_peak_rss_bytes"] / row["torch_peak_rss_bytes"], 2),
        ),
        strict=True,
      )
    )
    for row in found
  }


def _cell(value: Any) -> str:
  if value is None or value == "":
    return "-"
  return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
  cli.run(main)
