"""A cache of all that lies before a block, for models that see both ways."""

import dataclasses

import jax
import jax.numpy as jnp

from research.diffusion.sampling import layout
from research.diffusion.sampling.denoiser import FirstStepCache, ends


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixCache(FirstStepCache):
  """Later steps of a block read the block and all that is behind it.

  Keys and values of all before the block, finished blocks included, are those
  of its first step: the prefix cache of Wu et al. 2025 (Fast-dLLM,
  arXiv:2505.22618), an approximation as `BlockCache` is.

  Shapes are static, so a call reads 1, 2, 3, 4, 6, 8, 12, .. times a block's
  places, the fewest that reach the last text's end; the rest is padding. It is
  one program with a branch for each, which blocks share.

  Attributes:
    model: the Transformer; all tokens see all.
    shift: see `own_rows`.
    time: by the masks of a row, for models that are conditioned on it.
  """

  def step(self, params, tokens, valid, start, size, carry):
    spans = self.spans(size, tokens.shape[1])
    need = jnp.maximum(ends(valid).max() - start, size)
    chosen = sum((need > n).astype(jnp.int32) for n in spans)
    # A call may read beyond the end of the rows.
    longer = [jnp.pad(x, ((0, 0), (0, spans[-1]))) for x in (tokens, valid)]

    def reading(span):
      given = params, *longer, start, size, carry
      return lambda: self.states(*given, low=start, span=span)

    own, carry = jax.lax.switch(chosen, [reading(n) for n in spans])
    logits = self.model.apply({"params": params}, own, method="logits")
    return logits, carry

  @staticmethod
  def spans(size: int, length: int) -> list[int]:
    """Returns how many places a call may read, ascending.

    Args:
      size: places of a block.
      length: of a row.
    """
    blocks = range(1, -(-length // size) + 1)
    return sorted({min(size * layout.bucket(n, 1), length) for n in blocks})
