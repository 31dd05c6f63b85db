"""GenMD4: how fast each token type is masked is learned with the model.

Shi et al. 2024 (arXiv:2406.04329), section 6: token v is clean at time t with
probability `alpha_v(t) = 1 - t^w_v`, so the bound's integrand is

  sum over masked places of  w_x/t (-log p(x) - 1) + sum_v w_v/t p(v)

and depends on w twice: as written, and through which tokens are masked. The
second gradient is that of REINFORCE with the other of two samples as its
baseline. Below `first`, where the integrand is large and says little, a
prediction that knows w alone fills in what is left.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import weights
from research.diffusion import mask_ratio_time, process
from research.diffusion.objective import Noise
from research.diffusion.process import Spread
from research.diffusion.sampling.denoiser import own_rows
from research.diffusion.variants import chunked_sum
from research.generation.sampling import row_keys
from research.nn import output_head
from research.nn.transformer import Transformer
from research.ranges import PositiveFloat, PositiveInt, Ranged, Real
from research.training.objectives.objective import Batch, Sums
from research.typing import Array, Bool, Float, Params, PRNGKey, UserError

NAME = "mask_rates"
"""Of the numbers in the tree that w comes from, by softplus."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates(Ranged):
  """A transform that puts w into a model's tree, to be trained with it.

  Attributes:
    vocab: token ids, the mask's included.
    start: w of all of them; 1 is the linear schedule.
  """

  vocab: PositiveInt
  start: PositiveFloat = 1.0

  def __call__(self, params: Params, key: PRNGKey) -> Params:
    del key
    raw = float(np.log(np.expm1(self.start)))
    return dict(params) | {NAME: jnp.full(self.vocab, raw, jnp.float32)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenMD4(Ranged):
  """The bound with learned schedules, two samples of masks a row.

  A row has one time. Its documents do not see each other.

  Attributes:
    model: the network; an experiment fills it in once it is loaded.
    mask_id: the token that hides others.
    first: the time down to which the model fills in.
    noise: which tokens may be masked, see `MaskedDiffusion`.
    spread: of the times of a batch, see `process.times`.
    shift: see `denoiser.own_rows`.
    rows: rows of logits held at a time.
  """

  model: Transformer | None = None
  mask_id: int = -1
  first: Real(above=0, below=1) = 1e-3
  noise: Noise = "all"
  spread: Spread = "even"
  shift: bool = False
  rows: int = 256

  @property
  def rearranged(self) -> str:
    """What the network reads; see `Rearranges`."""
    return "each row twice"

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of loss, of weights, and of masks.

    Raises:
      UserError: the tree has no w.
    """
    if NAME not in params:
      raise UserError(
        f"GenMD4: the parameters have no {NAME!r}; put learned.Rates among "
        "the experiment's transforms"
      )
    params = weights.bind(params, key=key)
    maskable = self._maskable(batch)
    w = jax.nn.softplus(params[NAME].astype(jnp.float32))
    own = jnp.take(w, batch["tokens"])
    drawn = process.drawing(key, batch["tokens"])
    t, masks = self.draw(drawn, maskable, own)
    pair = self._integrands(params, w, batch, masks, t)
    chances = [_log_chance(m, maskable, own, t) for m in masks]
    # In value nothing, in gradient that of which tokens are masked.
    lead = jax.lax.stop_gradient(pair[0] - pair[1]) * (chances[0] - chances[1])
    lead = 0.5 * (lead - jax.lax.stop_gradient(lead))
    loss = (0.5 * (pair[0] + pair[1]) + lead).sum() * (1 - self.first)
    loss += self._rest(w, own, maskable)
    metrics = {"masked": 0.5 * (masks[0].sum() + masks[1].sum())}
    return loss, maskable.sum().astype(jnp.float32), metrics

  def _maskable(self, batch: Batch) -> Bool[Array, "B T"]:
    real = batch["segments"] >= 0
    if self.noise == "all":
      return real
    before = process.learned(batch["weights"])
    return real & before & (batch["positions"] > 0)

  def draw(
    self, key: PRNGKey, maskable: Bool[Array, "B T"], w: Float[Array, "B T"]
  ) -> tuple[Float[Array, "B 1"], list[Bool[Array, "B T"]]]:
    """Returns each row's time, and two draws of what is masked then.

    Args:
      key: of the batch.
      maskable: which tokens may be.
      w: of each token.
    """
    rows = maskable.shape[0]
    first, *samples = jax.random.split(key, 3)
    u = 1 - process.times(first, rows, self.spread)  # below 1
    t = self.first + (1 - self.first) * u[:, None]
    rate = jax.lax.stop_gradient(t**w)
    return t, [
      process.mask_each(row_keys(k, jnp.arange(rows)), maskable, rate)
      for k in samples
    ]

  def _integrands(self, params, w, batch, masks, t) -> Float[Array, "2 B"]:
    """Returns the integrand of each row, by either draw of masks."""
    both = {name: jnp.concatenate([x, x]) for name, x in batch.items()}
    tokens, masked = both["tokens"], jnp.concatenate(masks)
    tree = {name: x for name, x in params.items() if name != NAME}
    hidden, _ = self.model.apply(
      {"params": tree},
      process.noisy(tokens, masked, self.mask_id),
      both["positions"],
      Mask.full(segments=both["segments"]),
      time=mask_ratio_time.if_conditioned(
        self.model, jnp.concatenate([t, t])[:, 0]
      ),
    )
    hidden = own_rows(
      hidden, jnp.int32(0), tokens.shape[1], self.shift, both["positions"]
    )

    def loss(logits, tokens, masked):
      logp = jax.nn.log_softmax(logits)
      own = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
      rest = (jnp.exp(logp) * w).sum(-1)
      each = jnp.take(w, tokens) * (-own - 1) + rest
      return jnp.where(masked, each, 0).sum(-1)

    total = chunked_sum(
      self.model,
      output_head.head_of(tree),
      hidden,
      loss,
      (tokens, masked),
      self.mask_id,
      self.rows,
    )
    return total.reshape(2, -1) / t[:, 0]

  def _rest(self, w, own, maskable) -> Float[Array, ""]:
    """Returns what tokens masked at the first time cost, in expectation."""
    log_t = jnp.log(self.first)
    real = jnp.arange(w.shape[0]) != self.mask_id
    norm = jax.nn.logsumexp(jnp.where(real, w * log_t, -jnp.inf))
    each = -jnp.exp(own * log_t) * (own * log_t - norm)
    return jnp.where(maskable, each, 0).sum()


def _log_chance(
  masked: Bool[Array, "B T"],
  maskable: Bool[Array, "B T"],
  w: Float[Array, "B T"],
  t: Float[Array, "B 1"],
) -> Float[Array, "B"]:
  """Returns the log-probability of masks; w may be learned by it."""
  log_masked = w * jnp.log(t)
  log_clean = jnp.log(-jnp.expm1(log_masked))
  each = jnp.where(masked, log_masked, log_clean)
  return jnp.where(maskable, each, 0).sum(-1)
