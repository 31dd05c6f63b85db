"""Heptad against transformers on the real model, and the goldens of it."""

import functools

import make_models
import numpy as np
import peft
import pytest
import smollm2
import support
import torch
import transformers

NAME = "smollm2-135m"


@functools.cache
def stored() -> dict[str, np.ndarray]:
  with np.load(smollm2.FILE) as file:
    return dict(file)


def live(reference, rows):
  return (smollm2.row_logits(reference, row).numpy() for row in rows)


def test_golden_is_what_transformers_says(reference):
  g = stored()
  rows = g["ids"].astype(np.int32)
  np.testing.assert_array_equal(
    smollm2.encode(smollm2.PROMPTS[0]), g["prompt0"]
  )
  for i, logits in enumerate(live(reference, rows)):
    picked = np.take_along_axis(logits, g["top_ids"][i].astype(int), -1)
    tolerance = 2e-5 * g["span"]
    assert np.abs(picked - g["top_logits"][i]).max() < tolerance
    top = torch.from_numpy(logits).double().logsumexp(-1).numpy()
    assert np.abs(top - g["logsumexp"][i]).max() < tolerance


def test_transformers_reads_the_same_weights_from_the_file():
  path = smollm2.path()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  )
  state = model.state_dict()
  for key, value in smollm2.tensors().items():
    np.testing.assert_array_equal(state[key].numpy(), value, err_msg=key)


def test_logits(reference, heptad):
  rows = stored()["ids"].astype(np.int32)
  got = heptad.bridge("logits", NAME, tokens=rows)
  worst = 0.0
  for ours, theirs in zip(got, live(reference, rows), strict=True):
    worst = max(worst, np.abs(ours - theirs).max())
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
  assert worst <= 2e-4 * stored()["span"]


@pytest.mark.parametrize("i", [0, 1])
def test_greedy_continuation(i, heptad):
  got = heptad.bridge("greedy", NAME, prompt=stored()[f"prompt{i}"], steps=64)
  np.testing.assert_array_equal(got["tokens"], stored()[f"greedy{i}"])


def test_tokenizer(heptad):
  text = smollm2.text()[:50000] + " é → 12345 <|im_start|>user\n\t  x"
  got = heptad.bridge("encode", NAME, text=text)
  np.testing.assert_array_equal(got["ids"], smollm2.encode(text))


@pytest.mark.parametrize("window, count", [(256, 6), (1024, 2)])
def test_perplexity(window, count, reference, heptad, tmp_path):
  text = smollm2.text()[100000:130000]
  (tmp_path / "text.txt").write_text(text, encoding="utf-8")
  got = heptad.command(
    "perplexity",
    f"--model={NAME}",
    f"--text={tmp_path / 'text.txt'}",
    f"--window={window}",
    f"--max_windows={count}",
  )
  ids = smollm2.encode(text)[: window * count]
  want = np.exp(smollm2.nll(reference, ids, window))
  assert got["tokens"] == count * (window - 1)
  assert abs(got["perplexity"] / want - 1) < 2e-3


def test_perplexity_of_a_short_last_window(reference, heptad, tmp_path):
  text = "The quick brown fox jumps over the lazy dog. " * 5
  (tmp_path / "text.txt").write_text(text, encoding="utf-8")
  got = heptad.command(
    "perplexity",
    f"--model={NAME}",
    f"--text={tmp_path / 'text.txt'}",
    "--window=32",
    "--max_windows=8",
  )
  want = np.exp(smollm2.nll(reference, smollm2.encode(text), 32))
  assert abs(got["perplexity"] / want - 1) < 2e-3


def test_peft_loads_our_adapter_of_the_real_model(heptad, tmp_path):
  rows = stored()["ids"][:, :64].astype(np.int32)
  ours = heptad.bridge(
    "adapt", NAME, tmp_path / "adapter", tokens=rows, rank=8, std=0.02
  )
  model = peft.PeftModel.from_pretrained(
    smollm2.reference(), tmp_path / "adapter"
  ).eval()
  mask = np.ones_like(rows)
  places = np.tile(np.arange(64, dtype=np.int32), (2, 1))
  want = make_models.logits(
    model, dict(tokens=rows, attention_mask=mask, positions=places)
  )
  assert support.relative_error(ours["logits"], want) < 2e-4
