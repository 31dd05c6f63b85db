"""Tests data-dependent initialisation against NumPy and papers' claims."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree
from research.lora import adapt, init_stats, wrap
from research.lora.adapt_eva import AdaptEVA
from research.lora.adapted import AdaptedTensor
from research.lora.methods.eva import EVA
from research.lora.methods.lora import LoRA
from research.lora.methods.svd_init import CorDA, LoRAGA
from research.training.objectives.objective import NextToken
from research.typing import UserError
from tests import support, support_mesh

KEY = jax.random.key(0)
MODEL = support.model("llama", vocab=64, depth=2)
LOADED = SimpleNamespace(model=MODEL, tokenizer=None)
PLANTED = 3


@dataclasses.dataclass(frozen=True)
class Batches:
  """Data that only yields batches."""

  batch_size: int = support_mesh.BATCH

  def rows(self, tokenizer):
    raise NotImplementedError

  def stream(self, tokenizer):
    raise NotImplementedError

  def evaluation(self, tokenizer, limit=None):
    raise NotImplementedError

  def training(self, tokenizer, process=0, processes=1):
    return (support_mesh.batch(i) for i in itertools.count())


READING = init_stats.CalibrationData(data=Batches(), batches=2)
LOOKS = {
  CorDA: init_stats.Covariances(calibration=READING),
  LoRAGA: init_stats.Gradients(calibration=READING),
  EVA: init_stats.InputPCA(calibration=READING, count=4),
}


@functools.cache
def params():
  """Returns weights whose layer inputs lie in a plane."""
  found = support.params(MODEL)
  rng = np.random.default_rng(5)
  inside = rng.standard_normal((64, PLANTED)) @ plane()
  layer = found["run0"]["layer0"]
  norm = {"scale": jnp.ones_like(layer["attention_norm"]["scale"])}
  run = {"layer0": layer | {"attention_norm": norm}}
  return found | {"embed": jnp.asarray(inside, jnp.float32), "run0": run}


def plane():
  rng = np.random.default_rng(4)
  return np.linalg.qr(rng.standard_normal((32, PLANTED)))[0].T


def mean_loss(params, batch):
  batch = jax.tree.map(jnp.asarray, batch)
  total, weight, _ = NextToken(MODEL)(params, batch, None)
  return total / weight


@functools.cache
def gradients():
  """Returns the mean loss's gradient, averaged over the batches read."""
  grad = jax.jit(jax.grad(mean_loss))
  found = [grad(params(), support_mesh.batch(i)) for i in range(2)]
  return jax.tree.map(lambda a, b: (a + b) / 2, *found)


def rows(params):
  """Yields (address, layer's own parameters) of every matrix in layers."""
  for i, layer in enumerate(tree.layers(params)):
    for path, w in wrap.leaves(layer):
      if len(w.shape) == 2:
        yield f"layers/{i}/{path}", w


@functools.cache
def adapted(kind, **fields):
  change = adapt.Adapt(method=kind(rank=4, **fields), init_stats=LOOKS[kind])
  return change.with_model(LOADED)(params(), KEY)


@functools.partial(jax.jit)
def logits(params):
  hidden, _ = MODEL.apply({"params": params}, support.tokens(vocab=64))
  return MODEL.apply({"params": params}, hidden, method="logits")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.sample(4)
def test_calibrated_adapters_start_as_their_base(kind):
  chex.assert_trees_all_equal(logits(adapted(kind)), logits(params()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOOKS)
@pytest.mark.sample(2)
def test_planning_needs_no_data(kind):
  change = adapt.Adapt(method=kind(rank=4), init_stats=LOOKS[kind])
  planned = jax.eval_shape(change.with_model(LOADED), params(), KEY)
  chex.assert_trees_all_equal_shapes_and_dtypes(planned, adapted(kind))


@pytest.mark.slow
def test_gradients_are_of_the_mean_loss():
  addresses = [address for address, _ in rows(params())]
  got = LOOKS[LoRAGA].with_model(LOADED)(params(), addresses, KEY)
  for address, want in rows(gradients()):
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got[address], want, atol=1e-5 * scale)


@pytest.mark.slow
def test_loraga_steps_down_the_gradient_further_than_lora():
  """Wang et al. 2024, section 3: the step resembles full fine-tuning's."""
  whole = gradients()

  def alignment(start):
    trained, rest = tree.partition(start, wrap.TRAINABLE)
    both = [
      jax.grad(lambda t, b: mean_loss(tree.combine(t, rest), b))(
        trained, support_mesh.batch(i)
      )
      for i in range(2)
    ]
    grads = jax.tree.map(lambda a, b: (a + b) / 2, *both)
    moved = jax.tree.map(lambda x, g: x - 1e-3 * g, trained, grads)
    found = dict(rows_of_adapters(tree.combine(moved, rest)))
    return {
      address: cosine(found[address].delta(), -g) for address, g in rows(whole)
    }

  plain = adapt.Adapt(method=LoRA(rank=4))(params(), KEY)
  ours, theirs = jax.jit(alignment)(adapted(LoRAGA)), jax.jit(alignment)(plain)
  for address in theirs:
    assert ours[address] > theirs[address] + 0.1, address


def rows_of_adapters(params):
  for i, layer in enumerate(tree.layers(params)):
    for path, w in wrap.leaves(layer):
      if isinstance(w, AdaptedTensor):
        yield f"layers/{i}/{path}", w


def cosine(a, b):
  return jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["instruction", "knowledge"])
def test_corda_is_the_decomposition_by_its_inputs(keep):
  """In fp64, as PEFT has it, of `W [out, in]` and the covariance."""
  addresses = [address for address, _ in rows(params())]
  seen = LOOKS[CorDA].with_model(LOADED)(params(), addresses, KEY)
  own = dict(rows_of_adapters(adapted(CorDA, keep=keep)))
  for address, w in rows(params()):
    c = np.asarray(seen[address], np.float64)
    c += 0.01 * np.diag(c).mean() * np.eye(len(c))
    inverse = np.linalg.inv(c)
    u, s, vh = np.linalg.svd(np.asarray(w, np.float64).T @ c)
    n = len(s)
    kept = slice(0, 4) if keep == "instruction" else slice(n - 4, n)
    want = (u[:, kept] * s[kept]) @ (vh[:n] @ inverse)[kept]
    t = own[address]
    got = t.method.scale * np.asarray(t.fixed["a0"]).T @ t.fixed["b0"]
    # The inverse has a condition of up to 100 times the number of inputs.
    scale = np.abs(np.asarray(w)).max()
    np.testing.assert_allclose(got, want.T, atol=2e-3 * scale, err_msg=address)


@pytest.mark.slow
def test_corda_takes_covariances_that_have_no_inverse():
  wide = np.zeros((64, 64), np.float32)
  wide[0, 0] = 1e9  # 0.01 of the mean is no help to 1e-30
  w = jax.random.normal(KEY, (64, 8))
  for damping in (1e-30, 0.01):
    a, b = jax.jit(CorDA(rank=2, damping=damping).factors)(w, wide)
    assert jnp.isfinite(a).all() and jnp.isfinite(b).all()
  a, b = CorDA(rank=8).factors(w, np.zeros_like(wide))
  np.testing.assert_allclose(2 * a.T @ b, w, atol=1e-5)


def test_eva_spans_the_plane_that_its_inputs_are_in():
  directions = init_stats.InputPCA(calibration=READING, count=6).with_model(
    LOADED
  )
  addresses = [address for address, _ in rows(params())]
  found = directions.explained(params(), addresses)
  for name in "qkv":
    got, share = found[f"layers/0/attention/{name}"]
    np.testing.assert_allclose(share[:PLANTED].sum(), 1, atol=1e-4)
    inside = np.asarray(got[:PLANTED]) @ plane().T @ plane()
    np.testing.assert_allclose(inside, got[:PLANTED], atol=1e-3)
  elsewhere, share = found["layers/1/mlp/down"]
  assert share.sum() < 1
  np.testing.assert_allclose(elsewhere @ elsewhere.T, np.eye(6), atol=1e-5)


@functools.cache
def moved_ranks(form):
  change = AdaptEVA(
    adapt=adapt.Adapt(method=EVA(rank=4)),
    calibration=READING,
    rho=2.0,
    form=form,
  )
  return change.with_model(LOADED)(params(), KEY)


def test_ranks_go_where_they_explain_more():
  ranks = {
    address: w.method.rank
    for address, w in rows_of_adapters(moved_ranks("split"))
  }
  assert sum(ranks.values()) == 4 * 14 and max(ranks.values()) <= 8
  assert {ranks[f"layers/0/attention/{name}"] for name in "qkv"} == {PLANTED}
  scales = {w.method.scale for _, w in rows_of_adapters(moved_ranks("split"))}
  assert max(scales) - min(scales) < 1e-12


@pytest.mark.parametrize("form", ["padded", "split"])
def test_alphas_of_a_pattern_keep_their_scale(form, monkeypatch):
  """Whatever the rank: one form had ignored them, one had divided them."""
  monkeypatch.setattr(init_stats.InputPCA, "explained", spread_evenly)
  change = AdaptEVA(
    adapt=adapt.Adapt(method=EVA(rank=4), alpha_pattern={"v": 2.0}),
    calibration=READING,
    form=form,
  )
  got = dict(rows_of_adapters(change.with_model(LOADED)(params(), KEY)))
  for address, w in got.items():
    want = (2.0 if address.endswith("/v") else EVA.alpha) / 4
    assert w.method.scale == pytest.approx(want), address


def spread_evenly(self, params, addresses):
  sizes = wrap.matrices(params)
  return {
    a: (np.eye(self.count, sizes[a][0], dtype="f4"), np.ones(self.count, "f4"))
    for a in addresses
  }


@pytest.mark.slow
def test_padded_ranks_train_as_split_ones():
  """Zero rows have no gradient, so Adam does not change them."""
  tx = optax.adam(1e-2)

  def trained(start):
    moving, rest = tree.partition(start, wrap.TRAINABLE)
    state = tx.init(moving)
    for i in range(3):
      grads = jax.grad(
        lambda t, i=i: mean_loss(tree.combine(t, rest), support_mesh.batch(i))
      )(moving)
      updates, state = tx.update(grads, state)
      moving = optax.apply_updates(moving, updates)
    return tree.combine(moving, rest)

  padded = jax.jit(trained)(moved_ranks("padded"))
  assert len(tree.runs(padded)) == 1
  split = jax.jit(trained)(moved_ranks("split"))
  want = logits(split)
  assert jnp.abs(want - logits(params())).max() > 1e-2
  chex.assert_trees_all_close(logits(padded), want, atol=2e-3)
  used = {a: w.method.rank for a, w in rows_of_adapters(split)}
  for address, w in rows_of_adapters(padded):
    r = used.get(address, 0)
    assert not (w.trained["a"][r:].any() or w.trained["b"][r:].any())


def packed_with_experts():
  model = support_mesh.model("experts")
  return SimpleNamespace(model=model, tokenizer=None), support_mesh.packed(
    support.params(model)
  )


@pytest.mark.slow
def test_packed_experts_are_measured():
  loaded, base = packed_with_experts()
  change = adapt.Adapt(
    method=LoRAGA(rank=4), targets=("up",), init_stats=LOOKS[LoRAGA]
  )
  got = dict(rows_of_adapters(change.with_model(loaded)(base, KEY)))
  (w, *_) = got.values()
  assert w.trained["a"].shape == (4, 4, 64)  # experts, rank, width
  assert all(jnp.isfinite(x).all() for x in w.trained.values())
  with pytest.raises(UserError, match="experts of a stack share one rank"):
    AdaptEVA(
      adapt=adapt.Adapt(method=EVA(rank=4), targets=("experts/up",)),
      calibration=READING,
    ).with_model(loaded)(base, KEY)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (lambda: LOOKS[EVA](params(), ["layers/0/mlp/up"], KEY), "has no model"),
    (
      lambda: LOOKS[EVA].with_model(LOADED)(params(), ["embed"], KEY),
      "exclude",
    ),
    (
      lambda: init_stats.InputPCA(calibration=READING, count=33).with_model(
        LOADED
      )(params(), ["layers/0/mlp/up"], KEY),
      "at most the 32 inputs",
    ),
    (
      lambda: LOOKS[EVA].with_model(LOADED)(
        params() | {"embed": jnp.full((64, 32), jnp.nan)},
        ["layers/0/mlp/up"],
        KEY,
      ),
      "not finite",
    ),
    (
      lambda: AdaptEVA(adapt=adapt.Adapt(), calibration=READING),
      "expected the method EVA",
    ),
    (
      lambda: jax.eval_shape(
        AdaptEVA(
          adapt=adapt.Adapt(method=EVA()), calibration=READING, form="split"
        ),
        params(),
        KEY,
      ),
      "form = 'padded'",
    ),
  ],
)
def test_mistakes_raise(wrong, message):
  with pytest.raises(UserError, match=message):
    wrong()
