"""Two more ways to say the bound: any order, and scores.

Any-order autoregression (Uria et al. 2014, arXiv:1310.1757; Hoogeboom et al.
2022, arXiv:2110.02037) draws how many tokens are masked instead of a time: the
same bound (Ou et al. 2024, arXiv:2406.03736), its samples less apart. SEDD (Lou
et al. 2024, arXiv:2310.16834) learns ratios of probabilities, which need not
sum to 1: the same bound again where they do, and above it elsewhere.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.diffusion import process
from research.diffusion.objective import MaskedDiffusion
from research.generation.sampling import row_keys
from research.nn import output_head
from research.nn.transformer import Transformer
from research.training.objectives import losses
from research.training.objectives.objective import Sums
from research.typing import Array, Bool, Float, Int, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyOrder(MaskedDiffusion):
  """`L/n` times the cross-entropy of n masked tokens, n uniform on 1 to L.

  L are a row's tokens that may be masked, whatever documents they belong to: a
  random order of a row is one of each of its documents. `schedule` and `levels`
  are without meaning, since no time is drawn; `spread` is that of n.
  """

  def __post_init__(self):
    super().__post_init__()
    for name, no in (
      ("complement", False),
      ("levels", None),
      ("count", "elbo"),
    ):
      if getattr(self, name) != no:
        raise UserError(
          f"AnyOrder: {name} is {getattr(self, name)!r}, expected {no!r}: "
          "numbers of masks are drawn, not times"
        )

  def times(self, key: PRNGKey, maskable: Any, segments: Any) -> Any:
    """Raises UserError: there are none."""
    raise UserError(
      "AnyOrder: numbers of masks are drawn, not times, but the model is "
      "conditioned on the time (Sizes.time_embedding); expected MaskedDiffusion"
    )

  def draw(
    self,
    key: PRNGKey,
    maskable: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
  ) -> tuple[Bool[Array, "B T"], Float[Array, "B T"]]:
    """Returns what is masked, and what each masked token counts."""
    del segments
    first, second = jax.random.split(key)
    length = maskable.sum(-1)
    u = process.times(first, maskable.shape[0], self.spread)
    count = jnp.clip(jnp.ceil(u * length).astype(jnp.int32), 1, length)
    keys = row_keys(second, jnp.arange(maskable.shape[0]))
    masked = process.mask_count(keys, maskable, count)
    counts = length / jnp.maximum(count, 1)
    return masked, jnp.broadcast_to(counts[:, None], maskable.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreEntropy(MaskedDiffusion):
  """SEDD's loss for masks: `sum_v exp(z_v) - 1 - z_x` in place of -log p(x).

  The logits z are log ratios, up to the factor `1 / (exp(sigma) - 1)` that a
  time without a network has (`z + log(..)` is SEDD's log score). Least where
  `exp(z)` are the probabilities; a constant more in z costs, so that a model
  trained by this can be sampled as any other.

  Attributes:
    scaled: whether ratios are `exp(z) / (V - 1)`, as SEDD's are, so that a
      model begins near 1.
  """

  scaled: bool = True

  def _states(self, params, *inputs, time):
    """Returns final states: all have logits, which are formed twice."""
    hidden, _ = self.model.apply({"params": params}, *inputs, time=time)
    return hidden, output_head.head_of(params)

  def _sums(self, head, hidden, tokens, masked, counts, weight) -> Sums:
    def loss(logits, tokens, counts):
      z = logits
      if self.scaled:
        z = z - jnp.log(float(self.model.vocab_size - 1))
      own = jnp.take_along_axis(z, tokens[..., None], axis=-1)[..., 0]
      each = jnp.exp(z).sum(-1) - 1 - own
      return jnp.where(counts > 0, counts * each, 0).sum()

    counts = jnp.where(masked, counts, 0.0)
    never = self.mask_id if self.never_mask else None
    total = chunked_sum(
      self.model, head, hidden, loss, (tokens, counts), never, self.rows
    )
    metrics = {"masked": masked.sum() * 1.0}
    return total, weight.astype(jnp.float32), metrics


def chunked_sum(
  model: Transformer,
  head: Params,
  hidden: Float[Array, "B T D"],
  loss: Callable[..., Any],
  arrays: tuple[Any, ...],
  never: int | None,
  rows: int,
) -> Any:
  """Returns sums over places of what needs all logits of each of them.

  The backward pass forms the logits again, so that `[B, T, V]` never is.

  Args:
    model: whose head is used.
    head: the parameters of it.
    hidden: the states.
    loss: (logits, *arrays) -> sums over a chunk; it gets zeros for padding.
    arrays: `[B, T]` each.
    never: a token without probability, the mask; or None.
    rows: rows of logits held at a time.
  """

  @jax.checkpoint
  def one(head, hidden, *arrays):
    out = model.apply({"params": head}, hidden, method="logits")
    return loss(losses.exclude_token(out.astype(jnp.float32), never), *arrays)

  chunks = losses.split_rows(rows, hidden, *arrays)
  zero = jax.eval_shape(lambda *x: one(head, *x), *[x[0] for x in chunks])
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), zero)

  def add(total, chunk):
    return jax.tree.map(jnp.add, total, one(head, *chunk)), None

  return jax.lax.scan(add, zero, chunks)[0]
