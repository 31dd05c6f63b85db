"""Questions about image files: what is read when, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from research.typing import UserError
from research.vlm import data
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
