"""The contract of `flash_attention`: masks, defaults, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.masks import Mask

B, T, S, N, K, H = 2, 3, 8, 2, 1, 4
attend = jax.jit(
  flash_attention,
  static_argnames=(
    "causal",
    "window",
    "causal_alignment",
    "backend",
    "scale",
    "return_lse",
  ),
)


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


@pytest.fixture(name="x")
def arrays():
  return draw(B, T, N, H), draw(B, S, K, H), draw(B, S, K, H, seed=1)


def close(a, b):
  # float32, sums of eight terms near 1.
  chex.assert_trees_all_close(a, b, atol=2e-6)


def test_arguments_build_the_mask(x):
  close(
    attend(*x, causal=True, window=(2, None)),
    attend(*x, mask=Mask.causal((2, None))),
  )
  close(
    attend(*x, causal=True, causal_alignment="top_left"),
    attend(*x, mask=Mask.causal(offset=0)),
  )


def test_alignment_only_matters_for_unequal_lengths(x):
  q, k, v = x
  square = functools.partial(attend, q, k[:, :T], v[:, :T], causal=True)
  close(square(), square(causal_alignment="top_left"))
  differ = attend(*x, causal=True) - attend(
    *x, causal=True, causal_alignment="top_left"
  )
  assert float(jnp.abs(differ).max()) > 0.1


def test_scale_is_the_inverse_root_of_the_head_dim(x):
  close(attend(*x), attend(*x, scale=0.5))


@pytest.mark.parametrize("window", [(None, None), (2, None), (1, 1)])
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_are_shorter_rows(x, causal, window):
  """Rows of a padded batch equal each row alone, offsets included."""
  q, k, v = x
  lens = (5, 2)
  whole = attend(q, k, v, causal=causal, window=window, kv_lens=jnp.array(lens))
  for b, n in enumerate(lens):
    row = slice(b, b + 1)
    alone = attend(q[row], k[row, :n], v[row, :n], causal=causal, window=window)
    close(whole[row], alone)


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 3])
def test_offsets_as_integers_and_as_data_agree(x, offset):
  q, k, v = x
  static = flash_attention(*x, causal=True, q_offset=offset)
  traced = attend(*x, causal=True, q_offset=jnp.array(offset))
  rows = attend(*x, causal=True, q_offset=jnp.full(B, offset))
  n = offset + T
  close(traced, static)
  close(rows, static)
  close(static, attend(q, k[:, :n], v[:, :n], causal=True))


def test_decoding_steps_are_rows_of_the_whole(x):
  _, k, v = x
  q = draw(B, S, N, H, seed=2)
  whole = attend(q, k, v, causal=True)
  for t in (0, 4, S - 1):
    mask = Mask.causal(q_positions=jnp.full((B, 1), t))
    close(attend(q[:, t : t + 1], k, v, mask=mask), whole[:, t : t + 1])


def test_packed_documents_do_not_see_each_other(x):
  _, k, v = x
  q = draw(B, S, N, H, seed=2)
  packed = attend(
    q, k, v, causal=True, segment_ids=jnp.array([[0] * 3 + [1] * 5] * B)
  )
  for part in (slice(0, 3), slice(3, 8)):
    close(packed[:, part], attend(q[:, part], k[:, part], v[:, part],
          causal=True))  # fmt: skip


@pytest.mark.parametrize("shape", [(), (S,), (T, S), (N, 1, S), (B, N, T, S)])
def test_bias_broadcasts_like_arrays(x, shape):
  bias = draw(*shape)
  full = jnp.broadcast_to(bias, (B, N, T, S))
  close(attend(*x, bias=bias), attend(*x, bias=full))


def test_backends_agree_and_return_the_log_sum_exp(x):
  for name in ("reference", "xla_blockwise", "auto"):
    o, lse = attend(*x, backend=name, return_lse=True)
    chex.assert_shape((o, lse), [(B, T, N, H), (B, N, T)])
    chex.assert_type(lse, jnp.float32)
    scores = jnp.einsum("btnh,bsh->bnts", x[0], x[1][:, :, 0]) / 2
    close(lse, jax.nn.logsumexp(scores, axis=-1))


def test_one_compilation_serves_every_mask_of_a_kind(x):
  @jax.jit
  @chex.assert_max_traces(n=1)
  def run(q, k, v, mask):
    return flash_attention(q, k, v, mask=mask)

  for t in (2, 5):
    run(*x, Mask.causal(q_positions=jnp.full((B, T), t)))


ERRORS = {
  "both masks": (dict(mask=Mask.full(), causal=True), "put all of it"),
  "backend": (dict(backend="triton"), "available here: auto, reference"),
  "interpret": (dict(interpret=True), "no use for it"),
  "config": (dict(config=Blocks(), backend="mosaic_tpu"), "expected Tiles"),
  "rate": (dict(dropout_rate=1.0, dropout_seed=0), "expected \\[0, 1\\)"),
  "seed": (dict(dropout_rate=0.5), "dropout_seed: missing"),
  "softcap": (dict(softcap=0.0), "positive"),
  "offset": (dict(q_offset=-1), "at least 0"),
  "alignment": (dict(causal_alignment="left"), "bottom_right"),
  "segments": (dict(segment_ids=jnp.zeros((B, T), int)), "a pair"),
  "bias": (dict(bias=jnp.zeros((5, S))), "broadcast to"),
  "sinks": (dict(sinks=jnp.zeros(N + 1)), "sinks"),
  "window": (dict(window=(-1, None)), "no negative side"),
  "heads": (dict(k=jnp.zeros((B, S, 3, H)), v=jnp.zeros((B, S, 3, H))), "N %"),
  "depth": (dict(k=jnp.zeros((B, S, K, H + 1))), "H"),
  "values": (dict(v=jnp.zeros((B, S + 1, K, H))), "S"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_invalid_arguments_raise(x, name):
  arguments, message = ERRORS[name]
  arguments = {**dict(zip("qkv", x, strict=True)), **arguments}
  # With checked annotations some shapes fail before our own check.
  with pytest.raises((ValueError, TypeCheckError), match=message):
    flash_attention(**arguments)


def test_invalid_blocks_raise():
  with pytest.raises(ValueError, match="at least 1"):
    Blocks(q=0)
