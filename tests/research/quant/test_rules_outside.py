"""Tests rules for matrices outside of layers: embeddings and heads."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research import weights
from research.quant.algorithms import calibrate
from research.quant.algorithms.outlier_rows import KeepOutlierRows
from research.quant.formats.affine import Affine
from research.quant.methods import GPTQMethod, RoundToNearest
from research.quant.quantize_by_rules import Rule
from research.quant.untied_embedding import Untied
from research.typing import UserError
from tests.research.quant.test_quantize_by_rules import (
  FORMAT,
  LAYERS,
  known,
  run,
)


def test_what_is_outside_of_layers_is_checked_before_calibration(monkeypatch):
  model, params = known()
  monkeypatch.setattr(calibrate, "walk", lambda *_: pytest.fail("walked"))
  unfit = Rule(match="embed", format=Affine(block=64))
  with pytest.raises(UserError, match=r"^embed: .*64"):
    run(model, params, LAYERS, unfit)
  fit = dataclasses.replace(unfit, format=FORMAT)
  broken = params | {"embed": params["embed"].at[3, 1].set(jnp.nan)}
  with pytest.raises(UserError, match=r"^embed: 1 of .* not finite"):
    run(model, broken, LAYERS, fit)
  seeing = dataclasses.replace(fit, method=KeepOutlierRows(method=GPTQMethod()))
  with pytest.raises(UserError, match="embed is packed without calibration"):
    run(model, params, LAYERS, seeing)


def test_an_untied_embedding_keeps_its_head():
  """A rotated model's; both are packed as their arrays would be alone."""
  model, params = known()
  table = params["embed"]
  untied = params | {"embed": Untied(table, 3.0 * table[::-1])}
  rule = Rule(match="embed", format=FORMAT)
  packed, report = run(model, untied, rule, calibration=None)
  assert [row.address for row in report.rows] == ["embed", "head"]
  for name in ("table", "head"):
    alone = params | {"embed": getattr(untied["embed"], name)}
    want, _ = run(model, alone, rule, calibration=None)
    got = getattr(packed["embed"], name)
    np.testing.assert_array_equal(got.dense(), want["embed"].dense())
    assert got.shape == table.shape


@pytest.mark.slow
def test_an_embedding_keeps_outlier_rows():
  model, params = known()
  method = KeepOutlierRows(method=RoundToNearest(), rows=2, dtype="float32")
  rule = Rule(match="embed", format=Affine(block=16, bits=3), method=method)
  packed, _ = run(model, params, rule, calibration=None)
  got, want = weights.dense(packed["embed"]), params["embed"]
  same = np.flatnonzero((np.asarray(got) == np.asarray(want)).all(0))
  # Rows of what is stored, its transpose: two of its width's.
  kept = packed["embed"].outliers["rows"]
  np.testing.assert_array_equal(kept, same)
  ids = jnp.array([5, 0, 5])
  np.testing.assert_array_equal(weights.take(packed["embed"], ids), got[ids])
