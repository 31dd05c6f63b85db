"""All-to-all between tokens and heads, and back."""

import chex
import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.flash_attention.sharded import AttentionSharding
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from kernels_pallas.masks import Mask
from tests import support_sequence as support
from tests.support_sequence import T


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("heads", [(8, 4, 4, 4), (12, 6, 4, 4), (4, 1, 4, 4)])
def test_key_heads_of_any_number(heads):
  x = support.operands(heads)
  mask = Mask.causal(segments=(support.documents(1), support.documents(2)))
  expected = support.alone(mask, x)
  found = support.shared(mask, x, support.ROWS, support.ULYSSES)
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


def test_block_diffusion():
  x = support.operands((4, 4, 4, 4))
  mask = Mask.block_diffusion(T // 2, 4, segments=support.documents(3))
  expected = support.alone(mask, x)
  found = support.shared(mask, x, support.ROWS, support.ULYSSES)
  chex.assert_trees_all_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_tpu_kernels():
  x = support.operands(dtype=jnp.float32)
  mask = Mask.causal((9, None))
  expected = support.alone(mask, x)
  found = support.shared(
    mask,
    x,
    {"along": 2},
    AttentionSharding(ulysses=("along",)),
    backend="mosaic_tpu",
    config=Tiles(*[Tile(8, 8, 4, 4)] * 3),
    interpret=True,
  )
  # Float32 sums of up to 32 numbers near 1.
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)


def test_only_heads_are_exchanged():
  x = support.operands((4, 4, 4, 4), jnp.float32)
  _, found = support.program(support.ROWS, support.ULYSSES, x)
  assert {c.kind for c in found} == {"all-to-all"}
  assert {c.axes for c in found} == {frozenset({"along"})}
  # q, k, v and o forth, their gradients back: a quarter of the tokens of one of
  # four heads to each; and the log-sum-exp.
  pieces = [c.shapes for c in found]
  assert pieces.count(((1, T // 4, 1, 4),) * 4) == 8
  assert set(pieces) == {((1, T // 4, 1, 4),) * 4, ((1, 1, T // 4),) * 4}


def test_indivisible_query_heads_raise():
  x = support.operands((6, 2, 4, 4))
  with pytest.raises(ValueError, match="6 query heads over 4 devices"):
    support.shared(Mask.causal(), x, support.ROWS, support.ULYSSES)
