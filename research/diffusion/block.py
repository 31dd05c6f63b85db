"""Block diffusion: blocks from left to right, diffusion inside each.

Arriola et al. 2025 (BD3-LM, arXiv:2503.09573): p(x) is a product over blocks,
each bounded by masked diffusion given the clean blocks before it. One pass over
`[noisy, clean]`, both at the same positions, gives all blocks at once: a noisy
token sees its own noisy block and the clean blocks before it, a clean one the
clean blocks up to its own. A block of one token is autoregression; one of the
whole row is plain diffusion.
"""

import dataclasses

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.diffusion import process
from research.diffusion.batch_transforms import BatchTransform
from research.diffusion.objective import Noise, masked_sums
from research.generation.sampling import row_keys
from research.nn import output_head
from research.nn.transformer import Transformer
from research.ranges import PositiveInt, Ranged
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusion(Ranged):
  """The bound of block diffusion, each block at a time of its own.

  Attributes:
    model: the network; an experiment fills it in once it is loaded.
    mask_id: the token that hides others.
    block: tokens of a block; blocks start where documents do.
    low, high: a block's time, which is the share of masks, lies between;
      a narrower range has less variance, and is no bound. A masked token counts
      one over its block's time, or 1 if `low` is above a half, as in the
      authors' code. Blocks of one token are always masked.
    noise: which tokens may be masked, see `MaskedDiffusion`.
    shift: whether a token is predicted by the state before it, as in models
      that began autoregressive. A block's first token is predicted by the last
      clean state before it, which the clean half holds; a document's first
      token has its own state alone, and is not trained.
    never_mask: whether the mask has no probability, whatever the head says.
    rows: rows of logits held at a time.
    batch_transforms: of each batch, in order, before anything is masked.
  """

  model: Transformer | None = None
  mask_id: int = -1
  block: PositiveInt = 32
  low: float = 1e-3
  high: float = 1.0
  noise: Noise = "all"
  shift: bool = False
  never_mask: bool = True
  rows: int = 256
  batch_transforms: tuple[BatchTransform, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if not 0 < self.low <= self.high <= 1:
      raise UserError(
        f"BlockDiffusion: low is {self.low} and high {self.high}, expected "
        "0 < low <= high <= 1"
      )

  @property
  def rearranged(self) -> str:
    """What the network reads; see `Rearranges`."""
    return "each row twice"

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of loss, of weights, and of masks."""
    params = weights.bind(params, key=key)
    for transform in self.batch_transforms:
      batch = transform(batch, key)
    drawn = process.drawing(key, batch["tokens"])
    tokens, maskable = batch["tokens"], self.maskable(batch)
    masked, counts = self.draw(drawn, maskable, batch["positions"])
    time = None
    if self.model.time_embedding is not None:
      time = self.times(drawn, batch["positions"])
    hidden, head = self.states(params, batch, masked, time)
    weight = maskable.sum()
    return masked_sums(self, head, hidden, tokens, masked, counts, weight)

  def maskable(self, batch: Batch) -> Bool[Array, "B T"]:
    """Returns which tokens may be masked."""
    real = batch["segments"] >= 0
    if self.shift:
      real &= batch["positions"] > 0
    if self.noise == "all":
      return real
    before = process.learned(batch["weights"])
    return real & before & (batch["positions"] > 0)

  def draw(
    self,
    key: PRNGKey,
    maskable: Bool[Array, "B T"],
    positions: Int[Array, "B T"],
  ) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
    """Returns what is masked, and what each masked token counts.

    Times of a row's blocks are spread evenly from a draw of the row's own.
    """
    if self.block == 1:
      return maskable, jnp.ones(maskable.shape)
    first, second, third = jax.random.split(key, 3)
    t = self._times(first, third, positions)
    keys = row_keys(second, jnp.arange(maskable.shape[0]))
    masked = process.mask_each(keys, maskable, t)
    counts = jnp.ones_like(t) if self.low > 0.5 else 1 / t
    return masked, counts

  def times(
    self, key: PRNGKey, positions: Int[Array, "B T"]
  ) -> Float[Array, "B T"]:
    """Returns the time of each token's block, of the draw by that key."""
    if self.block == 1:
      return jnp.ones(positions.shape)
    first, _, third = jax.random.split(key, 3)
    return self._times(first, third, positions)

  def _times(self, first, third, positions):
    rows, length = positions.shape
    place = jnp.arange(length)
    start = jnp.maximum(place - positions % self.block, 0)
    # Padding begins none, or it would take most of the times of a short row.
    start = jnp.where(positions < 0, length, start)
    # The n-th block of a row, of documents too that begin within it.
    fresh = jax.vmap(lambda s: jnp.zeros(length).at[s].set(1.0, mode="drop"))(
      start
    )
    number = jnp.maximum(jnp.cumsum(fresh, axis=-1) - 1, 0)
    keys = row_keys(first, jnp.arange(rows))
    u = jax.vmap(lambda k: jax.random.uniform(k, ()))(keys)
    blocks = jnp.maximum(number.max(-1, keepdims=True) + 1, 1)
    # In no order, or a row's last block would always be its noisiest.
    order = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(
      row_keys(third, jnp.arange(rows))
    )
    order = jnp.where(place < blocks, order, 2.0)
    order = process.ranks(order)
    number = jnp.take_along_axis(order, number.astype(int), axis=-1)
    u = (u[:, None] + number / blocks) % 1
    return self.low + (self.high - self.low) * (1 - u)

  def states(
    self,
    params: Params,
    batch: Batch,
    masked: Bool[Array, "B T"],
    time: Float[Array, "B T"] | None = None,
  ) -> tuple[Float[Array, "B T D"], Params]:
    """Returns the states that predict each place's token, see `output_head`.

    Args:
      params: of the model.
      batch: rows.
      masked: what is hidden in their noisy copy.
      time: of each token's block, for a conditioned model; clean copies
        are at time 0.
    """
    tokens, positions = batch["tokens"], batch["positions"]
    noisy = process.noisy(tokens, masked, self.mask_id)
    both = copies(noisy, tokens, positions, batch["segments"], self.block)
    hidden, head = output_head.head_inputs(
      self.model, params, *both, time=times(time)
    )
    return predicting(hidden, positions, self.block, self.shift), head


def copies(
  noisy: Int[Array, "B T"],
  clean: Int[Array, "B T"],
  positions: Int[Array, "B T"],
  segments: Int[Array, "B T"],
  block: int,
) -> tuple[Int[Array, "B S"], Int[Array, "B S"], Mask]:
  """Returns tokens, positions and mask of one pass over `[noisy, clean]`.

  Args:
    noisy, clean: the two copies; S is 2 T.
    positions, segments: of either.
    block: tokens of a block.
  """
  tokens, positions, segments = (
    jnp.concatenate(x, axis=1)
    for x in ((noisy, clean), (positions,) * 2, (segments,) * 2)
  )
  length = noisy.shape[1]
  mask = Mask.block_diffusion(length, block, segments, positions)
  return tokens, positions, mask


def times(noisy: Float[Array, "B T"] | None) -> Float[Array, "B S"] | None:
  """Returns the times of both copies: clean ones are at 0; None of None."""
  if noisy is None:
    return None
  return jnp.concatenate([noisy, jnp.zeros_like(noisy)], axis=1)


def predicting(
  hidden: Float[Array, "B S D"],
  positions: Int[Array, "B T"],
  block: int,
  shift: bool,
) -> Float[Array, "B T D"]:
  """Returns the states that predict each place's own token, see `shift`.

  Args:
    hidden: of `copies`.
    positions: of either.
    block: tokens of a block.
    shift: of `BlockDiffusion`.
  """
  noisy, clean = jnp.split(hidden, 2, axis=1)
  if not shift:
    return noisy

  def before(x):
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]

  first = (positions % block == 0)[..., None]
  shifted = jnp.where(first, before(clean), before(noisy))
  # What is before a document is padding, or another one.
  return jnp.where((positions == 0)[..., None], noisy, shifted)
