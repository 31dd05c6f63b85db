"""Benchmarks of attention and of decoding, next to third-party kernels.

The shapes of attention are those of the FlashAttention papers: 16,384 tokens in
rows of several lengths, 2048 / H heads. Decoding reads half a gigabyte to a
gigabyte of keys and values, more than any cache of a chip.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench import attention, baselines, jobs, sequence
from kernels_pallas.bench.jobs import Job, Target
from kernels_pallas.decode_attention.api import (
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import (
  MAX_CODE,
  Pages,
  append_to_pages,
)
from kernels_pallas.flash_attention.api import flash_attention

LENGTHS = (1024, 4096, 16384)
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384


@dataclasses.dataclass(frozen=True)
class AttentionCall:
  """A call of attention with T = S = length.

  Attributes:
    length: Tokens per batch row.
    batch: Batch rows.
    heads: Heads of queries and of keys.
    head_dim: Head dim of queries, keys and values.
    causal: Whether the mask is causal, else full.
    direction: 'forward', or 'backward', which is both passes.
  """

  length: int
  batch: int
  heads: int
  head_dim: int
  causal: bool
  direction: str

  @property
  def flops(self) -> float:
    """Credited FLOPs: 4 H per visible pair, 3.5 times that if backward."""
    pairs = self.length**2
    if self.causal:
      pairs = self.length * (self.length + 1) // 2
    forward = 4 * self.batch * self.heads * self.head_dim * pairs
    return float(forward * (3.5 if self.direction == "backward" else 1))

  @property
  def name(self) -> str:
    """Unique name."""
    mask = "causal" if self.causal else "full"
    return f"H{self.head_dim}/T{self.length}/{mask}/{self.direction}"


def attention_calls(tiny: bool) -> list[AttentionCall]:
  """Returns the calls of attention to time."""
  lengths, dims = ((128,), (64,)) if tiny else (LENGTHS, HEAD_DIMS)
  return [
    AttentionCall(
      length=n,
      batch=1 if tiny else TOKENS // n,
      heads=1 if tiny else 2048 // H,
      head_dim=H,
      causal=causal,
      direction=direction,
    )
    for H in dims
    for n in lengths
    for causal in (False, True)
    for direction in ("forward", "backward")
    # If tiny, one with and one without a mask cover all code paths.
    if not tiny or causal == (direction == "backward")
  ]


def times(target: Target) -> list[Job]:
  """Returns benchmarks of attention, ring parts, decoding and appending."""
  found = [_attention(target, row) for row in attention_calls(target.tiny)]
  found.append(_parts(target))
  found += [_decoding(target, x) for x in decode_steps(target)]
  return found + [_appending(target, x) for x in decode_steps(target) if x.page]


def _job(target, name, implementations, operands, flops=0.0, size=0.0) -> Job:
  def measure():
    return jobs.time_all(target, implementations, operands, flops, size)

  def program():
    return implementations["ours"](), jax.eval_shape(operands)

  return Job(f"time/{name}", jobs.TIME, flops or size, measure, program)


def _attention(target: Target, row: AttentionCall) -> Job:
  tiles = attention.tiles(target, row.head_dim, row.head_dim)
  ours = functools.partial(
    flash_attention, causal=row.causal, backend=target.backend, config=tiles,
    interpret=target.interpret(),
  )  # fmt: skip
  implementations = {"ours": lambda: ours} | baselines.attention(target, row)
  shape = row.batch, row.length, row.heads, row.head_dim

  def operands():
    return tuple(jobs.normal(n, *shape, dtype=jnp.bfloat16) for n in range(4))

  directed = {n: _directed(row, make) for n, make in implementations.items()}
  return _job(target, f"attention/{row.name}", directed, operands, row.flops)


def _directed(row: AttentionCall, make: Callable[[], Any]) -> Callable[[], Any]:
  """Returns a function of (q, k, v, do): the output, or also all gradients."""

  def made():
    attend = make()
    if row.direction == "forward":
      return lambda q, k, v, do: attend(q, k, v)

    def both(q, k, v, do):
      o, pull = jax.vjp(attend, q, k, v)
      return o, pull(do)

    return both

  return made


def _parts(target: Target) -> Job:
  """Times a ring's steps on one device against a single call."""
  length = 128 if target.tiny else 4096
  x = attention.Problem(
    sequence.causal_by_position, T=length, S=length, N=2 if target.tiny else 16,
    K=2 if target.tiny else 16, H=64 if target.tiny else 128,
    Hv=64 if target.tiny else 128, extras=("sinks",), tiles="own",
  )  # fmt: skip
  implementations = {
    "ours": lambda: functools.partial(
      sequence.ring_by_parts, target, x, "backward"
    ),
    "in_one_call": lambda: attention.make_check(target, x, "backward").run,
  }  # fmt: skip
  operands = functools.partial(attention.operands, x)
  # Of the causal pairs, the window hides those of the last quarter of queries
  # with the keys before it.
  outside = length - 3 * length // 4
  pairs = (length * (length + 1) - outside * (outside - 1)) // 2
  flops = 3.5 * x.flops / length**2 * pairs
  return _job(target, "sequence/parts", implementations, operands, flops)


@dataclasses.dataclass(frozen=True)
class DecodeStep:
  """A decoding step in which all rows have the same length.

  Attributes:
    rows, tokens: Rows, and tokens of each.
    N, K, H: Heads of queries and of keys, head dim.
    page: Tokens per page, or 0 for a cache.
    kv_dtype: Dtype of keys and values.
  """

  rows: int = 32
  tokens: int = 8192
  N: int = 32
  K: int = 8
  H: int = 128
  page: int = 0
  kv_dtype: str = "bfloat16"

  @property
  def size(self) -> float:
    """Bytes of keys, values and scales."""
    token = 2 * self.H * jnp.dtype(self.kv_dtype).itemsize
    token += 8 if jnp.dtype(self.kv_dtype) in MAX_CODE else 0
    return float(self.rows * self.tokens * self.K * token)

  @property
  def name(self) -> str:
    """Unique name."""
    kind = f"pages{self.page}" if self.page else "cache"
    shape = f"{self.rows}x{self.tokens}/N{self.N}/K{self.K}/H{self.H}"
    return f"{kind}/{self.kv_dtype}/{shape}"


def decode_steps(target: Target) -> list[DecodeStep]:
  """Returns the decoding steps: batches that fill a chip, and one long row."""
  if target.tiny:
    small = DecodeStep(2, 64, 2, 1, 64)
    return [small, dataclasses.replace(small, page=32)]
  page = 128 if target.platform == "tpu" else 64
  return [
    DecodeStep(),
    DecodeStep(H=64, N=16),
    DecodeStep(rows=1, tokens=131_072),
    DecodeStep(page=page),
    DecodeStep(page=16),
    DecodeStep(page=page, kv_dtype="int8"),
    DecodeStep(page=page, kv_dtype="float8_e4m3fn"),
  ]


def _cache(x: DecodeStep):
  """Returns keys and values, and the page table."""
  if not x.page:
    shape = x.rows, x.K, x.tokens, x.H
    k, v = (jobs.normal(n, *shape, dtype=x.kv_dtype) for n in (1, 2))
    return (k, v), None
  width = x.tokens // x.page
  shape = x.rows * width, x.K, x.page, 2 * x.H
  codes, scale = jnp.dtype(x.kv_dtype) in MAX_CODE, None
  kv = jobs.normal(1, *shape, dtype=jnp.bfloat16)
  kv = (kv * 20).astype(x.kv_dtype) if codes else kv.astype(x.kv_dtype)
  if codes:
    scale = jnp.full((shape[0], 2, x.K, x.page), 0.05, jnp.float32)
  order = np.random.default_rng(0).permutation(shape[0])
  table = jnp.asarray(order.reshape(x.rows, width), jnp.int32)
  return Pages(kv, scale, x.H), table


def _decoding(target: Target, x: DecodeStep) -> Job:
  lens = jnp.full(x.rows, x.tokens, jnp.int32)
  theirs = baselines.decoding(target, x)

  def operands():
    q = jobs.normal(0, x.rows, x.N, x.H, dtype=jnp.bfloat16)
    return q, *_cache(x), baselines.split_pages(x) if theirs else None

  def attend(backend, interpret=None):
    def run(q, cache, table, apart):
      del apart
      how = {"backend": backend, "interpret": interpret}
      if table is None:
        k, v = (y.swapaxes(1, 2) for y in cache)
        return decode_attention(q, k, v, lens, **how)
      return paged_attention(q, cache, table, lens, **how)

    return run

  implementations = {
    "ours": lambda: attend(target.backend, target.interpret()),
    "xla": lambda: attend("xla"),
  }
  return _job(
    target, f"decode/{x.name}", implementations | theirs, operands, size=x.size
  )


def _appending(target: Target, x: DecodeStep) -> Job:
  """Times appending a token to each row, in place."""
  lens = jnp.full(x.rows, x.tokens, jnp.int32)

  def operands():
    new = (jobs.normal(n, x.rows, x.K, x.H, dtype=jnp.bfloat16) for n in (3, 4))
    return *_cache(x), *new

  def append(cache, table, k, v):
    return append_to_pages(cache, k, v, table, lens)

  def measure():
    cache, *rest = operands()
    run = jax.jit(append, donate_argnums=0)
    calls = 1 if target.tiny else 100
    took = jobs.chained_seconds(lambda cache: run(cache, *rest), cache, calls)
    return {"ok": True, "ours": {"ms": round(took * 1e3, 5)}}

  return Job(
    name=f"time/append/{x.name}",
    stage=jobs.TIME,
    cost=x.size,
    measure=measure,
    program=lambda: (append, jax.eval_shape(operands)),
  )
