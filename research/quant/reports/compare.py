"""How far a rewritten model is from its base, token by token.

Perplexity alone hides what changed: tokens that became more likely make up for
others. So both models read the same windows, and each predicted token has the
divergence of its two distributions, KL(base || new), whether the most likely
token is the same, and the change of the right token's probability. The base is
computed once for many models: its last hidden states are kept, never logits.

Tokens near each other are alike, so standard errors are those of means over
runs of `RUN` tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research.nn.transformer import Transformer
from research.training import positions
from research.training.objectives import losses
from research.typing import Array, Float, Int, Params, UserError

RUN = 32
"""Neighbouring tokens whose mean counts as one observation."""

ROWS = 256
"""Positions whose logits exist at the same time, of each model."""


@dataclasses.dataclass(frozen=True)
class Base:
  """A model that others are compared with, on some windows of text.

  Attributes:
    model: how to compute.
    head: what makes logits of hidden states.
    tokens: int32 `[N, T]`; the first of a window is given, not predicted.
    hidden: `[N, T - 1, D]`, of what predicts.
    batch: windows that are computed at a time.
  """

  model: Transformer
  head: Params
  tokens: np.ndarray
  hidden: np.ndarray
  batch: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A model beside its base; divergences in nats, of predicted tokens.

  Attributes:
    perplexity, base_perplexity: `exp` of the mean negative log-likelihood.
    nll_change, nll_change_se: mean of what it grew by, and standard error.
    kl, kl_se: mean KL(base || new), and standard error.
    kl_999: 99.9th percentile of it.
    same_top, same_top_se: share of tokens whose most likely one is the same.
    rms_delta_p: root mean square change of the right token's probability.
    accuracy, base_accuracy: share of tokens that are the most likely one.
    tokens: how many were predicted.
  """

  perplexity: float
  base_perplexity: float
  nll_change: float
  nll_change_se: float
  kl: float
  kl_se: float
  kl_999: float
  same_top: float
  same_top_se: float
  rms_delta_p: float
  accuracy: float
  base_accuracy: float
  tokens: int


def base(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "N T"] | np.ndarray,
  batch: int = 4,
) -> Base:
  """Returns what other models are compared with.

  Args:
    model: the Transformer.
    params: its parameters.
    tokens: windows, each of which is read alone.
    batch: windows that are computed at a time.

  Raises:
    UserError: there is nothing to predict, or a window exceeds the context.
  """
  tokens = np.asarray(tokens, np.int32)
  if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < 2:
    raise UserError(
      f"compare: tokens are {tokens.shape}, expected windows of at least 2"
    )
  limit = model.max_positions
  if limit is not None and tokens.shape[1] > limit:
    raise UserError(
      f"compare: windows of {tokens.shape[1]} tokens, expected at most the "
      f"model's context of {limit}"
    )
  hidden = np.concatenate(
    [
      np.asarray(_hidden(model, params, part))
      for part in _parts(tokens[:, :-1], batch)
    ]
  )[: len(tokens)]
  return Base(model, positions.head_of(params), tokens, hidden, batch)


def compare(found: Base, model: Transformer, params: Params) -> Comparison:
  """Returns how a model differs from its base.

  Args:
    found: see `base`.
    model: the other Transformer; of the same vocabulary.
    params: its parameters.

  Raises:
    UserError: the vocabularies differ.
  """
  return summary(**each_token(found, model, params))


def each_token(
  found: Base, model: Transformer, params: Params
) -> dict[str, np.ndarray]:
  """Returns `[N, T - 1]` of each predicted token; names as for `summary`."""
  if model.vocab_size != found.model.vocab_size:
    raise UserError(
      f"compare: a model of {model.vocab_size} tokens beside a base of "
      f"{found.model.vocab_size}, expected the same vocabulary"
    )
  out = []
  for tokens, hidden in zip(
    _parts(found.tokens, found.batch),
    _parts(found.hidden, found.batch),
    strict=True,
  ):
    both = _measured(found.model, model, found.head, params, hidden, tokens)
    out.append(jax.tree.map(np.asarray, both))
  joined = jax.tree.map(lambda *x: np.concatenate(x), *out)
  return {k: x[: len(found.tokens)] for k, x in joined.items()}


def summary(
  *,
  nll: Float[np.ndarray, "N T"],
  base_nll: Float[np.ndarray, "N T"],
  kl: Float[np.ndarray, "N T"],
  same: Float[np.ndarray, "N T"],
  right: Float[np.ndarray, "N T"],
  base_right: Float[np.ndarray, "N T"],
) -> Comparison:
  """Returns means and standard errors over tokens, in float64.

  Args:
    nll, base_nll: negative log-likelihood of the right token.
    kl: KL(base || new).
    same: 1 where both models' most likely token is the same.
    right, base_right: 1 where that is the right one.
  """
  nll, base_nll, kl, same = (
    np.asarray(x, np.float64) for x in (nll, base_nll, kl, same)
  )
  change = np.exp(-nll) - np.exp(-base_nll)
  with np.errstate(over="ignore"):
    perplexities = np.exp(nll.mean()), np.exp(base_nll.mean())
  return Comparison(
    perplexity=float(perplexities[0]),
    base_perplexity=float(perplexities[1]),
    nll_change=float((nll - base_nll).mean()),
    nll_change_se=standard_error(nll - base_nll),
    kl=float(kl.mean()),
    kl_se=standard_error(kl),
    kl_999=float(np.quantile(kl, 0.999)),
    same_top=float(same.mean()),
    same_top_se=standard_error(same),
    rms_delta_p=float(np.sqrt((change**2).mean())),
    accuracy=float(np.mean(right, dtype=np.float64)),
    base_accuracy=float(np.mean(base_right, dtype=np.float64)),
    tokens=int(nll.size),
  )


def standard_error(x: Float[np.ndarray, "N T"], run: int = RUN) -> float:
  """Returns the standard error of the mean of tokens in windows.

  Args:
    x: a number of each token.
    run: neighbours that count as one observation; what is left over at a
      window's end is not looked at. Windows that are shorter count as one.

  Returns:
    infinity where there are fewer than two observations.
  """
  size = min(run, x.shape[1])
  whole = x.shape[1] // size * size
  means = x[:, :whole].reshape(-1, size).mean(1, dtype=np.float64)
  if len(means) < 2:
    return float("inf")
  return float(means.std(ddof=1) / np.sqrt(len(means)))


def _parts(x: np.ndarray, batch: int) -> list[np.ndarray]:
  """Returns rows some at a time, all parts of one shape."""
  batch = min(batch, len(x))
  missing = -len(x) % batch
  x = np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
  return [x[i : i + batch] for i in range(0, len(x), batch)]


@functools.partial(jax.jit, static_argnames="model")
def _hidden(
  model: Transformer, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  where = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return model.apply({"params": params}, tokens, where, Mask.causal())[0]


@functools.partial(jax.jit, static_argnames=("base", "model"))
def _measured(
  base: Transformer,
  model: Transformer,
  head: Params,
  params: Params,
  hidden: Float[Array, "B T D"],
  tokens: Int[Array, "B S"],
) -> dict[str, Float[Array, "B T"]]:
  """Returns the arrays of `summary`; logits exist some positions at a time."""

  def one(heads: Any, theirs: Any, ours: Any, targets: Any) -> Any:
    theirs = positions.fp32_logits(base, heads[0], theirs)
    ours = positions.fp32_logits(model, heads[1], ours)
    log_p, log_q = jax.nn.log_softmax(theirs), jax.nn.log_softmax(ours)
    base_nll, base_right = losses.token_losses(theirs, targets)
    nll, right = losses.token_losses(ours, targets)
    return dict(
      nll=nll,
      base_nll=base_nll,
      kl=(jnp.exp(log_p) * (log_p - log_q)).sum(-1),
      same=(theirs.argmax(-1) == ours.argmax(-1)).astype(jnp.float32),
      right=right,
      base_right=base_right,
    )

  return positions.map_positions(
    one,
    (head, positions.head_of(params)),
    hidden,
    _hidden(model, params, tokens[:, :-1]),
    tokens[:, 1:],
    rows=ROWS,
  )
