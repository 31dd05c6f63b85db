"""Chunked cross-entropy against autodiff of full logits, written out here."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest

from research.nn import transformer
from research.quant.formats.ggml import GGML
from research.quant.qtensor import QTensor
from research.training.objectives import losses
from research.training.objectives.objective import NextToken
from tests import support
from tests.support_lora import lora

B, T, D, V = 3, 7, 5, 11


def full(logits, targets, weight, smoothing=0.0, z_loss=0.0):
  """The textbook, from log_softmax and a gather."""
  log_p = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
  nll = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
  nll += z_loss * jax.nn.logsumexp(logits, -1) ** 2
  correct = logits.argmax(-1) == targets
  return (nll * weight).sum(), (correct * weight).sum()


@pytest.fixture(scope="module")
def case():
  k = jax.random.split(jax.random.key(0), 5)
  return {
    "hidden": jax.random.normal(k[0], (B, T, D)),
    "head": jax.random.normal(k[1], (D, V)),
    "targets": jax.random.randint(k[2], (B, T), 0, V),
    "weight": jax.random.uniform(k[3], (B, T))
    * (jax.random.uniform(k[4], (B, T)) > 0.3),
  }


@pytest.mark.parametrize(
  ("smoothing", "z_loss"), [(0.1, 0.0), (0.0, 0.1), (0.2, 0.3)]
)
def test_an_evaluation_has_the_cross_entropy_alone(case, smoothing, z_loss):
  """What perplexity is of: training adds to it, an evaluation does not."""
  model = support.model("llama", vocab=V)
  params = support.params(model)
  tokens, weight = case["targets"], case["weight"]
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  segments = jnp.zeros((B, T), jnp.int32)
  batch = dict(
    tokens=tokens,
    targets=case["targets"],
    weights=weight,
    positions=positions,
    segments=segments,
  )
  objective = NextToken(model, z_loss=z_loss, label_smoothing=smoothing)
  logits = transformer.logits(model, params, tokens)
  for key, terms in (
    (None, (0.0, 0.0)),
    (jax.random.key(0), (smoothing, z_loss)),
  ):
    found, total, _ = objective(params, batch, key)
    want, _ = full(logits, case["targets"], weight, *terms)
    chex.assert_trees_all_close(found / total, want / weight.sum(), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 6, 9, 256])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
  "softcap,smoothing,z_loss", [(None, 0.0, 0.0), (2.0, 0.1, 1e-2)]
)
@pytest.mark.cover(1)
def test_equals_full_logits(case, rows, tied, softcap, smoothing, z_loss):
  eq = "btd,vd->btv" if tied else "btd,dv->btv"
  head = case["head"].T if tied else case["head"]
  logits = support.linear_head(eq, softcap)
  kind = losses.TokenLoss(z_loss, smoothing, rows)

  def ours(head, hidden, weight):
    total, correct = losses.chunked_cross_entropy(
      logits, head, hidden, case["targets"], weight, kind
    )
    return 3 * total, correct

  def truth(head, hidden, weight):
    total, correct = full(
      logits(head, hidden), case["targets"], weight, smoothing, z_loss
    )
    return 3 * total, correct

  got, want = (
    jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(
      head, case["hidden"], case["weight"]
    )
    for f in (ours, truth)
  )
  # Sums of 21 terms of order 1 in float32.
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=2e-6)
  chex.assert_trees_all_close(
    jax.jit(ours)(head, case["hidden"], case["weight"]), want[0], rtol=1e-5
  )


def test_gradient_of_an_adapter_on_the_head(case):
  k = jax.random.split(jax.random.key(1), 2)
  a = jax.random.normal(k[0], (2, D))
  b = jax.random.normal(k[1], (2, V))
  logits = support.linear_head("btd,dv->btv")

  def ours(a, b, hidden):
    head = lora(case["head"], a, b)
    return losses.chunked_cross_entropy(
      logits,
      head,
      hidden,
      case["targets"],
      case["weight"],
      losses.TokenLoss(rows=6),
    )[0]

  def truth(a, b, hidden):
    head = case["head"] + a.T @ b
    return full(hidden @ head, case["targets"], case["weight"])[0]

  got, want = (
    jax.jit(jax.grad(f, argnums=(0, 1, 2)))(a, b, case["hidden"])
    for f in (ours, truth)
  )
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_packed_head_stays_packed():
  k = jax.random.split(jax.random.key(2), 3)
  head = QTensor(
    dict(
      codes=jax.random.randint(k[0], (1, 32, V), -127, 128, jnp.int8),
      scale=jax.random.uniform(k[1], (1, V), jnp.float16, 1e-3, 1e-2),
    ),
    format=GGML(kind="Q8_0"),
    inputs=32,
    outputs=V,
    axis=-1,
  )
  hidden = jax.random.normal(k[2], (B, T, 32))
  targets = jnp.arange(B * T).reshape(B, T) % V
  weight = jnp.ones((B, T))
  logits = support.linear_head("btd,vd->btv")

  def ours(hidden):
    return losses.chunked_cross_entropy(
      logits, head, hidden, targets, weight, losses.TokenLoss(rows=6)
    )[0]

  def truth(hidden):
    return full(hidden @ head.dense().T, targets, weight)[0]

  got, want = (jax.jit(jax.value_and_grad(f))(hidden) for f in (ours, truth))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


def _dots(jaxpr) -> int:
  """Returns the number of matmuls in `jaxpr`, including scan bodies."""
  inner = [
    _dots(getattr(v, "jaxpr", v))
    for e in jaxpr.eqns
    for v in e.params.values()
    if hasattr(v, "eqns") or hasattr(v, "jaxpr")
  ]
  return sum(e.primitive.name == "dot_general" for e in jaxpr.eqns) + sum(inner)


@pytest.mark.parametrize(
  "trained,dots", [(("hidden",), 2), (("hidden", "head"), 3)]
)
def test_a_frozen_head_pays_for_no_gradient(case, trained, dots):
  def loss(some):
    x = {**case, **some}
    return losses.chunked_cross_entropy(
      support.linear_head("btd,dv->btv"),
      x["head"],
      x["hidden"],
      x["targets"],
      x["weight"],
    )[0]

  grad = jax.jit(jax.grad(loss)).trace({k: case[k] for k in trained})
  assert _dots(grad.jaxpr.jaxpr) == dots


def test_memory_does_not_hold_the_logits():
  rows, vocab, width = 2048, 4096, 8
  shapes = (
    jax.ShapeDtypeStruct((width, vocab), jnp.float32),
    jax.ShapeDtypeStruct((1, rows, width), jnp.float32),
    jax.ShapeDtypeStruct((1, rows), jnp.int32),
    jax.ShapeDtypeStruct((1, rows), jnp.float32),
  )
  loss = functools.partial(
    losses.chunked_cross_entropy, support.linear_head("btd,dv->btv")
  )
  grad = jax.jit(jax.grad(lambda *x: loss(*x)[0], argnums=(0, 1)))
  stats = grad.lower(*shapes).compile().memory_analysis()
  # Full logits are 32 MiB; a chunk of 256 rows is 4 MiB, a few of which live.
  assert stats.temp_size_in_bytes < rows * vocab * 4 * 0.75


def test_large_logits_stay_finite(case):
  logits = support.linear_head("btd,dv->btv")
  value, grad = jax.jit(
    jax.value_and_grad(
      lambda h: losses.chunked_cross_entropy(
        logits, case["head"], h, case["targets"], case["weight"]
      )[0]
    )
  )(case["hidden"] * 1e4)
  chex.assert_tree_all_finite((value, grad))
