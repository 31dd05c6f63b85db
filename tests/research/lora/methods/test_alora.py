"""Tests activated LoRA: the base before its invocation, LoRA after it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.generation import decoding, generate
from research.generation.sampling import GREEDY
from research.lora import adapt, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.methods.alora import ALoRA, from_last_match
from research.lora.methods.lora import LoRA
from research.training.objectives import objective
from research.typing import UserError
from tests import support, support_mesh
from tests.research.lora.methods import test_methods as laws

CALL = (5, 6)
KEY = jax.random.key(0)


@functools.cache
def model():
  return support.model(width=16, head_dim=4, depth=2)


@functools.cache
def adapted(method):
  """Returns a model's parameters under an adapter with random arrays."""
  params = adapt.Adapt(method=method)(support.params(model()), KEY)
  return tree.map_paths(
    lambda p, x: (
      x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
      if "/trained/" in p
      else x
    ),
    params,
  )


def activated():
  return adapted(ALoRA(rank=2, invocation=CALL))


@functools.cache
def ways():
  """Returns hidden states of (activated, always on, base) for two rows."""
  tokens = np.array(support.tokens(2, 12))
  tokens[tokens == CALL[0]] = 1
  tokens[0, 1:3] = CALL
  tokens[0, 6:8] = CALL
  tokens = jnp.asarray(tokens)

  @jax.jit
  def hidden(params):
    params = weights.with_tokens(params, tokens)
    return model().apply({"params": params}, tokens)[0]

  return (
    hidden(activated()),
    hidden(adapted(LoRA(rank=2))),
    hidden(wrap.disable(activated())),
  )


@pytest.mark.parametrize(
  "row, wanted, start",
  [
    ([1, 5, 6, 2, 5, 6, 3], (5, 6), 4),
    ([5, 5, 6, 2, 5, 5, 3], (5, 6), 1),
    ([5, 5, 5, 2, 1, 1, 5], (5, 5), 1),
    ([1, 2, 3, 4, 1, 2, 5], (5, 6), None),
    ([1, 2, 3, 4, 1, 2, 5], (5,), 6),
    ([5, 6, 1, 1, 1, 1, 1], (5, 6), 0),
    ([1, 1, 5], (5, 6, 7, 8), None),
  ],
)
def test_acts_from_the_last_occurrence(row, wanted, start):
  got = from_last_match(jnp.array([row]), wanted)[0]
  want = [start is not None and i >= start for i in range(len(row))]
  assert got.tolist() == want


def test_each_document_of_a_packed_row_has_its_own_invocation():
  tokens = jnp.array([[5, 6, 1, 2, 5, 5, 6, 6, 5, 6]])
  segments = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2, -1, -1]])
  got = from_last_match(tokens, (5, 6), segments)[0].astype(int).tolist()
  assert got == [1, 1, 1, 0, 0, 1, 1, 1, 0, 0]
  # An invocation that a border cuts is none.
  segments = jnp.array([[0, 1, 1, 1, 1, 1, 2, 2, 3, 4]])
  assert not from_last_match(tokens, (5, 6), segments).any()


@pytest.mark.slow
def test_positions_before_the_invocation_use_the_base():
  got, always, base = ways()
  chex.assert_trees_all_equal(got[0, :6], base[0, :6])
  chex.assert_trees_all_equal(got[1], base[1])
  assert (jnp.abs(got[0, 6:] - base[0, 6:]).max(-1) > 1e-3).all()
  # And what is before is not adapted, so it is no LoRA from there on.
  assert jnp.abs(got[0, 6:] - always[0, 6:]).max() > 1e-3


@pytest.mark.slow
def test_invoked_by_its_first_tokens_it_is_lora():
  tokens = jnp.asarray(support.tokens(2, 8)).at[:, :2].set(jnp.array(CALL))

  @jax.jit
  def hidden(params):
    params = weights.with_tokens(params, tokens)
    return model().apply({"params": params}, tokens)[0]

  want = hidden(adapted(LoRA(rank=2)))
  chex.assert_trees_all_close(hidden(activated()), want, atol=1e-5)


PROMPTS = [[1, 2, *CALL, 3], [1, 2, 7, 8, 3, 9, 4], [*CALL, 4, 4, *CALL]]


@pytest.mark.slow
def test_generates_as_without_a_cache_and_shares_the_bases_cache():
  got = generate.generate(model(), activated(), PROMPTS, 4).tokens
  time = 12

  @jax.jit
  def logits(params, tokens, gate):
    def set_gate(w):
      if not isinstance(w, AdaptedTensor):
        return w
      lead = w.shape[:-2]
      return AdaptedTensor(
        w.w,
        w.trained,
        gate=jnp.broadcast_to(gate, (*lead, *gate.shape)),
        method=w.method,
      )

    params = jax.tree.map(set_gate, params, is_leaf=weights.is_weight)
    hidden = model().apply({"params": params}, tokens)[0]
    return model().apply({"params": params}, hidden, method="logits")

  for prompt, new, start in zip(PROMPTS, got, [2, time, 4], strict=True):
    text = list(prompt)
    gate = (jnp.arange(time) >= start)[None]
    for _ in range(4):
      padded = jnp.array([text + [0] * (time - len(text))])
      found = logits(activated(), padded, gate)[0, len(text) - 1]
      text.append(int(found.argmax()))
    assert new == text[len(prompt) :]


@pytest.mark.slow
def test_shares_the_bases_cache_before_its_invocation():
  prompt = [1, 2, 3, 4, 7, *CALL, 8]
  tokens = jnp.array([prompt + [0] * 8])

  def cache(params):
    params = weights.with_tokens(params, tokens.at[0, len(prompt) :].set(-1))
    return decoding.prefill(
      model(),
      params,
      tokens,
      jnp.array([len(prompt)]),
      GREEDY,
      KEY,
      jnp.array([0]),
      jnp.array([4]),
      jnp.array([-1]),
      16,
    )[0].cache

  own, base = (
    [x for x in jax.tree.leaves(cache(params)) if x.ndim > 3]
    for params in (activated(), wrap.disable(activated()))
  )
  assert own
  for x, y in zip(own, base, strict=True):
    # Whatever the layout, what differs are the slots from the call on.
    differs = np.asarray(x != y)
    axis = [i for i, n in enumerate(x.shape) if n == 16][-1]
    rest = tuple(i for i in range(x.ndim) if i != axis)
    slots = differs.any(rest).tolist()
    assert not any(slots[:5]) and all(slots[5:8])


def test_trains_only_where_it_is_invoked():
  tokens = np.array(support.tokens(1, 8))
  tokens[tokens == CALL[0]] = 1
  place = jnp.arange(8)[None]
  selected, frozen = tree.partition(activated(), wrap.TRAINABLE)

  @jax.jit
  def slopes(tokens):
    batch = dict(
      tokens=tokens,
      targets=jnp.roll(tokens, -1, 1),
      positions=place,
      segments=jnp.zeros_like(place),
      weights=jnp.ones((1, 8)),
    )
    loss = objective.NextToken(model())
    return jax.grad(lambda x: loss(tree.combine(x, frozen), batch, None)[0])(
      selected
    )

  assert all(not x.any() for x in jax.tree.leaves(slopes(tokens)))
  tokens[0, 3:5] = CALL
  assert all(x.any() for x in jax.tree.leaves(slopes(tokens)))


@pytest.mark.parametrize(
  "what, words",
  [
    (lambda t: t.einsum("btd,df->btf", jnp.ones((1, 2, 8))), "with_tokens"),
    (lambda t: weights.dense(t), "cannot be merged"),
    (
      lambda t: t.with_tokens(jnp.ones((1, 5), int), None).einsum(
        "td,df->tf", jnp.ones((3, 8))
      ),
      "expected those of its tokens",
    ),
    (lambda t: ALoRA(invocation=(3, -1)), "found -1, expected at least 0"),
    (
      lambda t: adapt.Adapt(method=ALoRA())(support.params(model()), KEY),
      "is empty",
    ),
  ],
)
def test_unsupported_uses_raise(what, words):
  method = ALoRA(rank=2, invocation=CALL)
  arrays = {"a": jnp.ones((2, 8)), "b": jnp.ones((2, 4))}
  with pytest.raises(UserError, match=words):
    what(AdaptedTensor(jnp.ones((8, 4)), arrays, method=method))


def away(packed=False):
  """Returns one matrix under an adapter with random arrays."""
  method = ALoRA(rank=4, invocation=CALL)
  return laws.one(laws.moved(method, packed))


CALLED = np.array([[1, *CALL, 3], [*CALL, *CALL], [1, 2, 3, 4], [2, 2, *CALL]])
FROM = (1, 2, 4, 2)
"""Where each of those rows is called."""


def product(t, x, tokens):
  t = weights.with_tokens({"w": t}, tokens)["w"]
  return weights.einsum("btd,df->btf", x, t)


@pytest.mark.parametrize("packed", [False, True])
def test_on_a_packed_base_and_a_plain_one(packed):
  t, x = away(packed), laws.draw(4, 4, laws.IN)
  got = np.asarray(jax.jit(product)(t, x, CALLED))
  alone = np.asarray(jax.jit(product)(t.w, x, CALLED))
  x = np.asarray(x, np.float64)
  a, b = (np.asarray(t.trained[n], np.float64) for n in "ab")
  merged = np.asarray(weights.dense(t.w)) + t.method.scale * a.T @ b
  for i, start in enumerate(FROM):
    np.testing.assert_array_equal(got[i, :start], alone[i, :start])
    if start < 4:
      laws.close(got[i, start:], x[i, start:] @ merged)
      assert np.abs(got[i, start:] - alone[i, start:]).min(0).max() > 1e-2


def test_gradients_are_finite_differences():
  with jax.enable_x64():
    t = jax.tree.map(jnp.float64, away())
    x = laws.draw(4, 4, laws.IN, dtype=jnp.float64)
    rng = np.random.default_rng(0)

    @jax.jit
    def loss(trained, x):
      w = AdaptedTensor(t.w, trained, method=t.method)
      return jnp.sin(product(w, x, jnp.asarray(CALLED))).sum()

    at = dict(trained=t.trained, x=x)
    ways = {k: rng.standard_normal(v.shape) for k, v in t.trained.items()}
    ways = dict(trained=ways, x=rng.standard_normal(x.shape))
    grads = jax.jit(jax.grad(loss, (0, 1)))(*at.values())
    flat = [jax.tree.leaves(part) for part in (at, ways, grads)]
    places = jax.tree.structure(at)
    for k in range(len(flat[0])):

      def moved(e, k=k):
        leaves = list(flat[0])
        leaves[k] = leaves[k] + e * flat[1][k]
        return float(loss(**places.unflatten(leaves)))

      want = (moved(1e-5) - moved(-1e-5)) / 2e-5
      got = float(jnp.sum(flat[2][k] * flat[1][k]))
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@functools.cache
def on_devices(layout):
  """Returns outputs and gradients of eight rows; one program."""
  plan = support_mesh.LAYOUTS[layout]
  mesh = plan.mesh()
  halves = tree.partition({"mlp": {"up": away()}}, wrap.TRAINABLE)
  places = tuple(plan.shardings(x, mesh) for x in halves)
  x, tokens = laws.draw(8, 4, laws.IN), jnp.asarray(np.tile(CALLED, (2, 1)))

  def loss(learned, frozen, x, tokens):
    t = tree.combine(learned, frozen)["mlp"]["up"]
    y = product(t, x, tokens)
    return jnp.sum(y * laws.waves(y)), y

  with jax.set_mesh(mesh):
    cut = plan.batch(mesh)
    given = jax.device_put((*halves, x, tokens), (*places, cut, cut))
    f = jax.jit(
      jax.value_and_grad(loss, has_aux=True), in_shardings=(*places, cut, cut)
    )
    done = f.lower(*given).compile(support_mesh.QUICKLY)
    (_, y), slopes = done(*given)
  return jax.tree.map(np.asarray, (y, dict(tree.flatten_paths(slopes))))


def test_eight_devices_compute_what_one_does():
  (want, alone), (got, shared) = on_devices("one"), on_devices("mixed")
  laws.close(got, want)
  assert alone.keys() == shared.keys() and len(alone) == 2
  for path, x in alone.items():
    scale = np.abs(x).max()
    assert scale > 0, path
    np.testing.assert_allclose(shared[path], x, rtol=1e-4, atol=3e-5 * scale)
