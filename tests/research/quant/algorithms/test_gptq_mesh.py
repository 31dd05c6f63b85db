"""Tests that GPTQ gives the same codes sharded over eight devices as on one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research import sharding, tree, weights
from research.interop.loaded import Loaded
from research.quant import methods, qtensor
from research.quant.algorithms.gptq import GPTQ
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.methods import GPTQMethod
from research.quant.quantize_by_rules import Quantization, Rule
from tests import support, support_mesh
from tests.research.quant.test_quantize_by_rules import CALIBRATION, Bytes

IN, OUT = 128, 32


@functools.cache
def problem(experts=0):
  """Returns (weights, statistics of correlated inputs)."""
  rng = np.random.default_rng(0)
  lead = (experts,) if experts else ()
  w = rng.standard_normal((*lead, IN, OUT)).astype(np.float32)
  x = rng.standard_normal((*lead, 512, IN)) @ rng.standard_normal((IN, IN))
  xx = np.swapaxes(x, -1, -2) @ x
  n = np.full((*lead, 1), 512, np.float32)
  return w, {"xx": xx.astype(np.float32), "n": n}


CASES = {
  "outputs": ((None, "tensor"), Affine(block=16), GPTQ(order="activations")),
  "both": (("fsdp", "tensor"), Affine(block=16), GPTQ(grids="static")),
  "nested": (("fsdp", "tensor"), Codebook(block=32), GPTQ()),
  "experts": (("expert", None, "tensor"), Affine(block=16), GPTQ()),
}
LAYOUT = sharding.Layout(data=1, fsdp=2, tensor=4)
EXPERTS = sharding.Layout(data=1, expert=2, tensor=4)


def different(got, want):
  """Returns the share of codes that differ, of two packed matrices."""
  a, b = (np.asarray(w.normal_form().codes) for w in (got, want))
  return np.mean(a != b)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.sample(5, 1)
def test_a_sharded_matrix_is_rounded_as_on_one_device(case):
  names, format, options = CASES[case]
  w, seen = problem(2 if case == "experts" else 0)
  mesh = (EXPERTS if case == "experts" else LAYOUT).mesh()

  def place(x, *axes):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

  lead = names[:-2]
  cut = {"xx": place(seen["xx"], *lead), "n": place(seen["n"], *lead)}
  method = GPTQMethod(options=options)
  (got,), (dense,), (said,) = methods.round_matrices(
    (place(w, *names),), cut, format, method
  )
  whole = jax.tree.map(jnp.asarray, (w, seen))
  (want,), _, (alone,) = methods.round_matrices(
    (whole[0],), whole[1], format, method
  )
  # Sums in another order: a weight half way between two codes may fall to the
  # other side, and its error is then made up for by others.
  assert different(got, want) < 5e-3
  np.testing.assert_allclose(said.output_error, alone.output_error, rtol=2e-3)
  assert not np.any(said.damping.failed)
  np.testing.assert_array_equal(dense, got.dense())
  if got.order is not None:
    np.testing.assert_array_equal(got.order, want.order)
  # What comes back lies where it was made.
  codes = got.parts["codes"]
  assert not codes.sharding.is_fully_replicated


@pytest.mark.slow
def test_a_sharded_model_is_rounded_as_on_one_device():
  model = support_mesh.model("plain")
  params = support.params(model)
  rule = Rule(
    match="^layers/",
    format=Affine(block=16),
    method=GPTQMethod(options=GPTQ(order="activations")),
  )
  how = Quantization(rules=(rule,), calibration=CALIBRATION)
  want, alone = how.with_model(Loaded(model, params, Bytes(), {})).run(params)
  layout = support_mesh.LAYOUTS["mixed"]
  mesh = layout.mesh()
  where = layout.shardings(params, mesh, sharding.head_counts(model))
  cut = jax.device_put(params, where)
  with jax.set_mesh(mesh):
    got, said = how.with_model(Loaded(model, cut, Bytes(), {})).run(cut)
  assert [r.address for r in said.rows] == [r.address for r in alone.rows]
  for a, b in zip(said.rows, alone.rows, strict=True):
    assert a.output_error == pytest.approx(b.output_error, rel=2e-2), a.address

  def packed(params):
    found = jax.tree.leaves(params, is_leaf=weights.is_weight)
    return [w for w in found if isinstance(w, qtensor.QTensor)]

  shares = [
    different(a, b) for a, b in zip(packed(got), packed(want), strict=True)
  ]
  assert len(shares) == 7 and max(shares) < 2e-2, shares
  # Placed by the table again, it is the same model.
  again = layout.shardings(got, mesh, sharding.head_counts(model))
  tokens = support.tokens(vocab=64)
  f = jax.jit(lambda p: model.apply({"params": p}, tokens)[0])
  one = f(jax.device_get(got))
  with jax.set_mesh(mesh):
    eight = f(jax.device_put(got, again))
  np.testing.assert_allclose(eight, one, atol=2e-5 * np.abs(one).max())
  assert tree.nbytes(got) == tree.nbytes(want)
