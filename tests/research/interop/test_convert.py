"""There and back again: every format, every family, to the last bit."""

import dataclasses
import functools
import json
import pathlib
import shutil

import chex
import jax
import ml_dtypes
import numpy as np
import pytest

from research import tree
from research.interop import convert, gguf, load, native, parts, peft, sources
from research.interop.gguf import recipe as gguf_recipe
from research.interop.gguf import tensor_types
from research.interop.loaded import NOTE
from research.interop.quantized import checkpoint_formats
from research.io import safetensors
from research.lora import adapt, wrap
from research.lora.merge import changes
from research.lora.methods.lora import LoRA
from research.optim.low_rank import int8_weights
from research.quant.algorithms import rotate
from research.typing import UserError
from tests import support, support_hf_quant

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"
FAMILIES = sorted(
  p.parent.name
  for p in MODELS.glob("*/config.json")
  # transformers 5 stacks experts; ours come out under their plain names.
  if not any(
    name.endswith("experts.gate_up_proj")
    for name in safetensors.open_directory(p.parent)
  )
)
FILES = sorted(p.parent.name for p in MODELS.glob("gguf_*/model.gguf"))
# llama.cpp has no way to say these.
NOT_GGUF = {"llama_dynamic", "qwen2_window", "qwen3_moe"}


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
  hidden, _ = model.apply({"params": params}, tokens)
  return model.apply({"params": params}, hidden, method="logits")


@functools.cache
def opened(name):
  """What is read of a golden model for many tests, none of which changes it."""
  return sources.open_source(MODELS / name)


@functools.cache
def loaded(name):
  return load.load_model(MODELS / name)


@pytest.fixture(scope="module", name="llama")
def _llama(tmp_path_factory):
  """Our checkpoint of a model."""
  folder = tmp_path_factory.mktemp("llama") / "ours"
  convert.to_orbax(opened("llama"), folder)
  return folder


def golden_tokens(name):
  with np.load(MODELS / name / "golden.npz") as golden:
    return golden["tokens"][:1, :12]


def raw(folder) -> dict:
  return {
    name: (t.shape, str(t.dtype), t.read().tobytes())
    for name, t in safetensors.open_directory(folder).items()
  }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(18)
def test_hf_to_ours_to_hf_is_bitwise(name, tmp_path):
  convert.to_orbax(opened(name), tmp_path / "ours")
  log = convert.to_hf(sources.open_source(tmp_path / "ours"), tmp_path / "hf")
  assert raw(tmp_path / "hf") == raw(MODELS / name)
  assert log.summary()["changed"] == 0
  old, new = (
    json.loads((f / "config.json").read_text())
    for f in (MODELS / name, tmp_path / "hf")
  )
  assert new == old
  # Both are what --model= takes, too.
  want = loaded(name)
  for form in ("ours", "hf"):
    got = load.load_model(tmp_path / form)
    assert got.model == want.model
    chex.assert_trees_all_equal(got.params, want.params)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - NOT_GGUF))
@pytest.mark.sample(14, 1)
def test_hf_to_gguf_to_hf(name, tmp_path):
  file = tmp_path / "model.gguf"
  convert.to_gguf(opened(name), file, gguf_recipe.Recipe("F32"))
  log = convert.to_hf(sources.open_source(file), tmp_path / "hf")
  assert log.summary()["changed"] == 0
  # vLLM and llama.cpp's converter look for the class by its name.
  new, old = (
    json.loads((f / "config.json").read_text())["architectures"]
    for f in (tmp_path / "hf", MODELS / name)
  )
  assert new == old
  got, want = load.load_model(tmp_path / "hf"), loaded(name)
  tokens = golden_tokens(name)
  a = logits(got.model, got.params, tokens)
  b = logits(want.model, want.params, tokens)
  np.testing.assert_allclose(a, b, atol=2e-5 * np.ptp(b))
  if not name.startswith("gemma"):  # whose norms are rounded with their 1
    assert raw(tmp_path / "hf") == raw(MODELS / name)


@pytest.mark.parametrize("name", sorted(NOT_GGUF & set(FAMILIES)))
def test_what_gguf_cannot_say_is_an_error(name, tmp_path):
  with pytest.raises(UserError, match="GGUF"):
    convert.to_gguf(opened(name), tmp_path / "x.gguf")
  assert list(tmp_path.iterdir()) == []


def tensors(path):
  return {
    name: (t.type, t.shape, t.data.tobytes())
    for name, t in gguf.open_gguf(path).tensors.items()
  }


def same_metadata(got, want):
  assert list(got) == list(want)
  for key, value in want.items():
    if isinstance(value, np.ndarray):
      np.testing.assert_array_equal(got[key], value)
    else:
      assert got[key] == value, key


@pytest.mark.parametrize("name", FILES)
@pytest.mark.sample(9)
def test_gguf_to_ours_to_gguf_is_byte_identical(name, tmp_path):
  file = MODELS / name / "model.gguf"
  convert.to_orbax(sources.open_source(file), tmp_path / "ours")
  for source in (file, tmp_path / "ours"):
    to = tmp_path / f"{source.name}.gguf"
    log, reason, _ = convert.to_gguf(sources.open_source(source), to)
    assert tensors(to) == tensors(file)
    assert (log.summary()["changed"], reason) == (0, "")
    new, old = (gguf.open_gguf(f).metadata for f in (to, file))
    new.pop("general.file_type")
    old.pop("general.file_type", None)
    same_metadata(new, old)


@pytest.mark.parametrize("name", ["gguf_mixed", "gguf_q8_0", "gguf_bf16"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_our_checkpoint_of_packed_weights_is_a_model(name, packed, tmp_path):
  file = MODELS / name / "model.gguf"
  convert.to_orbax(sources.open_source(file), tmp_path / "ours")
  got = load.load_model(tmp_path / "ours", packed=packed)
  want = load.load_model(file, packed=packed)
  assert got.tokenizer.encode("the rain") == want.tokenizer.encode("the rain")
  tokens = golden_tokens(name)
  chex.assert_trees_all_close(
    logits(got.model, got.params, tokens),
    logits(want.model, want.params, tokens),
    atol=1e-5,
  )


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_is_the_encoding_of_the_weights(kind, tmp_path):
  source = sources.open_source(MODELS / "gguf_f32" / "model.gguf")
  file = tmp_path / "x.gguf"
  log, _, _ = convert.to_gguf(source, file, gguf_recipe.Recipe(kind))
  old, new = (
    gguf.open_gguf(f).tensors
    for f in (MODELS / "gguf_f32" / "model.gguf", file)
  )
  errors = {c.name: c for c in log.changes}
  for name, tensor in old.items():
    x, y = tensor.decode(), new[name].decode()
    if x.ndim == 1:
      np.testing.assert_array_equal(x, y)
      continue
    assert new[name].data.tobytes() == tensor_types.encode(kind, x).tobytes()
    difference = np.abs(y.astype(np.float64) - x)
    assert errors[name].max_abs_error == pytest.approx(difference.max())
    relative = np.linalg.norm(difference) / np.linalg.norm(x)
    assert errors[name].relative_error == pytest.approx(relative, rel=1e-6)
    assert 0 < relative < {"F16": 3e-4, "BF16": 3e-3}.get(kind, 0.2)


def test_rows_that_a_type_cannot_hold_are_named(tmp_path):
  with pytest.raises(UserError, match="rows of 36 weights.*multiple of 32"):
    convert.to_gguf(
      opened("smollm2"),
      tmp_path / "x.gguf",
      gguf_recipe.Recipe("Q8_0"),
    )
  assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_goes_both_ways(tmp_path):
  file = MODELS / "gguf_f32" / "model.gguf"
  convert.to_hf(sources.open_source(file), tmp_path / "hf")
  back = tmp_path / "back.gguf"
  _, reason, _ = convert.to_gguf(sources.open_source(tmp_path / "hf"), back)
  assert reason == ""
  cases = json.loads((MODELS / "gguf_tokenizer.json").read_text())
  for path in (file, tmp_path / "hf", back):
    tokenizer = load.load_model(path).tokenizer
    for case in cases:
      assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.chat([{"role": "user", "content": "x"}]) == (
      "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (tokenizer.bos, tokenizer.eos) == (1, 2)


@pytest.mark.parametrize("kind", ["hf", "gguf", "orbax, hf"])
def test_a_rotated_model_keeps_its_head(kind, tmp_path):
  """Its embedding is tied no more: the last norm's gain is in the head."""
  model = support.model(depth=1, tied=True)
  params = support.params(model)
  scale = params["final_norm"]["scale"]
  params["final_norm"] = {"scale": scale.at[:8].multiply(3.0)}
  rotated = rotate.Rotate(model=model)(params, jax.random.key(0))
  source = support_hf_quant.source(model, rotated)
  to = tmp_path / "model.gguf"
  if kind.startswith("orbax"):
    convert.to_orbax(source, tmp_path / "ours")
    source = sources.open_source(tmp_path / "ours")
  (convert.to_gguf if kind == "gguf" else convert.to_hf)(source, to)
  found, tokens = load.load_model(to), support.tokens()
  got = logits(found.model, found.params, tokens)
  want = logits(model, params, tokens)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_files_are_cut_and_indexed(tmp_path):
  convert.to_hf(opened("llama"), tmp_path / "hf", None, 20_000)
  index = json.loads((tmp_path / "hf" / safetensors.INDEX).read_text())
  files = sorted((tmp_path / "hf").glob("*.safetensors"))
  assert len(files) > 2
  assert index["metadata"]["total_size"] == sum(
    t.raw.size for t in safetensors.open_directory(MODELS / "llama").values()
  )
  for file in files:
    held = safetensors.open_file(file)
    assert sum(t.raw.size for t in held.values()) <= 20_000
  assert raw(tmp_path / "hf") == raw(MODELS / "llama")


def test_the_config_says_the_type_that_tensors_have(tmp_path):
  """transformers rounds to it: a run in float32 of a model in bfloat16."""
  source = opened("llama")
  rounded = dict(source.config) | {"torch_dtype": "bfloat16"}
  convert.to_hf(dataclasses.replace(source, config=rounded), tmp_path / "hf")
  config = safetensors.read_json(tmp_path / "hf" / "config.json")
  assert config == dict(source.config)
  assert raw(tmp_path / "hf") == raw(MODELS / "llama")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_reported(dtype, tmp_path):
  log = convert.to_hf(opened("llama"), tmp_path / "hf", dtype)
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert config["torch_dtype"] == dtype
  old, new = (
    safetensors.open_directory(f) for f in (MODELS / "llama", tmp_path / "hf")
  )
  worst = 0.0
  for name, tensor in old.items():
    want = tensor.read().astype(new[name].dtype)
    np.testing.assert_array_equal(new[name].read(), want)
    worst = max(worst, np.abs(want.astype(np.float64) - tensor.read()).max())
  summary = log.summary()
  assert summary["max_abs_error"] == pytest.approx(worst)
  assert summary["types"] == {f"float32 -> {dtype}": len(old)}


def test_numbers_beyond_the_range_are_an_error(tmp_path):
  shutil.copytree(MODELS / "llama", tmp_path / "m")
  held = safetensors.open_directory(MODELS / "llama")
  big = {k: v.read().copy() for k, v in held.items()}
  big["model.norm.weight"][3] = 1e5
  safetensors.write_file(tmp_path / "m" / "model.safetensors", big)
  with pytest.raises(UserError, match="model.norm.weight: 100000.0 is beyond"):
    convert.to_hf(
      sources.open_source(tmp_path / "m"), tmp_path / "hf", "float16"
    )
  assert not (tmp_path / "hf").exists()
  assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["peft_patterns", "peftfull_untied_lora"])
def test_merged_exports_and_their_fidelity(name, tmp_path):
  source = opened(name)
  exact = convert.to_hf(source, tmp_path / "fp32")
  rounded = convert.to_hf(source, tmp_path / "bf16", "bfloat16")
  it = loaded(name)
  merged = load.load_model(tmp_path / "fp32")
  chex.assert_trees_all_close(
    parts_of(merged.params), parts_of(wrap.merge(it.params)), atol=1e-6
  )
  counts = [log.summary()["merged"] for log in (exact, rounded)]
  adapted = [p for p in source.parts.values() if hasattr(p.read(), "trained")]
  assert counts == [len(adapted)] * 2 != [0, 0]
  found = exact.summary()
  assert (found["merge_loss"], found["merge_noise"]) == (0, 0)
  # An independent count of what bf16 loses, for one module.
  change = next(c for c in rounded.changes if c.fidelity)
  new = safetensors.open_directory(tmp_path / "bf16")[change.name].read()
  old = safetensors.open_directory(tmp_path / "fp32")[change.name].read()
  base = safetensors.open_directory(MODELS / "llama")[change.name].read()
  new, old = new.astype(np.float64), old.astype(np.float64)
  # From the base in bf16: what that loses alone is no loss of the adapter's.
  alone = base.astype(ml_dtypes.bfloat16).astype(np.float64)
  lost = np.linalg.norm((new - alone) - (old - base))
  update = np.linalg.norm(old - base)
  assert change.fidelity == pytest.approx(lost / update, rel=1e-4)


def as_gguf(source, to):
  return convert.to_gguf(source, to, gguf_recipe.Recipe("Q8_0"))[0]


def as_int8(source, to):
  writer = checkpoint_formats.Compressed("int8", 4)
  return convert.to_quantized(source, to, writer, requantize=True)


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_gguf, as_int8])
@pytest.mark.sample(2)
def test_an_update_is_what_changes_the_base_in_the_same_type(write, tmp_path):
  """What the base alone loses there is no loss of the adapter's."""
  file = MODELS / "gguf_f32" / "model.gguf"
  it = load.load_model(file)
  params = adapt.Adapt(method=LoRA(rank=2))(it.params, jax.random.key(0))
  params = tree.map_paths(
    lambda p, x: x + 0.001 if "/trained/" in p else x, params
  )
  peft.save_adapter(tmp_path / "a", params, it.model, str(file))
  source, base = (sources.open_source(x) for x in (tmp_path / "a", file))
  files = [tmp_path / f"{name}.gguf" for name in ("merged", "alone")]
  log, _ = (write(x, to) for x, to in zip((source, base), files, strict=True))
  got, alone = (parts_of(load.load_model(x).params) for x in files)
  updates, made = [], []
  for address, part in source.parts.items():
    found = changes.dense_weight(part.read())
    if found.base is not None:
      updates.append((found.array - found.base).ravel())
      made.append((got[str(address)] - alone[str(address)]).ravel())
  update, change = np.concatenate(updates), np.concatenate(made)
  found = log.summary()
  kept = change @ update / (update @ update)
  assert found["merge_kept"] == pytest.approx(kept, rel=1e-5)
  assert found["merge_loss"] == max(0, 1 - found["merge_kept"])
  # The rest of each tensor's change: what is left beside its own share.
  rest = [c - u * (c @ u) / (u @ u) for c, u in zip(made, updates, strict=True)]
  noise = np.linalg.norm(np.concatenate(rest)) / np.linalg.norm(update)
  assert found["merge_noise"] == pytest.approx(noise, rel=1e-4)


def parts_of(params):
  return {
    str(address): changes.dense_weight(part.read()).array
    for address, part in parts.from_params(params).items()
  }


ADAPTERS = sorted(p.name for p in MODELS.glob("peft*_*"))


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.sample(12)
def test_peft_to_ours_to_peft(name, tmp_path):
  source = opened(name)
  convert.to_orbax(source, tmp_path / "ours")
  again = sources.open_source(tmp_path / "ours")
  assert again.model == source.model
  chex.assert_trees_all_equal(again.params(), source.params())
  convert.to_peft(again, tmp_path / "peft")
  got = load.load_model(tmp_path / "peft")
  assert got.model == source.model
  # Scales pass through a decimal alpha.
  chex.assert_trees_all_equal(
    jax.tree.leaves(got.params), jax.tree.leaves(source.params())
  )
  old = safetensors.open_file(MODELS / name / peft.WEIGHTS)
  new = safetensors.open_file(tmp_path / "peft" / peft.WEIGHTS)
  for key, tensor in new.items():
    np.testing.assert_array_equal(tensor.read(), old[key].read())


@pytest.mark.slow
def test_an_adapter_over_packed_weights(tmp_path):
  it = load.load_model(MODELS / "gguf_q8_0" / "model.gguf", packed=True)
  params = adapt.Adapt(method=LoRA(rank=2))(it.params, jax.random.key(0))
  params = tree.map_paths(
    lambda p, x: x + 0.01 if "/trained/" in p else x, params
  )
  base = str(MODELS / "gguf_q8_0" / "model.gguf")
  peft.save_adapter(tmp_path / "a", params, it.model, base)
  source = sources.open_source(tmp_path / "a")
  convert.to_orbax(source, tmp_path / "ours")
  again = sources.open_source(tmp_path / "ours")
  chex.assert_trees_all_equal(again.params(), source.params())
  log, _, _ = convert.to_gguf(
    again, tmp_path / "x.gguf", gguf_recipe.Recipe("Q8_0")
  )
  assert log.summary()["merged"] == 14
  log = convert.to_hf(again, tmp_path / "hf")
  assert log.summary()["merge_loss"] == 0


def test_nothing_is_overwritten(tmp_path):
  source = opened("llama")
  (tmp_path / "x").write_text("mine")
  for write in (convert.to_hf, convert.to_orbax, convert.to_gguf):
    with pytest.raises(UserError, match="already there"):
      write(source, tmp_path / "x")
  with pytest.raises(UserError, match="already there"):
    convert.to_hf(source, tmp_path)
  assert (tmp_path / "x").read_text() == "mine"


def test_a_model_without_adapters_is_none(tmp_path):
  source = opened("llama")
  with pytest.raises(UserError, match="--base"):
    convert.to_peft(source, tmp_path / "x")
  with pytest.raises(UserError, match="no adapter to save"):
    convert.to_peft(source, tmp_path / "x", str(MODELS / "llama"))
  assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda n: n.update(version=2), "version is 2, expected 1"),
    (lambda n: n.update(weights=[1]), "is no type and shape"),
    (lambda n: n.update(weights={}), "expected"),
    (lambda n: n["weights"].pop("final_norm"), "final_norm/scale has shape No"),
    (
      lambda n: n["weights"]["run0"].update(layer0={"": "Pickle"}),
      "a weight of type Pickle",
    ),
    (
      lambda n: n["weights"]["final_norm"].update(scale=["float32", 2**40]),
      "final_norm/scale has shape",
    ),
  ],
)
def test_a_damaged_checkpoint(change, text, llama, tmp_path):
  shutil.copytree(llama, tmp_path / "ours")
  file = tmp_path / "ours" / NOTE
  note = json.loads(file.read_text())
  change(note)
  file.write_text(json.dumps(note))
  with pytest.raises(UserError, match=text):
    load.load_model(tmp_path / "ours")


def test_a_checkpoint_without_its_arrays(llama, tmp_path):
  shutil.copytree(llama, tmp_path / "ours")
  shutil.rmtree(tmp_path / "ours" / native.ARRAYS)
  with pytest.raises(UserError, match="arrays"):
    load.load_model(tmp_path / "ours")


def test_sources_are_values():
  source = opened("llama")
  assert dataclasses.replace(source) == source


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.sample(2, 1)
def test_weights_that_are_codes_in_training_alone_are_numbers(
  adapted, tmp_path
):
  """A Q-GaLore run's model, as NumPy decodes it."""
  source = opened("llama")
  params = jax.jit(int8_weights.Pack(group=16))(source.params())
  q = params["run0"]["layer0"]["attention"]["q"]
  x = np.asarray(q.step) * (np.float32(q.codes) - np.asarray(q.zero))
  want = x.reshape(len(x), *q.shape[:-3:-1]).swapaxes(1, 2)
  if adapted:
    params = jax.jit(lambda *x: adapt.Adapt()(*x))(params, jax.random.key(0))
  source = dataclasses.replace(
    source, params=lambda: params, parts=parts.from_params(params)
  )
  convert.to_orbax(source, tmp_path / "ours")
  found = sources.open_source(tmp_path / "ours").params()
  got = found["run0"]["layer0"]["attention"]["q"]
  np.testing.assert_array_equal(got.w if adapted else got, want)
  if not adapted:
    for name, write in (("hf", convert.to_hf), ("a.gguf", convert.to_gguf)):
      write(source, tmp_path / name)
      read = load.load_model(tmp_path / name).params
      chex.assert_trees_all_equal(read["run0"], found["run0"])
