"""Attention over parts of the keys, combined, against attention over all."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.masks import Mask
from kernels_pallas.sequence_parallel.combine import combine
from tests import support_sequence as support

PARTS = ((0, 5), (5, 6), (6, 32))


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def partials(q, k, v, sinks, mask):
  """Outputs and log-sum-exps of the parts; the second one has the sink."""
  out = []
  for n, (start, stop) in enumerate(PARTS):
    part = Mask(
      mask.kind,
      mask.window,
      q_positions=mask.q_positions,
      kv_positions=mask.kv_positions[:, start:stop],
    )
    out.append(
      flash_attention(
        q,
        k[:, start:stop],
        v[:, start:stop],
        mask=part,
        sinks=sinks if n == 1 else None,
        return_lse=True,
      )
    )
  return zip(*out, strict=True)


def test_parts_are_the_whole_forward_and_backward():
  x = support.operands()
  # With 9 keys to look back on, most queries see nothing of some part.
  mask = support.with_positions(Mask.causal((9, None)), 32, 32)
  expected = support.alone(mask, x)

  def attend(q, k, v, sinks, mask, return_lse):
    assert return_lse
    return combine(*map(list, partials(q, k, v, sinks, mask)))

  found = support.quick(lambda x: support.results(attend, mask, x))(x)
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


def some(seed=0):
  """Three partials; the second saw nothing, the third nothing in half."""
  o = support.draw(3, 2, 6, 4, 5, seed=seed)
  lse = support.draw(3, 2, 4, 6, seed=seed) * 20
  return o, lse.at[1].set(-jnp.inf).at[2, :, :, :3].set(-jnp.inf)


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_the_contents_of_an_empty_partial_do_not_matter(garbage):
  o, lse = some()
  empty = jnp.isneginf(lse).swapaxes(2, 3)[..., None]

  def loss(o, lse):
    y, total = combine(tuple(o), tuple(lse))
    return jnp.sum(jnp.sin(y)) + jnp.sum(total), (y, total)

  run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
  clean = run(jnp.where(empty, 0, o), lse)
  chex.assert_tree_all_finite(clean)
  chex.assert_trees_all_equal(run(jnp.where(empty, garbage, o), lse), clean)
  do, dlse = clean[1]
  assert not jnp.where(empty, do, 0).any()
  assert not jnp.where(jnp.isneginf(lse), dlse, 0).any()


def test_order_and_grouping_do_not_matter():
  o, lse = some()
  whole = combine(tuple(o), tuple(lse))
  turned = combine(tuple(o[::-1]), tuple(lse[::-1]))
  pair = combine(tuple(o[1:]), tuple(lse[1:]))
  nested = combine((o[0], pair[0]), (lse[0], pair[1]))
  for other in (turned, nested):
    chex.assert_trees_all_close(other, whole, rtol=1e-13, atol=1e-13)
  dark = jnp.full_like(lse[0], -jnp.inf)
  y, total = combine((o[0] * jnp.nan, o[1]), (dark, dark))
  assert not y.any() and jnp.isneginf(total).all()


def test_log_sum_exps_far_beyond_the_range_of_exp():
  o, lse = some()
  y, total = combine(tuple(o), tuple(lse + 5000))
  expected = combine(tuple(o), tuple(lse))
  # 5000 has 12 bits before the point.
  chex.assert_trees_all_close(y, expected[0], rtol=1e-10, atol=1e-10)
  chex.assert_trees_all_close(total - 5000, expected[1], atol=1e-11)


def test_partials_come_in_pairs():
  o, lse = some()
  for outputs, lses in (((o[0],), ()), ((), ())):
    with pytest.raises(ValueError, match="expected one of each"):
      combine(outputs, lses)
