"""A vision language model as a directory: written, and read back the same."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import linen as nn

from research.interop import load, vision
from research.interop.loaded import Loaded
from research.interop.vision import ImageSize, config_write, write
from research.io import unread
from research.typing import UserError
from research.vlm import connectors, masks
from research.vlm.encoders.vit import Features
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.presets import MOLMO2, preset
from research.vlm.images.prompts import Wrapped
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.images.tiling.square import Square
from tests import support_vlm

MODEL, PARAMS = support_vlm.model(), support_vlm.params()


def loaded(model=MODEL, params=PARAMS, **changes):
  fields = dict(
    tokenizer=support_vlm.tokenizer(), preprocessor=support_vlm.PREPROCESSOR
  )
  return Loaded(model, params, source={}, **(fields | changes))


def test_what_is_written_is_read_back(tmp_path):
  vision.write_model(tmp_path / "model", loaded(), PARAMS)
  found = load.load_model(tmp_path / "model", towers="all")
  assert found.model == MODEL
  assert found.preprocessor == support_vlm.PREPROCESSOR
  assert found.tokenizer.encode("w5 w6") == [5, 6]
  jax.tree.map(np.testing.assert_array_equal, found.params, PARAMS)
  # Other commands read its language model.
  alone = load.load_model(tmp_path / "model")
  assert alone.model == MODEL.language
  jax.tree.map(np.testing.assert_array_equal, alone.params, PARAMS["language"])


def test_a_model_with_images_goes_where_the_mesh_has_it(tmp_path):
  """All of it, or its language model alone."""
  vision.write_model(tmp_path / "model", loaded(), PARAMS)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  asked = []

  def everywhere(tree):
    asked.append(set(tree))
    return jax.tree.map(lambda _: here, tree)

  for towers in ("all", "language"):
    folder = tmp_path / "model"
    whole = load.load_model(folder, towers=towers)
    found = load.load_model(folder, towers=towers, shardings=everywhere)
    assert {x.sharding for x in jax.tree.leaves(found.params)} == {here}
    assert all(names == set(whole.params) for names in asked)
    asked.clear()
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    # A plan reads nothing, and finds the same shapes.
    left = load.load_model(folder, towers=towers, shardings=unread.unplaced)
    assert left.params == unread.abstract(whole.params)


def test_a_plan_for_larger_images_reads_nothing(tmp_path):
  vision.write_model(tmp_path / "model", loaded(), PARAMS)
  both = [
    load.load_model(
      tmp_path / "model",
      towers="all",
      image_size=ImageSize(pixels=24),
      shardings=shardings,
    )
    for shardings in (None, unread.unplaced)
  ]
  assert both[1].params == unread.abstract(both[0].params)


def test_a_quantized_model_with_images_is_refused(tmp_path):
  folder = tmp_path / "model"
  vision.write_model(folder, loaded(), PARAMS)
  config = json.loads((folder / "config.json").read_text())
  config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
  (folder / "config.json").write_text(json.dumps(config))
  for packed in (None, True, False):
    with pytest.raises(UserError, match="quantized model with images .gptq"):
      load.load_model(folder, towers="all", packed=packed)


def llava():
  """Returns the model with LLaVA's connector and an earlier layer."""
  return dataclasses.replace(
    MODEL,
    connector=connectors.Mlp(size=32),
    features=Features(layers=(-2,), normed=False),
  )


@pytest.mark.parametrize(
  "model, kind",
  [
    (MODEL, "idefics3"),
    (llava(), "llava"),
    (
      dataclasses.replace(
        MODEL,
        connector=connectors.Linear(size=32),
        mask=masks.BidirectionalPrompt(),
      ),
      "paligemma",
    ),
  ],
)
def test_the_family_follows_from_the_parts(model, kind):
  assert config_write.describe(model)["model_type"] == kind


def test_how_a_connector_began_is_not_what_files_say():
  zeros = connectors.Linear(
    size=32, bias=False, kernel_init=nn.initializers.zeros
  )
  began = connectors.Squares(side=2, inner=zeros)
  model = dataclasses.replace(MODEL, connector=began)
  assert config_write.describe(model) == config_write.describe(MODEL)


def test_a_model_of_no_family_is_not_written(tmp_path):
  pool = connectors.AttentionPool(size=32, queries=2)
  model = dataclasses.replace(MODEL, connector=pool)
  with pytest.raises(UserError, match="no config.json describes this model"):
    vision.write_model(tmp_path, loaded(model), PARAMS)
  assert not list(tmp_path.iterdir())


def test_a_prompt_that_its_family_makes_otherwise_is_not_written(tmp_path):
  model = dataclasses.replace(MODEL, mask=masks.BidirectionalPrompt())
  model = dataclasses.replace(model, connector=connectors.Linear(size=32))
  with pytest.raises(UserError, match="found PromptFormat.begin='first'"):
    vision.write_model(tmp_path, loaded(model), PARAMS)


def test_a_scale_that_the_file_cannot_say_is_not_written(tmp_path):
  model = dataclasses.replace(MODEL, scale=2.0)
  with pytest.raises(UserError, match="no config.json describes"):
    vision.write_model(tmp_path, loaded(model), PARAMS)


def test_token_ids_and_files_of_transformers(tmp_path):
  vision.write_model(tmp_path / "model", loaded(), PARAMS)
  names = {path.name for path in (tmp_path / "model").iterdir()}
  assert {
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
  } <= names
  written = json.loads((tmp_path / "model" / "config.json").read_text())
  assert written["image_token_id"] == support_vlm.IMAGE


@pytest.mark.parametrize(
  "tiling, layout, good",
  [
    (Square(16, 4, 2), Wrapped(), True),
    (Square(16, 4, 2, "bilinear_sampled"), Wrapped(), False),
    (Overlap(resample="bilinear_sampled", fit="stretch"), MOLMO2, True),
    (Overlap(resample="bilinear", fit="stretch"), MOLMO2, False),
    (Overlap(resample="bilinear_sampled", fit="pad"), MOLMO2, False),
  ],
)
def test_views_that_a_file_cannot_say_are_not_written(tiling, layout, good):
  """Read back, it would make other pixels of an image."""
  how = Preprocessor(tiling, layout=layout)
  if good:
    written = write.preprocessor_config(how)
    sizes = dict(patch=tiling.patch, pool=tiling.pool)
    again = from_preprocessor_config(written, **sizes)
    assert (again.tiling, again.normalise) == (tiling, how.normalise)
  else:
    with pytest.raises(UserError, match="of which the file would make"):
      write.preprocessor_config(how)


@pytest.mark.parametrize(
  "name",
  [
    *("llava-1.5-stage1", "llava-1.5", "idefics3", "smolvlm-256m"),
    *("smolvlm-2.2b", "gemma3", "gemma3-pan-and-scan", "internvl"),
    *("paligemma-448", "qwen2-vl", "qwen3-vl", "gemma4", "molmo2"),
    *("siglip2-naflex", "clip-vit-l-336", "siglip-b-224"),
  ],
)
def test_published_preprocessing_is_read_back(name):
  how = preset(name)
  sizes = dict(patch=how.tiling.patch, pool=getattr(how.tiling, "pool", 1))
  again = from_preprocessor_config(write.preprocessor_config(how), **sizes)
  # What prompts have besides is the family's.
  assert dataclasses.replace(again, prompt=how.prompt) == how
