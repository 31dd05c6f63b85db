"""Checks the claims of FlashAttention and draws them.

  python -m experiments.studies.attention.attention_cost --to=DIR \
      [--topology=v5e:2x2]

F1: memory of a forward and backward pass at up to 32,768 tokens, naive against
tiles, by the compilers for this CPU and (where the package libtpu is
installed) for TPUs; a dash is what does not fit the chip. F2: errors against
float64. F3: bytes that our TPU kernel moves, counted from its index maps,
against the formula, and FLOPs a byte against what each chip needs.

Nothing large is computed: half a minute on two cores. Prints tables, writes
memory.png and traffic.png, and ends with a JSON line: F1, F2 and F3 are true.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments.core import cli
from research import tables

FLAGS = cli.new_flags()

_TO = flags.DEFINE_string(
  "to", None, "Folder for the pictures; made if missing.", flag_values=FLAGS
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v5e:2x2", "TPU to compile for, too.", flag_values=FLAGS
)
_LENGTHS = flags.DEFINE_list(
  "lengths",
  ["4096", "8192", "16384", "32768"],
  "Tokens to compile for.",
  flag_values=FLAGS,
)
BLOCKS = (128, 256, 512, 1024, 2048)
EXACT_LENGTH, TRAFFIC_LENGTH = 512, 32768


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Measures; returns the result, which the command prints as JSON."""
  del argv
  cli.required(to=_TO.value)
  cli.local(to=_TO.value)
  lengths = _lengths(_LENGTHS.value)
  import matplotlib

  matplotlib.use("Agg")
  from experiments.notebooks import attention_pictures as pictures
  from experiments.studies.attention import attention_claims as claims
  from research.planning import chips

  places = {"cpu": None}
  if chips.has_tpu_compiler():
    places[_TOPOLOGY.value] = _TOPOLOGY.value
  else:
    cli.say("F1 for TPUs: skipped, the package libtpu is not installed")
  memory = {n: claims.memory(lengths, t) for n, t in places.items()}
  exact = claims.exactness(EXACT_LENGTH)
  moved, ridges = claims.moved(TRAFFIC_LENGTH, BLOCKS), claims.ridges()
  folder = pathlib.Path(_TO.value)
  folder.mkdir(parents=True, exist_ok=True)
  pictures.memory(memory["cpu"]).savefig(folder / "memory.png")
  pictures.traffic(moved, ridges).savefig(folder / "traffic.png")
  for name, rows in (*memory.items(), ("exactness", exact)):
    cli.say(f"{name}\n{_table(rows)}\n")
  head = f"one head of {claims.HEAD_DIM}, bfloat16, forward"
  cli.say(f"{TRAFFIC_LENGTH} tokens, {head}")
  cli.say(f"{_table(moved)}\n\n{_table(ridges)}")
  return {
    "F1": _linear(memory),
    "F2": all(row["error"] <= 2 * row["naive"] for row in exact),
    "F3": _bandwidth(moved, ridges),
    "memory": memory,
    "exactness": exact,
    "traffic": moved,
    "ridges": ridges,
  }


def _linear(memory: dict[str, list[dict[str, Any]]]) -> bool:
  """Whether flash's memory doubles with the length where naive's squares."""
  verdicts = []
  for before, row in ((r[-2], r[-1]) for r in memory.values()):
    growth = row["flash"] / before["flash"]
    longer = row["length"] / before["length"]
    naive = row["naive"] is None or row["naive"] >= row["scores"]
    verdicts.append(growth < 1.1 * longer and naive)
  return all(verdicts)


def _bandwidth(moved: list[dict], ridges: list[dict]) -> bool:
  """Whether standard attention waits for memory, and large tiles do not.

  And whether bytes are as counted, and fall with the size of a tile as the
  paper says.
  """
  plain, *tiled = moved
  exact = all(row["bytes"] == row["formula"] for row in tiled)
  waits = all(plain["intensity"] < row["ridge"] for row in ridges)
  constants = [row["constant"] for row in tiled]
  scales = max(constants) < 1.2 * min(constants)
  return exact and waits and scales and all(
    tiled[-1]["intensity"] > row["ridge"] for row in ridges
  )  # fmt: skip


def _lengths(texts: Sequence[str]) -> list[int]:
  from research.typing import UserError

  if len(texts) < 2 or not all(text.isdecimal() for text in texts):
    raise UserError(
      f"--lengths={','.join(texts)}: expected two or more numbers of tokens"
    )
  lengths = sorted(set(map(int, texts)))
  if len(lengths) < 2 or lengths[0] < 1:
    raise UserError(
      f"--lengths={','.join(texts)}: expected different, positive numbers"
    )
  return lengths


def _table(rows: list[dict[str, Any]]) -> str:
  """Returns rows as Markdown."""
  names = list(rows[0])
  cells = ([_cell(row[name]) for name in names] for row in rows)
  return tables.markdown(names, cells)


def _cell(value: Any) -> str:
  if value is None:
    return "-"
  if isinstance(value, float):
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
  return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
  cli.run(main)
