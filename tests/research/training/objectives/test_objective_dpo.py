"""DPO and distillation against numpy, written out from full logits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kernels_pallas.masks import Mask
from research import tree
from research.data import pipeline
from research.data.examples import Example
from research.data.sources import pairs
from research.lora import wrap
from research.nn import presets
from research.training import positions, state, step
from research.training.objectives import distill, preference
from research.training.objectives.objective import NextToken, Objective
from research.typing import UserError

B, T, V = 3, 12, 67


class Answers:
  """Random pairs after equal prompts of 3 tokens; all lengths differ."""

  def pairs(self, tokenizer):
    rng = np.random.default_rng(0)

    def one(prompt, n):
      tokens = np.concatenate([prompt, rng.integers(0, V, n)])
      return Example(tokens, np.arange(len(tokens)) >= 3)

    out = []
    for i in range(B):
      prompt = rng.integers(0, V, 3)
      out.append((one(prompt, 4 + i), one(prompt, 9 - 2 * i)))
    return out


@pytest.fixture(scope="module")
def batch():
  [batch] = pairs.Pairs(source=Answers(), length=T, batch_size=4).evaluation(
    None
  )
  assert batch["weights"][3].sum() == 0  # the fourth pair is padding
  return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def rows():
  rng = np.random.default_rng(4)
  documents = [
    Example(rng.integers(0, V, n), rng.integers(0, 2, n) > 0)
    for n in (9, 12, 5, 7)
  ]

  class Documents:
    def examples(self, tokenizer):
      return documents

  data = pipeline.Pipeline(source=Documents(), length=T, batch_size=3)
  return jax.tree.map(jnp.asarray, data.evaluation(None)[0])


@pytest.fixture(scope="module")
def forward(model):
  @jax.jit
  def full(params, tokens):
    hidden, _ = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, hidden, method="logits")

  return full


@pytest.fixture(scope="module")
def other(params):
  """Another model of the same shape."""
  leaves, treedef = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(5), len(leaves))
  moved = [
    x + 0.05 * jax.random.normal(k, x.shape)
    for x, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(treedef, moved)


def answers_log_probs(full, params):
  """Each answer alone, unpadded, token by token, in numpy."""
  out = []
  for pair in Answers().pairs(None):
    for e in pair:
      logits = np.asarray(full(params, jnp.asarray(e.tokens[None])), np.float64)
      log_p = special.log_softmax(logits[0], -1)
      out.append(
        sum(log_p[t - 1, e.tokens[t]] for t in range(3, len(e.tokens)))
      )
  return np.array(out).reshape(B, 2)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.7, 0.2), (0.1, 0.0)])
@pytest.mark.sample(3)
def test_dpo_is_equation_7(
  model, params, other, forward, batch, beta, smoothing
):
  goal = preference.DPO(
    model, beta, smoothing, policy=preference.Part("policy"), rows=8
  )
  assert isinstance(goal, Objective)
  both = {"policy": other, "reference": params}
  loss, weight, found = jax.jit(goal)(both, batch, None)
  ratios = answers_log_probs(forward, other) - answers_log_probs(
    forward, params
  )
  margin = beta * (ratios[:, 0] - ratios[:, 1])
  want = -(1 - smoothing) * np.log(special.expit(margin))
  want -= smoothing * np.log(special.expit(-margin))
  # Sums of 9 log-probabilities of size 10 in float32, times beta.
  assert weight == B
  np.testing.assert_allclose(loss, want.sum(), rtol=1e-4)
  np.testing.assert_allclose(found["margin"], margin.sum(), rtol=1e-3)
  assert found["accuracy"] == (margin > 0).sum()
  np.testing.assert_allclose(
    found["reward_chosen"], beta * ratios[:, 0].sum(), rtol=1e-3
  )
  assert np.abs(margin).max() > 0.01


@pytest.mark.slow
def test_dpo_gradient_is_that_of_the_paper(
  model, params, other, forward, batch
):
  """Section 4: -b sigmoid(-margin) [grad log chosen - grad log rejected]."""
  beta = 0.5
  goal = preference.DPO(model, beta, policy=preference.Part("policy"), rows=8)
  both = {"policy": other, "reference": params}
  grads = jax.jit(jax.grad(lambda p: goal(p, batch, None)[0]))(both)
  zeros = jax.tree.map(jnp.zeros_like, params)
  chex.assert_trees_all_equal(grads["reference"], zeros)
  ratios = answers_log_probs(forward, other) - answers_log_probs(
    forward, params
  )
  margin = beta * (ratios[:, 0] - ratios[:, 1])
  scale = beta * special.expit(-margin)
  coefficients = np.zeros((4, 2))
  coefficients[:B] = scale[:, None] * np.array([[-1, 1]])

  @jax.jit
  def weighted(policy):
    tokens = batch["tokens"].reshape(-1, T)
    hidden, _ = model.apply({"params": policy}, tokens)
    logits = model.apply({"params": policy}, hidden, method="logits")
    log_p = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch["targets"].reshape(-1, T, 1), -1
    )[..., 0]
    each = (log_p * batch["weights"].reshape(-1, T)).sum(-1)
    return (each * coefficients.reshape(-1)).sum()

  chex.assert_trees_all_close(
    grads["policy"], jax.grad(weighted)(other), rtol=2e-3, atol=2e-4
  )


@pytest.mark.slow
def test_reference_is_the_model_without_its_adapters(
  model, params, adapted, batch
):
  goal = preference.DPO(model, 2.0, reference=wrap.disable, rows=8)
  two = preference.DPO(model, 2.0, policy=preference.Part("policy"), rows=8)
  got = jax.jit(goal)(adapted, batch, None)
  want = jax.jit(two)({"policy": adapted, "reference": params}, batch, None)
  chex.assert_trees_all_close(got, want, rtol=1e-5)
  assert abs(got[0] / B - np.log(2)) > 1e-3
  start = jax.jit(goal)(params, batch, None)
  np.testing.assert_allclose(start[0], B * np.log(2), rtol=1e-6)


@pytest.mark.slow
def test_dpo_trains(model, params, batch):
  """Policy and reference as copies in one state; accuracy reaches 1."""
  both = preference.Copies()(params, jax.random.key(0))
  goal = preference.DPO(model, policy=preference.Part("policy"), rows=64)
  tx = optax.adam(3e-3)
  at = state.create(both, "^policy/", tx)
  update = jax.jit(step.make_train_step(goal, tx, accumulate=2))
  for _ in range(12):
    at, metrics = update(at, batch, jax.random.key(0))
  assert metrics["accuracy"] == 1 and metrics["loss"] < 0.5
  chex.assert_trees_all_equal(at.params["reference"], params)


@pytest.mark.slow
def test_chat_sft_is_next_token_over_masked_rows(model, params, forward, rows):
  """Masked tokens count neither in the loss nor in the weight."""
  loss, weight, _ = jax.jit(NextToken(model, rows=8))(params, rows, None)
  total, count = 0.0, 0
  for row in range(len(rows["tokens"])):
    for segment in range(rows["segments"][row].max() + 1):
      here = rows["segments"][row] == segment
      tokens, targets = rows["tokens"][row][here], rows["targets"][row][here]
      log_p = special.log_softmax(
        np.asarray(forward(params, jnp.asarray(tokens[None])), np.float64)[0],
        -1,
      )
      learned = rows["weights"][row][here] > 0
      total -= log_p[np.arange(len(targets)), targets][learned].sum()
      count += learned.sum()
  assert weight == count and 0 < count < (rows["segments"] >= 0).sum()
  np.testing.assert_allclose(loss, total, rtol=1e-5)


@pytest.mark.parametrize("rows_held", [1, 8, 256])
@pytest.mark.parametrize(
  ("t", "hard"), [pytest.param(1.0, 0.0, marks=pytest.mark.slow), (2.5, 0.3)]
)
@pytest.mark.cover(1)
@pytest.mark.sample(2, 1)
def test_distillation_equals_full_logits(
  model, params, other, rows, rows_held, t, hard
):
  goal = distill.Distill(model, temperature=t, hard_weight=hard, rows=rows_held)

  def full(both):
    def logits(p):
      hidden, _ = model.apply(
        {"params": p},
        rows["tokens"],
        rows["positions"],
        Mask.causal(segments=rows["segments"]),
      )
      return model.apply({"params": p}, hidden, method="logits")

    q, p = (
      logits(both["student"]),
      jax.lax.stop_gradient(logits(both["teacher"])),
    )
    soft = jax.nn.softmax(p / t)
    kl = (soft * (jnp.log(soft) - jax.nn.log_softmax(q / t))).sum(-1)
    nll = -jnp.take_along_axis(
      jax.nn.log_softmax(q), rows["targets"][..., None], -1
    )[..., 0]
    return (((1 - hard) * t**2 * kl + hard * nll) * rows["weights"]).sum()

  both = {"student": other, "teacher": params}
  ours = jax.jit(jax.value_and_grad(lambda p: goal(p, rows, None)[0]))
  got, want = ours(both), jax.jit(jax.value_and_grad(full))(both)
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  chex.assert_trees_all_equal(got[1]["teacher"], zeros)
  assert got[0] > 0.01


@pytest.mark.slow
def test_a_perfect_student_has_nothing_to_learn(model, params, rows):
  goal = distill.Distill(model, rows=8)
  same = {"student": params, "teacher": params}
  grads, (loss, weight, found) = jax.jit(
    jax.grad(
      lambda p: (goal(p, rows, None)[0], goal(p, rows, None)), has_aux=True
    )
  )(same)
  assert abs(loss) < 1e-5 * weight and found["agreement"] == weight
  assert optax.tree.norm(grads) < 1e-3


@pytest.mark.slow
def test_teacher_of_another_shape(model, params, rows):
  small = presets.transformer(
    presets.FAMILIES["llama"],
    presets.Sizes(
      vocab=V, width=16, depth=1, heads=2, kv_heads=1, hidden=24, head_dim=8
    ),
  )
  tokens = jnp.zeros((1, T), jnp.int32)
  student = jax.jit(lambda k: small.init(k, tokens)["params"])(
    jax.random.key(1)
  )
  goal = distill.Distill(small, teacher=model, rows=8)
  tx = optax.adam(1e-2)
  at = state.create({"student": student, "teacher": params}, "^student/", tx)
  update = jax.jit(step.make_train_step(goal, tx))
  first = None
  for _ in range(30):
    at, metrics = update(at, rows, jax.random.key(0))
    first = first if first is not None else metrics["divergence"]
  assert metrics["divergence"] < 0.5 * first
  with pytest.raises(UserError, match="a teacher of 67 tokens and a student"):
    bad = presets.transformer(
      presets.FAMILIES["llama"],
      presets.Sizes(
        vocab=9, width=16, depth=1, heads=2, kv_heads=1, hidden=24, head_dim=8
      ),
    )
    distill.Distill(bad, teacher=model)(at.params, rows, None)


def test_no_full_logits_exist(model, params, rows):
  """Neither forward nor backward holds an array of B x T x V elements."""
  goal = distill.Distill(model, rows=4)
  both = {"student": params, "teacher": params}
  jaxpr = jax.make_jaxpr(jax.grad(lambda p: goal(p, rows, None)[0]))(both)
  full = rows["tokens"].size * V
  sizes = []

  def look(jaxpr):
    for eqn in jaxpr.eqns:
      sizes.extend(
        v.aval.size
        for v in eqn.outvars
        if getattr(v.aval, "shape", ()) and v.aval.shape[-1] == V
      )
      for inner in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
      ):
        if hasattr(inner, "eqns"):
          look(inner)
        elif hasattr(inner, "jaxpr"):
          look(inner.jaxpr)

  look(jaxpr.jaxpr)
  # The head's own gradient [D, V] is there, of 32 x 67.
  assert sizes and max(sizes) <= max(4 * V, 32 * V) < full


def test_a_part_that_is_missing():
  with pytest.raises(UserError, match="found x, expected 'policy'"):
    preference.Part("policy")({"x": 1})


def test_positions_cut_no_corner(model, params, rows):
  """log_probs equals token_losses of full logits, for any chunk size."""
  hidden, _ = jax.jit(lambda p: model.apply({"params": p}, rows["tokens"]))(
    params
  )
  logits = model.apply({"params": params}, hidden, method="logits")
  want = jnp.take_along_axis(
    jax.nn.log_softmax(logits), rows["targets"][..., None], -1
  )[..., 0]
  for size in (1, 5, 100):
    got = positions.log_probs(model, params, hidden, rows["targets"], size)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  assert tree.count(positions.head_of(params)) == V * 32
