"""Tests memory estimates against research/lora/MATH.md 6 and compilers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.planning import abstract_step, plan_training
from experiments.studies import results
from research.lora import adapt
from research.lora.diagnosis import memory
from research.lora.methods.dora import DoRA
from research.lora.methods.lora import LoRA
from research.nn import presets
from research.optim.low_rank import galore, subspace
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Cast, Quantize
from research.sharding import Layout
from tests import support_plan

LLAMA2_7B = presets.Sizes(
  vocab=32000,
  width=4096,
  depth=32,
  heads=32,
  kv_heads=32,
  head_dim=128,
  hidden=11008,
  tied=False,
)

COLUMNS = ("setup", "weights", "gradients", "master", "optimizer", "total")


def shapes(sizes: presets.Sizes = LLAMA2_7B) -> Any:
  """Returns the shapes of a model's parameters."""
  model = presets.transformer(presets.FAMILIES["llama"], sizes)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def setups() -> dict[str, memory.Memory]:
  """Returns what each setup takes, by its name."""
  params = shapes()

  def full(precision):
    return memory.lora_memory(params, trainable=".", precision=precision)

  def lora(rank, targets: str | Sequence[str] = adapt.ALL_LINEAR, *packed):
    how = adapt.Adapt(method=LoRA(rank=rank), targets=targets)
    return memory.lora_memory(params, (Cast(), *packed, how))

  def qlora(rank, nested):
    return lora(
      rank, adapt.ALL_LINEAR, Quantize(format=Codebook(nested=nested))
    )

  def galore(**how):
    return memory.galore_memory(params, 1024, **how)

  twice, once = "NF4 with double quantization", "NF4, one level"
  return {
    "full, 16 bits with a float32 master": full(memory.MIXED),
    "full, all in 16 bits": full(memory.HALF),
    "LoRA r = 8 on q, v": lora(8, ("q", "v")),
    "LoRA r = 16 on all": lora(16),
    "LoRA r = 64 on all": lora(64),
    "LoRA r = 256 on all": lora(256),
    f"QLoRA r = 16, {twice}": qlora(16, 256),
    f"QLoRA r = 64, {twice}": qlora(64, 256),
    f"QLoRA r = 64, {once}": qlora(64, 0),
    "GaLore r = 1024, 16-bit moments": galore(),
    "GaLore r = 1024, 8-bit moments, layer by layer": galore(
      state=1, layerwise=True
    ),
  }


def table_of() -> list[list[str]]:
  """Returns the cells of the table in decimal GB, its head first."""
  out = [list(COLUMNS)]
  for name, found in setups().items():
    parts = (found.frozen, found.learned)
    weights = " + ".join(_gb(x) for x in parts if x)
    rest = (found.gradients, found.master, found.optimizer)
    out.append([name, weights, *map(_gb, rest), f"{found.total / 1e9:.1f}"])
  return out


def _gb(size: int) -> str:
  return f"{size / 1e9:.2f}" if size else ""


def adapting(rank, targets="all-linear", method=LoRA):
  return adapt.Adapt(method=method(rank=rank), targets=targets)


# research/lora/MATH.md 6: frozen, learned, gradients, master, optimizer; all.
ROWS = [
  ((0, 13.48, 13.48, 26.95, 53.91), 107.8),
  ((0, 13.48, 13.48, 0, 26.95), 53.9),
  ((13.48, 0.02, 0.02, 0, 0.03), 13.5),
  ((13.48, 0.16, 0.16, 0, 0.32), 14.1),
  ((13.48, 0.64, 0.64, 0, 1.28), 16.0),
  ((13.48, 2.56, 2.56, 0, 5.12), 23.7),
  # 3.34 packed and 0.52 of embedding and head; 3.64 with one level.
  ((3.87, 0.16, 0.16, 0, 0.32), 4.5),
  ((3.87, 0.64, 0.64, 0, 1.28), 6.4),
  ((4.17, 0.64, 0.64, 0, 1.28), 6.7),
  # Projectors and two kinds of moments.
  ((0, 13.48, 13.48, 0, 1.88 + 6.48 + 1.05 - 0.01), 36.4),
  ((0, 13.48, 0.09, 0, 1.88 + 3.24 + 0.52), 19.2),
]


def test_rows_of_the_table():
  found = setups()
  assert len(found) == len(ROWS)
  for (name, got), (want, total) in zip(found.items(), ROWS, strict=True):
    parts = (got.frozen, got.learned, got.gradients, got.master, got.optimizer)
    parts = [round(x / 1e9, 2) for x in parts]
    assert parts == [round(x, 2) for x in want], name
    assert round(got.total / 1e9, 1) == total, name
    assert f"{total} GB" in str(got)


@pytest.mark.parametrize("rank", [8, 100])
def test_galores_bytes_are_those_of_its_state(rank):
  """Also where the rank is more than the smaller side of some matrices."""
  params = {
    "embed": jax.ShapeDtypeStruct((50, 64), np.float32),
    "run0": {
      "layer0": {
        "attention": {"k": jax.ShapeDtypeStruct((3, 64, 16), np.float32)},
        "mlp": {"up": jax.ShapeDtypeStruct((3, 64, 256), np.float32)},
        "norm": jax.ShapeDtypeStruct((3, 64), np.float32),
      }
    },
  }
  tx = galore.galore(0.1, subspace.Projection(rank=rank))
  state = jax.tree.leaves(jax.eval_shape(tx.init, params))
  # Of 16 bits there, of 32 here; counters are not counted.
  want = sum(2 * x.size for x in state if x.ndim)
  assert memory.galore_memory(params, rank).optimizer == want


def test_the_stored_table_is_that_of_shapes():
  [table] = results.load("runs/lora/memory.gin")["tables"]
  _, _, *lines = results.markdown(table).splitlines()
  stated = [[x.strip() for x in line[1:-1].split("|")] for line in lines]
  assert stated == table_of()[1:]


@pytest.mark.parametrize(
  ("start", "count"),
  [
    (adapting(8, ("q", "v")), 460_800),
    (adapting(8), 2_442_240),
    (adapting(64), 19_537_920),
    (adapting(1), 305_280),
    (adapting(8, method=DoRA), 2_442_240 + 155_520),
  ],
)
def test_counts_of_smollm2(start, count):
  params = shapes(support_plan.SMOLLM2)
  got = memory.lora_memory(params, (start,))
  assert got.learned == got.gradients == 4 * count
  assert got.optimizer == 8 * count


# Activations -----------------------------------------------------------------


def taken(how="lora", remat="names"):
  """Returns a step over 4 rows of 256 tokens, and its shapes."""
  whole = support_plan.experiment(
    Layout(data=1), support_plan.SMOLLM2, batch=4, length=256
  )
  model = dataclasses.replace(whole.model, remat=remat)
  whole = dataclasses.replace(whole, model=model)
  if how != "full":
    before = (Quantize(),) if how == "qlora" else ()
    whole = dataclasses.replace(
      whole,
      transforms=(*before, adapting(4)),
      trainable="/trained/",
    )
  return whole, abstract_step.build(whole, jax.devices()[:1])


@pytest.mark.slow
def test_activations_are_the_named_residuals():
  rows, n, d, f = 4 * 256, 30, 576, 1536
  # Queries, keys, values; attention's output and normaliser; the middle, gate,
  # up; the input of each layer. And of the loss: hidden states, twice.
  layer = (9 + 3 + 3) * 64 + 9 * 64 + 9 + d + 2 * f + d
  want = 4 * rows * (n * layer + 2 * d)
  got = plan_training.arithmetic(*taken()).activations
  assert got == pytest.approx(want, rel=0.01)
  # Adapters do not shrink them, a packed base does not grow them.
  assert plan_training.arithmetic(*taken("qlora")).activations == got
  full = plan_training.arithmetic(*taken("full")).activations
  assert got < full < 1.2 * got
  assert (
    plan_training.arithmetic(*taken(remat="layer")).activations < 0.15 * got
  )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["lora", "qlora", "full"])
@pytest.mark.sample(4)
def test_within_ten_percent_of_the_compilers_report(how):
  whole, found = taken(how)
  usage = abstract_step.lower(whole, found).compile().memory_analysis()
  total = usage.argument_size_in_bytes + usage.temp_size_in_bytes
  total += usage.output_size_in_bytes - usage.alias_size_in_bytes
  got = plan_training.arithmetic(whole, found)
  assert got.total == pytest.approx(total, rel=0.1)


def test_transformed_weights_count_as_part_of_the_model():
  whole, found = taken()
  want = plan_training.arithmetic(whole, found)
  changing = dataclasses.replace(whole, transformed="/w$")
  got = plan_training.arithmetic(
    changing, abstract_step.build(changing, jax.devices()[:1])
  )
  assert got == want


def test_unknown_parts_are_not_reported():
  whole, _ = taken()
  cut = dataclasses.replace(whole, mesh=Layout(data=2))
  found = abstract_step.build(cut, jax.devices()[:2])
  assert plan_training.arithmetic(cut, found) is None
