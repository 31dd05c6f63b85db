"""FLOPs: traced functions, closed forms and XLA against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from research import tree, weights
from research.lora.adapt import Adapt
from research.lora.methods.dora import DoRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.lora import LoRA
from research.nn import flops, presets
from research.nn.attention import CrossAttention
from research.nn.cross_attention import GatedCrossAttention
from research.nn.mlp import PlainMlp
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from research.planning import hlo
from research.planning.cost import program_cost
from research.sharding import Layout
from research.training.objectives.objective import NextToken
from research.vlm.cross_attention import interleave
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


T, OUTPUTS = 16, 3


def _random_sizes(seed):
  rng = np.random.default_rng(seed)
  kv_heads = int(rng.integers(1, 4))
  return dict(
    width=int(rng.integers(5, 12)) * 4,
    depth=int(rng.integers(1, 4)),
    kv_heads=kv_heads,
    heads=kv_heads * int(rng.integers(1, 4)),
    head_dim=int(rng.integers(2, 6)) * 4,
    hidden=int(rng.integers(20, 60)),
    vocab=int(rng.integers(40, 90)),
    window=int(rng.integers(2, 12)),
    tied=bool(rng.integers(2)),
  )


def _sparse(shared):
  routing = Routing(experts=6, active=2)
  return presets.Sparse(routing=routing, hidden=20, shared=shared)


def _flamingo(**sizes):
  layer = GatedCrossAttention(
    attention=CrossAttention(heads=2, head_dim=8),
    mlp=PlainMlp(hidden=20, bias=False),
    media_width=24,
  )
  model = support.model("llama", **sizes)
  return interleave(model, layer, every=1, first=0)


MODELS = {
  "dense and GQA": lambda **sizes: support.model("llama", **sizes),
  "sliding window": lambda **sizes: support.model("gemma2", **sizes),
  "experts": lambda **sizes: support.model(
    "qwen3_moe", sparse=_sparse(0), **sizes
  ),
  "experts, one shared": lambda **sizes: support.model(
    "qwen3_moe", sparse=_sparse(1), **sizes
  ),
  "borrowed keys and vectors of each layer": lambda **sizes: support.gemma4(
    kinds=("local", "global") * 2,
    kv_shared_layers=2,
    per_layer=12,
    per_layer_vocab=67,
    width=sizes["width"],
    global_values="keys",
  ),
  "cross-attention without images": _flamingo,
}


def _logits(model):
  def logits(params, tokens):
    hidden = model.apply({"params": params}, tokens)[0][:, -OUTPUTS:]
    return model.apply({"params": params}, hidden, method="logits")

  return logits


TOKENS = jax.ShapeDtypeStruct((1, T), jnp.int32)


def _sums_of_experts(model):
  """Returns the FLOPs of a token's sums of experts' outputs."""
  mixtures = (x.mlp for x in model.layer_kinds() if isinstance(x.mlp, Moe))
  return sum(2 * model.width * x.routing.active for x in mixtures)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_a_closed_form_is_what_the_traced_forward_multiplies(name, seed):
  """Of models of random sizes; a tile of scores is computed whole."""
  model = MODELS[name](**_random_sizes(seed))
  cost = flops.model_cost(model).forward(T, flops.Dense(T, T), OUTPUTS)
  traced = flops.count_flops(_logits(model), support.shapes(model), TOKENS)
  assert cost == traced - T * _sums_of_experts(model)


@pytest.mark.parametrize("name", ["dense and GQA", "sliding window"])
def test_a_closed_form_is_what_xla_counts(name):
  """Up to an operation or two of each number that is no product's.

  XLA counts a loop's body once, so that layers are unrolled; sums count their
  operands.
  """
  model = MODELS[name](**_random_sizes(7))
  shapes = jax.eval_shape(tree.unroll, support.shapes(model))
  compiled = jax.jit(_logits(model)).lower(shapes, TOKENS).compile()
  cost = flops.model_cost(model).forward(T, flops.Dense(T, T), OUTPUTS)
  assert program_cost(hlo.parse(compiled.as_text()), 1).flops == cost
  others = _numbers_beside_products(_logits(model), shapes, TOKENS)
  assert cost <= compiled.cost_analysis()["flops"] <= cost + 2 * others


def _numbers_beside_products(f, *args):
  def count(jaxpr):
    total = 0
    for e in jaxpr.eqns:
      inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(e.params)]
      inner = [x for x in inner if hasattr(x, "eqns")]
      if inner:
        total += sum(map(count, inner))
      elif e.primitive.name != "dot_general":
        sizes = (x.aval.size for x in (*e.invars, *e.outvars))
        total += max(sizes)
    return total

  return count(jax.make_jaxpr(f)(*args).jaxpr)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("method", [LoRA, DoRA, IA3])
def test_adapters_count(method, family, tied):
  """As traced, but for products of weights alone, which no token costs."""
  sizes = _random_sizes(3) | {"tied": tied}
  if family == "qwen3_moe":
    sizes["sparse"] = _sparse(0)
  model = support.model(family, **sizes)
  adapter = IA3() if method is IA3 else method(rank=3)
  targets = ".*" if method is LoRA else "all-linear"
  shapes = jax.eval_shape(
    lambda params: Adapt(method=adapter, targets=targets)(
      params, jax.random.key(0)
    ),
    support.shapes(model),
  )
  cost = flops.model_cost(model, params=shapes)

  def unexplained(tokens):
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    traced = flops.count_flops(_logits(model), shapes, ids)
    traced -= tokens * _sums_of_experts(model)
    return traced - cost.forward(tokens, flops.Dense(tokens, tokens), OUTPUTS)

  assert unexplained(T) == unexplained(T - 4)
  if method is LoRA:
    assert unexplained(T) == 0
    assert cost.matrices > flops.model_cost(model).matrices
