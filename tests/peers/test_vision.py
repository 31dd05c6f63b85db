"""Vision language models against transformers, live: read, and written back."""

import json
import warnings

import make_gemma4
import make_models
import make_molmo2
import make_qwen_vl
import make_siglip2
import make_vlm
import make_vlm_generated
import numpy as np
import peft
import pytest
import safetensors.numpy
import support
import torch
import transformers
import vlm_inputs

NAMES = [
  name
  for name, kind in make_vlm.CLASSES.items()
  if kind.endswith("ForConditionalGeneration")
]


@pytest.mark.parametrize("name", NAMES)
def test_read_and_written_back(name, heptad, tmp_path):
  theirs = make_vlm.build(name, tmp_path / "theirs")
  want = plain(name, theirs)
  ours = tmp_path / "ours"
  rows = inputs_of(want)
  got = heptad.bridge("vision", tmp_path / "theirs", adapter=ours, **rows)
  assert support.relative_error(got["features"], want["features"]) < 1e-5
  assert support.relative_error(got["logits"], want["logits"]) < 1e-5

  assert_opened(make_vlm.CLASSES[name], ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_peft_opens_an_adapter_of_the_language_model(name, heptad, tmp_path):
  """Every tensor has its module, and no module of the encoder an adapter."""
  theirs = make_vlm.build(name, tmp_path / "theirs")
  rows = inputs_of(plain(name, theirs))
  got = heptad.bridge(
    "adapted", tmp_path / "theirs", adapter=tmp_path / "adapter", **rows
  )
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*missing adapter keys")
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
  held = safetensors.numpy.load_file(
    tmp_path / "adapter" / "adapter_model.safetensors"
  )
  has = {k for k, _ in wrapped.named_parameters() if ".lora_" in k}
  assert {k.replace(".default", "") for k in has} == set(held)
  want = plain(name, wrapped.double().eval())
  assert support.relative_error(got["logits"], want["logits"]) < 1e-5


def test_paligemma_2_answers_see_all_of_a_prompt(heptad, tmp_path):
  """As in big_vision, whose gemma.py has no windows and trained the weights.

  transformers 5.24 lets a prompt see all of itself in spite of
  `sliding_window`, but cuts what an answer sees in local layers: that is no
  rule of a model that was trained. It opens what we write without windows.
  """
  name = "paligemma2"
  theirs = make_vlm.build(name, tmp_path / "theirs")
  rows = inputs_of(plain(name, theirs))
  rows["answer"] = np.array([35, 22], np.int32)
  ours = tmp_path / "ours"
  got = heptad.bridge("vision", tmp_path / "theirs", adapter=ours, **rows)
  after = np.arange(rows["tokens"].shape[1]) >= rows["answer"][:, None]

  def logits_of(model):
    given = dict(
      input_ids=torch.from_numpy(rows["tokens"]).long(),
      pixel_values=torch.from_numpy(rows["pixels"]).double(),
      token_type_ids=torch.from_numpy(after).long(),
    )
    with torch.no_grad(), make_models.float64():
      return model(
        **given, labels=given["input_ids"],
        attention_mask=torch.ones_like(given["input_ids"]),
      ).logits.numpy()  # fmt: skip

  cut = logits_of(theirs)
  assert support.relative_error(got["logits"][~after], cut[~after]) < 1e-5
  assert support.relative_error(got["logits"][after], cut[after]) > 0.1
  again = assert_opened(make_vlm.CLASSES[name], ours, theirs).double().eval()
  assert support.relative_error(got["logits"], logits_of(again)) < 1e-5


def plain(name, model):
  """Returns what transformers computes of the family's inputs."""
  with torch.no_grad(), make_models.float64():
    return make_vlm.generative(model, make_vlm.FAMILIES[name], name)


def inputs_of(want):
  """Returns the inputs of a family, for Heptad's side."""
  rows = dict(
    pixels=want["pixels"],
    tokens=want["tokens"].astype(np.int32),
    counts=np.array([2, 1]),
    answer=np.array([-1, -1], np.int32),
  )
  if "answer" in want:
    rows["answer"] = want["answer"].argmax(-1).astype(np.int32)
  return rows


def assert_opened(kind, folder, theirs):
  """transformers opens what we wrote, and has the same weights."""
  again = getattr(transformers, kind).from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  )
  before, after = (
    {k: v.float().numpy() for k, v in m.state_dict().items()}
    for m in (theirs, again)
  )
  assert set(after) == set(before)
  for key, value in before.items():
    np.testing.assert_array_equal(after[key], value, err_msg=key)
  return again


@pytest.mark.parametrize("name", make_qwen_vl.FAMILIES)
def test_native_resolution_read_and_written_back(name, heptad, tmp_path):
  """Images of three shapes in two rows; generated as transformers does."""
  theirs = make_qwen_vl.build(name, tmp_path / "theirs")
  with torch.no_grad(), make_models.float64():
    made = make_qwen_vl.golden(theirs, name)
  want = {k: np.asarray(v) for k, v in made.items()}
  ours = tmp_path / "ours"
  got = heptad.bridge(
    "native",
    tmp_path / "theirs",
    adapter=ours,
    **{k: v for k, v in want.items() if k.startswith("image_")},
    counts=np.array([2, 1]),
    tokens=want["tokens"].astype(np.int32),
    lengths=want["lengths"],
    steps=np.array(make_qwen_vl.NEW),
  )
  features = want["features"]
  if "deeper" in want:
    features = np.concatenate([features[:, None], want["deeper"]], axis=1)
  assert support.relative_error(got["features"], features) < 1e-5
  for i, n in enumerate(want["lengths"]):
    error = support.relative_error(got["logits"][i, :n], want["logits"][i, :n])
    assert error < 1e-5
  np.testing.assert_array_equal(got["generated"], want["generated"])
  again = assert_opened(make_qwen_vl.CLASSES[name], ours, theirs)
  # The weights are not all: what config.json says is theirs, too.
  with torch.no_grad(), make_models.float64():
    rows = make_qwen_vl.golden(again.double().eval(), name)
  assert support.relative_error(np.asarray(rows["logits"]), want["logits"]) < (
    1e-9
  )


def assert_as_generated(got, want, tolerance=1e-5):
  """Soft tokens and logits are near transformers', and its tokens ours."""
  assert support.relative_error(got["features"], want["features"]) < 1e-5
  for i, n in enumerate(want["lengths"]):
    error = support.relative_error(got["logits"][i, :n], want["logits"][i, :n])
    assert error < tolerance
  np.testing.assert_array_equal(got["generated"], want["generated"])


def rows_of(want, **more):
  """Returns what `native` gets of a golden with two rows."""
  pictures = {k: v for k, v in want.items() if k.startswith("image_")}
  return pictures | dict(
    counts=np.array([2, 1]),
    tokens=want["tokens"],
    lengths=want["lengths"],
    steps=np.array(want["generated"].shape[1]),
    **more,
  )


def write_processor(folder, config):
  """Writes a preprocessor_config.json."""
  (folder / "preprocessor_config.json").write_text(json.dumps(config))


def assert_same_views(folder, config):
  """What we wrote makes transformers' views of before, bit for bit."""
  written = json.loads((folder / "preprocessor_config.json").read_text())
  pictures = vlm_inputs.images(make_vlm_generated.SHAPES)
  before, after = (
    make_vlm_generated.views_of(x, pictures) for x in (config, written)
  )
  for want, got in zip(before, after, strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", make_vlm_generated.PROCESSORS)
def test_images_of_no_square_through_a_cache(name, heptad, tmp_path):
  """Two in a row; tiles, crops or one view by each family's processor."""
  theirs = make_vlm.build(name, tmp_path / "theirs")
  with torch.no_grad(), make_models.float64():
    want = make_siglip2.rounded(make_vlm_generated.golden(theirs, name))
  config = make_vlm_generated.PROCESSORS[name]
  write_processor(tmp_path / "theirs", config)
  ours = tmp_path / "ours"
  got = heptad.bridge("native", tmp_path / "theirs", adapter=ours,
                      **rows_of(want, views=np.array(12)))  # fmt: skip
  assert_as_generated(got, want)
  assert_opened(make_vlm.CLASSES[name], ours, theirs)
  assert_same_views(ours, config)


@pytest.mark.parametrize("name", make_vlm_generated.DUAL)
def test_two_towers_read_and_written_back(name, heptad, tmp_path):
  """CLIP and SigLIP: images of no square, by each one's processor."""
  theirs = make_vlm.build(name, tmp_path / "theirs")
  config = make_vlm_generated.DUAL[name]
  pictures = vlm_inputs.images(make_vlm_generated.SHAPES)
  views = np.concatenate(make_vlm_generated.views_of(config, pictures))

  def products(model):
    with torch.no_grad(), make_models.float64():
      made = make_vlm.contrastive(model, make_vlm.FAMILIES[name], views)
    return make_siglip2.rounded(made)

  want = products(theirs)
  write_processor(tmp_path / "theirs", config)
  ours = tmp_path / "ours"
  got = heptad.bridge(
    "dual",
    tmp_path / "theirs",
    adapter=ours,
    tokens=want["tokens"],
    **{f"image_{i}": picture for i, picture in enumerate(pictures)},
  )
  for key, value in got.items():
    assert support.relative_error(value, want[key]) < 1e-5, key
  again = assert_opened(make_vlm.CLASSES[name], ours, theirs)
  assert_same_views(ours, config)
  # The weights are not all: what config.json says is theirs, too.
  made = products(again.double().eval())["logits_per_image"]
  assert support.relative_error(made, want["logits_per_image"]) < 1e-6


@pytest.mark.parametrize("name", make_gemma4.FAMILIES)
def test_gemma4_read_and_written_back(name, heptad, tmp_path):
  """Images of three shapes in two rows, by budgets that are not reached."""
  theirs = make_gemma4.build(name, tmp_path / "theirs")
  with torch.no_grad(), make_models.float64():
    want = make_siglip2.rounded(make_gemma4.golden(theirs))
  ours = tmp_path / "ours"
  got = heptad.bridge("native", tmp_path / "theirs", adapter=ours,
                      **rows_of(want))  # fmt: skip
  # Its attention does not divide by sqrt(H): what fp32 rounds grows in softmax.
  assert_as_generated(got, want, 1e-4)
  again = assert_opened(make_gemma4.CLASS, ours, theirs)
  # The weights are not all: what config.json says is theirs, too.
  with torch.no_grad(), make_models.float64():
    made = make_gemma4.golden(again.double().eval())
  error = support.relative_error(np.asarray(made["logits"]), want["logits"])
  assert error < 1e-6


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (4, 2)])
def test_molmo2_read_and_written_back(
  heads, kv_heads, heptad, tmp_path, monkeypatch
):
  """Images cut into one to five views, whose patches are pooled together."""
  pooling = make_molmo2.CONFIG["adapter_config"]
  monkeypatch.setitem(pooling, "num_attention_heads", heads)
  monkeypatch.setitem(pooling, "num_key_value_heads", kv_heads)
  theirs = make_molmo2.build(tmp_path / "theirs")
  for own in (make_molmo2.ALL, *vlm_inputs.IMAGES_OF):
    make_molmo2.processed(own)
  with torch.no_grad(), make_models.float64():
    want = make_siglip2.rounded(make_molmo2.golden(theirs))
  processor = dict(
    image_processor_type="Molmo2ImageProcessor", **make_molmo2.PROCESSOR
  )
  path = tmp_path / "theirs" / "preprocessor_config.json"
  path.write_text(json.dumps(processor))
  ours = tmp_path / "ours"
  got = heptad.bridge("native", tmp_path / "theirs", adapter=ours,
                      **rows_of(want, views=np.array(10)))  # fmt: skip
  assert_as_generated(got, want)
  again = assert_opened(make_molmo2.CLASS, ours, theirs)
  with torch.no_grad(), make_models.float64():
    made = make_molmo2.golden(again.double().eval())
  error = support.relative_error(np.asarray(made["logits"]), want["logits"])
  assert error < 1e-6
  processor = transformers.Molmo2ImageProcessor.from_pretrained(ours)
  for name in ("max_crops", "overlap_margins", "patch_size", "pooling_size"):
    assert getattr(processor, name) == make_molmo2.PROCESSOR[name], name


def test_siglip2_read_and_written_back(heptad, tmp_path):
  """Images of five shapes in a batch, resized by the published processor."""
  theirs = make_siglip2.build(tmp_path / "theirs")
  with torch.no_grad(), make_models.float64():
    want = make_siglip2.rounded(make_siglip2.golden(theirs))
  processor = dict(
    image_processor_type="Siglip2ImageProcessor",
    patch_size=make_siglip2.PATCH,
    max_num_patches=make_siglip2.BUDGET,
  )
  path = tmp_path / "theirs" / "preprocessor_config.json"
  path.write_text(json.dumps(processor))
  ours = tmp_path / "ours"
  got = heptad.bridge(
    "dual",
    tmp_path / "theirs",
    adapter=ours,
    tokens=want["tokens"],
    **{
      f"image_{i}": want[f"image_{i}"] for i in range(len(make_siglip2.SHAPES))
    },
  )
  for name, value in got.items():
    assert support.relative_error(value, want[name]) < 1e-5, name
  again = assert_opened(make_siglip2.CLASS, ours, theirs)
  with torch.no_grad(), make_models.float64():
    made = make_siglip2.golden(again.double().eval())
  error = support.relative_error(
    np.asarray(made["logits_per_image"]), want["logits_per_image"]
  )
  assert error < 1e-6
