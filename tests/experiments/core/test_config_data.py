"""Data configurations: every one makes batches, for every split it names."""

import dataclasses
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from experiments.core import config
from research.data import sources
from research.interop import load
from research.lora.methods.dora import DoRA
from research.typing import UserError

HEAD = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'models/{model}.gin'
include 'data/{name}.gin'
include 'optim/adamw_cosine.gin'
STEPS = 9
LEARNING_RATE = 1e-3
"""
PAGE = (
  pathlib.Path(__file__).resolve().parents[3] / "research/data/README.md"
).read_text("utf-8")
ELSEWHERE = {
  # Batches that the policy samples itself.
  "additions",
  "chain_sum_rewards",
  "countdown_scored",
  "question_rewards",
  # Problems with a vocabulary of their own, and labels of them.
  "chain",
  "countdown",
  "digit_chain",
  "labelled_steps",
  "questions_jsonl",
  # Rows of which a run file chooses the task: tests of research/diffusion.
  "toy",
  # Images, whose run files bind the rest: tests of research/vlm.
  "captions",
  "image_jsonl",
  "mixed_images",
  "drawn_questions",
  "small_text",
}
NAMES = sorted(
  p.stem for p in config.CONFIGS.glob("data/*.gin") if p.stem not in ELSEWHERE
)


def _head(name):
  """Returns a configuration around data: of a model that can read it."""
  sees = name in ("shapes", "shapes_digits")
  model = "vlm_tiny" if sees else "smollm2_135m"
  return HEAD.format(name=name, model=model)


@pytest.fixture(scope="module")
def tokenizer():
  return load.load_model("smollm2-135m", packed=True).tokenizer


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
  """Returns a file of 120 conversations, 2 with each teacher."""
  path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
  rows = [
    {
      "messages": [
        {"role": "user", "content": f"What is {i} + {i}?"},
        {"role": "assistant", "content": f"{2 * i}."},
      ],
      "teacher": f"teacher {i // 2}",
    }
    for i in range(120)
  ]
  path.write_text("\n".join(map(json.dumps, rows)))
  return str(path)


KINDS = {  # run of runs/data -> its data configuration and a record
  "chat": (
    "chat_jsonl",
    lambda i: {
      "messages": [
        {"role": "user", "content": f"What is {i} + {i}?"},
        {"role": "assistant", "content": f"{2 * i}."},
      ]
    },
  ),
  "text": ("text", None),
  "text_jsonl": ("text_jsonl", lambda i: {"text": f"{i} + {i} is {2 * i}."}),
  "completions": (
    "completions_jsonl",
    lambda i: {"prompt": f"{i} + {i} =", "completion": f" {2 * i}."},
  ),
  "preferences": (
    "preferences_jsonl",
    lambda i: {
      "prompt": f"{i} + {i} =",
      "chosen": f" {2 * i}.",
      "rejected": f" {2 * i + 1}.",
    },
  ),
}


def _write(folder, kind, count, without=None):
  """Writes a file of records, or lines, none in a split; returns its path."""
  _, record = KINDS[kind]
  if record is None:
    path = folder / "a.txt"
    lines = [f"{i} + {i} is {2 * i}." for i in range(count)]
  else:
    path = folder / f"{kind}.jsonl"
    found = (json.dumps(record(i), sort_keys=True) for i in itertools.count())
    kept = (line for line in found if sources.split_of(line) != without)
    lines = list(itertools.islice(kept, count))
  path.write_text("".join(f"{line}\n" for line in lines))
  return path


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
  """Returns files of token ids: as many documents as rows, and three."""
  folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
  np.save(folder / "a.npy", rng.integers(0, 49152, (20, 200), np.uint16))
  ids = rng.integers(0, 49152, 1500, np.int32)
  np.savez(folder / "b.npz", tokens=ids, offsets=[0, 400, 900, 1500])
  return str(folder / "a.npy"), str(folder / "b.npz")


def test_every_file_binds_the_data_of_a_run():
  """What does not, such as problems without answers, has no place in data."""
  text = {p.stem: p.read_text("utf-8") for p in config.CONFIGS.glob("data/*")}
  bound = {name for name in text if "Experiment.data = " in text[name]}
  assert set(NAMES) <= bound


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(8)
def test_data_makes_batches(name, tokenizer, chat, tokens, tmp_path):
  given = {
    "arrays": [f"TRAIN={tokens[0]!r}", f"HELDOUT={tokens[1]!r}"],
    "stdlib": ["DOCUMENTS=5"],
    "shapes": ["HELDOUT_SAMPLES=40"],
  }
  for kind, (own, _) in KINDS.items():
    if own == name:
      given[name] = [f"FILES={_write(tmp_path, kind, 120)}"]
  given["chat_jsonl"] = [f"FILES=({chat!r},)", "KEY=teacher"]
  read = config.parse(_head(name), given.get(name, []))
  experiment = read.experiment
  batch = next(iter(experiment.data.training(tokenizer)))
  shape = batch["tokens"].shape
  assert shape[0] == experiment.data.batch_size
  assert shape[-1] == experiment.data.length
  assert 0 < batch["weights"].sum() < batch["weights"].size
  found = experiment.evaluations(tokenizer)
  batches = [b for part in found.values() for b in part]
  assert batches and all(b["tokens"].shape == shape for b in batches)


def test_required_files_are_said():
  with pytest.raises(UserError, match="(?i)required"):
    config.parse(_head("chat_jsonl"))


@pytest.mark.parametrize("kind", KINDS)
def test_ten_records_are_enough(kind, tokenizer, tmp_path, capsys):
  """Of each kind, named by a pattern, with nothing else to say."""
  _write(tmp_path, kind, 10, without="validation")
  read = config.read(f"runs/data/{kind}.gin", [f"FILES={tmp_path}/*"])
  batch = next(iter(read.experiment.data.training(tokenizer)))
  assert batch["weights"].sum() > 0
  found = read.experiment.evaluations(tokenizer)
  warned = capsys.readouterr().err
  if kind == "text":  # of one file: each split has a line
    assert sorted(found) == ["heldout", "validation"] and not warned
  else:
    assert "validation" not in found
    assert "warning: there is no validation data (" in warned
    assert "none of 10 records is in the split 'validation'" in warned


def test_a_run_of_own_data_takes_any_model(tmp_path):
  path = _write(tmp_path, "text", 10)
  bindings = [f"FILES={path}", "MODEL=org/name"]
  assert config.read("runs/data/text.gin", bindings).experiment.model.name == (
    "org/name"
  )


def test_the_page_s_examples_are_read(tokenizer, tmp_path):
  found = re.findall(r"### (\w+)\n\n```jsonl\n(.*?)```", PAGE, re.S)
  assert {name for name, _ in found} == KINDS.keys() - {"text"}
  for name, lines in found:
    path = tmp_path / f"{name}.jsonl"
    path.write_text(lines)
    read = config.read(f"runs/data/{name}.gin", [f"FILES={path}"])
    source = dataclasses.replace(read.experiment.data.source, split=None)
    rows = dataclasses.replace(read.experiment.data, source=source)
    assert len(lines.splitlines()) == 3
    assert sum(r["weights"].sum() for r in rows.rows(tokenizer)) > 3


def test_the_page_s_run_of_one_s_own(tmp_path, monkeypatch):
  [text] = re.findall(r"```gin\n(.*?)```", PAGE, re.S)
  (tmp_path / "mine.gin").write_text(text)
  monkeypatch.chdir(tmp_path)
  experiment = config.read("mine.gin").experiment
  assert experiment.transforms[0].method == DoRA(rank=4)
  assert experiment.data.source.paths == "answers.jsonl"
  assert experiment.data.length == 128 and experiment.validation.length == 256
