"""The tables and pictures of `colab/lora.ipynb`: sizes, capacity and spectra.

Rows are those of a pipeline's trainings that tried several learning rates.
"""

import contextlib
import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.pipeline import Pipeline
from experiments.studies.protocol import Row
from research import tree, weights
from research.lora import adapt, wrap
from research.lora.diagnosis import diagnose
from research.lora.method import Method
from research.lora.methods import all_methods
from research.nn import presets
from research.training.objectives.objective import NextToken
from research.typing import Float, Params, UserError

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
"""What these methods need; for all others, defaults."""

TARGETS = {"Tokens": "embed"}
"""What these are for; all others are counted on the linear layers."""

ABSTRACT = ("DecompositionInit", "Rotation")
MEASURED = {"CorDA": "PiSSA", "LoRAGA": "PiSSA", "EVA": "LoRA"}
"""Their start needs data; their arrays are those of another method."""


def methods() -> list[dict[str, Any]]:
  """Returns what each method trains on SmolLM2-135M, fewest first."""
  shapes = smollm2_shapes()
  total, out = tree.count(shapes), []
  for name, kind in all_methods().items():
    if name in ABSTRACT:
      continue
    count = trained(name, kind(**OPTIONS.get(name, {})), shapes)
    share = round(100 * count / total, 2)
    peft = peft_name(kind)
    out.append(dict(method=name, trained=count) | {"share %": share})
    out[-1]["PEFT"] = peft
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


def smollm2_shapes() -> Any:
  """Returns the shapes of SmolLM2-135M's parameters."""
  model = presets.transformer(presets.FAMILIES["llama"], SMOLLM2)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def peft_name(kind: type[Method]) -> str:
  """Returns PEFT's name of a method, and the flag that selects it."""
  if kind.PEFT is None:
    plain = kind.exported is not Method.exported
    return "as LORA" if plain else "-"
  return f"{kind.PEFT}, {kind.PEFT_FLAG}" if kind.PEFT_FLAG else kind.PEFT


def shorter(study: Pipeline, steps: int) -> Pipeline:
  """Returns a pipeline whose trainings have so many steps."""
  names = [x.name for x in study.steps if x.command == "train"]
  fewer = dict.fromkeys(names, (f"STEPS={steps}",))
  return dataclasses.replace(study, overrides=fewer)


def run(
  study: Pipeline, names: Sequence[str], place: pathlib.Path
) -> dict[str, Row]:
  """Returns rows of steps with seed 0, without what their commands say."""
  rows: dict[str, Row] = {}
  with contextlib.redirect_stderr(io.StringIO()):
    for name in names:
      rows[name] = study.run(f"{name}, seed 0", rows, place)
  return rows


def ranking(rows: Mapping[str, Row]) -> list[dict[str, Any]]:
  """Returns a line an arm: what it trained, and what came of it.

  The loss is held out, the rate chosen on other documents.
  """
  full = rows["full"]["trainable_parameters"]
  return [
    {
      "arm": name,
      "trained %": 100 * row["trainable_parameters"] / full,
      "rate": row["at"],
      "loss": row["loss_after"],
    }
    for name, row in rows.items()
    if "tried" in row
  ]


def capacity(rows: Mapping[str, Row]) -> Any:
  """Returns a figure: losses against rates, and against parameters."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
  for name, row in rows.items():
    if "tried" in row:
      tried = row["tried"]
      left.semilogx([*map(float, tried)], [*tried.values()], "o-", label=name)
  lines = ranking(rows)
  left.set(xlabel="learning rate", ylabel="validation loss")
  left.legend(frameon=False)
  right.semilogx(
    [x["trained %"] for x in lines], [x["loss"] for x in lines], "o"
  )
  for line in lines:
    place = (line["trained %"], line["loss"])
    right.annotate(line["arm"], place, (4, 4), textcoords="offset points")
  right.margins(0.2)  # names stay inside of the frame
  right.set(xlabel="trained, % of full", ylabel="held-out loss, best rate")
  return figure


def loss(model: Any, params: Params, batches: Sequence[Any]) -> float:
  """Returns the mean loss of a next token."""
  objective = jax.jit(NextToken(model=model, rows=512))
  sums = [objective(params, batch, None)[:2] for batch in batches]
  return float(sum(x for x, _ in sums) / sum(n for _, n in sums))


def ranks(runs: Mapping[str, tuple[Params, Params]]) -> dict[str, float]:
  """Returns how many singular values of updates have 90% of their energy."""
  means = {}
  for name, (before, after) in runs.items():
    changes = diagnose.diagnose_change(before, after).values()
    means[name] = float(np.mean([x.energy_rank for x in changes]))
  return means


def spectrum(
  before: Params, after: Params, address: str
) -> Float[np.ndarray, " S"]:
  """Returns the singular values of a matrix's change, largest first."""
  changed, base = (
    np.asarray(weights.dense(_matrix(params, address)), np.float64)
    for params in (after, before)
  )
  return np.linalg.svd(changed - base, compute_uv=False)


def _matrix(params: Params, address: str) -> Any:
  _, number, path = address.split("/", 2)
  for i, layer in enumerate(tree.layers(params)):
    if i == int(number) and path in (found := dict(wrap.leaves(layer))):
      return found[path]
  raise UserError(f"{address}: no such matrix")


def spectra(runs: Mapping[str, tuple[Params, Params]], address: str) -> Any:
  """Returns a figure of the singular values of one matrix's changes."""
  figure, axis = plt.subplots(figsize=(7, 4))
  for name, (before, after) in runs.items():
    s = spectrum(before, after, address)
    axis.semilogy(range(1, len(s) + 1), s / s[0], ".-", label=name)
  axis.set(
    xlabel="singular value",
    ylabel="of the change, largest is 1",
    ylim=(1e-4, 1.5),
    title=address,
  )
  axis.legend(frameon=False)
  return figure
