"""LoRA+, LoRA-FA, Riemannian and LoRA-Pro, against PEFT and their theorems."""

import dataclasses
import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tree, weights
from research.lora.adapted import AdaptedTensor
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.dora import DoRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.kasa import KaSA
from research.lora.methods.one_factor import LoRAFA
from research.lora.optim import loraplus, lorapro, pairs, riemannian
from research.optim import optim, rates
from research.training import state
from research.typing import UserError
from tests.research.lora.methods import test_methods as laws
from tests.support_lora import lora

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "optimizers.json"
MODEL = "base_model.model."


@functools.cache
def golden(name):
  return json.loads(GOLDEN.read_text())["peft"][name]


def sines(n, shape):
  t = np.arange(np.prod(shape))
  return 0.5 * np.sin(0.7 * t + n).reshape(shape)


def gradient(n, k, shape):
  t = np.arange(np.prod(shape))
  return np.sin(0.3 * t**2 + 1.3 * n + 2.1 * k).reshape(shape)


def ours(values, scales):
  """Returns the trainable part of a tree from PEFT's names and values."""
  out = {}
  for module in ("embed", "up"):
    own = {k: v for k, v in values.items() if f".{module}.lora_" in k}
    if own:
      a, b = (next(v for k, v in own.items() if f"_{x}." in k) for x in "AB")
      out[module] = lora(None, jnp.array(a), jnp.array(b).T, scales[module])
  for name, value in values.items():
    if "lora_" not in name:
      kind = "norm" if ".norm." in name else "up"
      out[f"{kind}_{name.rpartition('.')[2]}"] = jnp.array(value)
  return out


def follow(name, tx, steps=6):
  """Runs our optimizer on PEFT's arrays and compares the results."""
  want = golden(name)
  scales = {"embed": 1.5, "up": 2.5}
  with jax.enable_x64(True):
    shapes = {k: np.shape(v) for k, v in want.items()}
    moved = ours(
      {k: sines(n, s) for n, (k, s) in enumerate(shapes.items())}, scales
    )
    held, update = tx.init(moved), jax.jit(tx.update)
    for k in range(steps):
      g = {
        name: gradient(n, k, shape)
        for n, (name, shape) in enumerate(shapes.items())
      }
      updates, held = update(ours(g, scales), held, moved)
      moved = optax.apply_updates(moved, updates)
    # Rates are float32 in our state: 6e-8 of each step, and b is divided by
    # roots of mean squares that are near 0.
    chex.assert_trees_all_close(moved, ours(want, scales), atol=1e-7)


def test_loraplus_groups_are_pefts():
  tx = loraplus.peft_groups(
    0.01,
    ratio=4,
    embedding=0.003,
    undecayed=r"bias$|^norm_",
    weight_decay=0.1,
  )
  follow("loraplus", tx)


def test_riemannian_is_pefts():
  tx = riemannian.riemannian(
    0.01, matching="^(?!embed)", weight_decay=0.1, clip=None
  )
  follow("riemannian", tx)


def test_lora_fa_is_pefts():
  follow("lora_fa", riemannian.lora_fa(0.01, eps=1e-12))


def test_lora_fa_has_neither_moments_nor_updates_for_a():
  params = {"q": lora(None, jnp.ones((3, 2, 5)), jnp.ones((3, 2, 4)))}
  tx = riemannian.lora_fa(0.1, weight_decay=0.5)
  held = tx.init(params)
  # Two moments of b, Adam's count, the rate and its count.
  assert tree.count(held) == 2 * params["q"].trained["b"].size + 3
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), held, params)
  assert not updates["q"].trained["a"].any()
  assert updates["q"].trained["b"].all()


def test_loraplus_multiplies_the_rate_of_b_alone():
  params = {"q": lora(None, jnp.ones((2, 5)), jnp.ones((2, 4)))}
  tx = loraplus.loraplus(0.01, ratio=16, weight_decay=0.1, clip=None)
  g = jax.tree.map(lambda x: 0.3 * x, params)
  updates, held = tx.update(g, tx.init(params), params)
  # Adam's first step is the sign of the gradient, to the float32 rounding of
  # 1 - 0.999 under a root.
  chex.assert_trees_all_close(
    updates["q"].trained,
    {"a": jnp.full((2, 5), -0.011), "b": jnp.full((2, 4), -0.176)},
    rtol=5e-5,
  )
  assert float(optax.tree.get(held, "learning_rate")) == np.float32(0.01)


def test_the_first_row_of_a_table_counts():
  factor = rates.table([("^x/", 0), ("a$", 2.0)], rest=3.0)
  params = {"x": {"a": jnp.ones(1)}, "a": jnp.ones(1), "b": jnp.ones(1)}
  tx = rates.scale_by_path(factor)
  found, _ = tx.update(params, tx.init(params))
  assert jax.tree.map(lambda x: float(x[0]), found) == {
    "x": {"a": 0.0},
    "a": 2.0,
    "b": 3.0,
  }


def test_adams_path_of_the_product_has_two_symmetries():
  """Section 3.1: (alpha / p q, p init_a, p rate_a, q rate_b) is the same."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)), rng.normal(size=(20, 5))
    w, a = rng.normal(size=(6, 5)), rng.normal(size=(3, 6))

    def run(alpha, init, rate_a, rate_b):
      factor = rates.table([("a$", rate_a), ("b$", rate_b)])
      tx = rates.adamw(0.01, factor, eps=1e-30, clip=None)
      params = {"a": jnp.array(init * a), "b": jnp.zeros((3, 5))}

      def merged(p):
        return w + alpha / 3 * p["a"].T @ p["b"]

      def body(_, carry):
        p, held = carry
        g = jax.grad(lambda p: ((x @ merged(p) - y) ** 2).sum())(p)
        updates, held = tx.update(g, held, p)
        return optax.apply_updates(p, updates), held

      p, _ = jax.lax.fori_loop(0, 50, body, (params, tx.init(params)))
      return merged(p), w

    (plain, start), (other, _) = jax.jit(
      lambda: (run(4.0, 1, 1, 1), run(4.0 / (8 * 3), 8, 8, 3))
    )()
    assert np.abs(plain - start).max() > 0.1
    np.testing.assert_allclose(other, plain, atol=1e-9)


@pytest.fixture(scope="module")
def pro():
  """LoRA-Pro's step in float64, with all quantities of its theorems."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    s, r, i, o = 1.7, 3, 7, 6
    a, b = rng.normal(size=(2, r, i)), rng.normal(size=(2, r, o))
    full = rng.normal(size=(2, i, o))
    ga = s * b @ np.swapaxes(full, -1, -2)
    gb = s * a @ full
    tx = lorapro.match_full_gradient(damping=0.0)
    params = {"q": lora(None, jnp.array(a), jnp.array(b), s)}
    grads = {"q": lora(None, jnp.array(ga), jnp.array(gb), s)}
    found, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    da, db = (np.asarray(found["q"].trained[n]) for n in "ab")
  return s, a, b, full, ga, gb, da, db


def test_lorapro_is_the_nearest_step_of_the_product(pro):
  s, a, b, full, *_, da, db = pro
  t = lambda x: np.swapaxes(x, -1, -2)  # noqa: E731
  moved = s * (t(da) @ b + t(a) @ db)
  for n in range(2):
    # All steps of the product that a pair can make, as a linear map.
    columns = [
      (t(ea) @ b[n] + a[n].T @ np.zeros_like(b[n])).ravel()
      for ea in np.eye(a[n].size).reshape(-1, *a[n].shape)
    ] + [
      (a[n].T @ eb).ravel() for eb in np.eye(b[n].size).reshape(-1, *b[n].shape)
    ]
    basis = np.stack(columns, 1)
    solved = np.linalg.lstsq(basis, full[n].ravel(), rcond=None)[0]
    want = (basis @ solved).reshape(full[n].shape)
    np.testing.assert_allclose(moved[n], want, atol=1e-10)


def test_lorapro_is_the_nearest_of_those_to_the_gradient(pro):
  _, a, b, _, ga, gb, da, db = pro
  rng = np.random.default_rng(2)

  def distance(x):
    # Any such x leaves the product's step as it is.
    return ((da + x @ a - ga) ** 2).sum() + (
      (db - np.swapaxes(x, -1, -2) @ b - gb) ** 2
    ).sum()

  best = distance(np.zeros((2, 3, 3)))
  for _ in range(20):
    x = 1e-3 * rng.normal(size=(2, 3, 3))
    ahead, behind = distance(x), distance(-x)
    assert min(ahead, behind) > best
    # At a minimum the slope is 0; both are 1e-5 above it.
    assert abs(ahead - behind) < 1e-9


@pytest.mark.parametrize(
  "make",
  [lorapro.lorapro, riemannian.riemannian, riemannian.lora_fa],
  ids=lambda make: make.__name__,
)
def test_b_of_zero_and_equal_rows_stay_finite(make):
  rng = np.random.default_rng(3)
  a = np.repeat(rng.normal(size=(1, 8)), 3, 0)  # of rank one
  params = {"q": lora(None, jnp.float32(a), jnp.zeros((3, 5)))}
  grads = {"q": lora(None, jnp.zeros((3, 8)), jnp.float32(a[:, :5]))}
  tx = make(0.01)
  held, update = tx.init(params), jax.jit(tx.update)
  for _ in range(3):
    updates, held = update(grads, held, params)
    params = optax.apply_updates(params, updates)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
  assert not (params["q"].trained["a"] - jnp.float32(a)).any()


def test_pairs_have_the_scale_of_their_adapter():
  arrays = {"a": 1, "b": 2}
  inner = lora(None, jnp.ones((2, 5)), jnp.ones((2, 4)), 3.0)
  params = {
    "q": lora(inner, jnp.ones((2, 5)), jnp.ones((2, 4)), 0.5),
    "plain": jax.tree.map(jnp.ones, arrays),
    "fixed_one": {"fixed": {"a": jnp.ones(1)}, "trained": {"b": jnp.ones(1)}},
    "extra": jnp.ones(1),
  }
  found = {p.down: (p.up, p.scale) for p in pairs.pairs(params)}
  assert found == {
    "fixed_one/fixed/a": ("fixed_one/trained/b", 1.0),
    "plain/a": ("plain/b", 1.0),
    "q/trained/a": ("q/trained/b", 0.5),
    "q/w/trained/a": ("q/w/trained/b", 3.0),
  }


def _trains_b(method):
  """Whether there are `a` and a trained `b`; computes nothing."""
  w = jax.ShapeDtypeStruct((1, laws.IN, laws.OUT), jnp.float32)
  t = jax.eval_shape(lambda w: laws.fresh(method, w), w)
  return "a" in t.arrays and "b" in t.trained


NAMED = [m for m in laws.METHODS if _trains_b(m)]


def slopes(t):
  """Returns gradients of a, of b, and of the adapted matrix."""
  x = laws.draw(5, laws.IN)
  both = {name: t.arrays[name] for name in "ab"}

  def loss(both):
    trained = t.trained | {k: v for k, v in both.items() if k in t.trained}
    w = dataclasses.replace(t, trained=trained)
    return jnp.sin(weights.einsum("td,df->tf", x, w)).sum()

  def of_matrix(both):
    full = x.T @ jnp.cos(x @ t.dense())
    if isinstance(t.method, DoRA):  # a matrix that is scaled afterwards
      full = full * t.method._gain(t.arrays, t.w)
    return jax.grad(loss)(both), full

  both, full = jax.device_get(jax.jit(of_matrix)(both))
  return both["a"], both["b"], full


@pytest.mark.parametrize("method", NAMED, ids=laws.label)
@pytest.mark.sample(3)
def test_updates_of_pairs_change_the_matrix_by_their_product(method):
  """`ga = s b Gᵀ` and `gb = s a G`, G of the matrix; if not, it is refused."""
  t = laws.one(laws.moved(method))
  ga, gb, full = slopes(t)
  a, b = (np.asarray(t.arrays[name]) for name in "ab")
  if method.pair_scale is None:
    with pytest.raises(
      UserError, match=f"q/trained/a: {type(method).__name__}"
    ):
      pairs.pairs({"q": t})
    # And rightly so.
    if a.shape[-1:] == full.shape[:1]:
      s = getattr(method, "scale", 1.0)
      right = s * a @ full
      assert right.shape != gb.shape or np.abs(gb - right).max() > 1e-3
    return
  (pair,) = pairs.pairs({"q": t})
  assert pair.scale == method.pair_scale
  laws.close(gb, pair.scale * a @ full)
  if not isinstance(method, LoRAFA):  # whose a has no gradient
    laws.close(ga, pair.scale * b @ full.T, laws.OUT)


def test_unmatched_pairs_are_ignored():
  params = {"k": laws.one(laws.moved(KaSA(rank=4)))}
  params["q"] = laws.one(laws.moved(laws.LoRA(rank=4)))
  assert [p.down for p in pairs.pairs(params, "^q/")] == ["q/trained/a"]
  for make in (lorapro.lorapro, riemannian.riemannian, riemannian.lora_fa):
    with pytest.raises(UserError, match="k/trained/a: KaSA adds another"):
      make(0.1).init(params)
    make(0.1, matching="^q/").init(params)


@pytest.mark.parametrize("part", [None, "per_layer", "language"])
def test_loraplus_speeds_up_the_zero_initialised_factor(part):
  """Of an embedding that is `a`: Gemma 4's second one's and a tower's, too."""
  table = lora(None, jnp.ones((2, 5)), jnp.ones((2, 4)))
  params = {part: {"embed": table}} if part else {"embed": table}
  tx = loraplus.loraplus(0.01, ratio=16, clip=None)
  updates, _ = tx.update(params, tx.init(params), params)
  table = (updates[part] if part else updates)["embed"]
  found = {k: float(x[0, 0]) for k, x in table.trained.items()}
  np.testing.assert_allclose([found["a"], found["b"]], [-0.16, -0.01], 5e-5)


def test_loraplus_without_any_b_is_refused():
  params = {"q": AdaptedTensor(None, {"l": jnp.ones(3)}, method=IA3())}
  for make in (loraplus.loraplus, loraplus.peft_groups):
    with pytest.raises(UserError, match="LoRA\\+: "):
      make(0.01).init(params)
  # PEFT's groups go by names and axes that other methods have not here.
  other = {"q": laws.one(laws.moved(AdaLoRA(rank=4)))}
  with pytest.raises(
    UserError, match="q: AdaLoRA, expected plain LoRA or what"
  ):
    loraplus.peft_groups(0.01).init(other)


def test_no_pairs_is_refused():
  params = {"a": jnp.ones((2, 3)), "extra": jnp.ones(2)}
  with pytest.raises(UserError, match="'.' matches none of 2 trainable arrays"):
    riemannian.riemannian(0.1).init(params)


def test_a_model_trains_and_its_state_is_sharded_like_its_parameters(
  adapted_state,
):
  for path, x in tree.flatten_paths(adapted_state.opt_state):
    assert x.ndim == 0 or path.endswith(("/trained/a", "/trained/b")), path


@pytest.fixture
def adapted_state():
  a, b = jnp.ones((3, 2, 8)), jnp.zeros((3, 2, 6))
  w = lora(jnp.ones((3, 8, 6)), a, b)
  params = {"run0": {"layer0": {"attention": {"q": w}}}}
  tx = riemannian.riemannian(optim.cosine(1e-3, 10))
  return state.create(params, "/trained/", tx)


def test_frozen_a_projects_on_what_a_fixed_a_can_express():
  """`s aᵀ db` is G, projected on the rows of a: whatever the scale is."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(4)
    a, full = rng.normal(size=(3, 7)), rng.normal(size=(7, 5))
    params = {"q": lora(None, jnp.array(a), jnp.zeros((3, 5)), 2.5)}
    grads = {"q": lora(None, jnp.array(a), jnp.array(2.5 * a @ full), 2.5)}
    tx = riemannian.frozen_a()
    found, _ = tx.update(grads, tx.init(params), params)
    moved = 2.5 * a.T @ np.asarray(found["q"].trained["b"])
  # The damping of 1e-8 beside eigenvalues of order 1.
  np.testing.assert_allclose(moved, np.linalg.pinv(a) @ a @ full, atol=1e-6)
