"""Reward models: a Transformer that says how good each step of a text is.

`RewardModel` has a scalar head, `GenerativeReward` asks the vocabulary for one
of two words. Both give logits of tokens, `[B, T, K]`: one logit, or those of a
wrong and of a right step. A step's score is that at its last token.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.nn import layers
from research.nn.block import Block
from research.nn.output_head import head_of
from research.nn.transformer import Transformer
from research.prm.heads import SCORE, Head, LinearHead, MlpHead
from research.training import positions as positionwise
from research.typing import Array, Float, Int, Params, PRNGKey, UserError

Readout = Callable[[Float[Array, "*B K"]], Float[Array, "*B"]]
"""Maps logits to scores."""


def log_odds(logits: Float[Array, "*B K"]) -> Float[Array, "*B"]:
  """Returns log of P(right) / P(wrong).

  Raises:
    UserError: there are neither one nor two logits.
  """
  count = logits.shape[-1]
  if count not in (1, 2):
    raise UserError(
      f"head: found {count} logits a token, expected 1 (a scalar) or 2 (wrong,"
      " right)."
    )
  return logits[..., 0] if count == 1 else logits[..., 1] - logits[..., 0]


def probability(logits: Float[Array, "*B K"]) -> Float[Array, "*B"]:
  """Returns P(right): the sigmoid of one logit, the softmax of two."""
  return jax.nn.sigmoid(log_odds(logits))


def difference(logits: Float[Array, "*B K"]) -> Float[Array, "*B"]:
  """Returns P(right) - P(wrong), from -1 to 1 (PURE, arXiv:2504.15275)."""
  return jnp.tanh(log_odds(logits) / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
  """A Transformer with a scalar head.

  Its parameters are the Transformer's, and `score`, the head's.

  Attributes:
    backbone: the Transformer; a head for the vocabulary is not used.
    head: hidden states -> logits.
    readout: logits -> score: `probability`, `log_odds` (a raw value, such as
      PQM's) or `difference`.
  """

  backbone: Transformer
  head: Head = LinearHead()
  readout: Readout = probability

  def init(self, key: PRNGKey) -> dict[str, Any]:
    tokens = jnp.zeros((1, 1), jnp.int32)
    return self.with_new_head(self.backbone.init(key, tokens)["params"], key)

  def with_new_head(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns a language model's parameters with a new head beside them."""
    hidden = jnp.zeros((1, 1, self.backbone.width))
    head = self.head.init(jax.random.fold_in(key, 1), hidden)["params"]
    return dict(params) | {SCORE: head}

  def clone(self, *, remat: layers.Remat) -> "RewardModel":
    return dataclasses.replace(self, backbone=self.backbone.clone(remat=remat))

  def layer_kinds(self) -> tuple[Block, ...]:
    return self.backbone.layer_kinds()

  @property
  def max_positions(self) -> int | None:
    return self.backbone.max_positions

  def logits(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    key: PRNGKey | None = None,
    keep: Int[Array, "B S"] | None = None,
  ) -> Float[Array, "B N K"]:
    """Returns logits of tokens.

    Args:
      tokens: ids.
      positions, segments: as in a batch of text; None for one text a row, from
        its first token on.
      key: random key of dropout; None for none.
      keep: indices of the tokens whose outputs are computed; None for all.
    """
    hidden = _hidden(self.backbone, params, tokens, positions, segments, keep)
    return self.logits_of(params, hidden, key)

  def logits_of(
    self,
    params: Params,
    hidden: Float[Array, "B T D"],
    key: PRNGKey | None = None,
  ) -> Float[Array, "B T K"]:
    """Returns logits of the backbone's final hidden states."""
    return self.head.apply({"params": params[SCORE]}, hidden, key)

  @property
  def outputs(self) -> int:
    """Numbers of a head that is one matrix and costs as much, for a ledger."""
    width = self.backbone.width if isinstance(self.head, MlpHead) else 0
    return width + self.head.outputs

  def scores(
    self, params: Params, tokens: Int[Any, "B T"], steps: Int[Any, "B S"]
  ) -> Float[Array, "B S"]:
    """Returns the score of each step, NaN where there is none.

    Args:
      tokens: texts, padded on the right.
      steps: index of each step's last token, -1 for steps that do not exist.
    """
    return _scores(self, params, jnp.asarray(tokens), jnp.asarray(steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerativeReward:
  """A language model whose next token is one of two: right or wrong.

  Math-Shepherd's and RLHFlow's process reward models; the rest of the
  vocabulary has no part in the score.

  Attributes:
    backbone: the language model.
    right, wrong: ids of the two tokens.
    rows: rows of logits materialised at a time.
    readout: logits -> score, see `RewardModel`.
  """

  backbone: Transformer
  right: int
  wrong: int
  rows: int = 256
  readout: Readout = probability

  def __post_init__(self):
    ids = {self.right, self.wrong}
    if len(ids) < 2 or not ids <= set(range(self.backbone.vocab_size)):
      raise UserError(
        f"GenerativeReward: found right {self.right} and wrong {self.wrong},"
        f" expected two ids below {self.backbone.vocab_size}."
      )

  @property
  def max_positions(self) -> int | None:
    return self.backbone.max_positions

  def init(self, key: PRNGKey) -> dict[str, Any]:
    return self.backbone.init(key, jnp.zeros((1, 1), jnp.int32))["params"]

  def logits(
    self,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    key: PRNGKey | None = None,
    keep: Int[Array, "B S"] | None = None,
  ) -> Float[Array, "B N K"]:
    """Returns logits of the wrong and the right word; see `RewardModel`."""
    del key
    hidden = _hidden(self.backbone, params, tokens, positions, segments, keep)
    return self.logits_of(params, hidden)

  def logits_of(
    self, params: Params, hidden: Float[Array, "B T D"]
  ) -> Float[Array, "B T K"]:
    """Returns logits of the backbone's final hidden states."""
    words = jnp.array([self.wrong, self.right])

    def two(head, hidden):
      every = positionwise.fp32_logits(self.backbone, head, hidden)
      return every[..., words]

    return positionwise.map_positions(
      two, head_of(params), hidden, rows=self.rows
    )

  @property
  def outputs(self) -> int:
    """Numbers that are computed for a token: the whole vocabulary's."""
    return self.backbone.vocab_size

  def scores(
    self, params: Params, tokens: Int[Any, "B T"], steps: Int[Any, "B S"]
  ) -> Float[Array, "B S"]:
    return _scores(self, params, jnp.asarray(tokens), jnp.asarray(steps))


def _hidden(backbone, params, tokens, positions, segments, keep, lengths=None):
  mask = None if segments is None else Mask.causal(segments=segments)
  params = weights.with_tokens(params, tokens, segments)
  hidden, _ = backbone.apply(
    {"params": params}, tokens, positions, mask, lengths=lengths, keep=keep
  )
  return hidden


@functools.partial(jax.jit, static_argnums=0)
def _scores(model, params, tokens, steps):
  keep = jnp.maximum(steps, 0)
  # Padding is no part of a text, by whose length `rope.Dynamic` rotates it.
  lengths = keep.max(1) + 1
  hidden = _hidden(model.backbone, params, tokens, None, None, keep, lengths)
  scores = model.readout(model.logits_of(params, hidden))
  return jnp.where(steps >= 0, scores, jnp.nan)
