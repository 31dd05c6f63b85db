"""Checks of decode attention on a chip: caches, pages, prompts, and appending.

The expected result is the definition in float32, of the keys and values as
stored. A kernel rounds probabilities and the output to the queries' dtype, so
the tolerance is that rounding times the output of absolute values, plus that of
the output. Keys and values that no token sees are NaN.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.bench import jobs
from kernels_pallas.bench.jobs import Check, Job, Target
from kernels_pallas.decode_attention.api import (
  decode_attention,
  paged_attention,
)
from kernels_pallas.decode_attention.pages import (
  MAX_CODE,
  Pages,
  append_to_pages,
  quantize,
)
from kernels_pallas.decode_attention.spec import Blocks

FLOAT32 = 2.0**-14
"""Relative error of float32 exponentials of logits near 20."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """A call to check.

  Attributes:
    lengths: Tokens of each row, including the new ones.
    new: New tokens of each row; one each if empty.
    N, K, H, Hv: Heads of queries and of keys, head dims.
    page: Tokens per page, or 0 for a cache.
    dtype: Dtype of queries.
    kv_dtype: Dtype of keys and values; None is that of queries.
    window, softcap, sinks: As in `decode_attention`.
    blocks: Block sizes and splits.
  """

  lengths: tuple[int, ...] = (1500, 0, 1, 777)
  new: tuple[int, ...] = ()
  N: int = 8
  K: int = 2
  H: int = 128
  Hv: int = 128
  page: int = 0
  dtype: str = "bfloat16"
  kv_dtype: str | None = None
  window: int | None = None
  softcap: float | None = None
  sinks: bool = False
  blocks: Blocks | None = None

  @property
  def size(self) -> int:
    """Most tokens of a row."""
    unit = max(self.page, 16)
    return -(-max(self.lengths) // unit) * unit

  @property
  def starts(self) -> np.ndarray:
    """Where each row's new tokens start, and where the last one's end."""
    new = self.new or tuple(map(min, self.lengths, (1,) * len(self.lengths)))
    return np.cumsum([0, *new]).astype(np.int32)

  @property
  def flops(self) -> float:
    """FLOPs over all keys."""
    tokens = int(self.starts[-1])
    return 2.0 * tokens * self.N * max(self.lengths) * (self.H + self.Hv)


def checks(target: Target) -> list[Job]:
  """Returns checks of attention, and of appending."""
  found = []
  for name, x in problems(target).items():
    x = _shrunk(x) if target.tiny else x
    job = jobs.check(
      target, name, _check(target, x), x.flops, name in SMOKE
    )  # fmt: skip
    found.append(job)
  for kv_dtype in ("bfloat16", "int8", "float8_e4m3fn"):
    x = Problem(page=_page(target), kv_dtype=kv_dtype, new=(1, 0, 1, 300))
    x = _shrunk(x) if target.tiny else x
    name, smoke = f"append/{kv_dtype}", kv_dtype == "bfloat16"
    found.append(jobs.check(target, name, _append(x), x.flops, smoke))
  return found


SMOKE = ("decode/cache", "decode/pages")


def _page(target: Target) -> int:
  """Returns a page size that quantized pages support on the target."""
  return 128 if target.platform == "tpu" else 32


def problems(target: Target) -> dict[str, Problem]:
  """Returns the problems to check, by name."""
  page, tpu = _page(target), target.platform == "tpu"
  cache = {
    "": Problem(),
    "_window": Problem(window=300),
    "_softcap": Problem(softcap=20.0),
    "_sinks": Problem(sinks=True, blocks=Blocks(splits=4)),
    "_one_split": Problem(blocks=Blocks(splits=1)),
    "_heads_alone": Problem(N=2),
    "_many_heads": Problem(N=24, K=1),
    "_more_heads": Problem(N=80, K=1),
    "_D64": Problem(H=64, Hv=64),
    "_D256": Problem(H=256, Hv=256, N=4),
    "_other_width": Problem(H=64, Hv=128),
    "_long": Problem(lengths=(20_000, 3, 9_999)),
  }
  pages = {
    "": Problem(page=16 if tpu else 48),
    "_large": Problem(page=128),
    "_prompts": Problem(new=(1, 0, 1, 300), page=page),
    "_prompts_window": Problem(
      new=(40, 0, 1, 300), page=page, window=100, sinks=True
    ),
    "_prompts_of_many_heads": Problem(new=(1, 0, 1, 300), page=page, N=32, K=2),
    "_D64": Problem(page=page, H=64, Hv=64),
    "_D256": Problem(page=page, H=256, Hv=256),
  }
  for kv_dtype in ("int8", "float8_e4m3fn"):
    pages |= {
      f"_{kv_dtype}": Problem(page=page, kv_dtype=kv_dtype),
      f"_{kv_dtype}_D64": Problem(page=page, kv_dtype=kv_dtype, H=64, Hv=64),
      f"_{kv_dtype}_prompts": Problem(
        new=(1, 0, 1, 300), page=page, kv_dtype=kv_dtype, window=100
      ),
    }
  other = {"_float32": Problem(dtype="float32")} if tpu else {
    "_float16": Problem(dtype="float16")}  # fmt: skip
  cache |= other
  pages |= {n: dataclasses.replace(x, page=page) for n, x in other.items()}
  return {
    f"decode/{kind}{name}": x
    for kind, found in (("cache", cache), ("pages", pages))
    for name, x in found.items()
  }


def _shrunk(x: Problem) -> Problem:
  """Returns a tiny version for the interpreter."""
  small = lambda n: min(n, 3) if n <= 1 else 60  # noqa: E731
  new = tuple(min(n, 5) for n in x.new)
  blocks = x.blocks and Blocks(splits=min(x.blocks.splits, 2))
  return dataclasses.replace(
    x, lengths=tuple(map(small, x.lengths)), new=new, N=min(x.N, 4), K=1,
    H=64, Hv=64, window=x.window and 20, blocks=blocks,
  )  # fmt: skip


def _operands(x: Problem) -> tuple[jax.Array, Any, jax.Array]:
  """Returns queries, keys and values in a cache or pages, and sinks."""
  rows, kv_dtype = len(x.lengths), x.kv_dtype or x.dtype
  q = jobs.normal(0, max(int(x.starts[-1]), rows), x.N, x.H, dtype=x.dtype)
  k = jobs.normal(1, rows, x.size, x.K, x.H, dtype=x.dtype)
  v = jobs.normal(2, rows, x.size, x.K, x.Hv, dtype=x.dtype)
  sinks = jobs.normal(3, x.N)
  dead = ~_seen(x)[:, :, None, None]
  if not x.page:
    return q, (jnp.where(dead, jnp.nan, k), jnp.where(dead, jnp.nan, v)), sinks
  codes = jnp.dtype(kv_dtype) in MAX_CODE
  k_scale = v_scale = None
  if codes:
    (k, k_scale), (v, v_scale) = (
      quantize(y, jnp.dtype(kv_dtype)) for y in (k, v)
    )  # fmt: skip
    scale = jnp.stack([k_scale, v_scale], 1)  # [rows, 2, size, K]
    scale = jnp.where(dead[:, None, :, :, 0], jnp.nan, scale)
    scale = scale.reshape(rows, 2, -1, x.page, x.K)
    scale = _dealt(x, scale.transpose(0, 2, 1, 4, 3))
  kv = jnp.concatenate([k, v], -1)
  kv = kv if codes else jnp.where(dead, jnp.nan, kv)
  kv = kv.reshape(rows, -1, x.page, x.K, kv.shape[-1]).swapaxes(2, 3)
  return q, Pages(_dealt(x, kv), scale if codes else None, x.H), sinks


def _seen(x: Problem) -> jax.Array:
  """Returns which stored tokens a new token of their row sees, [rows, size]."""
  at, lens = np.arange(x.size), np.asarray(x.lengths)[:, None]
  seen = at < lens
  if x.window is not None:
    first = lens[:, 0] - np.diff(x.starts) - x.window + 1
    seen &= at >= first[:, None]
  return jnp.asarray(seen & (np.diff(x.starts) > 0)[:, None])


def _table(x: Problem) -> jax.Array:
  """Returns the pages of each row, in random order."""
  rows, width = len(x.lengths), x.size // x.page
  order = np.random.default_rng(0).permutation(rows * width)
  return jnp.asarray(order.reshape(rows, width), jnp.int32)


def _dealt(x: Problem, y: jax.Array) -> jax.Array:
  """Permutes [rows, pages of a row, ...] to the order of the table."""
  flat = y.reshape(-1, *y.shape[2:])
  return jnp.zeros_like(flat).at[_table(x).reshape(-1)].set(flat)


def _attend(x: Problem, q, cache, sinks, **how) -> dict[str, jax.Array]:
  """Returns output and log-sum-exp."""
  options = {
    "window": x.window, "softcap": x.softcap, "return_lse": True,
    "sinks": sinks if x.sinks else None, **how,
  }  # fmt: skip
  lens = jnp.asarray(x.lengths, jnp.int32)
  if not x.page:
    found = decode_attention(q, *cache, lens, **options)
  else:
    starts = jnp.asarray(x.starts)
    found = paged_attention(q, cache, _table(x), lens, starts, **options)
  return dict(zip(("o", "lse"), found, strict=True))


def _check(target: Target, x: Problem) -> Check:
  how = {"backend": target.backend, "blocks": x.blocks}
  if target.interpret() is not None:
    how["interpret"] = target.interpret()
  if x.dtype == "float32":
    how["precision"] = jax.lax.Precision.HIGHEST
  return Check(
    run=functools.partial(_attend, x, **how),
    operands=functools.partial(_operands, x),
    expected=functools.partial(_expected, x),
    tolerances=functools.partial(_tolerances, x),
  )


def _expected(x: Problem, q, cache, sinks):
  if not x.page:
    cache = tuple(y.astype(jnp.float32) for y in cache)
  elif cache.scale is None:
    cache = dataclasses.replace(cache, kv=cache.kv.astype(jnp.float32))
  run = functools.partial(_attend, x, backend="reference")
  with jax.default_matmul_precision("highest"):
    return jobs.untuned_jit(run)(q.astype(jnp.float32), cache, sinks)


def _tolerances(x: Problem, operands, expected):
  q, cache, sinks = operands
  if not x.page:
    cache = cache[0], jnp.abs(cache[1])
  else:
    values = jnp.arange(cache.kv.shape[-1]) >= x.H
    wide = cache.kv.astype(jnp.float32)
    kv = jnp.where(values, jnp.abs(wide), wide).astype(cache.kv.dtype)
    cache = dataclasses.replace(cache, kv=kv)
  size, unit = _expected(x, q, cache, sinks)["o"], jobs.roundoff(x.dtype)
  lse = jnp.abs(jnp.where(jnp.isneginf(expected["lse"]), 0, expected["lse"]))
  return {
    "o": (unit + FLOAT32) * size + unit * jnp.abs(expected["o"]),
    "lse": FLOAT32 * (1 + lse),
  }


def _append(x: Problem) -> Check:
  """Checks that pages after appending equal those written by NumPy."""
  return Check(
    run=functools.partial(_appended, x),
    operands=functools.partial(_new, x),
    expected=functools.partial(_written, x),
    tolerances=lambda _, expected: dict.fromkeys(expected, 0.0),
    donates=True,
  )


def _new(x: Problem):
  """Returns pages without NaN, and new keys and values."""
  _, cache, _ = _operands(dataclasses.replace(x, window=None))
  cache = jax.tree.map(
    lambda y: y if y.dtype in MAX_CODE else jnp.nan_to_num(y), cache
  )
  tokens = int(x.starts[-1])
  shapes = (tokens, x.K, x.H), (tokens, x.K, x.Hv)
  return cache, *(jobs.normal(4, *s, dtype=x.dtype) for s in shapes)


def _appended(x: Problem, cache, k, v):
  found = append_to_pages(
    cache, k, v, _table(x), jnp.asarray(x.lengths), jnp.asarray(x.starts)
  )
  scale = {} if found.scale is None else {"scale": found.scale}
  return {"kv": found.kv, **scale}


def _written(x: Problem, cache, k, v):
  table, new = np.asarray(_table(x)), np.diff(x.starts)
  kv, parts = np.array(cache.kv), [k, v]
  scale = None if cache.scale is None else np.array(cache.scale)
  if scale is not None:
    (k, k_scale), (v, v_scale) = (quantize(y, cache.kv.dtype) for y in parts)
    scales = np.stack([np.asarray(k_scale), np.asarray(v_scale)], 1)
  rows = np.concatenate([np.asarray(y) for y in (k, v)], -1)
  for row, count in enumerate(new):
    for n in range(count):
      at, token = x.lengths[row] - count + n, x.starts[row] + n
      page, slot = table[row, at // x.page], at % x.page
      kv[page, :, slot] = rows[token]
      if scale is not None:
        scale[page, :, :, slot] = scales[token]
  found = {"kv": jnp.asarray(kv)}
  return found if scale is None else found | {"scale": jnp.asarray(scale)}
