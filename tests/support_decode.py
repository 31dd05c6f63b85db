"""Rows and pages shared by decoding tests, and expected results in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention.api import paged_attention
from kernels_pallas.decode_attention.pages import Pages, quantize
from kernels_pallas.decode_attention.spec import Blocks

# Interpreted kernels are large programs over tiny arrays.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)
BACKENDS = {
  "reference": {"backend": "reference"},
  "xla": {"backend": "xla"},
  "mosaic_tpu": {"backend": "mosaic_tpu", "interpret": True},
}
# Float32 sums of some ten products of numbers near 1, in another order.
CLOSE = dict(rtol=1e-5, atol=1e-5)

COUNT, SIZE, WIDTH = 18, 4, 5
# Rows that decode, prefill, continue a prefill, are padding; one is full.
LENS = np.array([7, 6, 20, 0, 13, 1], np.int32)
STARTS = np.array([0, 1, 7, 10, 11, 12, 13], np.int32)
TOKENS = 15  # the last two belong to no row


def draw(*shape, seed=0, dtype=np.float32):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape), dtype)


def tables(lens=LENS, width=WIDTH, seed=0):
  """Distinct pages for every row, in random order; elsewhere invalid pages."""
  order = np.random.default_rng(seed).permutation(COUNT)
  table, used = np.full((len(lens), width), -7, np.int32), 0
  for row, n in enumerate(-(-lens // SIZE)):
    table[row, :n] = order[used : used + n]
    used += n
  return table


def pool(K, H, Hv, dtype=jnp.float32):
  kv = draw(COUNT, K, SIZE, H + Hv, seed=1)
  if dtype == jnp.float32:
    return Pages(kv, None, H)
  (k, k_scale), (v, v_scale) = (
    quantize(x, dtype) for x in (kv[..., :H], kv[..., H:])
  )
  scale = jnp.stack([k_scale, v_scale], axis=1)
  return Pages(jnp.concatenate([k, v], -1), scale, H)


def plain(pages):
  """Keys and values of pages as float64 [pages, K, size, .]."""
  kv, H = np.asarray(pages.kv).astype(np.float64), pages.head_dim
  k, v = kv[..., :H], kv[..., H:]
  if pages.scale is not None:
    scale = np.asarray(pages.scale, np.float64)[..., None]
    k, v = k * scale[:, 0], v * scale[:, 1]
  return k, v


def truth(q, k, v, window=None, softcap=None, sinks=None, scale=None):
  """Expected output in float64: q [t, N, H] are the last of k, v [s, K, .]."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  (t, N, H), (s, K) = q.shape, k.shape[:2]
  o, lse = np.zeros((t, N, v.shape[-1])), np.full((t, N), -np.inf)
  for i in range(t):
    at = s - t + i
    keys = range(0 if window is None else max(0, at - window + 1), at + 1)
    for n in range(N):
      kn, vn = k[keys, n // (N // K)], v[keys, n // (N // K)]
      logits = kn @ q[i, n] * (H**-0.5 if scale is None else scale)
      if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
      extra = [] if sinks is None else [float(sinks[n])]
      if not len(keys) and not extra:
        continue
      every = np.concatenate([logits, extra])
      lse[i, n] = every.max() + np.log(np.exp(every - every.max()).sum())
      o[i, n] = np.exp(logits - lse[i, n]) @ vn
  return o, lse


def paged_truth(q, pages, table, lens, starts, **options):
  k, v = plain(pages)
  o, lse = np.zeros((*q.shape[:2], v.shape[-1])), np.full(q.shape[:2], -np.inf)
  sinks = options.get("sinks")
  if sinks is not None:
    lse[:] = sinks
  for row, (a, b) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
    n = lens[row]
    used = table[row, : -(-n // SIZE)]
    rows = (x[used].swapaxes(1, 2).reshape(-1, *x.shape[1::2]) for x in (k, v))
    if n:
      o[a:b], lse[a:b] = truth(q[a:b], *(x[:n] for x in rows), **options)
  return o, lse


@functools.partial(quick, static_argnames="window")
def every_backend(q, pages, table, lens, starts, window=None):
  return [
    paged_attention(
      q, pages, table, lens, starts, window=window, return_lse=True,
      blocks=Blocks(2, 8, 2), **backend,
    ) for backend in BACKENDS.values()
  ]  # fmt: skip


B, S = 4, 24
LENGTHS = np.array([24, 1, 0, 13], np.int32)
