"""A family of files is one row: a made-up one is read and written."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.interop import load, vision
from research.interop.loaded import Loaded
from research.interop.vision import config_write, families, names, towers
from research.interop.vision.families import Family, Language
from research.interop.vision.prefixes import Prefix, Prefixes
from research.typing import UserError
from research.vlm import connectors
from tests import support_vlm


def test_the_table_names_every_row():
  folder = pathlib.Path(families.__file__).parent
  files = {path.stem for path in folder.glob("*.py")}
  modules = [
    f"{families.__name__}.{file}"
    for file in files - {"__init__", "family", "table"}
  ]
  found = {
    row.model_type: module
    for module in modules
    for row in importlib.import_module(module).FAMILIES
  }
  assert found == families.MODULES
  for kind in found:
    assert families.family_of(kind).model_type == kind


def test_the_loader_asks_for_model_types_without_importing_jax():
  code = (
    "import sys; from research.interop.vision.families import MODULES;"
    "print(len(MODULES), 'jax' in sys.modules)"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True)
  assert done.stdout.decode().split() == [str(len(families.MODULES)), "False"]


def _parts(parts):
  side = parts.fields.integer("merge")
  inner = connectors.Mlp(size=parts.language.width)
  return dict(connector=connectors.Squares(side=side, inner=inner))


# The connector is inside of the encoder's prefix, as in files of Qwen2-VL.
MADE_UP = Family(
  model_type="made-up",
  architecture="MadeUpForConditionalGeneration",
  defaults=dict(image_token=128, merge=2),
  image_token="image_token",
  towers=(towers.SIGLIP,),
  language=Language("llama"),
  parts=_parts,
  fields=lambda model, config: dict(merge=model.connector.side),
  naming=Prefixes(
    (
      Prefix("connector", r"(model\.)?visual\.merger\.", "visual.merger."),
      Prefix("vision", r"(model\.)?visual\.", "visual."),
      Prefix("language", r"lm_head\.", "lm_head.", "lm_head."),
      Prefix("language", r"model\.(language_model\.)?", "model.", "model."),
      Prefix(None, r"audio\."),
    )
  ),
  connector_rows=(
    *names.linear("inner/up", "mlp.0"),
    *names.linear("inner/down", "mlp.2"),
  ),
)
FAMILIES = (MADE_UP,)

MODEL = dataclasses.replace(
  support_vlm.model(),
  connector=connectors.Squares(side=2, inner=connectors.Mlp(size=32)),
)


def params():
  """Returns weights of `MODEL`: new ones of its connector."""
  shapes = dict(up=(96, 32), up_bias=(32,), down=(32, 32), down_bias=(32,))
  rng = np.random.default_rng(0)
  inner = {
    k: jax.numpy.asarray(rng.normal(size=s), "float32")
    for k, s in shapes.items()
  }
  return support_vlm.params() | {"connector": {"inner": inner}}


@pytest.fixture
def made_up(monkeypatch):
  """Its line in the table, which names this file."""
  monkeypatch.setitem(families.MODULES, "made-up", __name__)


def written(folder):
  loaded = Loaded(MODEL, params(), support_vlm.tokenizer(), source={})
  vision.write_model(folder, loaded, params())
  return safetensors.numpy.load_file(folder / "model.safetensors")


def assert_read(folder):
  found = load.load_model(folder, towers="all")
  assert found.model == MODEL
  jax.tree.map(np.testing.assert_array_equal, found.params, params())


def test_a_row_is_all_that_a_family_takes(tmp_path, made_up):
  tensors = written(tmp_path / "model")
  config = json.loads((tmp_path / "model" / "config.json").read_text())
  assert config["model_type"] == "made-up" and config["merge"] == 2
  assert config["image_token"] == support_vlm.IMAGE
  up = params()["connector"]["inner"]["up"]
  np.testing.assert_array_equal(tensors["visual.merger.mlp.0.weight"], up.T)
  assert "visual.embeddings.patch_embedding.weight" in tensors
  assert "model.layers.0.mlp.up_proj.weight" in tensors
  assert_read(tmp_path / "model")


def test_names_in_memory_and_parts_that_no_model_here_has(tmp_path, made_up):
  tensors = {
    k.replace("model.", "model.language_model.").replace(
      "visual.", "model.visual."
    ): x
    for k, x in written(tmp_path / "model").items()
  }
  tensors["audio.layers.0.weight"] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / "model/model.safetensors")
  assert_read(tmp_path / "model")


@pytest.mark.parametrize(
  "extra", ["speech.weight", "model.visual.merger.mlp.0.bias"]
)
def test_unknown_and_repeated_tensors_are_refused(extra, tmp_path, made_up):
  tensors = written(tmp_path / "model")
  tensors[extra] = np.zeros(32, np.float32)
  safetensors.numpy.save_file(tensors, tmp_path / "model/model.safetensors")
  with pytest.raises(UserError, match=f"superfluous: .*{extra.split('.')[-1]}"):
    load.load_model(tmp_path / "model", towers="all")


@pytest.mark.parametrize("kind", ["clip_vision_model", None])
def test_an_encoder_of_another_kind_is_refused_by_name(kind, made_up):
  config = config_write.describe(MODEL)
  config["vision_config"]["model_type"] = kind
  with pytest.raises(UserError, match="expected one of siglip_vision_model"):
    vision.vision_language_model(config, "config.json")
