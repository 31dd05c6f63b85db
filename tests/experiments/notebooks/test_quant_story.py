"""What the notebook of quantization computes, on small matrices."""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.core import from_scratch
from experiments.notebooks import quant_pictures, quant_story
from research import tree
from research.nn import presets
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Quantize


@pytest.fixture(autouse=True)
def _closed():
  yield
  plt.close("all")


def _problem(tokens=96, inputs=16, outputs=8):
  rng = np.random.default_rng(0)
  mixed = rng.standard_normal((inputs, inputs)) / 3 + np.eye(inputs)
  x = rng.standard_normal((tokens, inputs)) @ mixed
  w = rng.standard_normal((inputs, outputs))
  return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@pytest.mark.slow
def test_the_papers_steps_are_the_librarys():
  x, w = _problem()
  steps = quant_story.gptq_steps(x, w, bits=3)
  np.testing.assert_allclose(steps.textbook, steps.after, atol=1e-5)
  # What is left at the end is the outputs' error, measured on the inputs.
  x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
  lost = np.square(x @ (steps.after - w)).sum() / np.square(x @ w).sum()
  assert steps.gptq[-1] == pytest.approx(lost, rel=1e-3)
  assert steps.gptq[-1] < 0.8 * steps.nearest[-1]
  assert steps.nearest[-1] > steps.nearest[0] > 0


def test_formats_are_sorted_and_count_their_scales():
  x, w = _problem(inputs=64)
  some = (
    Codebook(block=64, nested=0),
    Affine(bits=8, block=32),
    Affine(bits=2),
  )
  rows = quant_story.formats(x, w, some)
  assert [row["bits"] for row in rows[:2]] == [8.75, 4.5]
  errors = [row["weights' error"] for row in rows]
  assert errors == sorted(errors) and errors[0] < 0.01 < 0.3 < errors[-1]
  figure = quant_story.against_bits(rows)
  said = {text.get_text() for text in figure.axes[0].texts}
  assert said == {row["format"] for row in rows}


def test_normal_weights_use_more_of_nf4_than_of_an_even_grid():
  w = jnp.asarray(np.random.default_rng(0).standard_normal((256, 128)))
  figure = quant_story.histogram(w.astype(jnp.float32))
  nf4, even = (float(a.get_title().split()[-1]) for a in figure.axes)
  assert 4 > nf4 > even + 0.1


def test_a_matrix_that_differs_is_found():
  w = jnp.asarray(np.random.default_rng(0).standard_normal((1, 32, 32)))
  params = {
    "embed": jnp.zeros((4, 32)),
    "run0": {"layer0": {"mlp": {"up": w, "down": w + 1}}},
  }
  packed = Quantize(format=Affine(block=32))(params)
  assert quant_story.differing(packed, packed) == 0
  other = tree.map_paths(
    lambda path, x: x + 1e-3 if path.endswith("up") else x, params
  )
  assert quant_story.differing(params, other) == 1
  assert quant_story.differing(params, packed) == 2


def test_the_front_is_what_nothing_beats():
  rows = [
    {"bits_per_weight": b, "kl": k, "kl_se": 0.1 * k, "row": f"{b}, {k}"}
    for b, k in ((4.25, 1.0), (4.25, 0.5), (5.0, 0.6), (6.0, 0.1), (3.0, 2.0))
  ]
  front = quant_pictures.front(rows)
  assert [(r["bits_per_weight"], r["kl"]) for r in front] == [
    (3, 2.0),
    (4.25, 0.5),
    (6, 0.1),
  ]
  rows = [row | {"group": "integers"} for row in rows]
  figure = quant_pictures.front_and_ranking(rows, "tiny")
  # Of the band of 4.25 to 4.5 bits, the best one is on top.
  names = [x.get_text() for x in figure.axes[1].get_yticklabels()]
  assert [x for x in names if x] == ["4.25, 1.0  (4.25)", "4.25, 0.5  (4.25)"]


@pytest.mark.slow
def test_formats_of_a_model_diverge_the_less_the_more_bits_they_have():
  sizes = presets.Sizes(
    vocab=64, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, hidden=32
  )
  loaded = from_scratch.FromScratch(sizes=sizes).load()
  tokens = jnp.arange(96).reshape(2, 48) % 64
  some = {"integers": [Affine(bits=b, block=16) for b in (3, 4, 8)]}
  three, four, eight = quant_story.measured(loaded, tokens, some)
  assert three["kl"] > 2 * four["kl"] > 4 * eight["kl"] > 0
  assert eight["bits_per_weight"] == 8 + 1 + 0.5
