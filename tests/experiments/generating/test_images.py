"""Images in a prompt of the command line."""

import dataclasses
import itertools
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.generating import conversation, images
from research.interop import vision
from research.interop.loaded import Loaded
from research.typing import UserError
from research.vlm import answering, data, masks
from research.vlm.images import open_image
from research.vlm.images.prompts import PromptFormat
from research.vlm.scenes.sample import Sample
from tests import support, support_golden, support_qwen, support_vlm
from tests.experiments import generated

TOKENIZER, IMAGE = support_vlm.tokenizer(), support_vlm.IMAGE
LOADED = Loaded(
  support_vlm.model(),
  support_vlm.params(),
  dataclasses.replace(TOKENIZER, add_bos=True),
  source={},
  preprocessor=support_vlm.PREPROCESSOR,
)
SOFT = [IMAGE] * 4


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  out = []
  for i, view in enumerate(support_vlm.pixels(2, 1)):
    Image.fromarray(view[0]).save(folder / f"{i}.png")
    out.append(str(folder / f"{i}.png"))
  return out


BEGIN = TOKENIZER.bos
AFTER = PromptFormat(begin="after_images", end=" w9")


@pytest.mark.parametrize(
  "text, form, expected",
  [
    ("w5 w6", PromptFormat(), [BEGIN, *SOFT, *SOFT, 5, 6]),
    ("w5 <image> w6 <image>", PromptFormat(), [BEGIN, 5, *SOFT, 6, *SOFT]),
    ("<image><image>w7", PromptFormat(), [BEGIN, *SOFT, *SOFT, 7]),
    ("w5 w6", AFTER, [*SOFT, *SOFT, BEGIN, 5, 6, 9]),
    ("w5 <image> w6 <image>w7", AFTER, [5, *SOFT, 6, *SOFT, BEGIN, 7, 9]),
  ],
)
def test_images_fill_their_places_in_order(text, form, expected, files):
  """`AFTER` is what `PaliGemmaProcessor.prepare_inputs_layout` makes."""
  how = dataclasses.replace(LOADED.preprocessor, prompt=form)
  loaded = dataclasses.replace(LOADED, preprocessor=how)
  made = images.prompt_of(loaded, files, text)
  assert made.ids == expected
  assert made.image_tokens == 8
  features = made.params["embed"].features
  whole = LOADED.model.encode(
    LOADED.params, jnp.asarray(support_vlm.pixels(2, 1).swapaxes(0, 1))
  )
  np.testing.assert_allclose(features, whole, rtol=1e-5, atol=1e-6)


def test_a_conversation_has_them_in_its_message(files):
  """Its template wrote no bos, which the published processors then add."""

  def chat(text):
    return f"w1 {text} w2"

  made = images.prompt_of(LOADED, files[:1], "w5", chat)
  assert made.ids == [BEGIN, 1, *SOFT, 5, 2]


SMOLVLM = (
  "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
  "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}"
  "{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text'"
  " %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}"
  "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
  "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAVA = (
  "{% for message in messages %}{{ message['role'].upper() + ': '}}"
  "{% for content in message['content'] | selectattr('type', 'equalto',"
  " 'image') %}{{ '<image>\n' }}{% endfor %}"
  "{% for content in message['content'] | selectattr('type', 'equalto',"
  " 'text') %}{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
  "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXTS = (
  "{% for message in messages %}[{{ message['content'] | trim | lower }}]"
  "{% endfor %}"
)


@pytest.mark.parametrize(
  "template, said, expected",
  [
    (SMOLVLM, ["<image>A?"], "User:<image>A?<end_of_utterance>\nAssistant:"),
    (SMOLVLM, ["A <image>B?"], "User: A <image>B?<end_of_utterance>\nAssi"),
    (SMOLVLM, ["A?"], "User: A?<end_of_utterance>\nAssistant:"),
    (LLAVA, ["<image>A?"], "USER: <image>\nA? ASSISTANT:"),
    (LLAVA, ["A?", "B", "C?"], "USER: A? ASSISTANT: B USER: C? ASSISTANT:"),
    (TEXTS, ["<image>A? "], "[<image>a?]"),
  ],
)
def test_templates_of_parts_get_what_a_message_says(template, said, expected):
  """SmolVLM's and llava-hf's, which leave out a message that is a text."""
  words = dataclasses.replace(support_vlm.tokenizer(), chat_template=template)
  roles = itertools.cycle(["user", "assistant"])
  messages = [
    {"role": role, "content": text}
    for role, text in zip(roles, said, strict=False)
  ]
  found = conversation.text_of(words, messages)
  assert found.removeprefix("<|im_start|>").startswith(expected)


def test_a_template_that_leaves_images_out_is_refused(files):
  with pytest.raises(
    UserError, match="found 0 placeholders <image> in the rendered"
  ):
    images.prompt_of(LOADED, files, "w5", lambda text: "w5")


@pytest.mark.parametrize("text", ["<image> w5", "<image><image><image>"])
def test_as_many_marks_as_images(text, files):
  with pytest.raises(UserError, match="found 2 files and"):
    images.prompt_of(LOADED, files, text)


@pytest.mark.parametrize("form", [PromptFormat(), AFTER])
def test_a_prompt_is_what_rows_and_evaluation_have(form, files, monkeypatch):
  """The same ids in training, in `Answerer` and on the command line."""
  how = dataclasses.replace(LOADED.preprocessor, prompt=form)
  loaded = dataclasses.replace(LOADED, preprocessor=how)
  typed = images.prompt_of(loaded, files[:1], "w5 w6").ids
  pixels = open_image(files[0])
  sample = Sample((pixels,), "w5 w6", "w7", "", "", program={}, objects=())
  questions = data.ImageQuestions(
    samples=[sample], preprocessor=how, image_token=IMAGE, length=16
  )
  row = questions.rows(loaded.tokenizer)[0]
  before = (row["segments"] == 0).argmin() - 2  # w7, and the end
  assert row["tokens"][:before].tolist() == typed
  asked = []

  def generated(model, params, prompts, *args, **kwargs):
    asked.extend(prompts)
    return types.SimpleNamespace(tokens=[[7]])

  monkeypatch.setattr(answering.generate, "generate", generated)
  answering.Answerer(
    model=loaded.model,
    params=loaded.params,
    tokenizer=loaded.tokenizer,
    preprocessor=how,
  )([(pixels,)], ["w5 w6"])
  assert asked == [typed]


def test_a_placeholder_without_an_image_is_refused(tmp_path, capsys):
  """By its mark, or by the model's own placeholder; also in a conversation."""
  model = dataclasses.replace(LOADED.model, image_token=60)
  vision.write_model(
    tmp_path / "m", dataclasses.replace(LOADED, model=model), LOADED.params
  )
  call = generated.command(capsys)
  for text in ("w5 <image>", "w5 w60"):
    status, _, errors = call(f"--model={tmp_path / 'm'}", f"--prompt={text}")
    assert status and f"placeholder <image> in '{text}'" in errors
  images.check_text(model, "w5", [5])
  images.check_text(support.model("llama"), "w5 <image>", [5, 60])
  # Earlier messages have been checked, but answers are in the ids as well.
  with pytest.raises(UserError, match="expected --image=FILE"):
    images.check_text(model, "w5", [60, 5])


def test_a_language_model_takes_no_images(files):
  with pytest.raises(UserError, match="reads text alone"):
    images.check(support.model("llama"), files, ["w5"])
  with pytest.raises(UserError, match="found 2 prompts, expected one"):
    images.check(LOADED.model, files, ["w5", "w6"])


class OtherTowers:
  """A model of other towers: not a `VisionLanguageModel`."""

  def __init__(self):
    self.language, self.image_token = LOADED.model.language, IMAGE
    self.mask, self.square = masks.BidirectionalPrompt(), 1

  def with_images(self, params, pixels):
    return LOADED.model.with_images(params, pixels)

  with_images_compiled = with_images


def test_a_model_of_another_class_sees_images(files):
  images.check(OtherTowers(), files, ["w5"])
  assert images.mask_of(OtherTowers()) == masks.BidirectionalPrompt()
  assert images.mask_of(support.model("llama")) is None


def test_a_model_without_a_preprocessor_says_so(files):
  blind = dataclasses.replace(LOADED, preprocessor=None)
  with pytest.raises(UserError, match="no preprocessor_config.json"):
    images.prompt_of(blind, files, "w5")


def test_images_of_native_resolution(tmp_path):
  """The prompt is the goldens' first row, written as a user would."""
  model, params = support_qwen.opened("qwen2_vl", tmp_path)
  loaded = Loaded(
    model,
    params,
    support_qwen.tokenizer(),
    source={},
    preprocessor=support_qwen.preprocessor(model),
  )
  golden = support_golden.golden("qwen2_vl")
  paths = []
  for i in support_qwen.IMAGES_OF[0]:
    paths.append(str(tmp_path / f"{i}.png"))
    Image.fromarray(golden[f"image_{i}"]).save(paths[-1])
  ids = support_qwen.rows("qwen2_vl")[0]
  words = [f"w{i}" if i < support_qwen.IMAGE else str(i) for i in ids]
  text = " ".join(words)
  for grid in golden["grids"][:2]:
    soft = ["60"] * int(grid.prod() // 4)
    text = text.replace(" ".join(["61", *soft, "62"]), "<image>", 1)
  made = images.prompt_of(loaded, paths, text)
  assert made.ids == ids
  assert made.image_tokens == ids.count(support_qwen.IMAGE)
  grids = made.params["rotary"].grids[0]
  np.testing.assert_array_equal(grids, golden["grids"][:2] // 2)
  features = made.params["embed"].features[0, : made.image_tokens]
  expected = golden["features"][: made.image_tokens]
  np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)
  with pytest.raises(UserError, match="image placeholder in '<.image_pad"):
    images.prompt_of(loaded, paths, "<|image_pad|> " + text)
