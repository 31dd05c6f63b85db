"""FLOPs of traced functions against the usual formulas."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from research import tree, weights
from research.planning import flops
from research.sharding import Layout
from research.training.objectives.objective import NextToken
from tests import support

B, T = 4, 32


def _batch():
  names = ("tokens", "targets", "positions", "segments")
  batch = {k: jax.ShapeDtypeStruct((B, T), jnp.int32) for k in names}
  return batch | {"weights": jax.ShapeDtypeStruct((B, T), jnp.float32)}


def _forward(model):
  objective = NextToken(model=model)
  return flops.count_flops(
    lambda p, b: objective(p, b, None)[0], support.shapes(model), _batch()
  )


def test_a_forward_pass_is_twice_the_matrices_and_attention():
  model, sizes = support.model("llama"), support.SIZES
  matrices = sum(
    tree.count(leaf)
    for path, leaf in tree.flatten_paths(support.shapes(model))
    if not path.endswith("scale")
  )
  # Scores and mixing, every head, all of T x T: one block has no tile to skip.
  attention = sizes.depth * 2 * 2 * B * T * T * sizes.heads * sizes.head_dim
  head = 0 if model.tied else -sizes.vocab * sizes.width
  assert _forward(model) == 2 * B * T * (matrices + head) + attention


@pytest.mark.parametrize("matmul", [jax.lax.ragged_dot, weights.ragged_dot])
@pytest.mark.parametrize(
  ("wanted", "products"), [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)]
)
def test_of_experts_only_those_that_a_token_uses_count(
  matmul, wanted, products
):
  def loss(x, w, sizes):
    return (matmul(x, w, sizes) ** 2).sum()

  shapes = [
    jax.ShapeDtypeStruct((24, 16), jnp.float32),
    jax.ShapeDtypeStruct((8, 16, 32), jnp.float32),
    jax.ShapeDtypeStruct((8,), jnp.int32),
  ]
  f = jax.grad(loss, wanted) if wanted else loss
  assert flops.count_flops(f, *shapes) == products * 2 * 24 * 16 * 32


def test_of_branches_for_platforms_the_default_counts():
  def padded(x, w):
    return (jnp.concatenate([x, x]) @ w)[:4]

  def f(x, w):
    return jax.lax.platform_dependent(x, w, cpu=padded, default=jnp.matmul)

  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 8), (8, 8)))
  assert flops.count_flops(f, x, w) == 2 * 4 * 8 * 8


@pytest.mark.parametrize("branches", [1, 2])
def test_of_branches_the_most_expensive_counts(branches):
  def f(x, w):
    cheap, dear = (lambda x: x), (lambda x: x @ w @ w)
    return jax.lax.cond(x.sum() > 0, cheap, (cheap, dear)[branches - 1], x)

  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4, 8), (8, 8)))
  assert flops.count_flops(f, x, w) == (branches - 1) * 2 * 2 * 4 * 8 * 8


@pytest.mark.parametrize(
  ("left", "right", "out"),
  [
    (P("data"), P(), P("data")),
    (P(), P(None, "tensor"), P(None, "tensor")),
    (P("data"), P(None, "tensor"), P("data", "tensor")),
    (P(("data", "tensor")), P(), P(("data", "tensor"))),
    (P(None, "tensor"), P("tensor"), P()),
    (P(), P(), P()),
  ],
)
def test_work_that_devices_share_is_that_of_all(left, right, out):
  """Also where each is given its part by hand, as attention's are."""

  def local(x, w):
    y = x @ w
    return jax.lax.psum(y, "tensor") if left == P(None, "tensor") else y

  def f(x, w):
    return jax.shard_map(local, in_specs=(left, right), out_specs=out)(x, w)

  x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((16, 8), (8, 24)))
  with jax.set_mesh(Layout(data=4, tensor=2).mesh()):
    assert flops.count_flops(f, x, w) == 2 * 16 * 8 * 24


def test_a_model_on_a_mesh_does_what_it_does_on_one_device():
  model = support.model("llama")
  alone = _forward(model)
  with jax.set_mesh(Layout(data=4, tensor=2).mesh()):
    assert _forward(model) == alone
