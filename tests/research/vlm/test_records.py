"""Questions about image files: what is read when, and what is refused."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from research.typing import UserError
from research.vlm import answering, data
from research.vlm.buckets import Bucket, BucketedQuestions
from research.vlm.records import ImageRecords
from tests import support_vlm


def write(folder, *records):
  file = folder / "questions.jsonl"
  file.write_text("".join(json.dumps(x) + "\n" for x in records))
  return ImageRecords(paths=str(file), folder=str(folder))


def save(path, height, width, seed=0, **options):
  pixels = np.random.default_rng(seed).integers(
    0, 256, (height, width, 3), np.uint8
  )
  Image.fromarray(pixels).save(path, **options)
  return pixels


def test_samples_are_what_the_files_hold(tmp_path):
  one, two = save(tmp_path / "a.png", 9, 20), save(tmp_path / "b.png", 8, 8, 1)
  records = write(
    tmp_path,
    {"images": ["a.png", "b.png"], "question": "w5", "answer": "w6"},
    {"question": "w7", "answer": "w8"},
  )
  first, second = records[:]
  np.testing.assert_array_equal(first.images[0], one)
  np.testing.assert_array_equal(first.images[1], two)
  assert (first.question, second.answer) == ("w5", "w8")
  assert second.images == () and len(records) == 2
  sample, sizes = data.outline(records, 0)
  assert sizes == ((9, 20), (8, 8)) and sample.question == "w5"


def test_plans_read_headers_and_upright_sizes(tmp_path):
  """A file that ends after its header is planned, and fails when it is read."""
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  save(tmp_path / "turned.jpg", 9, 20, exif=exif)
  save(tmp_path / "whole.png", 40, 30)
  whole = (tmp_path / "whole.png").read_bytes()
  (tmp_path / "cut.png").write_bytes(whole[:200])
  records = write(
    tmp_path,
    {"images": ["turned.jpg"], "question": "w5", "answer": "w6"},
    {"images": ["cut.png"], "question": "w5", "answer": "w6"},
  )
  assert records.outline(0)[1] == ((20, 9),)
  assert records.outline(1)[1] == ((40, 30),)
  with pytest.raises(UserError, match="cut.png"):
    records[1]


def test_what_cannot_be_read_is_counted(tmp_path, capsys):
  save(tmp_path / "a.png", 8, 8)
  (tmp_path / "b.png").write_bytes(b"no image")
  good = {"images": ["a.png"], "question": "w5", "answer": "w6"}
  records = write(tmp_path, good, good | {"images": ["b.png"]}, good)
  questions = BucketedQuestions(
    samples=records,
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=support_vlm.IMAGE,
    buckets=(Bucket(length=8, rows=2),),
  )
  training = questions.training(support_vlm.tokenizer())
  assert sum(training.report["left_out"].values()) == 1
  said = capsys.readouterr().err
  assert "1 of 3 samples fit in no bucket" in said and "b.png" in said


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname"])
def test_no_record_names_a_file_elsewhere(tmp_path, name):
  (tmp_path / "in").mkdir()
  records = write(
    tmp_path / "in", {"images": [name], "question": "w5", "answer": "w6"}
  )
  with pytest.raises(UserError, match="expected a path inside of"):
    records.outline(0)


def test_images_are_a_list(tmp_path):
  records = write(
    tmp_path, {"images": "a.png", "question": "w5", "answer": "w6"}
  )
  with pytest.raises(UserError, match="jsonl:1: .* expected a list of paths"):
    records[0]


# --- conversations ---------------------------------------------------------

TOKENIZER = support_vlm.ChatWords().load()
LLAVA = {
  "image": ["a.png", "b.png"],
  "conversations": [
    {"from": "human", "value": "w5 \n<image>\n w6"},
    {"from": "gpt", "value": "w7 <image>"},
    {"from": "human", "value": "w8 <image>"},
    {"from": "gpt", "value": ""},
  ],
}
CHAT = {
  "images": ["a.png", "b.png"],
  "messages": [
    {
      "role": "user",
      "content": [
        {"type": "text", "text": "w5 "},
        {"type": "image", "text": None},
        {"type": "text", "text": " "},
        {"type": "text", "text": "w6"},
      ],
    },
    {"role": "assistant", "content": "w7 <image>"},
    {
      "role": "user",
      "content": [{"type": "text", "text": "w8 "}, {"type": "image"}],
    },
    {"role": "assistant", "content": []},
  ],
}


def with_paths():
  """Returns the chat with the paths in its parts."""
  first, answer, second, end = CHAT["messages"]
  parts = [dict(x) for x in first["content"]]
  parts[1]["image"] = "a.png"
  last = [second["content"][0], {"type": "image", "path": "b.png"}]
  turns = [first | {"content": parts}, answer, second | {"content": last}, end]
  return {"messages": turns}


def questions(records, **changes):
  fields = dict(
    samples=records,
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=support_vlm.IMAGE,
    length=32,
    views=2,
    batch_size=1,
  )
  return data.ImageQuestions(**(fields | changes))


@pytest.mark.parametrize(
  "record", [LLAVA, CHAT, with_paths()], ids=["llava", "chat", "paths"]
)
def test_layouts_of_conversations_are_one_sample(tmp_path, record):
  pixels = [save(tmp_path / f"{x}.png", 16, 16, i) for i, x in enumerate("ab")]
  records = write(tmp_path, record)
  records.check_files()
  sample, sizes = records.outline(0)
  assert sizes == ((16, 16), (16, 16)) and sample.images == ()
  contents = [each["content"] for each in sample.conversation.messages]
  assert contents[0] == "w5 <image> w6" and contents[2] == "w8 <image>"
  row = questions(records).rows(TOKENIZER)[0]
  soft = [support_vlm.IMAGE] * 4
  # A mark in the answer is a word that the tokenizer does not know.
  ids = [2, 5, *soft, 6, 3, 7, 1, 65, 2, 8, *soft, 3, 65]
  np.testing.assert_array_equal(row["tokens"][: len(ids)], ids)
  learned = row["targets"][row["weights"] > 0]
  np.testing.assert_array_equal(learned, [7, 1, 65, 65])
  for view, each in zip(row["pixels"], pixels, strict=True):
    expected = support_vlm.PREPROCESSOR.views(each).pixels[0]
    np.testing.assert_array_equal(view, expected)


def test_a_conversation_is_never_cut(tmp_path):
  for name in "ab":
    save(tmp_path / f"{name}.png", 8, 8)
  records = write(tmp_path, LLAVA)
  message = r"found 18, expected at least 19: 2 images .* the text of .*jsonl:1"
  with pytest.raises(UserError, match=message):
    questions(records, length=18).rows(TOKENIZER)[0]


def changed(record, *place, **fields):
  """Returns a copy of a record with other fields at a place in it."""
  record = json.loads(json.dumps(record))
  inner = record
  for key in place:
    inner = inner[key]
  inner.update(fields)
  return record


TURN = "conversations", 0
PART = "messages", 0, "content", 1


@pytest.mark.parametrize(
  ("record", "words"),
  [
    (changed(LLAVA, *TURN, value=3), "conversations.0.: field 'value': .* int"),
    (changed(LLAVA, *TURN, **{"from": "w"}), "0.: field 'from': .*, expected"),
    (changed(LLAVA, conversations="x"), "field 'conversations': .*list"),
    (changed(LLAVA, conversations=["x"]), "'conversations.0.': .* an object"),
    (changed(LLAVA, conversations=[]), "none by the assistant"),
    (changed(LLAVA, image="a.png"), "found 2 images .* 1 paths, expected as"),
    (changed(LLAVA, image=[3]), "field 'image': .* expected a list of paths"),
    (changed(LLAVA, question="w5"), "'conversations': .* none beside 'quest"),
    (changed(LLAVA, *TURN, value="\ufdd0"), r"0.: found U\+FDD0"),
    (
      changed(CHAT, *PART, type="image_url"),
      r"content.1.: field 'type': .*url",
    ),
    (changed(CHAT, *PART, type="text"), r"content.1.: field 'text': found"),
    (changed(CHAT, *PART, url="http://x"), "field 'url': .* expected 'path'"),
    (changed(CHAT, *PART, image=3), "field 'image': found int"),
    (changed(CHAT, *PART, image="a.png"), "found 1 of 2 images with a path"),
    (changed(CHAT, "messages", 0, role="robot"), "only the user's turns"),
    (changed(CHAT, "messages", 1, role="robot"), "message 1: role: .*'robot'"),
    (changed(CHAT, "messages", 1, content=3), "content: found int"),
    (changed(CHAT, images=[]), "found 2 images .* 0 paths, expected as many"),
    ({"image": "a.png"}, "field 'question': .* or 'messages' or 'conversatio"),
  ],
)
def test_errors_name_line_and_field(tmp_path, record, words):
  records = write(tmp_path, record)
  with pytest.raises(UserError, match=f"questions.jsonl:1: .*{words}") as error:
    records.check_files()
  assert len(str(error.value).splitlines()) <= 3


def test_conversations_are_no_evaluation_of_answers(tmp_path):
  for name in "ab":
    save(tmp_path / f"{name}.png", 8, 8)
  asks = answering.Answers(questions=questions(write(tmp_path, CHAT)))
  with pytest.raises(UserError, match="found conversations, expected quest"):
    asks(None)


def test_fields_have_any_names(tmp_path):
  renamed = {"turns": LLAVA["conversations"], "files": LLAVA["image"]}
  records = dataclasses.replace(
    write(tmp_path, renamed), conversations="turns", images="files"
  )
  save(tmp_path / "a.png", 8, 8)
  save(tmp_path / "b.png", 8, 8)
  assert len(records[0].images) == 2


def test_the_page_s_examples_are_read(tmp_path):
  page = pathlib.Path(__file__).parents[3] / "research/data/README.md"
  pattern = r"### images\n\n```json\n(.*?)```"
  [lines] = re.findall(pattern, page.read_text("utf-8"), re.S)
  records = write(tmp_path, *map(json.loads, lines.splitlines()))
  save(tmp_path / "a.png", 8, 8)
  save(tmp_path / "b.png", 8, 8)
  records.check_files()
  assert [len(each.images) for each in records] == [1, 2, 1]
  rows = questions(records, length=48).rows(TOKENIZER)
  assert [int(row["weights"].sum()) for row in rows] == [2, 2, 4]
