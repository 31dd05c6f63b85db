"""PEFT's adapters of vision language models, read and written."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import safetensors.numpy

from experiments.core import artifacts, config, experiment
from research import lora, tree
from research.interop import load, peft, vision
from research.interop.loaded import Loaded
from research.interop.peft import names as peft_names
from research.interop.vision import ImageSize, adapters, families
from research.lora import wrap
from research.lora.adapt import Adapt
from research.lora.methods import vera
from research.typing import UserError
from research.vlm.objective import WithImages
from research.vlm.within import Within
from tests import support_golden, support_vlm

PEFT = support_golden.GOLDEN / "vlm_peft"
NAMES = ("llava", "smolvlm", "paligemma", "gemma3", "internvl")
RUN = "runs/quickstart.gin"


@pytest.fixture
def folder_of(tmp_path):
  """Returns a function: an adapter of PEFT's, beside its base's directory."""

  def one(name):
    base = tmp_path / "vlm" / name
    base.mkdir(parents=True)
    support_golden.write(base, name)
    return shutil.copytree(PEFT / name, tmp_path / "vlm_peft" / name)

  return one


def file_of(folder):
  return safetensors.numpy.load_file(folder / peft.WEIGHTS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(2)
def test_logits_are_those_of_peft(name, folder_of):
  loaded = load.load_model(folder_of(name), towers="all")
  golden = support_golden.golden(name)
  with np.load(PEFT / name / "logits.npz") as file:
    want = file["logits"]
  got = support_golden.logits_with_images(loaded.model, loaded.params, golden)
  support_golden.assert_close(got, want)
  moved = np.abs(want - golden["logits"]).max()
  assert moved > 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_as_peft_wrote_it(name, folder_of, tmp_path):
  """And its language model alone, which text commands load, has it, too."""
  folder = folder_of(name)
  loaded = load.load_model(folder)
  base = load.load_model(tmp_path / "vlm" / name)
  naming = peft_names.naming_of_source(base.source)
  peft.save_adapter(
    tmp_path / "a", loaded.params, loaded.model, "x", naming=naming
  )
  old, new = file_of(folder), file_of(tmp_path / "a")
  # PEFT adds the embedding to an adapted head, which the base has.
  want = {k: x for k, x in old.items() if not k.endswith("base_layer.weight")}
  chex.assert_trees_all_equal(new, want)
  # PEFT compares names with the ends of all modules', so they are whole ones.
  written = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
  adapted = {k.partition(".lora_")[0] for k in old if ".lora_" in k}
  want = {k.removeprefix(peft_names.PREFIX) for k in adapted}
  assert set(written["target_modules"]) == want


def test_names_before_transformers_4_52_are_read(folder_of, tmp_path):
  folder = folder_of("llava")
  new = load.load_model(folder).params
  old = {
    k.replace("model.model.language_model.", "model.language_model.model."): x
    for k, x in file_of(folder).items()
  }
  safetensors.numpy.save_file(old, folder / peft.WEIGHTS)
  chex.assert_trees_all_equal(load.load_model(folder).params, new)


def test_adapters_of_encoders_are_refused(folder_of):
  folder = folder_of("llava")
  theirs = "base_model.model.model.vision_tower.layers.0.q_proj.lora_A.weight"
  tensors = file_of(folder) | {theirs: np.ones((2, 24), np.float32)}
  safetensors.numpy.save_file(tensors, folder / peft.WEIGHTS)
  with pytest.raises(UserError, match="found 1 tensors of other modules.*visi"):
    load.load_model(folder, towers="all")


def test_molmo2_has_no_names_for_adapters():
  with pytest.raises(UserError, match="Molmo2.* fuses matrices"):
    peft_names.naming_of_config({"model_type": "molmo2"})
  for kind in families.MODULES:
    if kind != "molmo2":
      assert peft_names.naming_of_config({"model_type": kind}).language


def adapted_run(base, tower, method=lora.LoRA(rank=2), **model):
  """Returns a run over a published model, and what it has trained."""
  run = dataclasses.replace(
    config.read(RUN).experiment,
    model=experiment.Pretrained(name=str(base), towers="all", **model),
    objective=WithImages(),
    transforms=(Within(tower, Adapt(method=method)),),
    trainable=wrap.TRAINABLE,
  )
  built = run.build()

  def move(path, x):
    if not path.endswith(("/trained/b", "/trained/l")):
      return x
    return 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)

  return run, dataclasses.replace(
    built, params=tree.map_paths(move, built.params)
  )


@pytest.fixture
def base(tmp_path):
  made = Loaded(
    support_vlm.model(),
    support_vlm.params(),
    tokenizer=support_vlm.tokenizer(),
    source={},
    preprocessor=support_vlm.PREPROCESSOR,
  )
  vision.write_model(tmp_path / "base", made, made.params)
  return tmp_path / "base"


@pytest.mark.parametrize("method", [lora.LoRA(rank=2), vera.VeRA(rank=2)])
def test_a_run_leaves_its_adapter(method, tmp_path, base):
  """Not the whole model; and `--model=` has images again."""
  run, built = adapted_run(base, "language", method)
  folder = tmp_path / "adapter"
  assert artifacts._save_adapter(folder, run, built, built.params)
  again = load.load_model(folder, towers="all")
  assert again.model == load.load_model(base, towers="all").model
  assert again.preprocessor == support_vlm.PREPROCESSOR
  assert again.tokenizer.encode("w5 w6") == [5, 6]
  found, want = (
    dict(tree.flatten_paths(tree.partition(x, wrap.TRAINABLE)[0]))
    for x in (again.params, built.params)
  )
  chex.assert_trees_all_equal(found, want)


def test_adapters_on_the_encoder_are_left_to_the_model(tmp_path, base, capsys):
  run, built = adapted_run(base, "vision")
  assert not artifacts._save_adapter(tmp_path / "a", run, built, built.params)
  assert "found an adapter on vision/" in capsys.readouterr().err
  with pytest.raises(UserError, match="language model alone"):
    adapters.language_model(built.loaded.model, built.params)


def test_images_of_another_size_are_left_to_the_model(tmp_path, base):
  """An adapter's base has the published size."""
  run, built = adapted_run(base, "language", image_size=ImageSize(pixels=32))
  assert not artifacts._save_adapter(tmp_path / "a", run, built, built.params)


def test_an_adapted_model_for_images_of_another_size(tmp_path, base):
  run, built = adapted_run(base, "language")
  folder = tmp_path / "adapter"
  assert artifacts._save_adapter(folder, run, built, built.params)
  found, plain = (
    load.load_model(x, towers="all", image_size=ImageSize(pixels=24))
    for x in (folder, base)
  )
  assert found.model == plain.model
  assert found.preprocessor == plain.preprocessor
  chex.assert_trees_all_equal(found.params["vision"], plain.params["vision"])
  chex.assert_trees_all_equal(
    found.params["language"], load.load_model(folder).params
  )


def test_the_language_model_alone_is_written_as_one(tmp_path, base):
  """Whose config.json no directory of a language model has."""
  run = dataclasses.replace(
    config.read(RUN).experiment,
    model=experiment.Pretrained(name=str(base)),
    transforms=(),
    trainable=".",
  )
  built = run.build()
  folder = tmp_path / "model"
  assert artifacts._save_model(folder, run, built, built.params)
  again = load.load_model(folder)
  assert again.model == load.load_model(base).model
  assert again.tokenizer.encode("w5 w6") == [5, 6]
  chex.assert_trees_all_equal(again.params, built.params)
