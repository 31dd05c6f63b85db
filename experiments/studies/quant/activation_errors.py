"""Measures what rounding activations costs, and what repairs it.

  python -m experiments.studies.quant.activation_errors --model=smollm2-135m

For some matrices: how large outliers of their inputs are, before and after a
rotation by a random Hadamard matrix, and the median over tokens of the
outputs' relative error with activations of 8 and 4 bits, a scale a tensor or a
token, smoothed (SmoothQuant, alpha 0.5), or rotated (QuaRot). Prints a table,
the claims, and a JSON line.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from experiments.core import cli, runtime

FLAGS = cli.new_flags()

_MODEL = flags.DEFINE_string("model", None, cli.MODEL, flag_values=FLAGS)
_TEXT = flags.DEFINE_string(
  "text",
  None,
  "A text file in UTF-8; by default topics of the Python reference.",
  flag_values=FLAGS,
)
_TOKENS = flags.DEFINE_integer(
  "tokens", 256, "How many are read.", flag_values=FLAGS
)
_MATRICES = flags.DEFINE_list(
  "matrices",
  [
    *("layers/0/attention/q", "layers/11/attention/q", "layers/20/mlp/up"),
    *("layers/5/mlp/down", "layers/11/mlp/down", "layers/28/mlp/down"),
  ],
  "Their addresses.",
  flag_values=FLAGS,
)


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result, which the command prints as JSON."""
  del argv
  cli.required(model=_MODEL.value)
  text = cli.read_text(_TEXT.value, "text") if _TEXT.value else None
  runtime.setup()
  import jax
  import jax.numpy as jnp

  from experiments.core import tables
  from research.data.sources import PydocTopics
  from research.interop.load import load_model
  from research.quant.reports import input_errors
  from research.typing import UserError

  loaded = load_model(_MODEL.value, "float32", False)
  if loaded.tokenizer is None:
    raise UserError(f"--model={_MODEL.value}: found no tokenizer in it")
  if text is None:
    source = PydocTopics("heldout")
    text = "\n".join(source[i] for i in range(len(source)))
  ids = loaded.tokenizer.prompt(text)[: _TOKENS.value]
  if len(ids) < 2:
    raise UserError(f"--text: found {len(ids)} tokens, expected at least 2")
  found = input_errors.collect_inputs(
    loaded.model,
    loaded.params,
    jnp.asarray([ids], jnp.int32),
    tuple(_MATRICES.value),
  )
  rows = {}
  for address in _MATRICES.value:
    errors = input_errors.errors(*found[address], jax.random.key(0))
    rows[address] = {k: float(errors[k]) for k in input_errors.COLUMNS}
  lines = [{"matrix": address, **row} for address, row in rows.items()]
  cli.say(f"\n{tables.text(lines)}\n")
  claims = verdicts(rows)
  for claim, holds in claims.items():
    cli.say(f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}")
  return {"claims": claims, "matrices": rows, "tokens": len(ids)}


def verdicts(rows: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
  """Returns whether the three classic claims hold for these matrices."""
  normed = [row for a, row in rows.items() if not a.endswith("/down")]
  return {
    "a scale a tensor loses most tokens somewhere, a scale a token none": (
      max(row["A8 tensor"] for row in rows.values()) > 0.5
      and max(row["A8 token"] for row in rows.values()) < 0.1
    ),
    "SmoothQuant at least halves that error behind norms": all(
      row["A8 tensor smooth"] <= 0.55 * row["A8 tensor"] for row in normed
    ),
    "a rotation divides the 4-bit error by 2.5 or more": all(
      row["A4 rotated"] <= row["A4 token"] / 2.5 for row in rows.values()
    ),
  }


if __name__ == "__main__":
  cli.run(main)
