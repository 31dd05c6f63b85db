"""Bytes of a step: lora.md section 5, and what the compiler says."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments import shapes
from research.lora import adapt, memory
from research.lora.memory import HALF, MIXED
from research.lora.methods.dora import DoRA
from research.lora.methods.lora import LoRA
from research.nn import presets
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


def params(sizes):
  """Returns the shapes of a model's parameters."""
  model = presets.transformer(presets.FAMILIES["llama"], sizes)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def adapting(rank, targets="all-linear", method=LoRA):
  return adapt.Adapt(method=method(rank=rank), targets=targets)


MASTERS = dict(trainable=".", precision=MIXED)
HALVES = dict(trainable=".", precision=HALF)
ROWS = {  # what is done -> weights frozen and learned, gradients, master, state
  "full": (
    MASTERS,
    (0, 13.48, 13.48, 26.95, 53.91),
    107.8,
  ),
  "half": (HALVES, (0, 13.48, 13.48, 0, 26.95), 53.9),
  "8 of q, v": ((8, ("q", "v")), (13.48, 0.02, 0.02, 0, 0.03), 13.5),
  "16": ((16,), (13.48, 0.16, 0.16, 0, 0.32), 14.1),
  "64": ((64,), (13.48, 0.64, 0.64, 0, 1.28), 16.0),
  "256": ((256,), (13.48, 2.56, 2.56, 0, 5.12), 23.7),
  # 3.34 packed and 0.52 of embedding and head; 3.64 with one level.
  "16 over NF4": ((16, 256), (3.87, 0.16, 0.16, 0, 0.32), 4.5),
  "64 over NF4": ((64, 256), (3.87, 0.64, 0.64, 0, 1.28), 6.4),
  "64 over NF4, one level": ((64, 0), (4.17, 0.64, 0.64, 0, 1.28), 6.7),
}


def of_row(case):
  if isinstance(case, dict):
    return memory.lora_memory(params(LLAMA2_7B), **case)
  rank, *rest = case
  how = [Cast()]
  if rest and isinstance(rest[0], int):
    how.append(Quantize(format=Codebook(nested=rest[0])))
  targets = rest[0] if rest and isinstance(rest[0], tuple) else "all-linear"
  return memory.lora_memory(params(LLAMA2_7B), (*how, adapting(rank, targets)))


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_table(name):
  case, parts, total = ROWS[name]
  got = of_row(case)
  found = (got.frozen, got.learned, got.gradients, got.master, got.optimizer)
  assert tuple(round(x / 1e9, 2) for x in found) == parts
  assert round(got.total / 1e9, 1) == total
  assert f"{total} GB" in str(got)


def test_galore_of_the_table():
  got = memory.galore_memory(params(LLAMA2_7B), 1024)
  assert round(got.optimizer / 1e9, 2) == round(1.88 + 6.48 + 1.05, 2) - 0.01
  assert round(got.total / 1e9, 1) == 36.4
  got = memory.galore_memory(params(LLAMA2_7B), 1024, state=1, layerwise=True)
  assert round(got.gradients / 1e9, 2) == 0.09
  assert round(got.total / 1e9, 1) == 19.2


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
  got = memory.lora_memory(params(support_plan.SMOLLM2), (start,))
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
  return whole, shapes.shapes(whole, jax.devices()[:1])


def predicted(found):
  return memory.step_memory(
    found.objective, found.state, found.batch, found.key
  )


def test_activations_are_those_that_are_named():
  _, found = taken()
  rows, n, d, f = 4 * 256, 30, 576, 1536
  # Queries, keys, values; attention's output and normaliser; the middle, gate,
  # up; the input of each layer. And of the loss: hidden states, twice.
  layer = (9 + 3 + 3) * 64 + 9 * 64 + 9 + d + 2 * f + d
  want = 4 * rows * (n * layer + 2 * d)
  got = predicted(found).activations
  assert got == pytest.approx(want, rel=0.01)
  # Adapters do not shrink them, a packed base does not grow them.
  assert predicted(taken("qlora")[1]).activations == got
  full = predicted(taken("full")[1]).activations
  assert got < full < 1.2 * got
  assert predicted(taken(remat="layer")[1]).activations < 0.15 * got


@pytest.mark.parametrize("how", ["lora", "qlora", "full"])
def test_within_a_tenth_of_the_compilers(how):
  whole, found = taken(how)
  usage = shapes.lower(whole, found).compile().memory_analysis()
  total = usage.argument_size_in_bytes + usage.temp_size_in_bytes
  total += usage.output_size_in_bytes - usage.alias_size_in_bytes
  assert predicted(found).total == pytest.approx(total, rel=0.1)
