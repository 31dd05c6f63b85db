"""Every imported family computes what transformers computes."""

import functools
import pathlib

import chex
import jax
import numpy as np
import pytest

from research.interop import load

MODELS = pathlib.Path(__file__).parents[2] / "golden" / "models"
FAMILIES = sorted(
  p.parent.name
  for p in MODELS.glob("*/golden.npz")
  if (p.parent / "config.json").is_file()
)


def golden(name: str) -> dict[str, np.ndarray]:
  with np.load(MODELS / name / "golden.npz") as file:
    return dict(file)


@functools.cache
def loaded(name: str) -> load.Loaded:
  return load.load_model(MODELS / name)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens, positions=None, lengths=None):
  variables = {"params": params}
  hidden, _ = model.apply(variables, tokens, positions, lengths=lengths)
  return model.apply(variables, hidden, method="logits")


def check(got, g, rows=slice(None)):
  real = g["attention_mask"][rows].astype(bool)
  want = g["logits"][rows]
  span = g["logits"].max() - g["logits"].min()
  error = np.abs(np.asarray(got) - want)[real].max() / span
  assert error < 1e-5, f"error {error:.1e}; theirs {g['fp32_error']:.1e}"
  chex.assert_trees_all_equal(
    np.argmax(got, -1)[real], np.argmax(want, -1)[real]
  )


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_with_padding_on_either_side(name):
  g, it = golden(name), loaded(name)
  check(logits(it.model, it.params, g["tokens"], g["positions"]), g)


@pytest.mark.parametrize("name", FAMILIES)
def test_right_padded_rows_by_lengths(name):
  g, it = golden(name), loaded(name)
  rows = np.array([0, 2])
  got = logits(
    it.model,
    it.params,
    g["tokens"][rows],
    None,
    g["attention_mask"][rows].sum(1),
  )
  check(got, g, rows)
