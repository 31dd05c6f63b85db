"""The masked diffusion objective: LLaDA's, MDLM's and MD4's, as one value.

A row's tokens are masked at a random time, and the cross-entropy of each masked
token counts `-alpha'(t) / (1 - alpha(t))`, see `research.diffusion.schedule`: a
bound on -log p(x) in expectation. Only masked places have logits. Rows are
those of next-token prediction; their tokens are read as they stand.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.diffusion import process
from research.diffusion.batch_transforms import BatchTransform
from research.diffusion.process import Spread
from research.diffusion.sampling.denoiser import own_rows
from research.diffusion.schedule import Linear, Schedule
from research.generation.sampling import row_keys
from research.nn import output_head
from research.nn.transformer import Transformer
from research.ranges import PositiveInt, Ranged
from research.training.objectives import losses
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError

Noise = Literal["all", "learned"]
Count = Literal["elbo", "uniform"]
Norm = Literal["token", "sequence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedDiffusion(Ranged):
  """The bound of masked diffusion, estimated at one time a document.

  LLaDA's pre-training is `schedule=Linear(high=1e-3)`, `noise="all"`,
  `norm="token"`; its fine-tuning `noise="learned"`, `norm="sequence"`. MDLM's
  and MD4's have `spread="even"` and their schedules.

  Attributes:
    model: the network; an experiment fills it in once it is loaded.
    mask_id: the token that hides others.
    schedule: how much is masked at a time.
    noise: which tokens may be masked: all, or those that are learned (the
      targets of next-token prediction), so that prompts stay clean.
    spread: of the times of a batch, see `process.times`.
    count: whether a masked token counts by the bound or 1.
    norm: whether the mean is over tokens that may be masked, or over rows of
      each row's mean.
    shift: whether a token is predicted by the state before it, see
      `denoiser.own_rows`.
    complement: each row comes twice, the second time with the other tokens
      masked, at the time that masks so many; linear schedules in continuous
      time only.
    levels: number of steps of the discrete-time bound (MD4, equation 6), or
      None for continuous time.
    never_mask: whether the mask has no probability (MDLM's zero masking
      probabilities), whatever the head says.
    rows: rows of logits held at a time.
    batch_transforms: of each batch, in order, before anything is masked.
  """

  model: Transformer | None = None
  mask_id: int = -1
  schedule: Schedule = Linear(high=1e-3)
  noise: Noise = "all"
  spread: Spread = "independent"
  count: Count = "elbo"
  norm: Norm = "token"
  shift: bool = False
  complement: bool = False
  levels: PositiveInt | None = None
  never_mask: bool = True
  rows: int = 256
  batch_transforms: tuple[BatchTransform, ...] = ()

  def __post_init__(self):
    super().__post_init__()
    if self.complement and not isinstance(self.schedule, Linear):
      raise UserError(
        "MaskedDiffusion: complement needs a linear schedule, found "
        f"{type(self.schedule).__name__}"
      )
    if self.complement and self.levels is not None:
      raise UserError(
        f"MaskedDiffusion: complement with levels {self.levels}, expected None:"
        " nothing is the complement of the last step's masks, which are all, so"
        " that it would count half"
      )

  @property
  def rearranged(self) -> str | None:
    """What the network reads; see `Rearranges`."""
    return "each row twice" if self.complement else None

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of loss, of weights, and of masks."""
    params = weights.bind(params, key=key)
    for transform in self.batch_transforms:
      batch = transform(batch, key)
    drawn = process.drawing(key, batch["tokens"])
    tokens = batch["tokens"]
    maskable = process.without_images(params, tokens, self.maskable(batch))
    masked, counts = self.draw(drawn, maskable, batch["segments"])
    time = None
    if self.model.time_embedding is not None:
      time = self.times(drawn, maskable, batch["segments"])
      if self.complement:
        time = jnp.concatenate([time, self._complement(time)])
    if self.complement:
      batch = {k: jnp.concatenate([v, v]) for k, v in batch.items()}
      tokens = batch["tokens"]
    hidden, head = self._states(
      params,
      process.noisy(tokens, masked, self.mask_id),
      batch["positions"],
      Mask.full(segments=batch["segments"]),
      time=time,
    )
    hidden = own_rows(
      hidden, jnp.int32(0), tokens.shape[1], self.shift, batch["positions"]
    )
    share = 1.0
    if self.norm == "sequence":
      share = 1 / jnp.maximum(maskable.sum(-1, keepdims=True), 1)
      share = jnp.concatenate([share, share]) if self.complement else share
    weight = maskable.sum() if self.norm == "token" else maskable.any(-1).sum()
    return self._sums(head, hidden, tokens, masked, counts * share, weight)

  def _states(self, params, *inputs, time):
    """Returns states and what makes logits of them, see `output_head`."""
    return output_head.head_inputs(self.model, params, *inputs, time=time)

  def maskable(self, batch: Batch) -> Bool[Array, "B T"]:
    """Returns which tokens may be masked."""
    real = batch["segments"] >= 0
    if self.noise == "all":
      return real
    # A token is learned where the place before it has it for a target.
    before = process.learned(batch["weights"])
    segments = batch["segments"]
    same = segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    return real & before & same

  def times(
    self,
    key: PRNGKey,
    maskable: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
  ) -> Float[Array, "B T"]:
    """Returns the time of each token's document, of the draw by that key."""
    return self._times(*jax.random.split(key, 3)[:2], maskable, segments)

  def _times(self, first, second, maskable, segments):
    rows, length = maskable.shape
    t = process.times(first, rows, self.spread)
    keys = row_keys(second, jnp.arange(rows))
    # Documents of a row are as far apart as chance has it; the first is at t.
    apart = jax.vmap(lambda k: jax.random.uniform(k, (length,)))(keys)
    apart = apart.at[:, 0].set(0.0)
    apart = jnp.take_along_axis(apart, jnp.maximum(segments, 0), axis=1)
    t = 1 - (1 - t[:, None] + apart) % 1
    if self.levels is not None:
      t = jnp.ceil(t * self.levels) / self.levels
    return t

  def draw(
    self,
    key: PRNGKey,
    maskable: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
  ) -> tuple[Bool[Array, "N T"], Float[Array, "N T"]]:
    """Returns what is masked, and what each masked token counts.

    Args:
      key: of the batch; each row's noise comes from its index and this.
      maskable: which tokens may be.
      segments: documents of a row, which have times of their own.
    """
    first, second, third = jax.random.split(key, 3)
    t = self._times(first, second, maskable, segments)
    keys = row_keys(third, jnp.arange(maskable.shape[0]))
    masked = process.mask_each(keys, maskable, self.schedule.masked(t))
    counts = self._counts(t)
    if self.complement:
      masked = jnp.concatenate([masked, maskable & ~masked])
      # Half of each: together they see every token once.
      others = self._counts(self._complement(t))
      counts = 0.5 * jnp.concatenate([counts, others])
    return masked, counts

  def _complement(self, t: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns when as many are masked as are clean at time t."""
    return self.schedule.time(self.schedule.alpha(t))

  def _counts(self, t: Float[Array, "B T"]) -> Float[Array, "B T"]:
    if self.count == "uniform":
      return jnp.ones_like(t)
    if self.levels is None:
      return self.schedule.weight(t)
    before = self.schedule.alpha(t - 1 / self.levels)
    fall = before - self.schedule.alpha(t)
    return self.levels * fall / self.schedule.masked(t)

  def _sums(self, head, hidden, tokens, masked, counts, weight) -> Sums:
    return masked_sums(self, head, hidden, tokens, masked, counts, weight)


def masked_sums(
  objective: Any,
  head: Params,
  hidden: Float[Array, "B T D"],
  tokens: Int[Array, "B T"],
  masked: Bool[Array, "B T"],
  counts: Float[Array, "B T"],
  weight: Int[Array, ""],
) -> Sums:
  """Returns the sums of the cross-entropy of masked tokens, and of masks.

  Args:
    objective: `MaskedDiffusion` or `BlockDiffusion`.
    head, hidden, tokens: see `masked_loss`.
    masked: which tokens are learned.
    counts: what each of them is worth.
    weight: what the loss is divided by.
  """
  loss = masked_loss(
    objective.model,
    head,
    hidden,
    tokens,
    jnp.where(masked, counts, 0.0),
    objective.mask_id if objective.never_mask else None,
    objective.rows,
  )
  return loss, weight.astype(jnp.float32), {"masked": masked.sum() * 1.0}


def masked_loss(
  model: Transformer,
  head: Params,
  hidden: Float[Array, "B T D"],
  tokens: Int[Array, "B T"],
  counts: Float[Array, "B T"],
  never: int | None = None,
  rows: int = 256,
) -> Float[Array, ""]:
  """Returns the sum of cross-entropies times `counts`; of zeros, no logits.

  Args:
    model: whose logits count.
    head: the parameters that `output_head.logits` needs of the states.
    hidden: the states that predict `tokens`, see `output_head`.
    tokens: the truth.
    counts: what each is worth.
    never: a token without probability, the mask; or None.
    rows: rows of logits held at a time.
  """

  def logits(head, hidden):
    return losses.exclude_token(output_head.logits(model, head, hidden), never)

  return losses.chunked_cross_entropy(
    logits,
    head,
    hidden,
    tokens,
    counts,
    losses.TokenLoss(rows=rows, sparse=True),
  )[0]
