"""Rows to look at while `generate --sampler=diffusion` fills them."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from research.diffusion.sampling import sampler, visualize

FRAME = 0.03
"""Seconds that a terminal shows a frame for."""


class UnmaskDisplay:
  """Shows a row as its blocks are filled; on a terminal step by step.

  Several rows are only timed.

  Attributes:
    seconds: spent here.
    blocks: after each, when it was, and how many places of each row are filled.
  """

  def __init__(
    self,
    tokenizer: Any,
    first_shown: list[int],
    mask_id: int,
    kept: Callable[[np.ndarray], np.ndarray] | None = None,
  ):
    """Sets where rows begin to be shown.

    Args:
      first_shown: each row's first place that is shown.
      kept: what of the row's tokens is text; by default all. A terminal, which
        shows what steps do, shows the others, too.
    """
    self._tokenizer, self._mask = tokenizer, mask_id
    self._first_shown, self._kept = first_shown, kept
    self._tty = sys.stdout.isatty()
    self._columns = shutil.get_terminal_size().columns
    self._above, self._last, self._written = 0, -1, 0
    self.seconds = 0.0
    self.blocks: list[tuple[float, list[int]]] = []

  @property
  def draws(self) -> bool:
    """Whether a terminal shows steps, each drawn over the one before."""
    return self._tty and len(self._first_shown) == 1

  def __call__(self, state: sampler.State) -> None:
    jax.block_until_ready(state)
    begin = time.perf_counter()
    filled = np.asarray(state.filled)
    ready = [
      int((row[first:] >= 0).sum())
      for row, first in zip(filled, self._first_shown, strict=True)
    ]
    self.blocks.append((begin - self.seconds, ready))
    if len(self._first_shown) > 1:
      return
    # Of a canvas that grows, what it is now.
    own = np.flatnonzero(np.asarray(state.valid)[0])
    own = own[own >= self._first_shown[0]]
    if self._kept is not None and not self._tty:
      own = own[self._kept(np.asarray(state.tokens)[0])[own]]
    filled, tokens, open_ = (
      np.asarray(x)[0, own] for x in (filled, state.tokens, state.masked)
    )
    if self._tty:
      self._draw(tokens, filled, open_)
    else:
      # To the first mask: characters may need tokens of the next block.
      ready = int(np.argmax(open_)) if open_.any() else len(tokens)
      text = self._tokenizer.decode(tokens[:ready].tolist())
      if not text.endswith("�") or ready == len(tokens):
        print(text[self._written :], end="", flush=True)
        self._written = len(text)
    self.seconds += time.perf_counter() - begin

  def _draw(self, tokens, filled, open_):
    pieces = visualize.shown(pieces_of(self._tokenizer, tokens, self._mask))
    filled = np.where(open_, np.iinfo(np.int32).max, filled)
    for now in visualize.calls(np.where(open_, -1, filled)):
      if now <= self._last:
        continue
      text, self._above = visualize.redrawn(
        visualize.frame(pieces, filled, now),
        f"step {now + 1}",
        self._above,
        self._columns,
      )
      print(text, end="", flush=True)
      self._last = now
      time.sleep(FRAME)


def pieces_of(tokenizer: Any, tokens: Any, mask_id: int) -> list[str]:
  """Returns the text of each token."""
  return [
    visualize.HIDDEN
    if i == mask_id
    else tokenizer.decode([int(i)], skip_special=False)
    for i in tokens
  ]
