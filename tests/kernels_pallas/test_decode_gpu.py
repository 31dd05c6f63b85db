"""The decoding kernel for GPUs, interpreted on the CPU with race detection.

The interpreter has no `mma` and no `cp.async`: products of warps and copies of
rows are plain ones there. Ranges, masks, softmax, the ring of tiles, parts and
splits are the kernel's.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.decode_attention.api import (
  decode_attention,
)
from kernels_pallas.decode_attention.spec import Blocks
from tests.support_decode import draw


@pytest.fixture(name="gpu")
def _gpu():
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

  yield plgpu.InterpretGPUParams(
    detect_races=True, uninitialized_memory="nan"
  )  # fmt: skip
  gpu_callbacks.reset_gpu_interpret_mode_state()


def close(found, exact, rough):
  """Outputs at most twice as rough as plain 16 bits; log-sum-exps exact."""
  chex.assert_trees_all_close(found[1], exact[1], rtol=1e-5, atol=1e-5)
  error, most = (
    float(jnp.abs(x.astype(jnp.float32) - exact[0]).max())
    for x in (found[0], rough)
  )
  assert error <= 2 * most + 1e-5


def naive(q, k, v, lengths, window, softcap, sinks):
  """In the dtype of q, everything laid out."""
  (N, H), (S, K) = q.shape[1:], k.shape[1:3]
  k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
  s = jnp.einsum("bnh,bsnh->bns", q, k).astype(jnp.float32) * H**-0.5
  s = s if softcap is None else softcap * jnp.tanh(s / softcap)
  key, n = jnp.arange(S), lengths[:, None]
  seen = (key < n) & (key >= (0 if window is None else n - window))
  s = jnp.where(seen[:, None], s, -1e30)
  if sinks is not None:
    extra = jnp.broadcast_to(sinks[None, :, None], (*s.shape[:2], 1))
    s = jnp.concatenate([s, extra], -1)
  p = jax.nn.softmax(s, axis=-1)[..., :S] * seen[:, None]
  v = jnp.where(seen[..., None, None], v, 0)
  return jnp.einsum("bns,bsnh->bnh", p.astype(q.dtype), v)


LENGTHS = np.array([150, 0, 1, 77], np.int32)
CASES = {
  "plain": {},
  "heads_alone": {"N": 2},
  "groups_of_three_window": {"N": 6, "window": 70, "splits": 4},
  "groups_of_eight_sinks": {"N": 16, "sinks": True, "splits": 4},
  "softcap_wide_values": {"softcap": 2.0, "Hv": 128, "splits": 2},
  "wide": {"H": 256, "Hv": 256, "K": 1, "window": 33},
  "two_parts": {"N": 24, "K": 1, "splits": 3, "dtype": jnp.float16},
  "one_part": {"N": 80, "K": 1, "window": 100, "softcap": 3.0},
}


@pytest.mark.parametrize("name", CASES)
def test_a_token_a_row_from_a_cache(gpu, name):
  from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

  case = {"N": 4, "K": 2, "H": 64, "Hv": 64, "window": None, "softcap": None,
          "sinks": False, "splits": 1, "dtype": jnp.bfloat16}  # fmt: skip
  case |= CASES[name]
  N, K, H, Hv, dtype = (case[x] for x in ("N", "K", "H", "Hv", "dtype"))
  B, S = len(LENGTHS), 150
  q = draw(B, N, H).astype(dtype)
  k = draw(B, S, K, H, seed=1).astype(dtype)
  v = draw(B, S, K, Hv, seed=2).astype(dtype)
  # What no token sees: behind the end, and before the window.
  key, n = np.arange(S), LENGTHS[:, None]
  dead = (key >= n) | (key < n - (case["window"] or S))
  dead = dead[:, :, None, None]
  sinks = draw(N, seed=3) if case["sinks"] else None
  options = {x: case[x] for x in ("window", "softcap")} | {"sinks": sinks}
  x = q, *(jnp.where(dead, jnp.nan, y) for y in (k, v)), jnp.asarray(LENGTHS)
  found = decode_attention(
    *x, backend="mosaic_gpu", interpret=gpu, return_lse=True,
    blocks=Blocks(splits=case["splits"]), **options,
  )  # fmt: skip
  assert not interpret_pallas_call.get_races().races_found
  wide = [y.astype(jnp.float32) for y in (q, k, v)]
  exact = decode_attention(
    *wide, x[3], backend="reference", return_lse=True, **options
  )
  rough = naive(q, k, v, x[3], case["window"], case["softcap"], sinks)
  assert found[0].dtype == dtype and np.all(np.asarray(found[0][1]) == 0)
  close(found, exact, rough)
