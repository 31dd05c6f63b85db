"""What `generate` calls tokens a second: those before a row's first end."""

import numpy as np
import pytest

from experiments.generating import diffusion, unmask_display
from research.diffusion.sampling import layout, sampler
from research.diffusion.sampling.config import SamplerConfig
from research.diffusion.sampling.sampler import Sampled
from research.generation.sampling import GREEDY
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from tests import support

END, BLOCK = 9, 4
WIDTH = layout.width(2, 2 * BLOCK)


class Words:
  def decode(self, ids, **_):
    return " ".join(map(str, ids))


class Clock(unmask_display.UnmaskDisplay):
  """Two blocks of two rows, the first after a second, the other after three."""

  seconds = 0.0
  blocks = ((1.0, [BLOCK, BLOCK]), (3.0, [2 * BLOCK, 2 * BLOCK]))

  def __init__(self, *_):
    pass


@pytest.mark.parametrize(
  ("made", "counts", "rate"),
  [
    # Six and eight tokens, of which two and four after the first block.
    ([[1] * 6 + [END] * 2, [1] * 8], [6, 8], 6 / 2),
    # An end in the first block: all after it is padding, and no speed.
    ([[1, END] + [END] * 6, [1] * 8], [1, 8], 4 / 2),
    ([[END] + [1] * 7, [END] * 8], [0, 0], 0.0),
  ],
)
def test_tokens_after_an_end_are_no_speed(monkeypatch, made, counts, rate):
  tokens = np.concatenate([np.full((2, WIDTH), 3), made], axis=1)
  filled = np.zeros(tokens.shape, np.int32)
  lengths = np.array(counts, np.int32)
  found = Sampled(tokens, filled, 8, np.array([8, 8]), lengths)
  monkeypatch.setattr(diffusion, "UnmaskDisplay", Clock)
  monkeypatch.setattr(sampler, "sample", lambda *_: found)
  monkeypatch.setattr(diffusion, "make_denoiser", lambda *_: None)
  loaded = Loaded(support.model(), {}, Words(), {})
  spec, config = Spec(mask_id=10, end=(END,)), SamplerConfig(length=2 * BLOCK)
  rows, shared = diffusion.fill(loaded, spec, [[3, 3]] * 2, GREEDY, config)
  assert [row["tokens"] for row in rows] == counts
  assert [row["tokens_per_call"] for row in rows] == [n / 8 for n in counts]
  assert shared["tokens_per_s"] == pytest.approx(rate)
