"""Compares a quantized model with its base: KL divergence and agreement.

Perplexity alone hides changes that cancel: some tokens become more likely,
others less. Both models therefore read the same windows, and each predicted
token is compared by the divergence of the two distributions, KL(base || new),
by agreement of the most likely token, and by the change of the correct token's
probability. The base runs once for many models; its last hidden states are
stored, not its logits.

Neighbouring tokens are correlated, so standard errors are computed from means
over runs of `RUN` tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import progress
from research.nn.transformer import Transformer
from research.training import positions
from research.training.objectives import losses
from research.typing import Array, Float, Int, Params, UserError

RUN = 32
"""Neighbouring tokens whose mean counts as one observation."""

ROWS = 256
"""Positions whose logits are in memory at a time, per model."""


@dataclasses.dataclass(frozen=True)
class BaseOutputs:
  """Outputs of a base model on windows of text, to compare others with.

  Attributes:
    head: parameters that compute logits from hidden states.
    tokens: int32 `[N, T]`; the first token of a window is not predicted.
    hidden: last hidden states of the predicting positions, `[N, T - 1, D]`.
  """

  model: Transformer
  head: Params
  tokens: np.ndarray
  hidden: np.ndarray
  batch: int


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Comparison of a model with its base over predicted tokens, in nats.

  Attributes:
    perplexity, base_perplexity: `exp` of the mean negative log-likelihood.
    nll_change, nll_change_se: mean increase of the negative log-likelihood, and
      its standard error.
    kl, kl_se: mean KL(base || new), and its standard error.
    kl_999: 99.9th percentile of KL(base || new).
    same_top, same_top_se: share of tokens for which both models predict the
      same most likely token, and its standard error.
    rms_delta_p: root mean square change of the correct token's probability.
    accuracy, base_accuracy: share of tokens that are the most likely one.
    tokens: number of predicted tokens.
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


def base_outputs(
  model: Transformer,
  params: Params,
  tokens: Int[Array, "N T"] | np.ndarray,
  batch: int = 4,
) -> BaseOutputs:
  """Runs the base model on windows of text, for `compare`.

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
      for part in progress.track(
        list(_parts(tokens[:, :-1], batch)), "reading windows by the base"
      )
    ]
  )[: len(tokens)]
  return BaseOutputs(model, positions.head_of(params), tokens, hidden, batch)


def compare(
  found: BaseOutputs, model: Transformer, params: Params
) -> Comparison:
  """Compares a model with the base.

  Args:
    model: the other Transformer, with the same vocabulary.

  Raises:
    UserError: the vocabularies differ.
  """
  return summary(**per_token(found, model, params))


def per_token(
  found: BaseOutputs, model: Transformer, params: Params
) -> dict[str, np.ndarray]:
  """Returns arrays `[N, T - 1]` over predicted tokens, the args of `summary`.

  Args and errors are those of `compare`.
  """
  if model.vocab_size != found.model.vocab_size:
    raise UserError(
      f"compare: a model of {model.vocab_size} tokens and a base of "
      f"{found.model.vocab_size}, expected the same vocabulary"
    )
  out = []
  pairs = zip(
    _parts(found.tokens, found.batch),
    _parts(found.hidden, found.batch),
    strict=True,
  )
  for tokens, hidden in progress.track(list(pairs), "comparing windows"):
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
    nll, base_nll: negative log-likelihood of the correct token.
    kl: KL(base || new).
    same: 1 where both models' most likely token is the same.
    right, base_right: 1 where the most likely token is the correct one.
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
  """Returns the standard error of the mean over tokens in windows.

  Args:
    run: number of neighbouring tokens that form one observation; the remainder
      at a window's end is ignored. A shorter window is one observation.

  Returns:
    the standard error; infinity for fewer than two observations.
  """
  size = min(run, x.shape[1])
  whole = x.shape[1] // size * size
  means = x[:, :whole].reshape(-1, size).mean(1, dtype=np.float64)
  if len(means) < 2:
    return float("inf")
  return float(means.std(ddof=1) / np.sqrt(len(means)))


def _parts(x: np.ndarray, batch: int) -> list[np.ndarray]:
  """Splits rows into batches of equal shape, padded with the last row."""
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
  """Returns the arrays of `summary`; computes logits in chunks of `ROWS`."""

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
