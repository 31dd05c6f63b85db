"""Where prompts, gaps and answers lie in rows, in few different shapes.

A program is compiled for each number of places in a row. So rows are padded,
prompts on the left and what follows the last gap on the right, until they have
one of few lengths. Padding has no position, and nothing sees it: tokens have
the positions that they have without it, from 0.
"""

import dataclasses

import numpy as np

from research.rounding import next_power_of_two
from research.typing import Bool, Int, UserError

LEAST = 64
"""Places of the shortest rows; shorter ones cost little anyway."""


def check_prompts(prompts: list[list[int]], mask_id: int) -> None:
  """Raises UserError if there is no prompt, or one holds the mask."""
  if not prompts:
    raise UserError("sampler: no prompts")
  for i, prompt in enumerate(prompts, 1):
    if mask_id in prompt:
      raise UserError(
        f"sampler: prompt {i} holds the mask, id {mask_id}; rows with gaps are "
        "for sampler.begin"
      )


def bucket(n: int, least: int = LEAST) -> int:
  """Returns the least of 64, 96, 128, 192, 256, 384, .. that is no less.

  Args:
    n: places that are needed.
    least: the first of them, a power of two.
  """
  top = max(least, next_power_of_two(n))
  middle = top * 3 // 4
  return middle if max(n, least) <= middle else top


def round_up(n: int, block: int) -> int:
  """Returns the least multiple of `block` that is no less than `n`."""
  return -(-n // block) * block


def width(longest: int, length: int, block: int = 1) -> int:
  """Returns how many places rows have for prompts: as many as a bucket leaves.

  Args:
    longest: of the prompts.
    length: places that follow.
    block: what the width is a multiple of, where blocks start with the row.
  """
  return round_up(max(bucket(longest + length) - length, longest), block)


@dataclasses.dataclass(frozen=True)
class PaddedRows:
  """Rows, as `sampler.begin` takes them.

  Attributes:
    tokens, masked, valid: `[B, T]`.
    starts: the index of each row's first token.
    heads: that of its first mask.
  """

  tokens: Int[np.ndarray, "B T"]
  masked: Bool[np.ndarray, "B T"]
  valid: Bool[np.ndarray, "B T"]
  starts: list[int]
  heads: list[int]

  @property
  def prompt(self) -> Bool[np.ndarray, "B T"]:
    """What stands before each row's first mask."""
    place = np.arange(self.tokens.shape[1])
    return self.valid & (place < np.array(self.heads)[:, None])


def first_mask(row: list[int], mask_id: int) -> int:
  """Returns how many tokens stand before the first mask."""
  return row.index(mask_id)


def pad_rows(
  rows: list[list[int]],
  mask_id: int,
  length: int,
  width: int,
  block: int = 1,
) -> PaddedRows:
  """Returns rows whose first masks stand where the last `length` places begin.

  Args:
    rows: ids, with masks in what is to be filled, at least one a row.
    mask_id: of the mask.
    length: places from there on, at least as many as any row needs.
    width: places before, see `width`.
    block: tokens of a block, where blocks start with the row: the first mask
      then stands in the first block of those places, wherever in it.
  """
  tokens = np.zeros((len(rows), width + length), np.int32)
  valid = np.zeros(tokens.shape, bool)
  starts, heads = [], []
  for out, ok, row in zip(tokens, valid, rows, strict=True):
    known = first_mask(row, mask_id)
    begin = width - known // block * block
    if begin < 0 or begin + len(row) > out.size:
      raise ValueError(f"a row of {len(row)}, {known} known: no room")
    out[begin : begin + len(row)] = row
    ok[begin : begin + len(row)] = True
    starts.append(begin)
    heads.append(begin + known)
  return PaddedRows(tokens, valid & (tokens == mask_id), valid, starts, heads)
