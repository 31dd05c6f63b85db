"""Tests calibration against the unchanged model and explicit sums."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.quant.algorithms import calibrate, error_propagation
from research.quant.algorithms.awq import AWQ
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.smoothquant import SmoothQuant
from research.quant.quantize_by_rules import Quantization
from research.taps import statistics
from research.text.special_tokens import SpecialTokens
from research.typing import UserError
from tests import support

EPS = float(jnp.finfo(jnp.float32).eps)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Letters:
  """A tokenizer of 26 tokens."""

  def encode(self, text):
    return [LETTERS.index(c) for c in text if c in LETTERS]


@dataclasses.dataclass(frozen=True)
class Texts:
  """Documents given as they are."""

  texts: tuple[str, ...]

  def __len__(self):
    return len(self.texts)

  def __getitem__(self, index):
    return self.texts[index]


def tokens(rows=5, length=7, vocab=67):
  found = np.random.default_rng(1).integers(0, vocab, (rows, length))
  return jnp.asarray(found, jnp.int32)


def windows(**changes):
  text = Texts((LETTERS, LETTERS[::-1], LETTERS))
  options = dict(source=text, windows=3, length=10) | changes
  return Calibration(**options).read(Letters())


def test_windows_are_of_the_text_and_drawn_by_the_seed():
  found = windows()
  stream = Letters().encode(LETTERS + LETTERS[::-1] + LETTERS)
  rows = np.reshape(stream[:70], (7, 10))
  np.testing.assert_array_equal(found.tokens, rows[found.indices])
  assert len(set(found.indices)) == 3
  again, other = windows(), windows(seed=1)
  assert found.record() == again.record()
  assert found.record()["sha256"] != other.record()["sha256"]


def test_windows_begin_with_the_tokenizers_special_tokens():
  class Around(Letters):
    special = SpecialTokens(begin=(66,), end=(65,), every_row=True)

  text = Texts((LETTERS, LETTERS[::-1]))
  found = Calibration(source=text, windows=3, length=10).read(Around())
  assert (found.tokens[:, 0] == 66).all()
  stream = []
  for i in range(2):
    stream += [66, *Letters().encode(text[i]), 65]
  assert len(stream) == 56
  # Documents begin at 0 and 28; what begins within one has a token less of it.
  parts = [(0, 10), (10, 19), (19, 28), (28, 38), (38, 47), (47, 56)]
  rows = [[*([66] * (i not in (0, 28))), *stream[i:j]] for i, j in parts]
  np.testing.assert_array_equal(found.tokens, np.array(rows)[found.indices])


@pytest.mark.parametrize(
  "changes, says",
  [
    (dict(source=Texts(())), "has 0 tokens"),
    (dict(source=Texts(("abc",))), "0 windows of 10"),
    (dict(windows=8), "7 windows of 10; expected 8"),
  ],
)
def test_too_little_text_raises(changes, says):
  with pytest.raises(UserError, match=says):
    windows(**changes)


def test_without_tokens_it_raises():
  model = support.model()
  with pytest.raises(UserError, match="at least one window"):
    calibrate.walk(
      model, support.params(model), tokens(rows=0), lambda i, layer, x: layer
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.sample(2)
def test_a_walk_that_changes_nothing_is_the_model(family):
  model = support.model(family)
  params = support.params(model)
  given, last = tokens(), []

  def visit(i, layer, inputs):
    if i == 2:
      last.append(inputs.outputs(layer))
    return layer

  found = calibrate.walk(model, params, given, visit, batch=2)
  jax.tree.map(np.testing.assert_array_equal, found, params)
  scale = params["final_norm"]["scale"]
  hidden = model.norm.apply({"params": {"scale": scale}}, last[0])
  want, _ = model.apply({"params": params}, given)
  np.testing.assert_allclose(
    hidden, want, atol=100 * EPS * float(abs(want).max())
  )


@pytest.mark.parametrize("follow", ["new", "old"])
def test_layers_receive_the_outputs_of_new_layers(follow):
  model = support.model()
  params = support.params(model)
  seen = []

  def visit(i, layer, inputs):
    seen.append(inputs.x)
    return jax.tree.map(jnp.zeros_like, layer) if i == 0 else layer

  calibrate.walk(model, params, tokens(), visit, batch=5, follow=follow)
  # A layer of zeros adds nothing to the residual.
  assert np.array_equal(seen[1], seen[0]) == (follow == "new")


def test_inputs_are_summed_over_batches():
  model = support.model()
  params = support.params(model)
  block, layer = model.layer_kinds()[0], next(tree.layers(params))
  x = calibrate.embed(model, params, tokens())
  inputs = calibrate.LayerInputs(block, x, batch=2)
  found = inputs.measure(layer, ["attention/v"], statistics.Covariance())
  scale = {"scale": layer["attention_norm"]["scale"]}
  rows = block.norm.apply({"params": scale}, x).reshape(-1, x.shape[-1])
  rows = np.asarray(rows, np.float64)
  want = rows.T @ rows
  np.testing.assert_allclose(
    found["attention/v"]["xx"], want, atol=len(rows) * EPS * want.max()
  )
  assert found["attention/v"]["n"] == len(rows)
  with pytest.raises(UserError, match="attention/z is no matrix"):
    inputs.measure(layer, ["attention/z"], statistics.Covariance())


def test_pairs_compute_two_models_at_once():
  model = support.model()
  block = model.layer_kinds()[0]
  old, new = (
    next(tree.layers(support.params(model, seed=seed))) for seed in (0, 1)
  )
  new = new | {  # norms are not rounded
    name: old[name] for name in ("attention_norm", "mlp_norm")
  }
  embed = support.params(model)["embed"]
  x = weights.take(embed, tokens())
  y = x + 0.1
  both = calibrate.outputs(
    block, error_propagation.pair_weights(old, new), jnp.concatenate([x, y])
  )
  want = [calibrate.outputs(block, old, x), calibrate.outputs(block, new, y)]
  np.testing.assert_allclose(both, np.concatenate(want), rtol=1e-5, atol=1e-5)


def test_drift_is_summed_as_defined():
  model = support.model()
  params = support.params(model)
  block, layer = model.layer_kinds()[0], next(tree.layers(params))
  x = calibrate.embed(model, params, tokens())
  inputs = calibrate.LayerInputs(block, jnp.concatenate([x, 2 * x + 1]), 10)
  pairs = error_propagation.pair_weights(layer, layer)
  found = inputs.measure(
    pairs, ["attention/q"], error_propagation.DriftStatistic()
  )["attention/q"]
  scale = {"scale": layer["attention_norm"]["scale"]}
  old, new = (
    np.asarray(block.norm.apply({"params": scale}, z), np.float64).reshape(
      -1, x.shape[-1]
    )
    for z in (x, 2 * x + 1)
  )
  atol = 100 * EPS * float(abs(new).max()) ** 2 * len(new)
  np.testing.assert_allclose(found["xx"], new.T @ new, atol=atol)
  np.testing.assert_allclose(found["drift"], (old - new).T @ new, atol=atol)
  assert found["n"] == len(new)


@pytest.mark.parametrize(
  ("transform", "masks", "fits"),
  [
    (AWQ(), Spec(mask_id=1), False),
    (SmoothQuant(), Spec(mask_id=1, block=4), False),
    (Quantization(rules=(), calibration=Calibration()), Spec(mask_id=1), False),
    (Quantization(rules=()), Spec(mask_id=1), True),
    (AWQ(), Spec(mask_id=1, shift=True, block=1), True),
    (AWQ(), None, True),
  ],
)
def test_models_of_masked_diffusion_are_not_calibrated_causally(
  transform, masks, fits
):
  model = support.model()
  loaded = Loaded(model, support.params(model), Letters(), {}, diffusion=masks)
  if fits:
    assert transform.with_model(loaded).model is model
  else:
    with pytest.raises(UserError, match="found a model of masked diffusion"):
      transform.with_model(loaded)
