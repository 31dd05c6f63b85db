"""Tests comparisons with a base against logits of the whole text in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.quant.reports import compare
from research.typing import UserError
from tests import support


@pytest.fixture(scope="module", name="pair")
def _pair():
  """A model, its weights, those in 4 bits, and three windows of text."""
  model = support.model(depth=2)
  params = support.params(model)
  other = Quantize(format=Affine(bits=4, block=4), targets=("q", "up"))(params)
  return model, params, other, np.asarray(support.tokens(3, 33))


@pytest.fixture(scope="module", name="found")
def _found(pair):
  model, params, other, tokens = pair
  base = compare.base_outputs(model, params, tokens, batch=2)
  return compare.per_token(base, model, other)


def _log_probs(model, params, tokens):
  hidden, _ = model.apply({"params": params}, jnp.asarray(tokens))
  logits = model.apply({"params": params}, hidden, method="logits")
  logits = np.asarray(logits, np.float64)
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_per_token_results_match_the_logits(pair, found):
  model, params, other, tokens = pair
  p, q = (_log_probs(model, x, tokens)[:, :-1] for x in (params, other))
  right = tokens[:, 1:, None]
  want = {
    "base_nll": -np.take_along_axis(p, right, -1)[..., 0],
    "nll": -np.take_along_axis(q, right, -1)[..., 0],
    "kl": (np.exp(p) * (p - q)).sum(-1),
    "same": p.argmax(-1) == q.argmax(-1),
    "right": q.argmax(-1) == right[..., 0],
    "base_right": p.argmax(-1) == right[..., 0],
  }
  assert found.keys() == want.keys()
  for name, x in want.items():
    # A few roundings of logits below 20.
    np.testing.assert_allclose(found[name], x, atol=3e-5, err_msg=name)
  assert 0 < found["same"].mean() < 1 and found["kl"].mean() > 0.01


def test_a_summary_is_the_means(found):
  s = compare.summary(**found)
  nll, base = (found[k].astype(np.float64) for k in ("nll", "base_nll"))
  assert s.tokens == 3 * 32
  assert s.perplexity == pytest.approx(np.exp(nll.mean()))
  assert s.base_perplexity == pytest.approx(np.exp(base.mean()))
  assert s.nll_change == pytest.approx(np.log(s.perplexity / s.base_perplexity))
  change = np.exp(-nll) - np.exp(-base)
  assert s.rms_delta_p == pytest.approx(np.sqrt(np.mean(change**2)))
  assert s.kl_999 == pytest.approx(np.percentile(found["kl"], 99.9))
  assert s.same_top == pytest.approx(found["same"].mean())


def test_a_model_compared_with_itself_has_no_distance(pair):
  model, params, _, tokens = pair
  base = compare.base_outputs(model, params, tokens, batch=2)
  s = compare.compare(base, model, params)
  assert s.kl == pytest.approx(0, abs=1e-6)
  assert (s.same_top, s.same_top_se, s.rms_delta_p) == (1, 0, 0)
  assert s.perplexity == s.base_perplexity and s.accuracy == s.base_accuracy


def test_standard_errors_count_correlated_runs_once():
  rng = np.random.default_rng(0)
  apart = rng.standard_normal((64, 320))
  # 20,480 independent draws; its own relative error is 1 / sqrt(2 * 640).
  alone = compare.standard_error(apart)
  assert alone == pytest.approx(20480**-0.5, rel=0.1)
  alike = np.repeat(rng.standard_normal((64, 10)), 32, axis=1)
  assert compare.standard_error(alike) == pytest.approx(640**-0.5, rel=0.1)
  assert compare.standard_error(alike, run=1) < 0.2 * 640**-0.5
  assert compare.standard_error(apart[:1, :32]) == float("inf")


def test_what_cannot_be_compared_is_refused(pair):
  model, params, _, tokens = pair
  with pytest.raises(UserError, match="windows of at least 2"):
    compare.base_outputs(model, params, tokens[:, :1])
  base = compare.base_outputs(model, params, tokens, batch=2)
  with pytest.raises(UserError, match="the same vocabulary"):
    compare.compare(base, support.model(vocab=68), params)
  short = support.model(max_positions=16)
  with pytest.raises(UserError, match="context of 16"):
    compare.base_outputs(short, params, tokens)


def test_padding_of_the_last_batch_counts_nothing(pair, found):
  model, params, other, tokens = pair
  base = compare.base_outputs(model, params, tokens[:2], batch=2)
  two = compare.per_token(base, model, other)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b[:2], atol=2e-5), two, found
  )
