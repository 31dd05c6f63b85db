"""Taps against a weight that records its inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import Mask
from research import sharding, taps, tree, weights
from research.taps import statistics
from research.training.objectives.objective import NextToken
from research.typing import UserError
from tests import support, support_mesh

EPS = float(jnp.finfo(jnp.float32).eps)
STATISTICS = (
  statistics.Covariance(),
  statistics.SampleCovariance(),
  statistics.Magnitudes(),
  statistics.Gradient(),
)


class Spy(weights.Weight):
  """A weight that records its inputs, for unrolled layers."""

  def __init__(self, w):
    self.w, self.seen = w, []
    self.shape, self.dtype = w.shape, w.dtype

  def einsum(self, eq, x):
    self.seen.append(x)
    return weights.einsum(eq, x, self.w)

  def ragged_dot(self, x, sizes):
    self.seen.append((x, sizes))
    return weights.ragged_dot(x, self.w, sizes)

  def dense(self):
    return self.w

  def bind(self, *, key, ids):
    return self


def batch(kind):
  """Returns a batch; for experts, all rows but padding count."""
  found = jax.tree.map(jnp.asarray, support_mesh.batch())
  if kind == "plain":
    return found
  real = (found["segments"] >= 0).astype(jnp.float32)
  return found | {"weights": real}


@functools.cache
def params(kind):
  return support.params(support_mesh.model(kind))


@functools.cache
def inputs(kind):
  """Returns {address: inputs} of every matrix, layer by layer in Python."""
  seen = jax.jit(
    functools.partial(seen_by_spies, kind),
    compiler_options=support_mesh.QUICKLY,
  )(params(kind), batch(kind))

  def wide(x):
    x = np.asarray(x)
    return x if np.issubdtype(x.dtype, np.integer) else np.float64(x)

  return jax.tree.map(wide, seen)


def seen_by_spies(kind, params, given):
  model = support_mesh.model(kind)
  layers = [
    jax.tree.map(lambda w: Spy(w) if w.ndim > 1 else w, layer)
    for layer in tree.layers(params)
  ]
  x = params["embed"][given["tokens"]]
  mask = Mask.causal(segments=given["segments"])
  at = given["positions"]
  for block, layer in zip(model.layer_kinds(), layers, strict=True):
    rope = block.attention.rope.tables(at, block.attention.head_dim)
    x, _, _ = block.apply({"params": layer}, x, at, mask, rope)
  return {
    f"layers/{i}/{path}": w.seen
    for i, layer in enumerate(layers)
    for path, w in tree.flatten_paths(layer)
    if isinstance(w, Spy)
  }


@functools.cache
def collected_once(kind, statistic):
  return collected(kind, statistic)


def collected(kind, statistic, remat="none", layout=None, given=None):
  """Returns the statistics of every matrix, by address."""
  model = support_mesh.model(kind).clone(remat=remat)
  objective = NextToken(model, rows=32)
  chosen = None
  if layout is not None:
    chosen = [a for a in inputs(kind) if not a.endswith("router")]

  def run(params, batch):
    def loss(params):
      return objective(params, batch, None)[0]

    counts = batch["weights"]
    return taps.collect(loss, params, statistic, counts, chosen)

  run = jax.jit(run, compiler_options=support_mesh.QUICKLY)
  given = given or params(kind)
  if layout is None:
    found = run(given, batch(kind))
  else:
    plan = support_mesh.LAYOUTS[layout]
    mesh = plan.mesh()
    where = plan.shardings(given, mesh, sharding.head_counts(model))
    with jax.set_mesh(mesh):
      given = jax.device_put(given, where)
      found = run(given, jax.device_put(batch(kind), plan.batch(mesh)))
  return taps.by_address(given, jax.tree.map(np.asarray, found))


def close(got, want, length=128):
  """Equal up to rounding of sums of `length` terms, and of the inputs."""
  want = np.asarray(want)
  scale = max(float(np.abs(want).max()), 1e-6)
  np.testing.assert_allclose(got, want, atol=32 * EPS * length**0.5 * scale)


def summed(statistic, x, counts):
  """Returns the statistic in NumPy, of `x [B, T, I]` and `counts [B, T]`."""
  c = np.asarray(counts, np.float64)[..., None]
  flat = (c * x).reshape(-1, x.shape[-1])
  match statistic:
    case statistics.Covariance():
      xx = flat.T @ x.reshape(flat.shape)
      return dict(xx=xx, x=flat.sum(0), n=[c.sum()])
    case statistics.Magnitudes():
      size = np.abs(flat)
      return dict(
        most=size.max(0),
        sizes=size.sum(0),
        squares=(size**2).sum(0),
        n=[c.sum()],
      )
    case statistics.SampleCovariance():
      xx, n = 0, 0
      for rows, mine in zip(x, c[..., 0] > 0, strict=True):
        if mine.any():
          rows = rows[mine] / np.abs(rows[mine].max())
          xx, n = xx + rows.T @ rows, n + 1
      return dict(xx=xx, n=[n])


@pytest.mark.parametrize("statistic", STATISTICS[:3], ids=repr)
@pytest.mark.sample(3)
def test_activations_of_every_layer_are_what_it_multiplies(statistic):
  found = collected_once("plain", statistic)
  assert len(found) == 7 * support_mesh.DEPTH
  for address, (x,) in inputs("plain").items():
    want = summed(statistic, x, batch("plain")["weights"])
    assert found[address].keys() == want.keys()
    for name in want:
      close(found[address][name], want[name])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "experts"])
@pytest.mark.sample(2)
def test_gradients_are_jaxs_own(kind):
  model, given = support_mesh.model(kind), params(kind)
  objective = NextToken(model, rows=32)
  want = jax.jit(
    jax.grad(lambda p: objective(p, batch(kind), None)[0]),
    compiler_options=support_mesh.QUICKLY,
  )(given)
  want = dict(tree.flatten_paths(want))
  found = dict(collected_once(kind, statistics.Gradient()))
  indices = tree.layer_indices(given)
  for prefix, rows in indices.items():
    for path in (p for p in want if p.startswith(prefix)):
      if want[path].ndim < 3:
        continue
      for k, i in enumerate(rows):
        got = found.pop(f"layers/{i}/{path.split('/', 2)[-1]}")["g"]
        close(got, want[path][k])
  assert not found


@pytest.mark.parametrize("remat", ["layer", "names"])
def test_recomputing_changes_nothing(remat):
  want = collected_once("plain", statistics.Covariance())
  got = collected("plain", statistics.Covariance(), remat)
  jax.tree.map(close, got, want)


@pytest.mark.slow
def test_packed_weights_are_seen_as_well():
  """The gradient of the dense matrix exists even for packed integers."""
  packed = support_mesh.packed(params("plain"))
  plain = jax.tree.map(weights.dense, packed, is_leaf=weights.is_weight)
  for statistic in (statistics.Covariance(), statistics.Gradient()):
    want = collected("plain", statistic, given=plain)
    got = collected("plain", statistic, given=packed)
    jax.tree.map(functools.partial(close, length=4096), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("statistic", STATISTICS[::2], ids=repr)
@pytest.mark.sample(2)
def test_each_expert_sees_its_own_rows(statistic):
  """The recorded rows without padding, which the recorder cannot detect."""
  found = collected_once("experts", statistic)
  real = np.asarray(batch("experts")["weights"]).astype(bool).reshape(-1)
  seen = {k: x for k, x in inputs("experts").items() if "experts/" in k}
  assert seen
  for address, ((x, sizes),) in seen.items():
    (tokens,) = inputs("experts")[address.split("experts")[0] + "router"]
    got = found[address]
    # Each real token is a row of two experts.
    assert got["n"].sum() == 2 * real.sum()
    padding = {row.tobytes() for row in tokens[~real]}
    for e, end in enumerate(np.cumsum(sizes)):
      rows = x[end - sizes[e] : end]
      if not address.endswith("down"):
        rows = rows[[row.tobytes() not in padding for row in rows]]
        want = summed(statistic, rows[None], np.ones((1, len(rows))))
        for name in want:
          close(got[name][e], want[name])


CASES = (
  *(("plain", m) for m in ("data", "fsdp", "tensor", "mixed", "ulysses")),
  ("experts", "experts"),
)


@pytest.mark.parametrize(("kind", "layout"), CASES)
@pytest.mark.parametrize("statistic", STATISTICS[::3], ids=repr)
@pytest.mark.cover(1)
@pytest.mark.sample(4)
def test_on_eight_devices_as_on_one(kind, layout, statistic):
  want = collected_once(kind, statistic)
  got = collected(kind, statistic, layout=layout)
  want = {address: want[address] for address in got}
  assert len(got) == 7 * support_mesh.DEPTH
  jax.tree.map(functools.partial(close, length=2048), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "tensor"])
@pytest.mark.sample(2)
def test_largest_values_and_samples_on_eight_devices(layout):
  for statistic in STATISTICS[1:3]:
    want = collected_once("plain", statistic)
    got = collected("plain", statistic, layout=layout)
    jax.tree.map(functools.partial(close, length=2048), got, want)


@pytest.mark.parametrize(
  ("layout", "statistic", "message"),
  [
    ("expert", STATISTICS[0], "does not shard"),
    ("experts", STATISTICS[2], "maxima are not supported"),
    ("ring", STATISTICS[0], "RING=1"),
  ],
)
def test_what_a_mesh_would_get_wrong_is_refused(layout, statistic, message):
  kind = "plain" if layout == "ring" else "experts"
  with pytest.raises(UserError, match=message):
    collected(kind, statistic, layout=layout)


@pytest.mark.slow
def test_a_head_is_no_row_of_the_batch():
  model = support.model("llama", tied=False)
  given, tokens = support.params(model), support.tokens()

  def loss(params):
    hidden, _ = model.apply({"params": params}, tokens)
    return model.apply({"params": params}, hidden[:, :3], method="logits").sum()

  run = functools.partial(taps.collect, loss, given, STATISTICS[0])
  with pytest.raises(UserError, match="leave it out"):
    run(jnp.ones(tokens.shape))
  assert set(run(addresses=["head"])) == {"head"}
  found = jax.jit(lambda: run(addresses=["layers/1/mlp/up"]))()
  assert set(found) == {"run0/layer0/mlp/up"}
  assert len(taps.by_address(given, found)) == 3


def test_activations_alone_are_compiled_without_a_backward_pass():
  """By the compiler's count: a backward pass would be two thirds."""
  model, given = support_mesh.model("plain"), params("plain")

  def loss(params):
    return NextToken(model, rows=32)(params, batch("plain"), None)[0]

  def operations(f):
    return jax.jit(f).lower(given).compile().cost_analysis()["flops"]

  def seen(params):
    return taps.collect(
      loss, params, STATISTICS[2], addresses=["layers/2/mlp/up"]
    )

  # Forward to the last of the layers, without the head.
  assert operations(seen) < operations(loss)
