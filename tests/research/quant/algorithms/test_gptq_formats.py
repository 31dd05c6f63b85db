"""Tests GPTQ on every format: better outputs, legal codes, or an error."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop.loaded import Loaded
from research.quant import methods
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.clip import Clip
from research.quant.algorithms.gptq import GPTQ
from research.quant.algorithms.outlier_rows import KeepOutlierRows
from research.quant.format import Format
from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.fp8 import FP8
from research.quant.formats.hqq import HQQ
from research.quant.formats.int8 import Int8
from research.quant.formats.nvfp4 import NVFP4
from research.quant.methods import FixedGrids, GPTQMethod, RoundToNearest
from research.quant.quantize_by_rules import Quantization, Rule
from research.typing import UserError
from tests import support

INPUTS, OUTPUTS = 256, 6
# One of each kind of grids; `Affine` and `Microscaling` are local.
GRIDS = (
  *ggml.TYPES.values(),
  *(Codebook(block=32), Codebook(block=512), FP8(), HQQ(), Int8(), NVFP4()),
)
FEW = ("Q2_K", "Q3_K", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "hqq4-g64")
FEW += ("int8-outputs", "nf4-b512-dq", "Q8_K", "IQ4_NL")


@functools.cache
def problem():
  """Returns a matrix and statistics of correlated inputs."""
  rng = np.random.default_rng(2)
  w = rng.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
  x = rng.standard_normal((2 * INPUTS, INPUTS))
  x = x @ (np.eye(INPUTS) + 0.1 * rng.standard_normal((INPUTS, INPUTS)))
  xx = jnp.asarray(x.T @ x, jnp.float32)
  return jnp.asarray(w), {"xx": xx, "n": jnp.full((1,), 2.0 * INPUTS)}


def test_every_encoder_runs_inside_of_programs():
  """As AWQ and LoftQ call them; most of ggml's are NumPy's."""
  w = problem()[0]
  grids = [format.for_shape(INPUTS, OUTPUTS) for format in GRIDS]
  grids = [format for format in grids if not format.traceable]
  assert len(grids) > 10
  found = jax.jit(lambda w: [dict(f.encode_traced(w)) for f in grids])(w)
  for format, parts in zip(grids, found, strict=True):
    chex.assert_trees_all_equal(parts, dict(format.encode(np.asarray(w))))


@pytest.mark.parametrize("format", GRIDS, ids=lambda format: format.name)
@pytest.mark.sample(12)
def test_codes_can_be_replaced_by_themselves(format):
  format = format.for_shape(INPUTS, OUTPUTS)
  parts = jax.tree.map(jnp.asarray, format.encode(np.asarray(problem()[0])))
  plain = format.normal_form(parts)
  again = format.with_codes(parts, plain.codes)
  chex.assert_trees_all_equal(dict(parts), dict(again))
  chex.assert_trees_all_equal(
    dict(parts), jax.jit(format.with_codes)(parts, plain.codes)
  )
  grids, known = FixedGrids.from_normal_form(plain), FixedGrids.grid_from(plain)
  shape = (-1, plain.group, OUTPUTS)
  groups = jnp.asarray(format.decode(parts)).reshape(shape)
  codes = grids.codes(groups, *known)
  np.testing.assert_allclose(grids.values(codes, *known), groups, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  "format", [f for f in GRIDS if f.name in FEW], ids=lambda f: f.name
)
@pytest.mark.sample(11, 1)
def test_outputs_improve_and_codes_are_legal(format):
  w, seen = problem()
  format = format.for_shape(INPUTS, OUTPUTS)
  (q,), (dense,), (found,) = methods.round_matrices(
    (w,), seen, format, GPTQMethod(), compare=True
  )
  assert found.output_error < 0.9 * found.nearest_error
  np.testing.assert_array_equal(dense, q.dense())
  codes, ends = np.asarray(q.normal_form().codes), q.normal_form().code_range
  if ends is not None:
    assert codes.min() >= ends[0] and codes.max() <= ends[1]
    assert codes.min() < codes.max()
  again = format.with_codes(q.parts, q.normal_form().codes)
  chex.assert_trees_all_equal(dict(again), dict(q.parts))


class Bytes:
  """A tokenizer that is never called."""

  def encode(self, text):
    raise AssertionError("the text is read")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole(Format):
  """A format without `with_codes`."""

  @property
  def name(self):
    return "whole"


CLIPPED = GPTQMethod(options=GPTQ(clip=Clip()))
DRIFTING = GPTQMethod(options=GPTQ(drift=0.5))


@pytest.mark.parametrize(
  ("format", "method", "options", "says"),
  [
    (Whole(block=32), GPTQMethod(), {}, "q: GPTQ: codes of whole cannot be"),
    (HQQ(block=32), CLIPPED, {}, "q: GPTQ.clip: the grids of hqq4-g32 are not"),
    (
      NVFP4(),
      RoundToNearest(clip=Clip()),
      {},
      "q: RoundToNearest.clip: the grids of nvfp4",
    ),
    (
      Affine(block=8),
      KeepOutlierRows(rows=32),
      {},
      "expected fewer than the matrix's 32",
    ),
    (Affine(block=8), DRIFTING, dict(sequential="none"), "GPTQ.drift"),
  ],
)
def test_unsupported_formats_raise_before_calibration(
  format, method, options, says
):
  model = support.model()
  params = support.params(model)
  rule = Rule(match="/q$", format=format, method=method)
  how = Quantization(rules=(rule,), calibration=Calibration(), **options)
  loaded = Loaded(model, params, Bytes(), {})
  with pytest.raises(UserError, match=says):
    how.with_model(loaded).run(params)


def test_outlier_rows_of_ggml_blocks():
  w, format = problem()[0], ggml.TYPES["Q4_K"]
  (q,), _, _ = methods.round_matrices(
    (w,), None, format, KeepOutlierRows(rows=1)
  )
  off = np.asarray(format.decode(format.encode(np.asarray(w)))) - w
  row = int(np.square(off).sum(-1).argmax())
  np.testing.assert_array_equal(q.outliers["rows"], [row])
  want = format.encode(np.asarray(w.at[row].set(0)))
  chex.assert_trees_all_equal(jax.device_get(q.parts), want)
