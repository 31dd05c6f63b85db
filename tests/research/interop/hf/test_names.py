"""The table of names is a bijection, and knows each family's norms."""

import pathlib

import pytest

from research.interop import hf, load, parts
from research.interop.hf import names as hf_names
from research.interop.parts import Address
from research.io import safetensors

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"


TABLES = [hf_names.PLAIN, hf_names.SANDWICH, hf_names.SPARSE, hf_names.MIXTRAL]


@pytest.mark.parametrize("table", TABLES)
def test_bijective(table):
  rows = list(table.rows())
  assert len({row.ours for row in rows}) == len(rows)
  assert len({row.theirs for row in rows}) == len(rows)
  places = [Address(None, row.ours) for row in table.outside]
  places += [
    Address(i, row.ours, e)
    for row in table.layer
    for i in (0, 7, 31)
    for e in ((0, 10, 127) if hf_names.EXPERT in row.theirs else (None,))
  ]
  assert len({table.theirs(place)[0] for place in places}) == len(places)
  for place in places:
    assert table.ours(table.theirs(place)[0]) == place


@pytest.mark.parametrize(
  "name",
  [
    "model.layers.0.self_attn.q_proj",
    "model.layers.00.self_attn.q_proj.weight",
    "model.layers.-1.self_attn.q_proj.weight",
    "model.layers.99999999999.self_attn.q_proj.weight",
    "model.layers.0.lm_head.weight",
    "self_attn.q_proj.weight",
    "",
  ],
)
def test_unknown_names(name):
  assert hf_names.PLAIN.ours(name) is None


@pytest.mark.parametrize(
  "name",
  [
    "model.layers.0.mlp.experts.<e>.up_proj.weight",
    "model.layers.0.mlp.experts..up_proj.weight",
    "model.layers.0.mlp.experts.01.up_proj.weight",
    "model.layers.0.mlp.experts.-1.up_proj.weight",
    "model.layers.0.mlp.experts.9999999.up_proj.weight",
    "model.layers.0.mlp.experts.1.2.up_proj.weight",
    "model.layers.0.mlp.experts.1.w1.weight",
  ],
)
def test_unknown_experts(name):
  assert hf_names.SPARSE.ours(name) is None


def test_a_stack_of_experts_has_no_single_name():
  with pytest.raises(KeyError):
    hf_names.SPARSE.theirs(Address(0, "mlp/experts/up"))
  with pytest.raises(KeyError):
    hf_names.SPARSE.theirs(Address(0, "mlp/up", 3))


@pytest.mark.parametrize(
  "family", ["llama_biases", "qwen3", "gemma2", "mixtral", "qwen3_moe"]
)
def test_every_tensor_of_a_file_has_its_place(family):
  model = load.load_model(MODELS / family).model
  table = hf.table(model)
  found = {table.ours(n) for n in safetensors.open_directory(MODELS / family)}
  assert found == {a for slot in parts.slots(model) for a in slot.addresses}


def test_what_a_norm_is_called_depends_on_the_family():
  name = "model.layers.3.post_attention_layernorm.weight"
  assert hf_names.PLAIN.ours(name) == Address(3, "mlp_norm/scale")
  assert hf_names.SANDWICH.ours(name) == Address(3, "post_attention_norm/scale")
