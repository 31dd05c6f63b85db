"""`flash_attention`: exact attention, the same semantics on every backend."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.common import arguments
from kernels_pallas.common.target_platform import program_device
from kernels_pallas.flash_attention import dispatch
from kernels_pallas.flash_attention.dispatch import BACKENDS, TileSizes, choose
from kernels_pallas.flash_attention.spec import Backend, Operands, Spec
from kernels_pallas.masks import Mask, Segments, Window

__all__ = ["BACKENDS", "choose", "flash_attention", "prepare"]

ALIGNMENTS = ("bottom_right", "top_left")


def flash_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  bias: Float[Array, "..."] | None = None,
  segment_ids: Segments | None = None,
  mask: Mask | None = None,
  sinks: Float[Array, " N"] | None = None,
  causal: bool = False,
  window: Window = (None, None),
  causal_alignment: str = "bottom_right",
  scale: float | None = None,
  softcap: float | None = None,
  bias_before_softcap: bool = False,
  dropout_rate: float = 0.0,
  dropout_seed: int | Int[Array, ""] | None = None,
  q_offset: int | Int[Array, "..."] | None = None,
  kv_lens: Int[Array, " B"] | None = None,
  return_lse: bool = False,
  backend: str = "auto",
  config: TileSizes | None = None,
  interpret: Any = None,
  precision: Any = None,
) -> (
  Float[Array, "B T N Hv"]
  | tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]
):
  """Computes softmax(cap(scale q k^T) + bias, over visible keys) v.

  Sums are accumulated in float32 (float64 for float64 inputs). N must be a
  multiple of K; query head n uses key head n // (N / K). A query that sees no
  key gives output 0, log-sum-exp -inf and no gradient; the contents of padding
  never matter. A decoding cache stored as [B, K, S, H] and passed as
  `cache.swapaxes(1, 2)` is not copied.

  Args:
    q: Queries.
    k: Keys.
    v: Values; Hv may differ from H.
    bias: Added to the logits, broadcastable to [B, N, T, S]; differentiable.
    segment_ids: [B, T] (T = S), or a pair [B, T], [B, S]; tokens attend iff
      their ids are equal and not negative.
    mask: Which keys each query sees. By default built from segment_ids, causal,
      window, causal_alignment, q_offset and kv_lens, which it excludes.
    sinks: One logit per head that joins the denominator only; -inf disables it.
    causal: Key j is visible to query i iff j <= i + offset.
    window: (left, right), inclusive: i + offset - left <= j <= i + offset +
      right.
    causal_alignment: 'bottom_right' (offset S - T, or kv_lens - T) or
      'top_left' (offset 0).
    scale: Default H ** -0.5.
    softcap: c of c tanh(logit / c).
    bias_before_softcap: Whether the bias is added inside the soft cap.
    dropout_rate: Fraction of the probabilities dropped, in [0, 1).
    dropout_seed: 32-bit integer; required for dropout.
    q_offset: Position of query 0 in key indices, instead of causal_alignment;
      an integer, or Int [] or [B], not negative.
    kv_lens: Int [B], at most S; keys from there on are padding.
    return_lse: Also return the log-sum-exp, which is differentiable.
    backend: One of `BACKENDS`; 'auto' chooses by the platform that the program
      is lowered for (`dispatch.resolve_auto`).
    config: Tile sizes: `Tiles` for mosaic_tpu, `GpuTiles` for mosaic_gpu,
      `CpuTiles` for cpu, else `Blocks`. With 'auto', `Blocks` select
      xla_blockwise; other types apply only if 'auto' takes their backend.
    interpret: For Pallas backends, as in `pl.pallas_call`; runs them on any
      platform. A `plgpu.InterpretGPUParams` for mosaic_gpu.
    precision: Precision of the matmuls, as in `jax.lax.dot`.

  Returns:
    The output in the dtype of q; with `return_lse`, also the natural
    log-sum-exp (sinks included, before dropout) in the accumulator dtype.

  Raises:
    ValueError: Shapes do not match, or arguments conflict or are unsupported.
  """
  _check_shapes(q, k, v, bias, sinks)
  B, T, S = *q.shape[:2], k.shape[1]
  _check_lengths(kv_lens, B, S)
  built = (
    segment_ids is not None
    or causal
    or tuple(window) != (None, None)
    or causal_alignment != "bottom_right"
    or q_offset is not None
    or kv_lens is not None
  )
  if mask is not None and built:
    raise ValueError(
      "flash_attention: found mask together with segment_ids, causal, window, "
      "causal_alignment, q_offset or kv_lens; put all of it into the mask"
    )
  if mask is None:
    mask = _mask(
      (B, T, S),
      segment_ids,
      causal,
      window,
      causal_alignment,
      q_offset,
      kv_lens,
    )
  if bias is not None:
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
  seed = None
  if dropout_rate and dropout_seed is not None:
    seed = jnp.asarray(dropout_seed).astype(jnp.uint32)
  x = Operands(q, k, v, mask, bias, sinks, seed)
  run, spec = prepare(
    x,
    scale=scale,
    softcap=softcap,
    bias_before_softcap=bias_before_softcap,
    dropout_rate=dropout_rate,
    backend=backend,
    config=config,
    interpret=interpret,
    precision=precision,
  )
  o, lse = run.attend(spec, x)
  return (o, lse) if return_lse else o


def prepare(
  x: Operands,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  bias_before_softcap: bool = False,
  dropout_rate: float = 0.0,
  backend: str = "auto",
  config: TileSizes | None = None,
  interpret: Any = None,
  precision: Any = None,
) -> tuple[Backend, Spec]:
  """Checks a call; returns its backend and its static part.

  Args:
    x: Arrays of the call.
    scale, softcap, bias_before_softcap, dropout_rate, backend, config,
      interpret, precision: As in `flash_attention`.

  Raises:
    ValueError: As in `flash_attention`.
  """
  q, k, v = x.q, x.k, x.v
  _check_shapes(q, k, v, x.bias, x.sinks)
  (B, T, _, H), S = q.shape, k.shape[1]
  x.mask.check(B, T, S)
  if not 0 <= dropout_rate < 1:
    raise ValueError(f"dropout_rate: found {dropout_rate}, expected [0, 1)")
  if dropout_rate and x.seed is None:
    raise ValueError("dropout_seed: missing, needed by dropout_rate > 0")
  arguments.check_softcap(softcap)
  spec = Spec(
    scale=H**-0.5 if scale is None else float(scale),
    softcap=softcap,
    bias_before_softcap=bias_before_softcap,
    dropout_rate=float(dropout_rate),
    precision=precision,
  )
  if backend == "auto" and interpret is None:
    run, config = dispatch.resolve_auto(x, config, spec)
  else:
    if backend == "auto":
      backend, _ = dispatch.choose_for_device(x, program_device(), config, spec)
    run = dispatch.get_backend(backend, interpret)
    if config is None:
      config = dispatch.default_tile_sizes(x, run.config, program_device()[1])
  if not isinstance(config, run.config):
    raise ValueError(
      f"config: found {config!r}, expected {run.config.__name__} for {backend}"
    )
  return run, dataclasses.replace(spec, blocks=config)


def _mask(dims, segments, causal, window, alignment, q_offset, kv_lens) -> Mask:
  """Builds the mask from `flash_attention`'s keyword arguments."""
  B, T, S = dims
  if alignment not in ALIGNMENTS:
    raise ValueError(
      f"causal_alignment: found {alignment!r}, expected one of {ALIGNMENTS}"
    )
  if segments is not None and not isinstance(segments, tuple) and T != S:
    raise ValueError(
      f"segment_ids: found one array for {T} queries and {S} keys, "
      "expected a pair (queries, keys)"
    )
  build = Mask.causal if causal else Mask.full
  offset, q_positions, kv_positions = None, None, None
  if isinstance(q_offset, int):
    if q_offset < 0:
      raise ValueError(f"q_offset: found {q_offset}, expected at least 0")
    offset, q_offset = q_offset, None
  elif q_offset is None and alignment == "top_left":
    offset = 0
  if kv_lens is None and q_offset is None:
    return build(tuple(window), segments, offset=offset)

  # Data-dependent offsets become positions, shifted by T to avoid negatives.
  if q_offset is None and offset is None and kv_lens is not None:
    q_offset = kv_lens - T
  level = jnp.asarray(offset if q_offset is None else q_offset)
  rows = level.reshape(-1, 1) + jnp.arange(T)
  q_positions = jnp.maximum(rows + T, 0)
  kv_positions = jnp.arange(S)[None] + T
  if kv_lens is not None:
    live = jnp.arange(S)[None] < kv_lens[:, None]
    kv_positions = jnp.where(live, kv_positions, -1)
  return build(tuple(window), segments, q_positions, kv_positions)


def _check_shapes(q, k, v, bias, sinks) -> None:
  shapes = f"found q {q.shape}, k {k.shape}, v {v.shape}"
  if not q.ndim == k.ndim == v.ndim == 4 or k.shape[:3] != v.shape[:3]:
    raise ValueError(
      f"flash_attention: {shapes}, expected [B,T,N,H], [B,S,K,H], [B,S,K,Hv]"
    )
  (B, T, N, H), (Bk, S, K, Hk) = q.shape, k.shape
  if (Bk, Hk) != (B, H) or K == 0 or N % K:
    raise ValueError(
      f"flash_attention: {shapes}, expected equal B and H, and N % K = 0"
    )
  if not T or not S:
    raise ValueError(f"flash_attention: {shapes}, expected T and S at least 1")
  _check_dtypes(q=q, k=k, v=v, bias=bias, sinks=sinks)
  if sinks is not None and sinks.shape != (N,):
    raise ValueError(f"sinks: found {sinks.shape}, expected {(N,)}")
  if bias is not None:
    padded = (1,) * (4 - bias.ndim) + bias.shape
    if len(padded) != 4 or any(
      have not in (1, want)
      for have, want in zip(padded, (B, N, T, S), strict=True)
    ):
      raise ValueError(
        f"bias: found {bias.shape}, expected to broadcast to {(B, N, T, S)}"
      )


def _check_dtypes(**arrays) -> None:
  """Rejects boolean masks passed as bias, and integers (the output's dtype)."""
  for name, x in arrays.items():
    if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f"{name}: found {x.dtype}, expected floats")


def _check_lengths(kv_lens, B: int, S: int) -> None:
  if kv_lens is None:
    return
  # Differences of unsigned integers would never be negative.
  if not jnp.issubdtype(kv_lens.dtype, jnp.signedinteger):
    raise ValueError(
      f"kv_lens: found {kv_lens.dtype}, expected signed integers"
    )
  if kv_lens.shape != (B,):
    raise ValueError(f"kv_lens: found shape {kv_lens.shape}, expected {(B,)}")
  if not arguments.has_values(kv_lens):
    return
  values = np.asarray(kv_lens)
  least, most = int(values.min()), int(values.max())
  if least < 0 or most > S:
    raise ValueError(
      f"kv_lens: found lengths from {least} to {most}, expected 0 to {S} keys"
    )
