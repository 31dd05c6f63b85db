"""Shapes of models in configs/models: those of the published checkpoints."""

import pytest

from experiments.core import config
from research.nn import presets

TEXT = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'models/{name}.gin'
include 'data/markov.gin'
include 'optim/adamw_wsd.gin'
from experiments.core import experiment
from research.diffusion import objective as masked
STEPS = 10
LEARNING_RATE = 1e-3
WARMUP = 1
DECAY_STEPS = 1
experiment.Experiment.objective = @masked.MaskedDiffusion()
masked.MaskedDiffusion.mask_id = %MASK
"""
SIZES = {
  "llada_8b": ("llama", presets.LLADA_8B, 126_336),
  "llada_moe_7b": ("qwen3_moe", presets.LLADA_MOE_7B, 156_895),
  "llada2_mini": ("qwen3", presets.LLADA2_MINI, 156_895),
  "dream_7b": ("qwen2", presets.DREAM_7B, 151_666),
}


def read(name):
  return config.parse(TEXT.format(name=name), []).experiment


@pytest.mark.parametrize("name", SIZES)
def test_published_shapes(name):
  family, sizes, mask = SIZES[name]
  made = read(name)
  assert made.model.family == family
  shape = presets.FAMILIES[family]
  assert presets.transformer(shape, made.model.sizes) == presets.transformer(
    shape, sizes
  )
  assert made.objective.mask_id == mask


@pytest.mark.parametrize("name", ["md4_text8", "mdlm_owt"])
def test_research_models_have_a_row_for_the_mask(name):
  made = read(name)
  sizes = made.model.sizes
  assert made.objective.mask_id == sizes.vocab - 1
  assert (sizes.width, sizes.depth, sizes.heads) == (768, 12, 12)
  assert sizes.time_embedding is None


@pytest.mark.parametrize(
  ("name", "quantity", "width"),
  [("md4_text8", "time", 768), ("mdlm_owt", "sigma", 128)],
)
def test_research_models_are_conditioned_on_time(name, quantity, width):
  text = TEXT.format(name=name)
  sizes = config.parse(
    text, ["TIME_EMBEDDING=@time_embedding.TimeEmbedding()"]
  ).experiment.model.sizes
  assert (sizes.time_embedding.input, sizes.time_embedding.width) == (
    quantity,
    width,
  )
  assert sizes.time_embedding.zero_gate
