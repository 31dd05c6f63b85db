"""Rows of questions about images: placeholders, labels, and what is refused."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models

from research.text.tokenizer import Tokenizer
from research.typing import UserError
from research.vlm import data
from research.vlm.connectors import GroupAttention
from research.vlm.cross_attention import LatestImage
from research.vlm.images import prompts
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.anyres import AnyRes
from research.vlm.images.tiling.idefics3 import Idefics3
from research.vlm.images.tiling.native import Native
from research.vlm.images.tiling.overlap import Overlap
from research.vlm.images.tiling.square import Square
from research.vlm.scenes.sample import Sample
from tests import support_text, support_vlm

TOKENIZER, IMAGE = support_vlm.tokenizer(), support_vlm.IMAGE
RNG = np.random.default_rng(0)


def image(height, width):
  return RNG.integers(0, 256, (height, width, 3), np.uint8)


def sample(*images, question="w5 <image> w6", answer="w7 w8"):
  return Sample(images, question, answer, "", "", program={}, objects=())


def questions(*samples, **changes):
  fields = dict(
    samples=list(samples),
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=IMAGE,
    length=16,
    views=2,
    batch_size=2,
  )
  return data.ImageQuestions(**(fields | changes))


def test_a_row_has_placeholders_question_answer_and_end():
  """What a user types stays text: `<image>` is an unknown word, `w1`."""
  row = questions(sample(image(9, 30))).rows(TOKENIZER)[0]
  ids = [*[IMAGE] * 4, 5, 1, 6, 7, 8, 65]
  np.testing.assert_array_equal(row["tokens"][:10], ids)
  np.testing.assert_array_equal(row["segments"], [0] * 10 + [-1] * 6)
  np.testing.assert_array_equal(row["positions"][:10], np.arange(10))
  learned = row["targets"][row["weights"] > 0]
  np.testing.assert_array_equal(learned, [7, 8, 65])


@pytest.mark.parametrize("text", ["question", "answer"])
def test_a_placeholder_in_a_text_is_refused(text):
  """One that the tokenizer knows would take the feature of another."""
  backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
  backend.add_special_tokens(["<image>"])
  assert backend.token_to_id("<image>") == IMAGE
  knows = dataclasses.replace(TOKENIZER, backend=backend)
  plain = sample(image(9, 30), question="w5 w6")
  found = questions(plain).rows(knows)[0]
  assert (found["tokens"] == IMAGE).sum() == 4
  wrong = dataclasses.replace(plain, **{text: "w5 <image> w6"})
  with pytest.raises(UserError, match="image placeholder in .*w5 <image>"):
    questions(wrong).rows(knows)[0]


def test_views_are_the_preprocessors_and_then_zeros():
  first = image(9, 30)
  row = questions(sample(first)).rows(TOKENIZER)[0]
  expected = support_vlm.PREPROCESSOR.views(first).pixels
  np.testing.assert_array_equal(row["pixels"][:1], expected)
  assert not row["pixels"][1].any()


def test_two_images_are_one_after_the_other():
  images = image(16, 16), image(8, 8)
  row = questions(sample(*images)).rows(TOKENIZER)[0]
  assert (row["tokens"] == IMAGE).sum() == 8
  for view, each in zip(row["pixels"], images, strict=True):
    expected = support_vlm.PREPROCESSOR.views(each).pixels[0]
    np.testing.assert_array_equal(view, expected)


def test_tokens_around_tiles_are_of_the_tokenizer():
  layout = prompts.Wrapped(before=("<begin>",), after=("w3",))
  tiles = Preprocessor(
    Idefics3(longest=32, tile=16, patch=4, pool=2), layout=layout
  )
  row = questions(
    sample(image(20, 30)), preprocessor=tiles, views=5, length=40
  ).rows(TOKENIZER)[0]
  soft = tiles.plan(20, 30).soft_tokens
  assert soft == 20  # four tiles, and the whole
  ids = [66, *[IMAGE] * soft, 3, 5]
  np.testing.assert_array_equal(row["tokens"][: len(ids)], ids)
  strange = Preprocessor(tiles.tiling, layout=prompts.Wrapped(("a b",)))
  with pytest.raises(UserError, match="found no token 'a b'"):
    questions(
      sample(image(20, 30)), preprocessor=strange, views=5, length=40
    ).rows(TOKENIZER)[0]


def test_what_does_not_fit_is_refused():
  words = "found 9, expected at least 10: 1 images with 4 soft"
  with pytest.raises(UserError, match=words):
    questions(sample(image(9, 9)), length=9).rows(TOKENIZER)[0]


def test_more_views_than_there_is_room_for_are_refused():
  images = [image(8, 8) for _ in range(3)]
  with pytest.raises(UserError, match="found 3 of 3 images, expected at most"):
    questions(sample(*images)).rows(TOKENIZER)[0]


def test_a_sample_without_images_is_a_row_without_placeholders():
  row = questions(sample()).rows(TOKENIZER)[0]
  np.testing.assert_array_equal(row["tokens"][:6], [5, 1, 6, 7, 8, 65])
  assert row["pixels"].shape == (2, 16, 16, 3) and not row["pixels"].any()


def test_a_sample_has_the_ids_of_its_whole_text():
  """Also where the tokenizer puts a blank before a text, as LLaVA-1.5's."""
  names = ["\u2581", "\u2581a", *"ab:</>s", "</s>"]
  backend = tokenizers.Tokenizer(
    models.BPE({name: i for i, name in enumerate(names)}, [("\u2581", "a")])
  )
  support_text.put_blank_before(backend)
  backend.add_special_tokens(["</s>"])
  tokenizer = Tokenizer(backend=backend, stop=(backend.token_to_id("</s>"),))
  template = data.Template(question="{question}:", answer=" {answer}")
  found = data.tokens_of(
    sample(question="b a", answer="a b"),
    (),
    tokenizer,
    99,
    template,
    prompts.PromptFormat(),
  )
  whole = backend.encode("b a: a b</s>").ids
  assert found.tokens.tolist() == whole
  assert found.loss_mask.sum() == len(backend.encode("a b</s>").ids)


def test_batches_resume_where_they_stopped():
  samples = [sample(image(8, 8), answer=f"w{i}") for i in range(6)]
  stream = iter(questions(*samples).training(TOKENIZER))
  next(stream)
  state = stream.get_state()
  expected = next(stream)
  other = iter(questions(*samples).training(TOKENIZER))
  other.set_state(state)
  found = next(other)
  assert expected["pixels"].shape == (2, 2, 16, 16, 3)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)


def with_layers_between():
  model = support_vlm.model()
  return dataclasses.replace(model, placement=LatestImage())


def pooled_in_groups():
  connector = GroupAttention(size=32, hidden=8, width=24)
  return dataclasses.replace(support_vlm.model(), connector=connector)


@pytest.mark.parametrize(
  "made, tiling, found",
  [
    (support_vlm.model, Square(tile=16, patch=4, pool=2), None),
    (support_vlm.model, Idefics3(32, 16, 4, 2), None),
    (support_vlm.model, Native(patch=4, merge=2), None),
    (support_vlm.model, Square(tile=16, patch=4), "16 placeholders of 1 views"),
    (support_vlm.model, Square(tile=16, patch=2, pool=2), "16 placeholders"),
    (
      support_vlm.model,
      AnyRes(tile=16, canvases=((16, 32),), patch=4, pool=2),
      "10 placeholders of 3 views .AnyRes., expected 12",
    ),
    (support_vlm.model, Native(patch=4, merge=1), r"\(4, 1\) patches"),
    (pooled_in_groups, Overlap(16, 2, (1, 1), patch=4, pool=2), None),
    (pooled_in_groups, Overlap(16, 2, (1, 1), patch=2, pool=2), r"\(2, 2\)"),
    (pooled_in_groups, Overlap(16, 2, (1, 1), patch=4, pool=1), r"\(4, 1\)"),
    (with_layers_between, Square(tile=16, patch=4, pool=4), None),
    (with_layers_between, Square(tile=16, patch=4, pool=2), "expected 1, as"),
  ],
)
def test_images_have_the_placeholders_of_their_model(made, tiling, found):
  """As many as it makes soft tokens, or one a view for layers between."""
  patches = None if tiling.native_square is None else 256
  rows = questions(preprocessor=Preprocessor(tiling), patches=patches)
  given = made(), support_vlm.params(), "."
  if found is None:
    assert rows.with_encoder(*given) == rows
  else:
    with pytest.raises(UserError, match=found):
      rows.with_encoder(*given)
