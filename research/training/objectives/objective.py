"""Training objectives: the protocol, and next-token prediction.

An objective maps parameters, a batch and a random key to sums, so microbatches,
processes and unevenly masked rows add up exactly. Callers divide once, by the
summed weight.
"""

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from kernels_pallas.masks import Mask, autoregressive_blocks
from research import weights
from research.nn.transformer import Transformer
from research.ranges import NonNegativeFloat, PositiveInt, Ranged, Share
from research.training.objectives import losses
from research.training.objectives.experts import Balance
from research.typing import Array, Params, PRNGKey, UserError

Batch = Mapping[str, Any]
"""Arrays [B, ...]. For text: `tokens`, `targets`, `positions` and `segments`,
int32 [B, T], the last two -1 for padding; `weights`, float32 [B, T]."""

PER_ROW = frozenset({"pixels", "patches", "grids", "groups", "features"})
"""Arrays of a batch whose second axis is not that of tokens: a mesh cuts their
first axis, and nothing else. That axis may be shorter than B where consecutive
rows share an entry."""

Sums = tuple[Array, Array, dict[str, Array]]
"""`(loss_sum, weight, metrics)`, all scalar sums over the batch."""


@runtime_checkable
class Objective(Protocol):
  """A loss function; `key` is None in evaluation, which is deterministic."""

  def __call__(
    self, params: Params, batch: Batch, key: PRNGKey | None
  ) -> Sums: ...


@runtime_checkable
class TakesMask(Protocol):
  """An objective whose tokens see what another part of the model says."""

  def with_mask(self, mask: Callable[[Batch], Mask]) -> Objective:
    """Returns the objective with this mask of a batch's tokens."""


@runtime_checkable
class Rearranges(Protocol):
  """An objective whose network reads other rows than those of the batch."""

  @property
  def rearranged(self) -> str | None:
    """What it reads, such as "each row twice"; None: the batch's rows."""


@runtime_checkable
class Constrained(Protocol):
  """An objective that bounds parameters: each update ends within its bounds."""

  def constrain(self, trainable: Params) -> Params:
    """Returns trained parameters, those out of bounds at their bounds."""


class WholeBatch:
  """Base of objectives in which a row's loss depends on all other rows.

  Such a loss is not a sum over microbatches, so a step does not accumulate it.
  """


def with_model(objective: Any, model: Any) -> Any:
  """Returns the objective with its network.

  Raises:
    UserError: the objective is of another kind of model.
  """
  kinds: tuple[type, ...] = ()
  for field in dataclasses.fields(objective):
    if field.name == "model":
      accepted = typing.get_args(field.type) or (field.type,)
      if Any not in accepted:
        kinds = tuple(x for x in accepted if isinstance(x, type))
  expected = [x for x in kinds if x is not type(None)]
  if expected and not isinstance(model, kinds):
    name = type(objective).__name__
    raise UserError(
      f"{name}.model: found {type(model).__name__}, expected"
      f" {' or '.join(x.__name__ for x in expected)}.\nUse an objective of this"
      " model, or a model of this objective."
    )
  return dataclasses.replace(objective, model=model)


def causal_mask(batch: Batch) -> Mask:
  """Returns the mask in which tokens see those before them, in a document."""
  # By index, not by position: rows are packed in order, and for an
  # index-based mask the tiles to skip are known at compile time.
  return Mask.causal(segments=batch["segments"])


def prefix_mask(batch: Batch) -> Mask:
  """Returns the mask of a prefix language model.

  Tokens that are learned see those before them. Others are prompts, and see
  all of their own (PaliGemma, arXiv:2407.07726, figure 2). At inference
  prompts need the same mask, `generate.chunks(mask=...)`.
  """
  learned = jnp.pad(batch["weights"][:, :-1] > 0, ((0, 0), (1, 0)))
  # A prompt that follows an answer, of a chat, is a block of its own.
  after = jnp.pad(learned[:, :-1], ((0, 0), (1, 0)))
  begins = (learned | after).astype(jnp.int32)
  return autoregressive_blocks(begins, segments=batch["segments"])


@dataclasses.dataclass(frozen=True)
class NextToken(Ranged):
  """Next-token prediction over packed rows.

  The loss of an evaluation is the cross-entropy alone, of which perplexity and
  bits per byte are functions.

  Attributes:
    model: the network; the experiment sets it after loading.
    z_loss: in training, see `losses.TokenLoss`.
    label_smoothing: in training, see `losses.TokenLoss`.
    rows: rows of logits materialised at a time.
    experts: auxiliary losses of a model with experts, or None.
    mask: what tokens see, `causal_mask` or `prefix_mask`.
  """

  model: Transformer | None = None
  z_loss: NonNegativeFloat = 0.0
  label_smoothing: Share = 0.0
  rows: PositiveInt = 256
  experts: Balance | None = None
  mask: Callable[[Batch], Mask] = causal_mask

  def with_mask(self, mask: Callable[[Batch], Mask]) -> "NextToken":
    return dataclasses.replace(self, mask=mask)

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    params = weights.bind(params, key=key)
    tokens, segments = batch["tokens"], batch["segments"]
    params = weights.with_tokens(params, tokens, segments)
    hidden, _, loads = self.model.apply(
      {"params": params},
      tokens,
      batch["positions"],
      self.mask(batch),
      method="with_router_loads",
    )
    head = "embed" if self.model.tied else "head"
    loss = losses.TokenLoss(rows=self.rows)
    if key is not None:
      loss = losses.TokenLoss(self.z_loss, self.label_smoothing, self.rows)
    loss_sum, correct_sum = losses.chunked_cross_entropy(
      self._logits,
      {head: params[head]},
      hidden,
      batch["targets"],
      batch["weights"],
      loss,
    )
    weight, sums = batch["weights"].sum(), {"accuracy": correct_sum}
    if self.experts is not None:
      added, router_sums = self.experts(loads, weight, training=key is not None)
      loss_sum, sums = loss_sum + added, sums | router_sums
    return loss_sum, weight, sums

  def _logits(self, head, hidden):
    return self.model.apply({"params": head}, hidden, method="logits")
