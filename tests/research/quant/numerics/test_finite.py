"""Infinities and NaN are refused, by address, whatever the format."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.quant import qtensor, quantize_by_rules
from research.quant.algorithms import qat
from research.quant.formats.affine import Affine
from research.quant.formats.ggml import GGML
from research.quant.numerics import finite
from research.quant.quantize import Quantize
from research.quant.quantize_by_rules import Quantization, Rule
from research.typing import UserError
from tests import support
from tests.research.quant.formats.test_formats import ROWS, matrices

BAD = [np.inf, -np.inf, np.nan]
FORMAT = Affine(block=4)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("how", [np.asarray, jnp.asarray])
def test_no_format_packs_what_is_not_finite(row, how):
  for at, bad in zip([(0, 0, 0), (1, 200, 3), (1, 255, 23)], BAD, strict=True):
    w = matrices().copy()
    w[at] = w[1, 255, 23] = bad
    count = 1 if at == (1, 255, 23) else 2
    with pytest.raises(UserError) as e:
      qtensor.pack(how(w), ROWS[row], where="layers/3/mlp/up")
    assert str(e.value).startswith(
      f"layers/3/mlp/up: {count} of {w.size} weights are not finite, the first "
      f"is {bad} at {list(at)};"
    )


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_of_every_type_in_either_library(kind):
  w = np.ones((4, 6)).astype(jnp.dtype(kind))
  for how in (np.asarray, jnp.asarray):
    finite.check(how(w), "w")
    for bad in BAD:
      damaged = w.copy()
      damaged[2, 5] = bad
      with pytest.raises(UserError, match=r"w: 1 of 24 .* at \[2, 5\]"):
        finite.check(how(damaged), "w")
  finite.check(np.zeros((0, 3), np.float32), "w")


def test_the_largest_number_is_finite():
  top = np.finfo(np.float32).max
  for how in (np.asarray, jnp.asarray):
    finite.check(how(np.full((64, 64), top, np.float32)), "w")


def damaged(name="up", bad=np.nan):
  """Returns params with one number of layer 1's `mlp/up` spoiled."""
  params = jax.tree.map(np.asarray, support.params(support.model()))
  w = params["run0"]["layer0"]["mlp"][name].copy()
  w[1, 5, 7] = bad
  params["run0"]["layer0"]["mlp"][name] = w
  return jax.tree.map(jnp.asarray, params)


@pytest.mark.parametrize("format", [FORMAT, GGML()], ids=lambda f: f.name)
@pytest.mark.parametrize("bad", BAD)
def test_quantize_names_the_matrix(format, bad):
  params = damaged(bad=bad)
  with pytest.raises(UserError, match=r"run0/layer0/mlp/up: 1 .* \[1, 5, 7\]"):
    Quantize(format=format, targets=("q", "mlp/up"))(params)
  Quantize(format=format, targets=("q",))(params)


def test_rules_name_the_matrix_before_anything_is_calibrated(monkeypatch):
  def walked(*args):
    raise AssertionError("calibrated first")

  monkeypatch.setattr(quantize_by_rules._Work, "alone", walked)
  how = Quantization(rules=(Rule(match="^layers/", format=FORMAT),))
  with pytest.raises(UserError, match=r"layers/1/mlp/up: 1 .* \[5, 7\]"):
    how.run(damaged())


def test_rules_name_an_embedding_and_what_was_packed():
  params = support.params(support.model())
  how = Quantization(rules=(Rule(match="^embed$", format=FORMAT),))
  bad = params | {"embed": params["embed"].at[3, 2].set(jnp.inf)}
  with pytest.raises(UserError, match=r"embed: 1 .* inf at \[3, 2\]"):
    how.run(bad)
  # A file's scales may be infinite, and are what a matrix stands for.
  packed = Quantize(format=FORMAT)(params)
  up = packed["run0"]["layer0"]["mlp"]["up"]
  scale = up.parts["scale"].at[2, 0, 1].set(jnp.nan)
  packed["run0"]["layer0"]["mlp"]["up"] = dataclasses.replace(
    up, parts=up.parts | {"scale": scale}
  )
  how = Quantization(rules=(Rule(match="up$", format=Affine(block=8)),))
  with pytest.raises(UserError, match=r"layers/2/mlp/up: 4 .* nan at \[0, 1\]"):
    how.run(packed)


def test_what_training_spoiled_is_not_converted():
  params = qat.Prepare(format=FORMAT)(support.params(support.model()))
  w = params["run0"]["layer0"]["mlp"]["up"]
  params["run0"]["layer0"]["mlp"]["up"] = dataclasses.replace(
    w, w=w.w.at[1, 5, 7].set(jnp.nan)
  )
  with pytest.raises(UserError, match=r"run0/layer0/mlp/up: 1 of .* nan"):
    qat.Convert()(params)


def test_shapes_alone_are_no_numbers():
  params = support.params(support.model())
  made = jax.eval_shape(Quantize(format=FORMAT), params)
  assert tree.nbytes(made) < tree.nbytes(params)
