"""Experiments for planning tests: nothing is loaded or trained."""

import dataclasses

from experiments.core.experiment import Experiment
from experiments.core.from_scratch import FromScratch
from research.data import pipeline
from research.data.sources import synthetic
from research.lora import adapt, wrap
from research.lora.methods.lora import LoRA
from research.nn import presets
from research.optim import optim
from research.sharding import Layout
from research.training import loop
from research.training.objectives.objective import NextToken
from tests import support

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
LLAMA3_8B = presets.Sizes(
  vocab=128256,
  width=4096,
  depth=32,
  heads=32,
  kv_heads=8,
  head_dim=128,
  hidden=14336,
  tied=False,
)


def experiment(
  layout: Layout,
  sizes: presets.Sizes = support.SIZES,
  batch: int = 8,
  length: int = 16,
  dtype: str = "float32",
  accumulate: int = 1,
) -> Experiment:
  """Returns full training of a fresh model."""
  source = synthetic.Markov(vocab=32, length=length, count=4)
  return Experiment(
    model=FromScratch(sizes=sizes, dtype=dtype, remat="names"),
    optimizer=optim.adamw(1e-3),
    objective=NextToken(),
    data=pipeline.Pipeline(source=source, length=length, batch_size=batch),
    plan=loop.TrainConfig(steps=2, accumulate=accumulate),
    mesh=layout,
  )


def adapted(whole: Experiment) -> Experiment:
  """Returns the same experiment with only adapters trained."""
  return dataclasses.replace(
    whole,
    transforms=(adapt.Adapt(method=LoRA(rank=4)),),
    trainable=wrap.TRAINABLE,
  )
