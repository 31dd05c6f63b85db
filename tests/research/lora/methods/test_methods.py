"""Properties of every method; a new one is one more row of METHODS.

Each row stands on one kind of base, every other on blocks, and in a model on
two of its matrices; with --slow on both kinds and on all. What is no law is
computed by numpy: eagerly, JAX compiles a program for each sum and slice.
"""

import dataclasses
import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.interop import native
from research.interop.gguf import tensor_types
from research.lora import adapt, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.method import MatrixSpec
from research.lora.methods import all_methods
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.alora import ALoRA
from research.lora.methods.bdlora import BDLoRA
from research.lora.methods.c3a import C3A
from research.lora.methods.delora import DeLoRA
from research.lora.methods.dora import DoRA
from research.lora.methods.eva import EVA
from research.lora.methods.fourierft import FourierFT
from research.lora.methods.gralora import GraLoRA
from research.lora.methods.hira import HiRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.kasa import KaSA
from research.lora.methods.loha import LoHa
from research.lora.methods.lokr import LoKr
from research.lora.methods.lora import LoRA
from research.lora.methods.miss import MiSS
from research.lora.methods.mora import MoRA
from research.lora.methods.one_factor import LoRAFA, MiCA
from research.lora.methods.qalora import QALoRA
from research.lora.methods.randlora import RandLoRA
from research.lora.methods.rotations import BOFT, HRA, OFT, Rotation
from research.lora.methods.shira import SHiRA
from research.lora.methods.svd_init import (
  CorDA,
  DecompositionInit,
  LoRAGA,
  OLoRA,
  PiSSA,
)
from research.lora.methods.tinylora import TinyLoRA
from research.lora.methods.tokens import Tokens
from research.lora.methods.vera import VeRA
from research.nn import presets
from research.quant import qtensor
from research.quant.activations import InputTensor, Round, RoundFloat
from research.quant.algorithms.rotate import Hadamard
from research.quant.formats import ggml
from research.quant.formats.affine import Affine
from research.quant.llm_int8 import Outliers
from research.typing import UserError
from tests import support

IN, OUT = 64, 32

METHODS = [
  LoRA(rank=4),
  LoRA(rank=4, rslora=True),
  DoRA(rank=4),
  HiRA(rank=4),
  LoHa(rank=4),
  LoKr(rank=2),
  LoKr(rank=2, both=True, factor=4),
  LoKr(rank=64),
  VeRA(rank=4, widest=64),
  IA3(),
  IA3(by_input=True),
  MoRA(rank=4),
  MoRA(rank=4, form="share"),
  MiSS(rank=4),
  MiSS(rank=24),
  GraLoRA(rank=4),
  C3A(block=4),
  QALoRA(rank=4, group=4),
  SHiRA(rank=4),
  SHiRA(rank=4, seed=-1),
  FourierFT(frequencies=40),
  PiSSA(rank=4),
  PiSSA(rank=4, part="smallest", rslora=True),
  OLoRA(rank=4),
  CorDA(rank=4),
  CorDA(rank=4, keep="knowledge"),
  LoRAGA(rank=4),
  LoRAGA(rank=4, form="peft"),
  LoRAFA(rank=4),
  MiCA(rank=4),
  EVA(rank=4),
  AdaLoRA(rank=4),
  DeLoRA(rank=4),
  RandLoRA(rank=12, alpha=12.0),
  KaSA(rank=4),
  OFT(block=4),
  OFT(block=2, form="exact"),
  BOFT(block=4),
  BOFT(block=2, factors=2),
  HRA(rank=4),
  TinyLoRA(rank=3, size=7),
  Tokens(ids=(9, 3, 0)),
  Tokens(ids=(9, 3, 0), side="out"),
  BDLoRA(rank=4, side="a"),
  BDLoRA(rank=4, blocks=2, side="b"),
]

SEEN = {CorDA: "ii", LoRAGA: "io", EVA: "ri"}
"""What some methods start from, by its axes."""


ROUNDED = (DoRA, HRA, KaSA)
"""Methods whose fresh adapter is its base up to fp32 rounding only."""

KEY = jax.random.key(0)
EPS = float(jnp.finfo(jnp.float32).eps)


def label(method):
  changed = [
    f"{k}={v}"
    for k, v in vars(method).items()
    if v != getattr(type(method)(), k) and k != "rank"
  ]
  return "-".join([type(method).__name__, *changed])


def crossed(axis, values, methods=METHODS):
  """Each of `methods` with one of `values`; with --slow, all of both."""
  often = {i: k for k, i in enumerate(map(METHODS.index, methods))}
  return pytest.mark.parametrize(
    ("method", axis),
    [
      pytest.param(
        method,
        value,
        id=f"{label(method)}-{value}",
        marks=[]
        if i in often and (often[i] - j) % len(values) == 0
        else pytest.mark.slow,
      )
      for i, method in enumerate(METHODS)
      for j, value in enumerate(values)
    ],
  )


ONE_OF_EACH = tuple({type(m): m for m in reversed(METHODS)}.values())
"""The first row of each class."""

every = pytest.mark.parametrize("method", METHODS, ids=label)
on_either = crossed("packed", [False, True])


@functools.cache
def base(packed=False, n=3):
  """Returns `[n, IN, OUT]`, an array or 4-bit blocks."""
  w = np.asarray(jax.random.normal(jax.random.key(1), (n, IN, OUT))) * 0.125
  if not packed:
    return jnp.asarray(w)
  rows = tensor_types.encode("Q4_1", w.swapaxes(1, 2).copy())
  return ggml.from_ggml("Q4_1", list(rows.reshape(n, OUT, -1)), -2)


def look(method, sizes):
  """Returns random statistics; CorDA's is a covariance."""
  axes, rng = SEEN.get(type(method), ""), np.random.default_rng(0)

  def draw(i, o):
    if axes == "ii":
      x = rng.standard_normal((i, 8 * i))
      return (x @ x.T / (8 * i)).astype(np.float32)
    x = rng.standard_normal([dict(i=i, o=o, r=8)[axis] for axis in axes])
    return x.astype(np.float32)

  return {path: draw(*size) for path, size in sizes.items()} if axes else {}


def fresh(method, w):
  paths = [f"layers/{i}/x" for i in range(w.shape[0])]
  seen = look(method, dict.fromkeys(paths, (IN, OUT)))
  trained, fixed = adapt.init_adapters(KEY, paths, method, w, seen)
  return AdaptedTensor(w, trained, fixed, method=method)


@functools.cache
def moved(method, packed=False):
  """Returns three adapters with random arrays."""
  t, rng = fresh(method, base(packed)), np.random.default_rng(2)
  trained = {
    name: jnp.asarray(x + 0.1 * rng.standard_normal(x.shape), jnp.float32)
    for name, x in sorted(jax.device_get(t.trained).items())
  }
  return AdaptedTensor(t.w, trained, t.fixed, method=method)


def draw(*shape, seed=3, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def waves(x):
  """Returns distinct numbers of magnitude 0.05."""
  return 0.05 + 0.02 * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)


def began(method, w):
  """Returns the effective matrix of a new adapter."""
  if not isinstance(method, KaSA):
    return w
  u, s, v = np.linalg.svd(np.asarray(weights.dense(w), np.float64))
  kept = len(s) - method.rank
  return jnp.asarray(u[:, :kept] * s[:kept] @ v[:kept], jnp.float32)


def one(t, k=0):
  return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[k]), t)


@jax.jit
def times(x, w):
  return weights.einsum("td,df->tf", x, w)


def close(got, want, length=IN):
  """Equal up to rounding of sums of `length` terms."""
  scale = float(np.abs(want).max())
  chex.assert_trees_all_close(got, want, atol=8 * EPS * length**0.5 * scale)


def test_every_method_has_a_row():
  assert {type(m) for m in METHODS} == set(all_methods().values()) - {
    DecompositionInit,
    Rotation,
    ALoRA,  # no matrix: `test_alora` has its laws
  }


@on_either
@pytest.mark.sample(3)
def test_a_fresh_adapter_changes_nothing(method, packed):
  t, x = one(fresh(method, base(packed))), draw(5, IN)
  both = jax.jit(
    lambda w, began, x: (
      weights.einsum("td,df->tf", x, w),
      weights.einsum("td,df->tf", x, began),
    )
  )
  got, want = both(t, began(method, t.w), x)
  if isinstance(method, ROUNDED):
    close(got, want)
  else:
    chex.assert_trees_all_equal(got, want)
  assert all(x.dtype == jnp.float32 for x in t.trained.values())


@on_either
def test_forward_is_multiplication_with_the_merged_matrix(method, packed):
  t = one(moved(method, packed))
  x, y, ids = draw(5, IN), draw(5, OUT, seed=4), np.array([3, 0, 3, 63])

  @jax.jit
  def forward(t, x, y, ids):
    there = weights.einsum("td,df->tf", x, t)
    back = weights.einsum("tf,df->td", y, t)
    return weights.dense(t), there, back, weights.take(t, ids)

  merged, there, back, rows = jax.device_get(forward(t, x, y, jnp.array(ids)))
  merged = merged.astype(np.float64)
  close(there, np.asarray(x, np.float64) @ merged)
  close(back, np.asarray(y, np.float64) @ merged.T)
  close(rows, merged[ids])


OPS = {
  "rotated": (Hadamard(), None),
  "8 bits": (Round(), None),
  "4 bits": (Round(bits=4), None),
  "fp8": (RoundFloat(), None),
  "static": (Round(per="tensor"), jnp.float32(3.0)),
  "outliers": (Outliers(threshold=0.0), None),
}


@pytest.mark.parametrize("method", ONE_OF_EACH, ids=label)
@pytest.mark.sample(7, 1)  # DoRA is one of them, the only one with norms
def test_over_transformed_inputs_it_adapts_the_weight_alone(method):
  """Norms, rows and merged matrices are of no input that is rounded."""
  t, ids = one(moved(method)), jnp.array([3, 0, 3, 63])
  blocks = qtensor.pack(OPS["rotated"][0].stored_weight(t.w), Affine(block=32))
  stored = {
    name: InputTensor(op.stored_weight(t.w), scale, op)
    for name, (op, scale) in OPS.items()
  } | {"blocks": InputTensor(blocks, op=OPS["rotated"][0])}

  @jax.jit
  def asked(t, stored):
    over = dataclasses.replace(t, w=stored)
    alone = dataclasses.replace(t, w=weights.dense(stored))
    return weights.dense(over), over.take(ids), weights.dense(alone)

  for w in stored.values():
    merged, rows, want = jax.device_get(asked(t, w))
    close(merged, want)
    close(rows, want[ids])


@every
@pytest.mark.sample(8)
def test_experts_have_adapters_of_their_own(method):
  t, x = moved(method), draw(5, IN)
  sizes = jnp.array([2, 0, 3])
  both = jax.jit(lambda t: (weights.ragged_dot(x, t, sizes), weights.dense(t)))
  got, merged = jax.device_get(both(t))
  x, merged = np.asarray(x, np.float64), merged.astype(np.float64)
  close(got, np.concatenate([x[:2] @ merged[0], x[2:] @ merged[2]]))


@pytest.mark.parametrize("method", ONE_OF_EACH, ids=label)
@pytest.mark.sample(4)
def test_a_new_adapter_of_an_embedding_is_refused_or_learns(method):
  """Its update is 0, and not all of its gradients are."""
  w, spec = base()[0], MatrixSpec(IN, OUT, embedding=True)
  stats = look(method, {"embed": (IN, OUT)}).get("embed")
  try:
    trained, fixed = method.init_arrays(KEY, spec, w, stats)
  except UserError as e:
    assert "found an embedding, expected" in str(e)
    return

  def loss(trained):
    t = AdaptedTensor(w, trained, fixed, method=method)
    return jnp.sum(jnp.sin(t.take(jnp.array([0, 3, 9]))))

  slopes = jax.jit(jax.grad(loss))(trained)
  assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(slopes))
  update = AdaptedTensor(w, trained, fixed, method=method).delta()
  close(w + update, np.asarray(w))


@pytest.mark.parametrize("method", [LoRAFA(rank=4), EVA(rank=4)], ids=label)
def test_embeddings_are_refused(method):
  """By what fixes, or measures, the factor that is 0 there."""
  place, stats = MatrixSpec(IN, OUT, embedding=True), jnp.ones((8, IN))
  with pytest.raises(UserError, match="found an embedding, expected a linear"):
    method.init_arrays(KEY, place, base()[0], stats)


@pytest.mark.parametrize(
  "method", [LoRA(rank=4), DoRA(rank=4), IA3()], ids=label
)
def test_experts_outputs_have_the_dtype_of_activations(method):
  x = jax.ShapeDtypeStruct((5, IN), jnp.bfloat16)
  sizes = jax.ShapeDtypeStruct((3,), jnp.int32)
  y = jax.eval_shape(weights.ragged_dot, x, moved(method), sizes)
  assert y.dtype == jnp.bfloat16


@every
@pytest.mark.sample(3)
def test_gradients_are_finite_differences(method):
  """Directional derivatives in fp64, at random arrays."""
  with jax.enable_x64():
    t = jax.tree.map(
      lambda x: np.float64(x) if x.dtype == jnp.float32 else np.asarray(x),
      one(moved(method)),
    )
    t, trained = jax.device_put((t, t.trained))[0], t.trained
    x, rng = draw(5, IN, dtype=jnp.float64), np.random.default_rng(0)
    directions = {
      k: rng.standard_normal(v.shape) for k, v in sorted(trained.items())
    }

    def loss(trained, x):
      w = AdaptedTensor(t.w, trained, t.fixed, method=method)
      return jnp.sin(weights.einsum("td,df->tf", x, w)).sum()

    grads = jax.device_get(jax.jit(jax.grad(loss))(t.trained, x))
    value = jax.jit(loss)
    for name in held_constant(method, t.trained):
      h, d = 1e-5, directions[name]

      def at(e, name=name, d=d):
        moved = jnp.asarray(trained[name] + e * d)
        return float(value(t.trained | {name: moved}, x))

      want = (at(h) - at(-h)) / (2 * h)
      got = np.sum(grads[name] * d)
      chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6)


def held_constant(method, trained):
  """Names of arrays whose gradient is that of the value.

  DoRA's norm is constant in the backward pass by definition, so only its
  magnitudes have the value's gradient.
  """
  return ["m"] if isinstance(method, DoRA) else sorted(trained)


@every
@pytest.mark.sample(4, 1)
def test_dropout_falls_on_the_adapter_alone(method):
  if not method.SUPPORTS_DROPOUT:
    with pytest.raises(UserError, match="dropout"):
      dataclasses.replace(method, dropout=0.5)
    return
  method = dataclasses.replace(method, dropout=0.5)
  t, x = one(moved(method)), draw(5, IN)
  bound = weights.bind({"w": t}, key=jax.random.key(5))["w"]
  dropped, quiet = np.asarray(times(x, bound)), np.asarray(times(x, t))
  assert np.abs(dropped - quiet).max() > 1e-3
  start = weights.bind({"w": one(fresh(method, base()))}, key=KEY)["w"]
  close(times(x, start), np.asarray(x) @ np.asarray(began(method, start.w)))


@every
@pytest.mark.sample(3, 1)
def test_a_fresh_adapter_leaves_the_base_s_rounding_of_inputs(method):
  op, x = Round(bits=4), draw(5, IN)
  got = np.asarray(times(x, one(fresh(method, InputTensor(base(), op=op)))))
  want = times(x, one(InputTensor(base(), op=op)))
  # KaSA takes a part out of the base, of inputs that are not rounded.
  taken = began(method, base()[0]) - base()[0]
  close(got, np.asarray(want + x @ taken))
  assert np.abs(got - np.asarray(times(x, base()[0]))).max() > 0.01


@jax.jit
def logits(params, tokens):
  return model().apply({"params": params}, tokens)[0]


@functools.cache
def model():
  """Returns a model with every kind of bias."""
  biases = dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), True)
  family = dataclasses.replace(presets.FAMILIES["llama"], **biases)
  sizes = dict(width=32, head_dim=8, depth=2)
  return presets.transformer(
    family, dataclasses.replace(support.SIZES, **sizes)
  )


@functools.cache
def plain():
  """Returns the model's parameters, and its logits without an adapter."""
  params = support.params(model())
  return params, np.asarray(logits(params, support.tokens()))


@crossed("targets", ["q|down", "v|up", "o|gate", "all"], ONE_OF_EACH)
@pytest.mark.sample(31)
def test_in_a_model_scanned_or_not(method, targets):
  params, before = plain()

  def seen(params, paths, key):
    sizes = wrap.matrices(params)
    return look(method, {path: sizes[path] for path in paths})

  matrices = 7 if targets == "all" else 2
  targets = adapt.ALL_LINEAR if targets == "all" else f".*/({targets})"
  adapted = adapt.Adapt(method=method, init_stats=seen, targets=targets)(
    params, KEY
  )
  noisy = tree.map_paths(
    lambda p, x: np.asarray(x + waves(x) if "/trained/" in p else x),
    jax.device_get(adapted),
  )
  got = np.asarray(logits(noisy, support.tokens()))
  assert np.abs(got - before).max() > 1e-3
  size = float(np.abs(got).max())
  # A start that is subtracted again rounds numbers larger than the result. Each
  # matrix rounds by itself, so errors add up as the root of their number.
  atol = (1e-4 if isinstance(method, DecompositionInit) else 2e-5) * size
  atol *= (matrices / 2) ** 0.5
  for other in (tree.unroll(noisy), wrap.merge(noisy)):
    after = logits(other, support.tokens())
    chex.assert_trees_all_close(after, got, atol=atol)
  chex.assert_trees_all_equal(wrap.disable(noisy), params)


@every
def test_axes_name_every_array(method):
  t = fresh(method, base())
  named = weights.axes(t, ("width", "heads"))
  for name, x in t.arrays.items():
    assert len(named.arrays[name]) == x.ndim, name


@every
def test_round_trip_through_a_checkpoints_json(method):
  note = json.loads(json.dumps(native._describe(fresh(method, base()))))
  assert native._abstract(note, "weights").method == method
