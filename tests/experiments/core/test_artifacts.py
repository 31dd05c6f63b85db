"""What a run leaves: its model, which says what its masks are, or adapters."""

import dataclasses
import resource
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.core import artifacts, config, experiment
from research import tree
from research.diffusion import mask_ratio_time
from research.diffusion.block import BlockDiffusion
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.sampling.block_causal import BlockCausal
from research.interop import convert, load, loaded, sources
from research.interop.diffusion.spec import Spec, from_config
from research.lora import adapt, wrap
from research.lora.methods import dora, lora
from research.nn.time_embedding import TimeEmbedding
from research.training.objectives.objective import NextToken
from research.typing import WriteError
from tests import support

RUN = "runs/llada/genmd4_markov.gin"
MASK = 10


def left(folder, objective, clock):
  """Returns the model of a run before its first step, and as it is read."""
  run = config.read(RUN, ["presets.Sizes.width=16"]).experiment
  sizes = dataclasses.replace(run.model.sizes, time_embedding=clock)
  run = dataclasses.replace(
    run,
    model=dataclasses.replace(run.model, sizes=sizes),
    objective=objective,
    transforms=(),
  )
  built = run.build()
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    built.params,
  )
  assert artifacts._save_model(folder, run, built, params)
  return built.loaded.model, params, load.load_model(folder)


CLOCK = TimeEmbedding(features=8, hidden=8, width=8)


@pytest.mark.parametrize(("block", "clock"), [(None, None), (4, CLOCK)])
@pytest.mark.sample(2)
def test_it_says_what_its_masks_are(tmp_path, block, clock):
  objective = MaskedDiffusion(mask_id=MASK, shift=True)
  if block is not None:
    objective = BlockDiffusion(mask_id=MASK, block=block)
  model, params, again = left(tmp_path / "model", objective, clock)
  assert again.diffusion == Spec(mask_id=MASK, shift=block is None, block=block)
  assert again.model.time_embedding == clock
  if clock is None:
    return  # Hugging Face's files, tested elsewhere
  tokens = jnp.array([[3, MASK, 1, MASK, MASK, 2, MASK, 4]])
  valid = jnp.ones(tokens.shape, bool)
  time = mask_ratio_time.for_model(model, MASK)

  def scores(model, params):
    asked = BlockCausal(model=model, block=block, time=time)
    return asked.prefill(params, tokens, valid, jnp.int32(4), 4)[0]

  got, want = scores(again.model, again.params), scores(model, params)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  ("objective", "change"),
  [
    (MaskedDiffusion(mask_id=MASK, shift=True), {}),
    (MaskedDiffusion(mask_id=MASK), dict(shift=False)),
    (MaskedDiffusion(mask_id=MASK - 1, shift=True), dict(mask_id=MASK - 1)),
    (BlockDiffusion(mask_id=MASK, shift=True, block=4), dict(block=4)),
    (NextToken(), {}),
  ],
)
@pytest.mark.parametrize("adapters", [False, True])
def test_what_it_learned_of_masks_is_what_it_says(
  tmp_path, objective, change, adapters
):
  """Of a model that had masks before; adapters alone say their base's."""
  first = MaskedDiffusion(mask_id=MASK, shift=True)
  base = tmp_path / "base"
  *_, before = left(base, first, None)
  transforms = ()
  if adapters:
    transforms = (adapt.Adapt(method=lora.LoRA(rank=2)),)
  run = config.read(RUN).experiment
  run = dataclasses.replace(
    run,
    model=experiment.Pretrained(name=str(base)),
    objective=objective,
    transforms=transforms,
    trainable=wrap.TRAINABLE if adapters else ".",
  )
  built = run.build()
  small = artifacts._save_adapter(tmp_path / "a", run, built, built.params)
  assert small == (adapters and not change)
  folder = tmp_path / "model"
  assert artifacts._save_model(folder, run, built, built.params)
  want = dataclasses.replace(before.diffusion, **change)
  assert load.load_model(folder).diffusion == want
  assert artifacts.with_masks(before, objective).diffusion == want


def test_a_config_of_a_text_model_within_another_is_read_again():
  model = config.read(RUN).experiment.build().loaded.model
  source = sources.Source(
    model=model, parts={}, params=dict, origin={},
    config={"model_type": "gemma3", "text_config": {"vocab_size": MASK + 1}},
  )  # fmt: skip
  made = artifacts._with_mask_config(source, MaskedDiffusion(mask_id=MASK))
  assert from_config(made.config) == Spec(mask_id=MASK)
  assert artifacts._with_mask_config(source, NextToken()) is source


def test_what_to_try_next_fills_in_masks(tmp_path):
  words = types.SimpleNamespace(stop=(1,))
  run = config.read(RUN).experiment
  loaded = dataclasses.replace(run.build().loaded, tokenizer=words)
  for objective in (NextToken(), MaskedDiffusion(mask_id=MASK)):
    made = artifacts.with_masks(loaded, objective)
    said = artifacts.next_commands(tmp_path, made, 1)
    masks = objective != NextToken()
    assert ("--sampler=diffusion --prompt=" in said) == masks
    assert ("experiments.perplexity" in said) != masks
    chats = artifacts.next_commands(tmp_path, made, 1, chats=True)
    assert ("--chat --prompt=" in chats) != masks


def test_adapters_without_a_form_in_peft_are_left_to_the_model(
  tmp_path, capsys
):
  """PEFT ties an embedding's DoRA to no head, which has other magnitudes."""
  model = support.model("llama", tied=True)
  put = adapt.Adapt(method=dora.DoRA(rank=2, alpha=4.0), targets=("embed",))
  base = support.params(model)
  params = put(base, jax.random.key(0))
  run = dataclasses.replace(
    config.read(RUN).experiment,
    model=experiment.Pretrained(name="a-base"),
    objective=NextToken(),
    transforms=(),
    trainable=wrap.TRAINABLE,
  )
  built = experiment.BuiltExperiment(
    loaded=loaded.Loaded(model, base, None, {}), params=params, objective=None
  )
  assert not artifacts._save_adapter(tmp_path / "a", run, built, params)
  assert "PEFT ties plain LoRA alone" in capsys.readouterr().err
  assert not (tmp_path / "a").exists()


def test_adapters_that_are_trained_further_are_left_to_the_model(tmp_path):
  """As adapters they would be added to those that they began as."""
  left(tmp_path / "base", NextToken(), None)
  run = dataclasses.replace(
    config.read(RUN).experiment,
    model=experiment.Pretrained(name=str(tmp_path / "base")),
    objective=NextToken(),
    transforms=(adapt.Adapt(method=lora.LoRA(rank=2)),),
    trainable=wrap.TRAINABLE,
  )
  built = run.build()
  params = moved(built.params)
  assert artifacts._save_adapter(tmp_path / "a", run, built, params)
  run = dataclasses.replace(
    run,
    model=experiment.Pretrained(name=str(tmp_path / "a")),
    transforms=(),
  )
  built = run.build()
  params = moved(built.params)
  assert not artifacts._save_adapter(tmp_path / "b", run, built, params)
  assert artifacts._save_model(tmp_path / "model", run, built, params)
  again = load.load_model(tmp_path / "model").params
  chex.assert_trees_all_equal(
    *(dict(tree.flatten_paths(x)) for x in (again, params))
  )
  # As an adapter it is one of the first base.
  convert.to_peft(sources.open_source(tmp_path / "model"), tmp_path / "c")
  again = load.load_model(tmp_path / "c").params
  chex.assert_trees_all_equal(
    *(dict(tree.flatten_paths(x)) for x in (again, params))
  )


def moved(params):
  """Returns parameters whose adapters change what the model says."""
  return tree.map_paths(
    lambda path, x: x + 0.1 if path.endswith("/trained/b") else x, params
  )


def test_a_full_disk_is_an_error_and_no_remark(tmp_path):
  """A run that could not write its model must not look finished."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
  try:
    with pytest.raises(WriteError, match="cannot be written .File too large"):
      left(tmp_path / "model", MaskedDiffusion(mask_id=MASK), None)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list(tmp_path.iterdir())
