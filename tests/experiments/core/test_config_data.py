"""Data configurations: every one makes batches, for every split it names."""

import json

import numpy as np
import pytest

from experiments.core import config
from research.interop import load
from research.typing import UserError

HEAD = """
from __gin__ import dynamic_registration
include 'base.gin'
include 'models/smollm2_135m.gin'
include 'data/{name}.gin'
include 'optim/adamw_cosine.gin'
STEPS = 9
LEARNING_RATE = 1e-3
"""
NAMES = sorted(p.stem for p in config.CONFIGS.glob("data/*.gin"))


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


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
  """Returns files of token ids: as many documents as rows, and three."""
  folder, rng = tmp_path_factory.mktemp("tokens"), np.random.default_rng(0)
  np.save(folder / "a.npy", rng.integers(0, 49152, (20, 200), np.uint16))
  ids = rng.integers(0, 49152, 1500, np.int32)
  np.savez(folder / "b.npz", tokens=ids, offsets=[0, 400, 900, 1500])
  return str(folder / "a.npy"), str(folder / "b.npz")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(8)
def test_data_makes_batches(name, tokenizer, chat, tokens):
  given = {
    "arrays": [f"TRAIN={tokens[0]!r}", f"HELDOUT={tokens[1]!r}"],
    "chat_jsonl": [f"FILES=({chat!r},)", "KEY='teacher'"],
    "stdlib": ["DOCUMENTS=5"],
  }
  read = config.parse(HEAD.format(name=name), given.get(name, []))
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
    config.parse(HEAD.format(name="chat_jsonl"))
