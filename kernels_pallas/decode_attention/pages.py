"""Paged KV cache: pages of keys and values shared by sequences of any length.

A sequence owns whole pages in any order, listed in its row of a page table; its
token t is in slot t % size of page `table[row, t // size]`.

The layout is `[pages, K, size, H + Hv]`: tokens in sublanes, a token's key and
value next to each other in lanes. A page of one head is then a matrix that a
TPU can multiply with as copied, whereas heads in sublanes (`[pages, size, 2K,
H]`, as in ragged paged attention) would have to be separated first. A page with
all heads, keys and values, is one contiguous copy, also on a device that holds
some of the heads. And heads of dim 64 fill the 128 lanes of a register, where
separate keys and values would be padded to twice their size, in a copy of all
pages for every call.

Quantized pages (int8 or float8_e4m3fn) have a scale per token and head, not per
page: a token is rounded once, when it is written, regardless of later tokens.
The scales of a page are in lanes, like its scores: they multiply scores and
probabilities, never keys and values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common.target_platform import program_device
from kernels_pallas.decode_attention import ragged, tpu

MAX_CODE = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""Quantized dtypes, and their largest finite number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """Pages of one layer, or of several layers along leading axes.

  Attributes:
    kv: `[pages, K, size, H + Hv]`, a token's key and then its value.
    scale: float32 `[pages, 2, K, size]`, scales of keys and of values if `kv`
      is quantized; else None.
    head_dim: H.
  """

  kv: Any
  scale: Any = None
  head_dim: int = dataclasses.field(default=0, metadata=dict(static=True))

  @property
  def size(self) -> int:
    """Tokens per page."""
    return self.kv.shape[-2]

  @property
  def count(self) -> int:
    """Number of pages, in use or not."""
    return self.kv.shape[-4]


def empty_pages(
  count: int,
  kv_heads: int,
  size: int,
  head_dim: int,
  dtype: Any = jnp.bfloat16,
  *,
  v_head_dim: int | None = None,
) -> Pages:
  """Returns pages of zeros.

  TPUs need sizes that are multiples of 8 tokens in float32, 16 in bfloat16, and
  128 in int8 and float8, because of their scales.

  Args:
    count: Number of pages.
    kv_heads: K.
    size: Tokens per page.
    head_dim: H.
    dtype: A float dtype, int8 or float8_e4m3fn.
    v_head_dim: Hv, by default H.

  Raises:
    ValueError: A size is below 1.
  """
  if min(count, kv_heads, size, head_dim) < 1:
    raise ValueError(
      f"pages: found {count} pages, {kv_heads} heads, {size} tokens, head dim "
      f"{head_dim}; expected at least 1 of each"
    )
  width = head_dim + (v_head_dim or head_dim)
  scale = None
  if jnp.dtype(dtype) in MAX_CODE:
    scale = jnp.zeros((count, 2, kv_heads, size), jnp.float32)
  kv = jnp.zeros((count, kv_heads, size, width), dtype)
  return Pages(kv, scale, head_dim)


def quantize(
  x: Float[Array, "*T H"], dtype: Any
) -> tuple[Array, Float[Array, "*T"]]:
  """Quantizes each vector of `x`, keeping its largest element exact.

  Args:
    x: Keys or values.
    dtype: A key of `MAX_CODE`.

  Returns:
    The rounded numbers and a float32 scale per vector; their product is `x`,
    within half a step. A vector of zeros has scale 0.
  """
  most = MAX_CODE[jnp.dtype(dtype)]
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / most
  x = x / jnp.where(scale == 0, 1, scale)[..., None]
  # Division may round past the largest number, and float8 has no inf.
  x = jnp.clip(x, -most, most)
  if jnp.dtype(dtype) == jnp.int8:
    x = jnp.round(x)
  return x.astype(dtype), scale


def check_pages(pages: Pages) -> None:
  """Raises ValueError unless shapes and dtypes of `pages` are consistent."""
  kv, scale, H = pages.kv, pages.scale, pages.head_dim
  if kv.ndim != 4 or 0 in kv.shape or not 0 < H < kv.shape[3]:
    raise ValueError(
      f"pages: found kv {kv.shape} of head dim {H}, expected [pages, K, size, "
      "H + Hv] and no 0"
    )
  wanted = None
  if kv.dtype in MAX_CODE:
    wanted = (kv.shape[0], 2, *kv.shape[1:3])
  found = None if scale is None else scale.shape
  if found != wanted:
    raise ValueError(
      f"pages.scale: found {found} with {kv.dtype} pages, expected {wanted}"
    )


def append_to_pages(
  pages: Pages,
  k: Float[Array, "T K H"],
  v: Float[Array, "T K Hv"],
  table: Int[Array, "R W"],
  kv_lens: Int[Array, " R"],
  cu_q_lens: Int[Array, " R1"] | None = None,
  *,
  backend: str = "auto",
  interpret: Any = None,
) -> Pages:
  """Returns the pages with new tokens appended to their sequences.

  Takes the same arguments as the `paged_attention` that follows: tokens
  `cu_q_lens[r]` to `cu_q_lens[r + 1]` become the last of the `kv_lens[r]`
  tokens of row r. In place if the pages are donated. Tokens after the last
  row's are not written, nor is anything outside the pages.

  Args:
    pages: Pages of one layer.
    k: New keys.
    v: New values.
    table: Pages of each row.
    kv_lens: Tokens of each row, including the new ones.
    cu_q_lens: Where each row's tokens start, and where the last row's end; by
      default one token per row.
    backend: 'xla', whose scatter is in place on CPUs and GPUs; 'mosaic_tpu'
      (which writes only within the pages, whatever the table contains); or
      'auto': the kernel on TPUs if a page is a whole number of registers, else
      'xla'.
    interpret: For 'mosaic_tpu' by name, as in `pl.pallas_call`; runs it on any
      platform.

  Raises:
    ValueError: Shapes do not match, `interpret` is given for another backend,
      or tokens (if values are known) have no page.
  """
  check_pages(pages)
  _, K, size, width = pages.kv.shape
  T, H, Hv = k.shape[0], pages.head_dim, width - pages.head_dim
  if k.shape != (T, K, H) or v.shape != (T, K, Hv):
    raise ValueError(
      f"append_to_pages: found k {k.shape}, v {v.shape}, expected "
      f"{(T, K, H)} and {(T, K, Hv)}"
    )
  if interpret is not None and backend != "mosaic_tpu":
    raise ValueError(
      f"interpret: found {interpret!r}, {backend} has no use for it"
    )
  rows = ragged.make_rows(T, table, kv_lens, cu_q_lens, (pages.count, size), 1)
  dtype, scale, scales = pages.kv.dtype, pages.scale, None
  where, taken = token_slots(rows, T, pages), _backend(backend, pages)
  if scale is not None:
    (k, k_scale), (v, v_scale) = quantize(k, dtype), quantize(v, dtype)
    scales = jnp.stack([k_scale, v_scale])
  new = jnp.concatenate([k.astype(dtype), v.astype(dtype)], axis=-1)
  if scale is not None:
    for n in (0, 1):
      scale = _put(scale, scales[n], where, n)
  if taken == "mosaic_tpu":
    kv = tpu.mosaic_tpu_append(pages.kv, new, rows, interpret)
  else:
    kv = _put(pages.kv, new, where)
  return Pages(kv, scale, H)


def _backend(backend: str, pages: Pages) -> str:
  """Resolves `backend`; raises if it cannot write `pages`."""
  dtype, group = pages.kv.dtype, tpu.group_size(pages.kv.dtype)
  uneven = (
    f"found {pages.size} tokens a page, expected a multiple of {group} in "
    f"{dtype}"
  )
  refusals = {
    "xla": None,
    "mosaic_tpu": uneven if pages.size % group else None,
  }
  if backend == "auto":
    kernel = "mosaic_tpu" if program_device()[0] == "tpu" else "xla"
    return kernel if refusals[kernel] is None else "xla"
  if backend not in refusals:
    raise ValueError(
      f"backend: found {backend!r}, available: auto, {', '.join(refusals)}"
    )
  if refusals[backend] is not None:
    raise ValueError(f"{backend}: {refusals[backend]}")
  return backend


def token_slots(
  rows: ragged.RaggedRows, tokens: int, pages: Pages
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
  """Returns the page and slot of each token; page `pages.count`, which does not
  exist, for tokens without one.

  Args:
    rows: The rows that the tokens belong to.
    tokens: T.
    pages: The pages to index.
  """
  row, position, live = ragged.token_positions(rows, tokens)
  inside = live & (position >= 0)
  inside &= position < rows.table.shape[1] * pages.size
  position = jnp.where(inside, position, 0)
  page = rows.table[row, position // pages.size]
  inside &= page >= 0
  return jnp.where(inside, page, pages.count), position % pages.size


def _put(old, new, where, *axes):
  """Writes tokens into an array of pages, dropping those without a page."""
  page, slot = where
  return old.at[page, *axes, :, slot].set(new, mode="drop")


def gather_pages(
  pages: Pages, table: Int[Array, "R W"], dtype: Any
) -> tuple[Float[Array, "R S K H"], Float[Array, "R S K Hv"]]:
  """Gathers keys and values of whole table rows, S = W size, for references.

  Args:
    pages: Pages of one layer.
    table: Pages of each row; invalid entries count as page 0.
    dtype: Dtype of the result.
  """
  inside = (table >= 0) & (table < pages.count)
  table = jnp.where(inside, table, 0)

  kv = pages.kv[table].astype(dtype)  # [R, W, K, size, H + Hv]
  parts = kv[..., : pages.head_dim], kv[..., pages.head_dim :]
  if pages.scale is not None:
    scale = jnp.moveaxis(pages.scale[table], 2, 0).astype(dtype)
    parts = tuple(x * y[..., None] for x, y in zip(parts, scale, strict=True))
  R, W, K, size, _ = kv.shape
  return tuple(
    x.swapaxes(2, 3).reshape(R, W * size, K, x.shape[-1]) for x in parts
  )
