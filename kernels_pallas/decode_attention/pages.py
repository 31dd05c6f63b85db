"""Pages of keys and values: memory that sequences of any length share.

A sequence owns whole pages, named by its row of a page table, in any order;
token t of it lies in slot t % size of page `table[row, t // size]`.

The layout is `[pages, K, size, H + Hv]`: tokens in sublanes, and the key and
the value of a token side by side in lanes. A page of one head is then a matrix
that a TPU multiplies with as it was copied, where heads in sublanes (`[pages,
size, 2K, H]`, as in ragged paged attention) have to be picked apart first. A
page of all heads, keys and values, is one contiguous copy, on a device that
holds some of the heads, too. And heads of dim 64 fill the 128 lanes of a
register, where keys and values apart would be padded to twice their size, in a
copy of all pages for every call.

Quantized pages (int8 or float8_e4m3fn) have scales for each token and head,
not for each page: a token is rounded once, when it is written, whatever comes
after it. Scales of a page lie in lanes, as its scores do: they multiply scores
and probabilities, never keys and values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.common.target_platform import device
from kernels_pallas.decode_attention import ragged
from kernels_pallas.decode_attention.tpu.mosaic_tpu_append import (
  group_size,
  mosaic_tpu_append,
)

LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
"""Quantized dtypes, and their largest number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """Pages of one layer, or of a run of layers behind leading axes.

  Attributes:
    kv: `[pages, K, size, H + Hv]`, a token's key and then its value.
    scale: float32 `[pages, 2, K, size]` of keys and of values, which are `kv`
      times their scale, if it is quantized; else None.
    head_dim: H.
  """

  kv: Any
  scale: Any = None
  head_dim: int = dataclasses.field(default=0, metadata=dict(static=True))

  @property
  def size(self) -> int:
    """Tokens a page."""
    return self.kv.shape[-2]

  @property
  def count(self) -> int:
    """Pages, live or not."""
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
  """Pages of zeros.

  A TPU takes sizes that are multiples of 8 tokens in float32, 16 in bfloat16
  and, for their scales' sake, 128 in int8 and float8.

  Args:
    count: Pages.
    kv_heads: K.
    size: Tokens a page.
    head_dim: H.
    dtype: A float dtype, int8 or float8_e4m3fn.
    v_head_dim: Hv, by default H.

  Raises:
    ValueError: A size below 1.
  """
  if min(count, kv_heads, size, head_dim) < 1:
    raise ValueError(
      f"pages: found {count} pages, {kv_heads} heads, {size} tokens, head dim "
      f"{head_dim}; expected at least 1 of each"
    )
  width = head_dim + (v_head_dim or head_dim)
  scale = None
  if jnp.dtype(dtype) in LARGEST:
    scale = jnp.zeros((count, 2, kv_heads, size), jnp.float32)
  kv = jnp.zeros((count, kv_heads, size, width), dtype)
  return Pages(kv, scale, head_dim)


def quantize(
  x: Float[Array, "*T H"], dtype: Any
) -> tuple[Array, Float[Array, "*T"]]:
  """`x` in `dtype`, with the largest number of each vector kept exactly.

  Args:
    x: Keys or values.
    dtype: A key of `LARGEST`.

  Returns:
    The rounded numbers and a float32 scale for each vector; their product is
    `x`, within half a step. A vector of zeros has scale 0.
  """
  most = LARGEST[jnp.dtype(dtype)]
  x = x.astype(jnp.float32)
  scale = jnp.max(jnp.abs(x), axis=-1) / most
  x = x / jnp.where(scale == 0, 1, scale)[..., None]
  # Division may round beyond the largest number, which float8 has no inf for.
  x = jnp.clip(x, -most, most)
  if jnp.dtype(dtype) == jnp.int8:
    x = jnp.round(x)
  return x.astype(dtype), scale


def check_pages(pages: Pages) -> None:
  """Raises ValueError unless shapes and dtypes of `pages` fit together."""
  kv, scale, H = pages.kv, pages.scale, pages.head_dim
  if kv.ndim != 4 or 0 in kv.shape or not 0 < H < kv.shape[3]:
    raise ValueError(
      f"pages: found kv {kv.shape} of head dim {H}, expected [pages, K, size, "
      "H + Hv] and no 0"
    )
  wanted = None
  if kv.dtype in LARGEST:
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
  """The pages with new tokens at the ends of their sequences.

  Takes what `paged_attention` takes afterwards: tokens `cu_q_lens[r]` to
  `cu_q_lens[r + 1]` become the last of the `kv_lens[r]` of row r. In place
  where the pages are donated; tokens after the last row's are not written, nor
  is anything outside the pages.

  Args:
    pages: Of one layer.
    k: New keys.
    v: New values.
    table: Pages of each row.
    kv_lens: Tokens of each row, the new ones included.
    cu_q_lens: Where each row's tokens start, and where the last one's end; by
      default a token a row.
    backend: 'xla', whose scatter is in place on CPUs and GPUs; 'mosaic_tpu'
      (which writes within the pages, wherever tables lead); or 'auto': the
      kernel for TPUs where a page is a whole number of registers, else 'xla'.
    interpret: Of the kernel, as of `pl.pallas_call`; runs it anywhere.

  Raises:
    ValueError: Shapes that do not fit, or (where values are known) tokens that
      have no page.
  """
  check_pages(pages)
  _, K, size, width = pages.kv.shape
  T, H, Hv = k.shape[0], pages.head_dim, width - pages.head_dim
  if k.shape != (T, K, H) or v.shape != (T, K, Hv):
    raise ValueError(
      f"append_to_pages: found k {k.shape}, v {v.shape}, expected "
      f"{(T, K, H)} and {(T, K, Hv)}"
    )
  rows = ragged.rows(T, table, kv_lens, cu_q_lens, (pages.count, size), 1)
  dtype, scale, scales = pages.kv.dtype, pages.scale, None
  where, taken = places(rows, T, pages), _backend(backend, pages)
  if scale is not None:
    (k, k_scale), (v, v_scale) = quantize(k, dtype), quantize(v, dtype)
    scales = jnp.stack([k_scale, v_scale])
  new = jnp.concatenate([k.astype(dtype), v.astype(dtype)], axis=-1)
  if scale is not None:
    for n in (0, 1):
      scale = _put(scale, scales[n], where, n)
  if taken == "mosaic_tpu":
    kv = mosaic_tpu_append(pages.kv, new, rows, interpret)
  else:
    kv = _put(pages.kv, new, where)
  return Pages(kv, scale, H)


def _backend(backend: str, pages: Pages) -> str:
  """What `backend` stands for here; raises where it cannot write `pages`."""
  dtype, group = pages.kv.dtype, group_size(pages.kv.dtype)
  uneven = (
    f"found {pages.size} tokens a page, expected a multiple of {group} in "
    f"{dtype}"
  )
  refusals = {
    "xla": None,
    "mosaic_tpu": uneven if pages.size % group else None,
  }
  if backend == "auto":
    kernel = "mosaic_tpu" if device()[0] == "tpu" else "xla"
    return kernel if refusals[kernel] is None else "xla"
  if backend not in refusals:
    raise ValueError(
      f"backend: found {backend!r}, available: auto, {', '.join(refusals)}"
    )
  if refusals[backend] is not None:
    raise ValueError(f"{backend}: {refusals[backend]}")
  return backend


def places(
  rows: ragged.Rows, tokens: int, pages: Pages
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
  """Page and slot of each token; page `pages.count`, which there is not, for
  tokens that have none.

  Args:
    rows: Whose they are.
    tokens: T.
    pages: That they are for.
  """
  row, position, live = ragged.places(rows, tokens)
  inside = live & (position >= 0)
  inside &= position < rows.table.shape[1] * pages.size
  position = jnp.where(inside, position, 0)
  page = rows.table[row, position // pages.size]
  inside &= page >= 0
  return jnp.where(inside, page, pages.count), position % pages.size


def _put(old, new, where, *axes):
  """What tokens have, written into an array of pages; nowhere is dropped."""
  page, slot = where
  return old.at[page, *axes, :, slot].set(new, mode="drop")


def dense(
  pages: Pages, table: Int[Array, "R W"], dtype: Any
) -> tuple[Float[Array, "R S K H"], Float[Array, "R S K Hv"]]:
  """Keys and values of whole rows of the table, S = W size: for references.

  Args:
    pages: Of one layer.
    table: Pages of each row; others than there are count as page 0.
    dtype: Of the result.
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
