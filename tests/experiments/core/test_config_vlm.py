"""Run files of vision language models, built without weights."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from experiments.core import config, train_eval
from experiments.core.from_scratch import FromScratch
from experiments.planning import abstract_step, plan_training
from research import tree
from research.nn.presets import Sizes
from research.text.special_tokens import NO_SPECIAL_TOKENS
from research.training.checkpoints.workdir import claim_workdir
from research.vlm.model import TOWERS
from research.vlm.scenes.captions import ShapeCaptions
from research.vlm.scenes.mixed import Mixed
from research.vlm.scenes.shapes import Shapes
from tests import support_vlm

SMOLLM2 = Sizes(
  vocab=49_152, width=576, depth=2, heads=9, kv_heads=3, head_dim=64, hidden=16
)
"""Vocabulary and width are the model's own; the rest is less."""

CONVERSATIONS = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'models/vlm_tiny.gin'
include 'data/image_jsonl.gin'
include 'optim/adamw_cosine.gin'
from experiments.core import from_scratch
from tests import support_vlm
from_scratch.FromScratch.tokenizer = @support_vlm.ChatWords()
VOCAB = 70
WIDTH = 16
DEPTH = 1
HEADS = 2
HEAD_DIM = 8
HIDDEN = 16
GRID = 2
SIDE = 16
STEPS = 2
LEARNING_RATE = 1e-2
WARMUP = 1
BATCH = 2
LENGTH = 32
VIEWS = 2
"""
"""A model of two layers in all, and conversations about images."""


def _trained(experiment):
  """Returns tower -> (trained, all) arrays."""
  params = experiment.load_abstract().params
  trained, _ = tree.partition(params, experiment.trainable)
  return {
    tower: [len(tree.flatten_paths(x[tower])) for x in (trained, params)]
    for tower in TOWERS
  }


def test_the_stages_of_smollm2_train_what_they_say(tmp_path):
  run = config.read("runs/vlm/two_stages_smollm2.gin").experiment
  align = run.stages["align"]
  language = FromScratch(sizes=SMOLLM2)
  model = dataclasses.replace(align.model, language=language)
  stages = dict(run.stages, align=dataclasses.replace(align, model=model))
  run = dataclasses.replace(run, stages=stages).in_workdir(tmp_path)
  assert run.stages["align"].model.encoder.workdir == tmp_path / "pretrain"
  assert run.stages["align"].model.vision == run.stages["pretrain"].model.vision
  found = {name: _trained(stage) for name, stage in run.stages.items()}
  for towers in found.values():
    assert towers["connector"][0] == towers["connector"][1] > 0
  assert [x["vision"][0] > 0 for x in found.values()] == [True, False, False]
  assert found["align"]["language"][0] == 0
  # Two factors for each of the seven matrices of a layer.
  trained, every = found["tune"]["language"]
  assert trained == 2 * 7
  assert every == found["align"]["language"][1] + trained


def test_images_of_smollm2_have_as_many_tokens_as_placeholders():
  run = config.read("runs/vlm/two_stages_smollm2.gin").experiment
  for name in ("pretrain", "align"):
    stage = run.stages[name]
    model, questions = stage.model, stage.data
    views = questions.preprocessor.views(questions.samples[0].image)
    assert views.plan.soft_tokens == 16
    height, width = views.pixels.shape[1:3]
    grid = (height // model.vision.patch, width // model.vision.patch)
    assert model.connector.tokens(grid) == 16
    assert questions.image_token == model.image_token
    assert stage.answers.questions.template == questions.template
  tune = run.stages["tune"].data
  assert tune.image_token == model.image_token == SMOLLM2.vocab


def test_rows_of_scenes_begin_with_their_image():
  """As those of the recorded results did: their tokenizers add no `bos`."""
  run = config.read("runs/vlm/shapes.gin", ["SAMPLES=4"]).experiment.stages
  stage, task = run["finetune"], Shapes(size=32)
  words = run["pretrain"].model.language.tokenizer.load()
  assert words.special == NO_SPECIAL_TOKENS
  row = dataclasses.replace(stage.data, samples=task).rows(words)[0]
  assert row["tokens"][0] == stage.data.image_token


@pytest.mark.parametrize("name", ["shapes", "two_stages_smollm2"])
def test_rows_have_room_for_the_longest_caption(name):
  """Of most objects, each with the most tokens."""
  stage = config.read(f"runs/vlm/{name}.gin").experiment.stages["pretrain"]
  words, task = stage.model.language.tokenizer.load(), stage.data.samples
  if isinstance(task, Mixed):
    (task,) = (x for x in task.tasks if isinstance(x, ShapeCaptions))
  named = [f"{x} {y}" for x in task.colours for y in task.shapes]
  longest = max(named, key=lambda x: len(words.encode(f", {x}")))
  caption = ", ".join([longest] * task.max_objects)
  sample = dataclasses.replace(task[0], answer=caption)
  rows = dataclasses.replace(stage.data, samples=[sample]).rows(words)
  assert (
    words.decode(rows[0]["tokens"].tolist()).count(longest) == task.max_objects
  )


@pytest.mark.slow
def test_images_of_any_number_have_buckets():
  """The buckets of the run file have room for all its samples."""
  run = config.read(
    "runs/vlm/mixed_images.gin", ["SAMPLES=40", "HELDOUT_SAMPLES=8"]
  ).experiment
  tokenizer = run.model.language.tokenizer.load()
  report = run.data.plan(tokenizer).report()
  assert not report["left_out"]
  assert all(x["tokens"] > 0.8 for x in report["buckets"].values())
  assert sum(x["samples"] for x in report["buckets"].values()) == 120
  training = run.data.training(tokenizer)
  assert len(training.shapes) == len(run.data.buckets) == 2
  for batch, _ in zip(training, range(6), strict=False):
    shapes = {k: x.shape for k, x in batch.items()}
    assert shapes in [
      {k: x.shape for k, x in each.items()} for each in training.shapes
    ]
  abstract = abstract_step.build(run, jax.devices()[:1])
  largest = plan_training.largest_bucket(run, abstract)
  assert largest.batch["tokens"].shape == (8, 116)
  assert [x["pixels"].shape[:2] for x in abstract.batches] == [
    (16, 2),
    (4, 12),
  ]
  counts = {len(x.images) for x in run.answers.questions.samples[:6]}
  assert counts == {1, 2, 3}
  assert run.answers.questions.samples.tasks[0].split == "heldout"


@pytest.mark.slow
def test_a_run_over_images_of_any_number_has_a_program_a_bucket(
  tmp_path, caplog
):
  bindings = ["SAMPLES=40", "HELDOUT_SAMPLES=4", "STEPS=9", "WARMUP=2"]
  bindings += ["WIDTH=32"]
  read = config.read("runs/vlm/mixed_images.gin", bindings)
  folder = claim_workdir(tmp_path / "run", read.text)
  with jax.log_compiles():
    result = train_eval.train(read.experiment, folder)
  said = [record.getMessage() for record in caplog.records]
  assert sum(x.startswith("Compiling jit(update)") for x in said) == 2
  assert sum(x["samples"] for x in result["buckets"].values()) == 120
  assert result["left_out"] == {} and result["perplexity_after"] > 0
  assert {"more", "count"} < set(result["answers"])


def test_ten_rows_of_my_pictures_are_enough(tmp_path):
  rng = np.random.default_rng(0)
  lines = []
  for i in range(10):
    pixels = rng.integers(0, 256, (20 + i, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    line = dict(images=[f"{i}.png"], question=f"Which? {i}", answer=str(i))
    lines.append(json.dumps(line) + "\n")
  file = tmp_path / "questions.jsonl"
  file.write_text("".join(lines))
  run = config.read(
    "runs/data/images.gin", [f"FILES={file}", f"FOLDER={tmp_path}"]
  ).experiment
  tokenizer = support_vlm.tokenizer()
  parts = (run.data, run.validation, run.heldout)
  rows = [row for data in parts for row in data.rows(tokenizer)]
  # Each row is in one split: 16 placeholders, and an answer that counts.
  assert len(rows) == 10
  for row in rows:
    assert (row["tokens"] == SMOLLM2.vocab).sum() == 16
    assert row["weights"].sum() > 0
    assert row["pixels"].shape == (1, 64, 64, 3)
  # A hash decides: a split without any is left out, and said.
  found = run.evaluations(tokenizer)
  have = {"validation": run.validation, "heldout": run.heldout}
  assert set(found) == {k for k, x in have.items() if len(x.samples)}


def test_conversations_about_images_are_trained_on(tmp_path):
  """Two steps on a file of LLaVA's layout, of a chat's, and of questions."""
  image, lines = np.zeros((16, 16, 3), np.uint8), []
  for i in range(12):
    Image.fromarray(image + 20 * i).save(tmp_path / f"{i}.png")
    turns = ("human", f"<image>\n w5 w{i}"), ("gpt", f"w{i}")
    turns += ("human", "w6 <image>"), ("gpt", "w7")
    llava = [{"from": who, "value": said} for who, said in turns]
    parts = [{"type": "image"}, {"type": "text", "text": f" w5 w{i}"}]
    chat = [
      {"role": "user", "content": parts},
      {"role": "assistant", "content": f"w{i}"},
    ]
    lines += [
      {"image": [f"{i}.png", "0.png"], "conversations": llava},
      {"images": [f"{i}.png"], "messages": chat},
      {"images": [f"{i}.png"], "question": f"w5 w{i}", "answer": f"w{i}"},
    ]
  file = tmp_path / "chats.jsonl"
  file.write_text("".join(json.dumps(x) + "\n" for x in lines))
  bindings = [f"FILES={file}", f"FOLDER={tmp_path}"]
  read = config.parse(CONVERSATIONS, bindings)
  run = read.experiment
  rows = run.data.rows(run.model.language.tokenizer.load())
  placeholders = {int((row["tokens"] == 70).sum()) for row in rows}
  assert placeholders == {4, 8}
  folder = claim_workdir(tmp_path / "run", read.text)
  result = train_eval.train(run, folder)
  assert result["steps"] == 2
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  first, second = [r["train/loss"] for r in records if "train/loss" in r]
  # At first all of the 70 words are about as likely.
  assert first == pytest.approx(np.log(70), abs=0.1) and second < first
  # Of a few rows with other words, after one more step: no bound from below.
  assert 0 < result["validation/loss"] < np.log(70) + 0.1
