"""Baselines: third-party kernels of the same calls, timed next to ours.

Each is imported when it is called: kernels that are not installed, or do not
support the call, report that in their own column.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.bench.jobs import Target

Implementations = dict[str, Callable[[], Callable[..., Any]]]


def attention(target: Target, row: Any) -> Implementations:
  """Returns makers of functions of q, k, v [B, T, N, H], by name.

  Args:
    target: The chip.
    row: A `times.AttentionCall`.
  """
  if target.tiny:
    return {"jax_nn": lambda: _jax_nn(row, "xla")}
  if target.platform == "tpu":
    return {
      "splash": lambda: _splash(row),
      "jax_flash": lambda: _jax_flash(row),
    }
  found = {
    "cudnn": lambda: _jax_nn(row, "cudnn"),
    "jax_mgpu": lambda: _jax_mgpu(row),
  }
  if importlib.util.find_spec("flash_attn_jax") is not None:
    found["flash_attn"] = lambda: _flash_attn(row)
  return found


def _jax_nn(row: Any, implementation: str):
  return functools.partial(
    jax.nn.dot_product_attention,
    is_causal=row.causal,
    implementation=implementation,
  )


def _jax_mgpu(row: Any):
  """JAX's own kernel: it requires scale 1 and float16, and has no causal
  backward pass. Its CUDA version check is not bypassed, so it may raise."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu

  if row.causal and row.direction == "backward":
    raise ValueError("has no causal backward pass")
  block = 64 if row.head_dim > 128 else 128  # noqa: PLR2004
  config = attention_mgpu.TuningConfig(
    block_q=64, block_kv=block, max_concurrent_steps=2, causal=row.causal,
    block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64,
  )  # fmt: skip

  def attend(q, k, v):
    q = (q * (1 / math.sqrt(row.head_dim))).astype("float16")
    k, v = (y.astype("float16") for y in (k, v))
    return attention_mgpu.attention(q, k, v, config).astype(jnp.bfloat16)

  return attend


def _flash_attn(row: Any):
  """Dao's kernels, from the package `flash_attn_jax`."""
  from flash_attn_jax import flash_mha

  return functools.partial(flash_mha, is_causal=row.causal)


def _splash(row: Any):
  """JAX's splash attention, at the best blocks of our table of schedules."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  shape, block = (row.length,) * 2, min(row.length, 1024)
  mask = masks.CausalMask(shape) if row.causal else masks.FullMask(shape)
  sizes = kernel.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=min(block, 512),
    block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=min(block, 512), use_fused_bwd_kernel=True,
  )  # fmt: skip
  run = kernel.make_splash_mha(
    masks.MultiHeadMask([mask] * row.heads),
    block_sizes=sizes, head_shards=1, q_seq_shards=1,
  )  # fmt: skip

  def attend(q, k, v):
    q = q * jnp.asarray(row.head_dim**-0.5, q.dtype)
    q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
    return jax.vmap(run)(q, k, v).swapaxes(1, 2)

  return attend


def _jax_flash(row: Any):
  """JAX's first TPU kernel, with other block sizes than its slow default."""
  from jax.experimental.pallas.ops.tpu import flash_attention as theirs

  block = min(row.length, 512)
  names = (
    "block_q", "block_k_major", "block_k", "block_q_major_dkv",
    "block_k_major_dkv", "block_k_dkv", "block_q_dkv", "block_k_major_dq",
    "block_k_dq", "block_q_dq",
  )  # fmt: skip
  sizes = theirs.BlockSizes(block_b=1, **dict.fromkeys(names, block))

  def attend(q, k, v):
    q, k, v = (y.swapaxes(1, 2) for y in (q, k, v))
    o = theirs.flash_attention(
      q, k, v, causal=row.causal, sm_scale=row.head_dim**-0.5,
      block_sizes=sizes,
    )  # fmt: skip
    return o.swapaxes(1, 2)

  return attend


def decoding(target: Target, x: Any) -> Implementations:
  """Returns makers of functions of q, our cache, the table, and `split_pages`.

  Args:
    target: The chip.
    x: A `times.DecodeStep`.
  """
  if target.tiny or not x.page or x.kv_dtype != "bfloat16":
    return {}
  return {"jax_paged": lambda: _jax_paged(target, x)}


def split_pages(x: Any) -> tuple[jax.Array, jax.Array]:
  """Returns keys and values as baselines need them, `[K, pages, size, H]`."""
  shape = x.K, x.rows * x.tokens // x.page, x.page, x.H
  k, v = (
    jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n in (1, 2)
  )
  return k, v


def _jax_paged(target: Target, x: Any):
  if target.platform == "tpu":
    from jax.experimental.pallas.ops.tpu.paged_attention import (
      paged_attention as theirs,
    )

    pages = "page_indices"
    theirs = functools.partial(
      theirs, pages_per_compute_block=max(1, 512 // x.page)
    )
  else:
    from jax.experimental.pallas.ops.gpu.paged_attention import (
      paged_attention as theirs,
    )

    pages = "block_tables"
  lens = jnp.full(x.rows, x.tokens, jnp.int32)

  def attend(q, ours, table, apart):
    del ours
    q = q * jnp.asarray(x.H**-0.5, q.dtype)
    # By name: the two kernels take them in different orders.
    return theirs(q, *apart, lengths=lens, **{pages: table})

  return attend
