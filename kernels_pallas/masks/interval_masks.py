"""Masks of intervals, built from what a caller knows about its tokens.

Pure functions of arrays with static shapes, so batches of any images, prefixes
and trees run one compiled program. Segments compose with all of them: packed
sequences see nothing of each other, whatever the intervals say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from kernels_pallas.common import arguments
from kernels_pallas.masks.function_masks import MAX_INTERVALS, Window
from kernels_pallas.masks.masks import Mask, Segments


def autoregressive_blocks(
  mask_ar: Int[Array, "#b t"],
  window: Window | None = None,
  segments: Segments | None = None,
  start: Int[Array, " b"] | None = None,
) -> Mask:
  """Tokens see all earlier blocks, and all of their own.

  With c = cumsum(mask_ar), key k is visible to query q iff c_k <= c_q: the rule
  of big_vision's PaliGemma (Beyer et al. 2024, arXiv:2407.07726). Ones alone
  are causal attention; zeros before ones are a prefix (kernels_pallas/MATH.md
  9.1).

  Args:
    mask_ar: 1 where a block begins, 0 where one goes on.
    window: As in `Mask.intervals`.
    segments: As in `Mask.intervals`.
    start: Tokens that a cache has of each row before these; all are visible.
  """
  hi = _block_ends(mask_ar != 0)
  if start is not None:
    hi = hi + start[:, None]
  bounds = jnp.stack([jnp.zeros_like(hi), hi], axis=1)
  return Mask.intervals(bounds, window, segments)


def image_blocks(
  images: Int[Array, "#b t"],
  window: Window | None = None,
  segments: Segments | None = None,
  start: Int[Array, " b"] | None = None,
) -> Mask:
  """Causal text in which the tokens of an image see each other.

  The masks of Gemma 3 (arXiv:2503.19786), in whose local layers the window
  applies to images as well, and of PaliGemma without its prefix.

  Args:
    images: Which image a token belongs to, negative for text. An image is a
      run of equal ids, at most as long as one call: it cannot be cut in pieces.
    window: As in `Mask.intervals`.
    segments: As in `Mask.intervals`.
    start: As in `autoregressive_blocks`.
  """
  begins = (images < 0) | _changes(images)
  return autoregressive_blocks(
    begins.astype(jnp.int32), window, segments, start
  )


def prefix_blocks(
  prefix: Int[Array, " b"],
  length: int,
  window: Window | None = None,
  segments: Segments | None = None,
) -> Mask:
  """`Mask.prefix_lm` by index, as intervals.

  Args:
    prefix: Tokens of each row that all queries see.
    length: T, tokens of each row.
    window: As in `Mask.intervals`.
    segments: As in `Mask.intervals`.
  """
  after = jnp.arange(length) >= prefix[:, None]
  return autoregressive_blocks(after.astype(jnp.int32), window, segments)


def bidirectional_tokens(
  marked: Bool[Array, "#b t"], segments: Segments | None = None
) -> Mask:
  """Causal, except that all marked tokens of a row see each other.

  The rule of Molmo 2 (arXiv:2601.10611), whose vision tokens see those of later
  images too. However many runs they form, two intervals are enough: the keys'
  coordinates number marked tokens from 0 and others from T
  (kernels_pallas/MATH.md 9.2). These are not positions, so the mask takes
  neither a window nor a cache with tokens in it.

  Args:
    marked: The tokens of all images.
    segments: As in `Mask.intervals`.
  """
  T = marked.shape[1]
  ours = jnp.cumsum(marked, axis=1, dtype=jnp.int32)
  others = T + jnp.cumsum(~marked, axis=1, dtype=jnp.int32)
  first = jnp.zeros_like(ours)
  bounds = [first, jnp.where(marked, T, ours), first + T, others]
  return Mask.intervals(
    jnp.stack(bounds, axis=1),
    segments=segments,
    kv_positions=jnp.where(marked, ours, others) - 1,
  )


def latest_image(
  marks: Bool[Array, "#b t"],
  sizes: Int[Array, "#b m"],
  segments: Segments | None = None,
  before: Int[Array, " b"] | None = None,
) -> Mask:
  """Cross-attention of text to the last image that came before it.

  Flamingo's mask (Alayrac et al. 2022, arXiv:2204.14198, section 2.3). Tokens
  before the first image see nothing, and get output 0; so do those after an
  image for which `sizes` has no column.

  Args:
    marks: Where an image stands in the text; that token sees the image.
    sizes: Keys of each image, which follow each other in S; 0 for none.
    segments: As in `Mask.intervals`, a pair.
    before: Images that each row had in earlier calls, for decoding.
  """
  count = jnp.cumsum(marks, axis=1, dtype=jnp.int32)
  if before is not None:
    count = count + before[:, None]
  edges = jnp.pad(jnp.cumsum(sizes, axis=1), ((0, 0), (1, 0)))
  known = (count > 0) & (count < edges.shape[1])
  lo, hi = (
    jnp.take_along_axis(edges, jnp.where(known, count - back, 0), axis=1)
    for back in (1, 0)
  )
  # T and S count different things: without an offset, T > S would be refused
  # where queries are sharded.
  return Mask.intervals(
    jnp.stack([lo, hi], axis=1), segments=segments, offset=0
  )


def message_tree(
  nodes: Int[Array, "#b t"],
  parents: Int[Array, "#b m"],
  depth: int,
  mask_ar: Int[Array, "#b t"] | None = None,
  segments: Segments | None = None,
) -> Mask:
  """Tokens see their own message causally, and all messages above it.

  One sequence then serves many that share a prefix: annotations of one image
  (message trees of Molmo 2, arXiv:2601.10611), answers to one prompt, steps of
  a search. `parents = [[-1, 0, 0, 0]]` are three branches of one prefix. Rotary
  positions are `tree_positions`. A window would count the tokens of other
  branches, so the mask takes none, nor a cache with tokens in it.

  Args:
    nodes: Message of each token, negative for padding, as is a number that
      `parents` does not have. The tokens of a message are consecutive.
    parents: Message above each one, of a lower number; negative for none.
    depth: Messages on the longest way up, at most `MAX_INTERVALS`.
    mask_ar: As in `autoregressive_blocks`, within each message; by default
      ones.
    segments: As in `Mask.intervals`.

  Raises:
    ValueError: The depth is out of range, or (where the parents are known
      before the program runs) a way up is longer or not downward in number.
  """
  _check_tree(parents, depth)
  nodes = _known(nodes, parents)
  begins = _changes(nodes)
  if mask_ar is not None:
    begins |= mask_ar != 0
  else:
    begins = jnp.ones_like(begins)
  (own, _), *above = _ways_up(nodes, parents, depth)
  ends = jnp.where(nodes >= 0, _block_ends(begins), 0)
  bounds = [own, ends, *(x for pair in above for x in pair)]
  return Mask.intervals(
    jnp.stack(bounds, axis=1),
    segments=segments,
    # Coordinates that say they are no positions.
    kv_positions=jnp.arange(nodes.shape[1], dtype=jnp.int32)[None],
  )


def tree_positions(
  nodes: Int[Array, "#b t"], parents: Int[Array, "#b m"], depth: int
) -> Int[Array, "b t"]:
  """Returns how many tokens of its message and those above precede each token.

  Args:
    nodes: As in `message_tree`; the position of padding is -1.
    parents: As in `message_tree`.
    depth: As in `message_tree`.
  """
  _check_tree(parents, depth)
  nodes = _known(nodes, parents)
  (own, _), *above = _ways_up(nodes, parents, depth)
  place = jnp.arange(nodes.shape[1]) - own + sum(hi - lo for lo, hi in above)
  return jnp.where(nodes >= 0, place, -1)


def _block_ends(begins: Bool[Array, "b t"]) -> Int[Array, "b t"]:
  """Returns one past the last token of each token's block."""
  T = begins.shape[1]
  index = jnp.where(begins, jnp.arange(T, dtype=jnp.int32), T)
  later = jnp.pad(index[:, 1:], ((0, 0), (0, 1)), constant_values=T)
  return jax.lax.cummin(later, axis=1, reverse=True)


def _changes(ids: Int[Array, "b t"]) -> Bool[Array, "b t"]:
  """Marks tokens whose id is not that of the token before."""
  return jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))


def _known(nodes, parents) -> Int[Array, "b t"]:
  """Marks tokens of messages that `parents` does not have as padding."""
  return jnp.where(nodes < parents.shape[1], nodes, -1)


def _ways_up(nodes, parents, depth: int) -> list[tuple[Array, Array]]:
  """Returns (first, one past the last) index of messages, own first."""
  B = max(nodes.shape[0], parents.shape[0])
  nodes = jnp.broadcast_to(nodes, (B, nodes.shape[1]))
  parents = jnp.broadcast_to(parents, (B, parents.shape[1]))
  return jax.vmap(functools.partial(_row_up, depth=depth))(nodes, parents)


def _row_up(nodes, parents, depth: int) -> list[tuple[Array, Array]]:
  """`_ways_up` for one row."""
  T, M = len(nodes), len(parents)
  index = jnp.arange(T, dtype=jnp.int32)
  home = jnp.where(nodes >= 0, nodes, M)  # outside: dropped
  first = jnp.full(M, T, jnp.int32).at[home].min(index, mode="drop")
  stop = jnp.zeros(M, jnp.int32).at[home].max(index + 1, mode="drop")
  found = []
  for _ in range(depth):
    # A message without tokens is an empty interval.
    lo, hi = (jnp.where(nodes >= 0, x[nodes], 0) for x in (first, stop))
    found.append((jnp.minimum(lo, hi), hi))
    nodes = jnp.where(nodes >= 0, parents[nodes], -1)
  return found


def _check_tree(parents: Array, depth: int) -> None:
  if not 1 <= depth <= MAX_INTERVALS:
    raise ValueError(
      f"tree depth: found {depth}, expected 1 to {MAX_INTERVALS}, as many "
      "intervals as kernels support"
    )
  if not arguments.has_values(parents):
    return
  above = np.asarray(parents)
  own = np.arange(above.shape[1])
  if (above >= own).any():
    raise ValueError(
      f"tree parents: found {above.tolist()}, expected each below its own index"
    )
  levels = np.ones_like(above)
  for n in own:
    up = np.take_along_axis(levels, np.maximum(above[:, n : n + 1], 0), 1)
    levels[:, n] = np.where(above[:, n] < 0, 1, up[:, 0] + 1)
  if levels.max(initial=1) > depth:
    raise ValueError(
      f"tree depth: found {depth}, expected {levels.max()}, the messages on "
      "the longest way up"
    )
