"""Every imported family computes what transformers computes."""

import functools
import pathlib

import chex
import jax
import numpy as np
import pytest

from research.interop import load
from research.interop.loaded import Loaded

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"
FAMILIES = sorted(
  p.parent.name
  for p in MODELS.glob("*/golden.npz")
  if (p.parent / "config.json").is_file()
)
TIME = 72  # the prompt and all but the last token of its continuation fit
# Its rotation follows the length, so a token's logits change as text is added.
BY_LENGTH = "llama_dynamic"


def golden(name: str) -> dict[str, np.ndarray]:
  with np.load(MODELS / name / "golden.npz") as file:
    return dict(file)


@functools.cache
def loaded(name: str) -> Loaded:
  return load.load_model(MODELS / name)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens, positions=None, lengths=None):
  variables = {"params": params}
  hidden, _ = model.apply(variables, tokens, positions, lengths=lengths)
  return model.apply(variables, hidden, method="logits")


def check(got: np.ndarray, g: dict[str, np.ndarray], rows: list[int]):
  real = g["attention_mask"][rows].astype(bool)
  got, want = got[: len(rows), : real.shape[1]][real], g["logits"][rows][real]
  span = g["logits"].max() - g["logits"].min()
  error = np.abs(got - want).max() / span
  assert error < 1e-5, f"error {error:.1e}; theirs {g['fp32_error']:.1e}"
  chex.assert_trees_all_equal(got.argmax(-1), want.argmax(-1))


def padded(x: np.ndarray, value: int) -> np.ndarray:
  return np.pad(x, ((0, 0), (0, TIME - x.shape[1])), constant_values=value)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.sample(4, 1)
def test_logits_and_greedy_continuation(name):
  # Rows without padding, padded left, padded right, and the golden greedy
  # continuation: its next token is the argmax at each of its positions,
  # which by induction makes it what greedy decoding would write.
  g, it = golden(name), loaded(name)
  text = np.concatenate([g["prompt"], g["greedy"]])[None, :-1]
  tokens = np.concatenate([padded(g["tokens"], 0), padded(text, 0)])
  steps = np.arange(text.shape[1])[None]
  places = np.concatenate([padded(g["positions"], -1), padded(steps, -1)])
  got = np.asarray(logits(it.model, it.params, tokens, places))
  check(got, g, [0, 1, 2])
  if name == BY_LENGTH:
    return  # the next test
  start = len(g["prompt"]) - 1
  following = got[3, start : text.shape[1]].argmax(-1)
  chex.assert_trees_all_equal(following.astype(np.int32), g["greedy"])


def test_greedy_by_full_passes_where_the_rotation_follows_the_length():
  g, it = golden(BY_LENGTH), loaded(BY_LENGTH)
  text = np.concatenate([g["prompt"], g["greedy_full"]])[:-1]
  lengths = np.arange(len(g["prompt"]), len(text) + 1)
  tokens = padded(np.broadcast_to(text, (len(lengths), len(text))), 0)
  got = np.asarray(logits(it.model, it.params, tokens, None, lengths))
  following = got[np.arange(len(lengths)), lengths - 1].argmax(-1)
  chex.assert_trees_all_equal(following.astype(np.int32), g["greedy_full"])


@pytest.mark.parametrize("name", ["llama_biases", "qwen2_window", "gemma3"])
@pytest.mark.sample(3)
def test_right_padded_rows_by_lengths(name):
  g, it = golden(name), loaded(name)
  rows = [0, 2]
  tokens, mask = g["tokens"][rows], g["attention_mask"][rows]
  got = logits(it.model, it.params, tokens, None, mask.sum(1))
  check(np.asarray(got), g, rows)
