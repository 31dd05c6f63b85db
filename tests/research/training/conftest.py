"""Fixtures: a small Transformer with LoRA, documents, training."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.nn import presets
from research.training.objectives.objective import NextToken
from tests.support_lora import lora

VOCAB, LENGTH = 67, 16


@pytest.fixture(scope="session")
def model():
  return presets.transformer(
    presets.FAMILIES["llama"],
    presets.Sizes(
      vocab=VOCAB,
      width=32,
      depth=2,
      heads=2,
      kv_heads=1,
      hidden=48,
      head_dim=16,
      tied=True,
    ),
  )


@pytest.fixture(scope="session")
def params(model):
  tokens = jnp.zeros((1, LENGTH), jnp.int32)
  init = jax.jit(lambda key: model.init(key, tokens)["params"])
  made = init(jax.random.key(0))
  # Larger than at initialisation, so that every gradient is far from zero.
  return jax.tree.map(lambda x: x * 1.5, made)


@pytest.fixture(scope="session")
def adapt():
  return with_lora


def with_lora(params, dropout=0.0, rank=3):
  """Puts LoRA on every matrix of the layers, with B away from zero."""
  key = jax.random.key(7)

  def leaf(path, w):
    if not path.startswith("run") or w.ndim != 3:
      return w
    n, rows, columns = w.shape
    k = jax.random.split(jax.random.fold_in(key, w.size + len(path)))
    a = jax.random.normal(k[0], (n, rank, rows)) / rows**0.5
    b = jax.random.normal(k[1], (n, rank, columns)) * 0.1
    return lora(w, a, b, scale=2.0, dropout=dropout)

  return tree.map_paths(leaf, params)


@pytest.fixture(scope="session")
def adapted(params):
  return with_lora(params)


@pytest.fixture(scope="session")
def documents():
  rng = np.random.default_rng(1)
  return [
    rng.integers(0, VOCAB, n).astype(np.int32)
    for n in (5, 9, 2, 16, 3, 4, 7, 11, 2, 5)
  ]


@pytest.fixture(scope="session")
def objective(model):
  return NextToken(model, rows=8)


@dataclasses.dataclass(frozen=True)
class Line:
  """Least squares, an objective that compiles quickly."""

  def __call__(self, params, batch, key):
    guess = batch["x"] @ params["w"] + params["base"]
    error = (guess - batch["y"]) ** 2 * batch["weights"]
    return error.sum(), batch["weights"].sum(), {"error": error.sum()}


class Numbers:
  """Endless batches for `Line`, without a position that can be saved."""

  def __init__(self, bad_from: int | None = None, size: int = 8):
    self.bad_from, self.size = bad_from, size

  def __iter__(self) -> Any:
    return _Iterator(self)


class _Iterator:
  def __init__(self, data):
    self.data, self.next_index = data, 0

  def __iter__(self):
    return self

  def __next__(self):
    self.next_index += 1
    batch = line_batch(self.next_index, self.data.size)
    if self.data.bad_from and self.next_index >= self.data.bad_from:
      batch["y"][0] = np.nan
    return batch


class Positioned(Numbers):
  """The same with a position."""

  def __iter__(self) -> Any:
    return _Positioned(self)


class _Positioned(_Iterator):
  def get_state(self):
    return {"next_index": self.next_index}

  def set_state(self, found):
    self.next_index = found["next_index"]


def line_batch(seed, size=8):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(size, 3)).astype(np.float32)
  return {
    "x": x,
    "y": x @ np.float32([1, -2, 3]) + np.float32(0.5),
    "weights": (rng.uniform(size=size) > 0.3).astype(np.float32),
  }


@pytest.fixture
def line():
  params = {"w": jnp.zeros(3), "base": jnp.float32(0.5)}
  return Line(), params, Numbers
