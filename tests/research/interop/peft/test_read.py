"""Adapters made by PEFT compute here what they compute there, and go back."""

import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.interop import load, peft
from research.interop.peft import config as peft_config
from research.io import safetensors
from research.lora import adapt, wrap
from research.lora.methods.dora import DoRA
from research.lora.methods.hira import HiRA
from research.typing import UserError
from tests.support_lora import adapting
from tests.support_peft import MODELS, base, golden, loaded, logits, relative

ADAPTERS = sorted(p.name for p in MODELS.glob("peft_*"))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
  "key, rewrite",
  [
    ("logits", lambda p: p),
    ("merged_logits", wrap.merge),
    ("base_logits", wrap.disable),
  ],
)
@pytest.mark.sample(4)
def test_logits_are_pefts(name, key, rewrite):
  it, g = loaded(name), golden(name)
  got = logits(it.model, rewrite(it.params), g["tokens"])
  assert relative(got, g[key]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.sample(3)
def test_loss_and_gradients_are_pefts(name, tmp_path):
  it, g = loaded(name), golden(name)
  selected, frozen = tree.partition(it.params, wrap.TRAINABLE)

  @jax.jit
  @jax.value_and_grad
  def loss(selected):
    y = logits(it.model, tree.combine(selected, frozen), g["tokens"])
    return optax.softmax_cross_entropy_with_integer_labels(
      y[:, :-1], g["tokens"][:, 1:]
    ).mean()

  value, gradient = loss(selected)
  np.testing.assert_allclose(value, g["loss"], rtol=1e-6)
  # Saved as if they were an adapter, the gradients carry the file's names.
  slopes = tree.combine(gradient, frozen)
  peft.save_adapter(tmp_path, slopes, it.model, "x")
  got = safetensors.open_file(tmp_path / peft.WEIGHTS)
  wanted = {k[5:]: v for k, v in g.items() if k.startswith("grad/")}
  assert set(got) == set(wanted)
  # The truth is fp64. PEFT's own fp32 gradients are up to 7.4e-6 of the
  # largest away from it; ours may be twice as far.
  for key, want in wanted.items():
    np.testing.assert_allclose(
      got[key].read(), want, atol=1.5e-5 * abs(want).max(), err_msg=key
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_read_and_written_again(name, tmp_path):
  it = loaded(name)
  rslora = "rslora" in name
  peft.save_adapter(tmp_path, it.params, it.model, "../llama", rslora)
  original = json.loads((MODELS / name / "adapter_config.json").read_text())
  written = json.loads((tmp_path / "adapter_config.json").read_text())
  original["init_lora_weights"] = True  # says how it began; no longer known
  assert {k: original[k] for k in written} == written
  theirs, ours = (f / peft.WEIGHTS for f in (MODELS / name, tmp_path))
  # Ours notes its base in the header; all else is theirs, byte for byte.
  got, notes = safetensors.open_with_metadata(ours)
  again = tmp_path / "again"
  safetensors.write_file(again, {k: x.read() for k, x in got.items()})
  assert again.read_bytes() == theirs.read_bytes()
  assert set(notes) == {"format", "base_fingerprint", "base_sample"}
  again = peft.load_adapter(tmp_path, base().params, base().model)
  chex.assert_trees_all_equal(again, it.params)


@pytest.mark.parametrize(
  "options",
  [
    dict(),
    dict(rslora=True, rank=5, alpha=7.0),
    dict(targets=r"layers/1/.*|layers/2/mlp/up", dropout=0.25),
    dict(rank_pattern={"layers/0/.*": 2}, alpha_pattern={"down": 1.0}),
    dict(targets=("head", "embed", "q")),
  ],
)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.sample(3, 1)
def test_every_adapter_of_ours_survives_the_format(
  tmp_path, options, use_rslora
):
  it = base()
  params = adapting(**options)(it.params, jax.random.key(0))
  params = tree.map_paths(
    lambda p, x: x + 0.5 if p.endswith(("/a", "/b")) else x, params
  )
  peft.save_adapter(tmp_path, params, it.model, "../llama", use_rslora)
  again = peft.load_adapter(tmp_path, it.params, it.model)
  # Scales pass through a decimal alpha.
  got, want = (dict(forms(p)) for p in (again, params))
  assert want
  chex.assert_trees_all_close(got, want, rtol=1e-9)
  chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(params))


def forms(params):
  for i, layer in enumerate([tree.outer_params(params), *tree.layers(params)]):
    for path, w in wrap.leaves(layer):
      if weights.is_adapter(w):
        yield f"{i}/{path}", (w.method.scale, w.method.dropout)


@pytest.fixture
def folder(tmp_path):
  shutil.copytree(MODELS / "peft_lora", tmp_path / "a")
  return tmp_path / "a"


def message(folder):
  with pytest.raises(UserError) as e:
    peft.load_adapter(folder, base().params, base().model)
  assert str(e.value).startswith(str(folder))
  assert len(str(e.value).split("\n")) <= 3
  return str(e.value)


@pytest.mark.parametrize(
  "change, text",
  [
    (dict(peft_type="VBLORA"), "peft_type is 'VBLORA', expected"),
    (dict(use_dora=True), "lora_magnitude_vector"),
    (dict(modules_to_save=["lm_head"]), "1 missing: base_model.model.lm_head"),
    (dict(trainable_token_indices=[1]), "token_adapter.trainable_tokens_delta"),
    (dict(trainable_token_indices=[1, 1]), "token ids, none of them twice"),
    (
      dict(trainable_token_indices=[67]),
      "rows of token 67 for embed, expected",
    ),
    (dict(trainable_token_indices={"norm": [1]}), "embedding's or head's name"),
    (dict(trainable_token_indices={"s": [1]}), "embedding's or head's name"),
    (dict(trainable_token_indices={"": [1]}), "embedding's or head's name"),
    (dict(trainable_token_indices="abc"), "expected an object or null"),
    (
      dict(trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
      "expected none of model.embed_tokens, which target_modules or modules_to",
    ),
    (dict(target_parameters=["x"]), "target_parameters"),
    (dict(bias="most"), "bias is 'most', expected one of none, all, lora_onl"),
    (dict(lora_bias=True), "lora_bias is True"),
    (dict(fan_in_fan_out=3), "fan_in_fan_out is 3, expected true or false"),
    (dict(layer_replication=[[0, 2]]), "layer_replication"),
    (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    (dict(use_something_new=True), "use_something_new is True"),
    (dict(target_modules=["x"]), "target_modules"),
    (dict(target_modules=["q_proj"]), "36 superfluous"),
    (dict(target_modules="all-linear", r=3), "expected [3, 40]"),
    (dict(target_modules=["q_proj", "lm_head"]), "2 missing"),
    (dict(rank_pattern={"q_proj": 2}), "has shape [4, 40], expected [2, 40]"),
  ],
)
def test_a_configuration_that_cannot_be_honoured(folder, change, text):
  path = folder / peft_config.CONFIG
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  assert text in message(folder)


def test_a_layout_that_no_linear_layer_has_is_none(folder):
  """PEFT warns and takes it for false, so the adapter is the same."""
  path = folder / peft_config.CONFIG
  fields = json.loads(path.read_text()) | dict(fan_in_fan_out=True)
  path.write_text(json.dumps(fields))
  with pytest.warns(RuntimeWarning, match="taken for false"):
    again = peft.load_adapter(folder, base().params, base().model)
  chex.assert_trees_all_equal(again, loaded("peft_lora").params)


@pytest.mark.parametrize("off", [None, [], {}])
def test_rows_of_no_tokens_are_none(folder, off):
  path = folder / peft_config.CONFIG
  fields = json.loads(path.read_text()) | dict(trainable_token_indices=off)
  path.write_text(json.dumps(fields))
  again = peft.load_adapter(folder, base().params, base().model)
  chex.assert_trees_all_equal(again, loaded("peft_lora").params)


def rewrite(folder, change):
  path = folder / peft.WEIGHTS
  tensors = {k: v.read().copy() for k, v in safetensors.open_file(path).items()}
  change(tensors)
  safetensors.write_file(path, tensors)


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"


def test_a_file_that_does_not_fit(folder):
  rewrite(folder, lambda t: t.pop(Q))
  assert f"1 missing: {Q}" in message(folder)
  assert "and the base model; is that the adapter's own?" in message(folder)
  rewrite(folder, lambda t: t.update({Q: np.ones((40, 4), np.int32)}))
  assert "stored as int32" in message(folder)
  # The adapter's name belongs to PEFT's memory, not to the file.
  wrong = Q.replace("lora_B.weight", "lora_B.default.weight")
  rewrite(folder, lambda t: t.update({wrong: t.pop(Q)}))
  assert f"1 superfluous: {wrong}" in message(folder)


def test_an_adapter_that_changes_nothing(folder):
  def zero(tensors):
    for key in tensors:
      if "lora_B" in key:
        tensors[key][:] = 0

  rewrite(folder, zero)
  assert "changes nothing" in message(folder)


def test_missing_files_and_pickles(folder):
  (folder / peft.WEIGHTS).rename(folder / "adapter_model.bin")
  assert "pickle" in message(folder)
  (folder / peft_config.CONFIG).write_text("[]")
  assert "found a JSON list" in message(folder)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_adapters_become_fp32(folder, kind):
  def narrow(tensors):
    for key, x in tensors.items():
      tensors[key] = np.asarray(jnp.asarray(x, kind))

  rewrite(folder, narrow)
  params = peft.load_adapter(folder, base().params, base().model)
  selected, _ = tree.partition(params, wrap.TRAINABLE)
  assert {str(x.dtype) for x in jax.tree.leaves(selected)} == {"float32"}


def test_embeddings_that_peft_saves_along(folder):
  table = np.asarray(base().params["embed"])
  key = "base_model.model.model.embed_tokens.weight"
  rewrite(folder, lambda t: t.update({key: table}))
  again = peft.load_adapter(folder, base().params, base().model)
  chex.assert_trees_all_equal(again, loaded("peft_lora").params)
  rewrite(folder, lambda t: t.update({key: table + 1}))
  changed = peft.load_adapter(folder, base().params, base().model)
  np.testing.assert_array_equal(changed["embed"], table + 1)
  rewrite(folder, lambda t: t.update({key: table[:, :-1]}))
  assert "embed has shape [67, 39], expected [67, 40]" in message(folder)


def test_a_tied_embedding_is_adapted_on_both_sides(tmp_path):
  it = load.load_model(MODELS / "smollm2")
  params = adapt.Adapt(targets=("embed",))(it.params, jax.random.key(0))
  params = tree.map_paths(
    lambda p, x: x + 0.5 if p.endswith("/a") else x, params
  )
  peft.save_adapter(tmp_path, params, it.model, "x")
  config = json.loads((tmp_path / peft_config.CONFIG).read_text())
  assert config["ensure_weight_tying"] is True
  again = peft.load_adapter(tmp_path, it.params, it.model)
  chex.assert_trees_all_equal(again, params)


@pytest.mark.parametrize("method", [DoRA(rank=2), HiRA(rank=2)])
def test_a_tied_embedding_takes_plain_lora(method, tmp_path):
  """PEFT 0.21.2 gives DoRA's head a magnitude for each token, not one of ours.

  The other methods it has of linear layers alone.
  """
  it = load.load_model(MODELS / "smollm2")
  add = adapt.Adapt(method=method, targets=("embed",))
  params = add(it.params, jax.random.key(0))
  with pytest.raises(
    UserError, match=f"adapter of {type(method).__name__} and"
  ):
    peft.save_adapter(tmp_path, params, it.model, "x")


def test_nothing_to_save(tmp_path):
  with pytest.raises(UserError, match="no adapter to save"):
    peft.save_adapter(tmp_path, base().params, base().model, "x")


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  it = loaded("peft_lora")
  with pytest.raises(UserError, match="cannot be written"):
    peft.save_adapter(tmp_path / "file", it.params, it.model, "x")
