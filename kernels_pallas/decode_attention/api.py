"""`decode_attention` and `paged_attention`: new tokens attend to a KV cache.

A new token sees the keys of its own row up to and including itself, within a
window of `window` keys; nothing else in the cache matters, not even NaN. Query
head n uses key head n // (N / K). Sums are accumulated in float32 (float64 for
float64 queries in `reference` and `xla`). A query that sees no key gives output
0 and log-sum-exp -inf (with sinks, that of the sink). Decoding has no gradient.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common import arguments
from kernels_pallas.common.target_platform import accumulator, program_device
from kernels_pallas.decode_attention import gpu, ragged, tpu
from kernels_pallas.decode_attention import pages as paging
from kernels_pallas.decode_attention import work as works
from kernels_pallas.decode_attention.cpu import cpu_decode
from kernels_pallas.decode_attention.dispatch import BACKENDS, resolve_auto
from kernels_pallas.decode_attention.dispatch import choose as choose
from kernels_pallas.decode_attention.pages import Pages
from kernels_pallas.decode_attention.reference import (
  add_sinks,
  reference_decode,
)
from kernels_pallas.decode_attention.spec import Blocks, Spec
from kernels_pallas.decode_attention.xla import xla_decode

KERNELS = ("mosaic_tpu", "mosaic_gpu")

TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
"""Device kinds whose two cores share the parallel steps of a kernel."""


def decode_attention(
  q: Float[Array, "B N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  lengths: Int[Array, " B"],
  *,
  window: int | None = None,
  sinks: Float[Array, " N"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: bool = False,
  backend: str = "auto",
  blocks: Blocks | None = None,
  interpret: Any = None,
  precision: Any = None,
) -> (
  Float[Array, "B N Hv"] | tuple[Float[Array, "B N Hv"], Float[Array, "B N"]]
):
  """Attention of one new token per row to that row's cache.

  A cache stored as [B, K, S, H] and passed as `cache.swapaxes(1, 2)` is not
  copied. TPU kernels need an S that is a multiple of 16 (8 in float32, if the
  backend is named explicitly).

  Args:
    q: Queries; row b's is at position `lengths[b] - 1`.
    k: Keys, position s in slot s.
    v: Values.
    lengths: Tokens in the cache, including the new one; 0 for padding.
    window: Most keys that a query sees, including its own.
    sinks: One logit per head that joins the denominator only; -inf disables it.
    scale: Default H ** -0.5.
    softcap: c of c tanh(logit / c).
    return_lse: Also return the natural log-sum-exp, sinks included.
    backend: One of `BACKENDS`; for 'auto' see `dispatch`.
    blocks: Block sizes and number of splits.
    interpret: For Pallas backends, as in `pl.pallas_call`; runs them on any
      platform.
    precision: Precision of the matmuls, as in `jax.lax.dot`.

  Returns:
    The output in the dtype of q; with `return_lse`, also the log-sum-exp in
    the accumulator dtype.

  Raises:
    ValueError: Shapes do not match, arguments are unsupported, or lengths, if
      known, exceed S.
  """
  _check_floats(q=(q, 3), k=(k, 4), v=(v, 4), sinks=(sinks, 1))
  (B, _, H), shapes = q.shape, f"q {q.shape}, k {k.shape}, v {v.shape}"
  if k.shape[:3] != v.shape[:3]:
    raise ValueError(
      f"decode_attention: found {shapes}, expected [B,N,H], [B,S,K,H], "
      "[B,S,K,Hv]"
    )
  if k.shape[0] != B or lengths.shape != (B,):
    raise ValueError(
      f"decode_attention: found {shapes}, lengths {lengths.shape}; expected "
      "one B"
    )
  storage = works.Cache(k.swapaxes(1, 2), v.swapaxes(1, 2))
  spec = _spec(H, scale, softcap, window, precision)
  rows = ragged.make_rows(B, None, lengths, None, k.shape[:2])
  return _run(
    spec, q, storage, rows, sinks, return_lse, backend, blocks, interpret
  )


def paged_attention(
  q: Float[Array, "T N H"],
  pages: Pages,
  table: Int[Array, "R W"],
  kv_lens: Int[Array, " R"],
  cu_q_lens: Int[Array, " R1"] | None = None,
  *,
  window: int | None = None,
  sinks: Float[Array, " N"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  return_lse: bool = False,
  backend: str = "auto",
  blocks: Blocks | None = None,
  interpret: Any = None,
  precision: Any = None,
) -> (
  Float[Array, "T N Hv"] | tuple[Float[Array, "T N Hv"], Float[Array, "T N"]]
):
  """Attention of new tokens, one or more per row, to pages of keys and values.

  Token t of the q_len new tokens of a row with kv_len tokens is at position
  kv_len - q_len + t: decoding rows, whole prompts and chunks of prompts may be
  mixed. The new keys and values must already be in the pages (`append_to_pages`
  takes the same arguments). Pages that no new token of their row sees are not
  read, and their table entries may be arbitrary.

  Args:
    q: Queries of all rows, concatenated; padding after the last row.
    pages: Keys and values, quantized or not.
    table: Pages of each row.
    kv_lens: Tokens of each row, including the new ones; 0 for padding.
    cu_q_lens: Where each row's queries start, and where the last row's end; by
      default each row has one query.
    window: Most keys that a query sees, including its own.
    sinks: One logit per head that joins the denominator only; -inf disables it.
    scale: Default H ** -0.5.
    softcap: c of c tanh(logit / c).
    return_lse: Also return the natural log-sum-exp, sinks included.
    backend: One of `BACKENDS`; for 'auto' see `dispatch`.
    blocks: Block sizes and number of splits.
    interpret: For Pallas backends, as in `pl.pallas_call`; runs them on any
      platform.
    precision: Precision of the matmuls, as in `jax.lax.dot`.

  Returns:
    The output in the dtype of q; with `return_lse`, also the log-sum-exp in
    the accumulator dtype.

  Raises:
    ValueError: Shapes or dtypes do not match, arguments are unsupported, or
      rows have no pages for their lengths (if known). If not known, table
      entries outside the pages are clamped, so that nothing outside is read.
  """
  paging.check_pages(pages)
  _check_floats(q=(q, 3), sinks=(sinks, 1))
  spec = _spec(q.shape[2], scale, softcap, window, precision)
  rows = ragged.make_rows(
    q.shape[0], table, kv_lens, cu_q_lens, (pages.count, pages.size), window
  )
  return _run(
    spec, q, pages, rows, sinks, return_lse, backend, blocks, interpret
  )


def _run(spec, q, storage, rows, sinks, return_lse, backend, blocks, interpret):
  """Checks what both functions share, and runs a backend."""
  T, N, H = q.shape
  K, Hk, _ = works.head_sizes(storage)
  if N % K or Hk != H:
    raise ValueError(
      f"decoding: found q {q.shape} for {K} key heads of dim {Hk}; expected "
      "equal head dims, and N % K = 0"
    )
  if sinks is not None and sinks.shape != (N,):
    raise ValueError(f"sinks: found {sinks.shape}, expected {(N,)}")
  if backend not in BACKENDS:
    raise ValueError(
      f"backend: found {backend!r}, available here: {', '.join(BACKENDS)}"
    )
  if interpret is not None and backend not in KERNELS:
    raise ValueError(
      f"interpret: found {interpret!r}, {backend} has no use for it"
    )
  if backend == "auto":
    attend = functools.partial(_attend, spec, blocks, None)
    o, lse = resolve_auto(attend, q, storage, rows, spec.precision)
  else:
    o, lse = _attend(
      spec, blocks, interpret, backend, program_device(), q, storage, rows
    )
  if sinks is not None:
    o, lse = add_sinks(o, lse, sinks)
  o = o.astype(q.dtype)
  return (o, lse) if return_lse else o


def _attend(spec, blocks, interpret, backend, place, q, storage, rows):
  """Runs a backend, without sinks, in the accumulator dtype."""
  if backend == "reference":
    return _reference(spec, q, storage, rows)
  if backend == "cpu":
    return cpu_decode(spec, q, storage, rows.kv_lens)
  if backend == "mosaic_gpu":
    _check_for_gpu(spec, q, storage)
  blocks = _blocks(blocks, backend, place, q, storage, rows)
  p, tiling = works.prepare(spec, blocks, q, storage, rows)
  decode = xla_decode
  if backend == "mosaic_gpu":
    decode = functools.partial(gpu.mosaic_gpu_decode, interpret=interpret)
  if backend == "mosaic_tpu":
    tpu.check_for_tpu(p, interpret)
    decode = functools.partial(tpu.mosaic_tpu_decode, interpret=interpret)
  return works.combine_splits(p, tiling, rows, q.shape[0], *decode(p))


def _reference(spec, q, storage, rows):
  dtype = accumulator(q.dtype)
  if rows.table is None:
    k, v = (x.swapaxes(1, 2).astype(dtype) for x in (storage.k, storage.v))
  else:
    k, v = paging.gather_pages(storage, rows.table, dtype)
  return reference_decode(
    spec, q, k, v, *ragged.token_positions(rows, q.shape[0])
  )


def _check_floats(**arrays) -> None:
  for name, (x, rank) in arrays.items():
    if x is None:
      continue
    if x.ndim != rank or not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(
        f"{name}: found {x.dtype} {x.shape}, expected floats, {rank} axes"
      )


def _spec(H, scale, softcap, window, precision) -> Spec:
  if window is not None and window < 1:
    raise ValueError(f"window: found {window}, expected at least 1 key")
  arguments.check_softcap(softcap)
  scale = H**-0.5 if scale is None else float(scale)
  if not math.isfinite(scale):
    raise ValueError(f"scale: found {scale}, expected a finite number")
  return Spec(scale, softcap, window, precision)


def _check_for_gpu(spec, q, storage) -> None:
  reason = gpu.unsupported("", q.dtype, storage, spec.precision)
  if reason is not None:
    raise ValueError(f"mosaic_gpu: {reason}; backend='xla' takes it")


def _blocks(blocks: Blocks | None, backend, place, q, storage, rows) -> Blocks:
  """Returns the requested sizes, with defaults for the device."""
  (platform, kind), blocks = place, blocks or Blocks()
  splits = 2 if platform == "tpu" and kind in TWO_CORES else 1
  if backend == "mosaic_gpu":
    # The kernel splits keys into any runs: small blocks make equal runs.
    blocks = dataclasses.replace(blocks, keys=min(blocks.keys, gpu.KEYS))
    width = 1 if rows.table is None else rows.table.shape[1]
    K, tokens = works.head_sizes(storage)[0], q.shape[0]
    each = works.queries_per_item(blocks, tokens, q.shape[1] // K, rows)
    splits = gpu.splits_for(K * -(-tokens // each), storage.size * width)
  if blocks.splits is None:
    blocks = dataclasses.replace(blocks, splits=splits)
  return blocks
