"""GaLore, APOLLO and Fira against their authors' code, and the projections."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import sharding, tree
from research.optim import adam8bit
from research.optim.low_rank import apollo, galore, subspace
from research.optim.low_rank.compressing import Compressing
from research.training import state, step
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "optimizers.json"
SHAPES = {"wide": (5, 8), "tall": (7, 4), "other": (6,)}


@functools.cache
def golden(name):
  """Returns the authors' result, [out, in] there, [in, out] here."""
  found = json.loads(GOLDEN.read_text())["projections"][name]
  return {
    k: np.transpose(np.float32(x)) for k, x in zip(SHAPES, found, strict=True)
  }


def value(n, shape):
  t = np.arange(np.prod(shape))
  return np.float32(0.5 * np.sin(0.7 * t + n)).reshape(shape).T


def gradient(n, k, shape):
  t = np.arange(np.prod(shape))
  return np.float32(np.sin(0.3 * t**2 + 1.3 * n + 2.1 * k)).reshape(shape).T


def arrays(f):
  return {k: jnp.asarray(f(n, s)) for n, (k, s) in enumerate(SHAPES.items())}


def follow(tx, params, gradients):
  held, update = tx.init(params), jax.jit(tx.update)
  for g in gradients:
    updates, held = update(g, held, params)
    params = optax.apply_updates(params, updates)
  return params, held


def projection(rank=2, **fields):
  return subspace.Projection(rank=rank, every=6, **fields)


ADAM = optax.scale_by_adam(0.8, 0.9, 1e-12)
MATRICES = "wide|tall"


def moments(make, rank=2, **fields):
  return make(
    0.1,
    projection(rank),
    matrices=MATRICES,
    b1=0.8,
    b2=0.9,
    eps=1e-12,
    **fields,
  )


def ours(name):
  if name.startswith("galore"):
    side = "longer" if name == "galore_reverse" else "shorter"
    where = projection(side=side)
    return galore.galore(0.1, where, moments=ADAM, matrices=MATRICES)
  return {
    "apollo": lambda: moments(apollo.apollo, scale=4.0),
    "apollo_mini": lambda: moments(
      apollo.apollo, 1, scale=4.0, factor=apollo.whole
    ),
    "fira": lambda: moments(apollo.fira),
  }[name]()


@pytest.mark.parametrize(
  "name", ["galore", "galore_reverse", "apollo", "apollo_mini", "fira"]
)
def test_six_steps_are_the_authors(name):
  gradients = [
    arrays(functools.partial(lambda k, n, s: gradient(n, k, s), k))
    for k in range(6)
  ]
  got, _ = follow(ours(name), arrays(value), gradients)
  # Float32 on both sides; Adam divides small R by their own size, so that
  # roundings of 1e-7 in singular vectors count a hundredfold.
  chex.assert_trees_all_close(got, golden(name), atol=3e-5)


@pytest.mark.slow
def test_a_stack_is_its_layers():
  rng = np.random.default_rng(0)
  stack = {"wide": jnp.float32(rng.normal(size=(3, 8, 5)))}
  grads = [{"wide": jnp.float32(rng.normal(size=(3, 8, 5)))} for _ in range(4)]
  for name in ("galore", "apollo", "fira"):
    got, _ = follow(ours(name), stack, grads)
    for n in range(3):
      one = jax.tree.map(lambda x, n=n: x[n], (stack, grads))
      want, _ = follow(ours(name), *one)
      chex.assert_trees_all_close(got["wide"][n], want["wide"], atol=2e-5)


def test_optax_s_galore_moves_one_matrix_alike_and_refuses_a_stack():
  """Why ours is by hand: layers of one shape are stacked."""
  start = arrays(value)
  gradients = [
    arrays(functools.partial(lambda k, n, s: gradient(n, k, s), k))
    for k in range(6)
  ]
  theirs = optax.chain(
    optax.contrib.scale_by_galore(2, 6, 0.25, ADAM), optax.scale(-0.1)
  )
  want, _ = follow(theirs, start, gradients)
  got, _ = follow(ours("galore_reverse"), start, gradients)
  chex.assert_trees_all_close(got, want, atol=3e-5)
  where = optax.contrib.GaLoreDimensionNumbers(-2, -1)
  stacked = optax.contrib.scale_by_galore(2, weight_dimension_numbers=where)
  with pytest.raises(ValueError, match="All axes must be specified"):
    stacked.init({"wide": jnp.zeros((3, 8, 5))})


def spectrum(shape, values):
  rng = np.random.default_rng(1)
  u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in shape)
  k = len(values)
  return jnp.float32(u[:, :k] * values @ v[:, :k].T)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_power_finds_the_singular_vectors(shape):
  values = np.array([8, 6, 4, 3, 0.1, 0.05, 0.02])
  g = spectrum(shape, values)
  where = subspace.Projection(rank=4, basis=subspace.Power(iterations=2))
  exact = subspace.Projection(rank=4)
  key, last = jax.random.key(0), jnp.zeros(where.shape(shape))
  p, q = (x.fresh(g, last, key) for x in (where, exact))
  # The part of weak directions falls as (0.1 / 3)^5 = 4e-8; float32 is 1e-6.
  small, want = where.down(g, p), exact.down(g, q)
  chex.assert_trees_all_close(jnp.abs(small), jnp.abs(want), atol=2e-5)
  back = where.up(small, p, shape)
  # What is lost is the rest of the spectrum.
  lost = np.linalg.norm(np.asarray(g - back))
  np.testing.assert_allclose(lost, np.linalg.norm(values[4:]), rtol=1e-3)


def test_gaussian_is_the_identity_in_the_mean():
  where = subspace.Projection(rank=8, basis=subspace.Gaussian())
  g, last = jnp.ones((6, 9)), jnp.zeros((6, 8))
  keys = jax.random.split(jax.random.key(0), 4000)
  draws = jax.vmap(lambda key: where.fresh(g, last, key))(keys)
  mean = jnp.einsum("nir,njr->ij", draws, draws) / len(keys)
  # A variance of at most 2 / 8 in each of 4000 draws: 0.008.
  np.testing.assert_allclose(mean, np.eye(6), atol=0.04)


def small_adam(mean="keep", square="keep", **fields):
  return galore.in_subspace(
    optax.scale_by_adam(),
    subspace.Projection(rank=4, every=1, **fields),
    scale=1.0,
    matrices="w",
    mean=mean,
    square=square,
  )


def test_means_turn_with_the_basis():
  rng = np.random.default_rng(2)
  g = [{"w": jnp.float32(rng.normal(size=(4, 6)))} for _ in range(2)]
  # Of full rank: nothing is lost, so that turned means are the plain mean.
  for mean, same in (("rotate", True), ("keep", False)):
    tx = small_adam(mean)
    _, held = follow(tx, g[0], g)
    inner, p = held.inner.mu["w"], held.projector["w"]
    plain = 0.1 * g[1]["w"] + 0.9 * 0.1 * g[0]["w"]
    close = np.allclose(p @ inner, plain, atol=1e-6)
    assert close == same
  _, held = follow(small_adam("reset", "reset"), g[0], g)
  small = held.projector["w"].T @ g[1]["w"]
  chex.assert_trees_all_close(held.inner.mu["w"], 0.1 * small, atol=1e-6)
  chex.assert_trees_all_close(held.inner.nu["w"], 1e-3 * small**2, atol=1e-7)
  # Means and squares are reset each by its own option.
  for options in (("reset", "keep"), ("keep", "reset")):
    _, held = follow(small_adam(*options), g[0], g)
    mean = np.allclose(held.inner.mu["w"], 0.1 * small, atol=1e-6)
    square = np.allclose(held.inner.nu["w"], 1e-3 * small**2, atol=1e-7)
    assert (mean, square) == tuple(x == "reset" for x in options)


def test_the_rank_of_a_sum_grows_with_projectors():
  rng = np.random.default_rng(3)
  target = jnp.float32(rng.normal(size=(16, 24)))
  where = subspace.Projection(rank=3, every=5)
  # Half of what is projected goes in a step, so that 1/32 is left of it when
  # the next directions are chosen.
  tx = galore.galore(
    0.5, where, moments=optax.identity(), scale=1.0, matrices="w"
  )
  params = {"w": jnp.zeros((16, 24))}
  held, update = tx.init(params), jax.jit(tx.update)
  for number in range(15):
    g = {"w": params["w"] - target}
    updates, held = update(g, held, params)
    params = optax.apply_updates(params, updates)
    values = np.linalg.svd(np.asarray(params["w"]), compute_uv=False)
    rank = (values > 1e-4 * values[0]).sum()
    assert rank == 3 * (number // 5 + 1)


def test_bytes_of_state():
  m, n, r = 64, 256, 8
  params = {"w": jnp.zeros((3, m, n)), "bias": jnp.zeros((3, n))}
  tx = galore.galore(
    0.1, subspace.Projection(rank=r), matrices="w$", moments=ADAM
  )
  projectors, moments, whole = 3 * m * r, 2 * 3 * r * n, 2 * 3 * n
  counters = 4  # updates (twice), Adam's, and the rate
  want = 4 * (projectors + moments + whole + counters)
  assert tree.nbytes(jax.eval_shape(tx.init, params)) == want
  packed = galore.galore(
    0.1,
    subspace.Projection(rank=r),
    matrices="w$",
    moments=adam8bit.scale_by_adam8bit(least=3 * r * n),
  )
  # A byte for each moment, 4 for each block of 256; one more count of Adam's.
  found = tree.nbytes(jax.eval_shape(packed.init, params))
  tops = 2 * 4 * 3 * r * n // 256
  assert found == want - 4 * moments + moments + tops + 4


@pytest.mark.slow
def test_state_lies_like_its_parameters_and_meshes_agree():
  rng = np.random.default_rng(4)
  shape = (2, 16, 32)
  params = {"run0": {"layer0": {"mlp": {"up": jnp.ones(shape)}}}}
  grads = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), params)
  layout = sharding.Layout(data=1, fsdp=2, tensor=4)
  mesh = layout.mesh()
  makes = (
    ours("fira"),
    galore.galore(0.1, projection(rank=4)),
    adam8bit.adamw8bit(0.1, least=0),
  )
  makes = (moments_of_layers(), *makes[1:])
  for tx in makes:
    held = tx.init(params)
    where = layout.shardings((params, held), mesh)
    for path, x in tree.flatten_paths(held):
      assert x.ndim == 0 or path.endswith("run0/layer0/mlp/up"), path
    with jax.set_mesh(mesh):
      placed = jax.device_put((params, held), where)
      update = jax.jit(tx.update)
      cut = update(jax.device_put(grads, where[0]), placed[1], placed[0])[0]
    want = jax.jit(tx.update)(grads, held, params)[0]
    chex.assert_trees_all_close(jax.device_get(cut), want, atol=1e-5)


def moments_of_layers():
  return apollo.fira(0.1, projection(rank=4), b1=0.8, b2=0.9)


class Quadratic:
  """Sum of squared errors of a matrix, for batches of rows."""

  def __call__(self, params, batch, key):
    error = ((batch["x"] @ params["w"] - batch["y"]) ** 2).sum(-1)
    return error @ batch["weights"], batch["weights"].sum(), {}


def rows(n=8, size=64):
  rng = np.random.default_rng(5)
  return {
    "x": rng.normal(size=(n, size)).astype(np.float32),
    "y": rng.normal(size=(n, size)).astype(np.float32),
    "weights": np.float32([1, 0.5, 0, 1, 1, 2, 0, 1]),
  }


def plain(tx):
  """Returns the optimizer without the seam: gradients are added up whole."""
  return optax.GradientTransformation(tx.init, tx.update)


def test_projected_gradients_add_up():
  """As whole ones do, where the projector does not depend on the batch."""
  where = subspace.Projection(
    rank=4, every=2, basis=subspace.Gaussian(), side="in"
  )
  tx = galore.galore(0.01, where, matrices="w", mean="rotate", moments=ADAM)
  start = state.create({"w": jnp.ones((64, 64))}, "w", tx)
  ends = []
  for optimizer, parts in ((tx, 4), (plain(tx), 4), (tx, 1)):
    update = jax.jit(step.make_train_step(Quadratic(), optimizer, parts))
    at = start
    for _ in range(3):
      at, metrics = update(at, rows(), jax.random.key(0))
    ends.append((at.trainable, at.opt_state))
  chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(ends[0], ends[2], rtol=1e-4, atol=1e-6)
  assert int(ends[0][1][0].count) == 3 and metrics["nonfinite"] == 0


def test_an_exact_projector_is_of_the_first_microbatch():
  where = subspace.Projection(rank=2, side="in")
  tx = galore.galore(0.01, where, matrices="w", moments=ADAM)
  start = state.create({"w": jnp.ones((64, 64))}, "w", tx)
  batch = rows()
  update = jax.jit(step.make_train_step(Quadratic(), tx, 4))
  found = update(start, batch, jax.random.key(0))[0].opt_state[0].projector["w"]
  x, y, weights = (batch[k][:2] for k in ("x", "y", "weights"))
  g = x.T @ ((x @ np.ones((64, 64)) - y) * weights[:, None])
  u = np.linalg.svd(g)[0][:, :2]
  np.testing.assert_allclose(found @ found.T, u @ u.T, atol=1e-4)


@pytest.mark.parametrize("masked", [2, 4, 6])
def test_masked_microbatches_settle_no_projector(masked):
  """A gradient of zeros has no directions, unlike the sum over all rows."""
  where = subspace.Projection(rank=2, side="in")
  # One direction, so that a projector of any row's gradient has all of it.
  batch = rows()
  batch["x"] = batch["x"][:1] * np.arange(1, 9, dtype=np.float32)[:, None]
  batch["weights"] = np.ones(8, np.float32)
  batch["weights"][:masked] = 0
  tx = galore.galore(
    0.01, where, matrices="w", mean="rotate", moments=optax.trace(0.9)
  )
  start = state.create({"w": jnp.ones((64, 64))}, "w", tx)
  ends = []
  for optimizer in (tx, plain(tx)):
    update, at = jax.jit(step.make_train_step(Quadratic(), optimizer, 4)), start
    for _ in range(2):
      at, _ = update(at, batch, jax.random.key(0))
    ends.append(at.trainable["w"])
  assert np.abs(ends[1] - 1).max() > 0.1
  np.testing.assert_allclose(*ends, rtol=1e-4)


def test_adding_up_projected_takes_less_memory():
  where = subspace.Projection(rank=4, basis=subspace.Gaussian())
  tx = galore.galore(0.01, where, matrices="w", moments=ADAM)
  size = 512
  shapes = jax.eval_shape(
    lambda: state.create({"w": jnp.ones((size, size))}, "w", tx)
  )
  batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, rows(8, size)))
  used = []
  for optimizer in (tx, plain(tx)):
    update = step.make_train_step(Quadratic(), optimizer, 4)
    program = jax.jit(update, donate_argnums=0)
    compiled = program.lower(shapes, batch, jax.random.key(0)).compile()
    used.append(compiled.memory_analysis().temp_size_in_bytes)
  # The sum of whole gradients is one more array of the matrix's size.
  assert used[1] - used[0] > 0.9 * 4 * size * size


def test_bad_use():
  with pytest.raises(
    UserError, match="'x' matches no matrix among 1 trainable"
  ):
    galore.galore(0.1, projection(), matrices="x").init({"w": jnp.ones((2, 2))})
  packed = galore.in_subspace(
    optax.identity(), projection(), matrices="w", mean="rotate"
  )
  with pytest.raises(UserError, match="mean: 'rotate' finds none of mu"):
    packed.init({"w": jnp.ones((4, 4))})
  assert isinstance(packed, Compressing)


@pytest.mark.parametrize(
  "options, field",
  [
    (dict(mean="rotate"), "mean: 'rotate' finds none of mu"),
    (dict(mean="reset"), "mean: 'reset' finds none of mu"),
    (dict(square="reset"), "square: 'reset' finds none of nu"),
  ],
)
def test_moments_that_a_new_projector_would_not_change_are_refused(
  options, field
):
  """Those in 8 bits, beside others in 32."""
  adam = adam8bit.scale_by_adam8bit(least=16, full_precision="embed")
  tx = galore.in_subspace(adam, projection(), matrices="w", **options)
  params = {"w": jnp.ones((8, 8)), "embed": jnp.ones((8, 8))}
  with pytest.raises(UserError, match=f"{field}.* for w"):
    tx.init(params)
