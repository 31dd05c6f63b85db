"""Tests adapter pools: swapping adapters in one compiled program."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.generation import decoding, generate
from research.interop import adapters, load, peft
from research.lora import adapt, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.methods.c3a import C3A
from research.lora.methods.dora import DoRA
from research.lora.methods.hira import HiRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.loha import LoHa
from research.lora.methods.lora import LoRA
from research.lora.methods.miss import MiSS
from research.lora.methods.one_factor import LoRAFA
from research.lora.methods.svd_init import PiSSA
from research.lora.methods.vera import VeRA
from research.lora.optim import row_factors
from research.lora.serving import adapter_slots, pool
from research.typing import UserError
from tests import support

TINY = pathlib.Path(__file__).parents[3] / "golden" / "models" / "llama"
PROMPTS = [[5, 6, 7], [8, 9]]


@functools.cache
def base():
  return load.load_model(TINY)


@functools.cache
def adapted(seed=0, method=LoRA(rank=2), targets=("q", "down")):
  made = adapt.Adapt(method=method, targets=targets)(
    base().params, jax.random.key(seed)
  )
  rng = np.random.default_rng(seed)

  def moved(path, x):
    if "/trained/" not in path:
      return x
    return x + jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32)

  return tree.map_paths(moved, made)


def saved(folder, params):
  peft.save_adapter(folder, params, base().model, str(TINY))
  return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  """Directories of three adapters."""
  root = tmp_path_factory.mktemp("adapters")
  return {
    name: saved(root / name, adapted(seed)) for seed, name in enumerate("abc")
  }


def empty(**options):
  loaded = base()
  chosen = dict(rank=4, read=adapters.read_factors) | options
  return pool.create(loaded.params, loaded.model, **chosen)


def tokens(params):
  return generate.generate(base().model, params, PROMPTS, 6).tokens


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, ids):
  hidden, _ = model.apply({"params": params}, ids)
  return model.apply({"params": params}, hidden, method="logits")


def test_adapters_are_swapped_without_compiling(places):
  """Three adapters in two slots; each batch equals the adapters alone."""
  alone = {name: tokens(adapted(seed)) for seed, name in enumerate("abc")} | {
    pool.BASE: tokens(base().params)
  }
  held = empty(slots=2)
  for name, place in places.items():
    held = pool.add(held, name, place)

  def compiled():
    parts = decoding.prefill, decoding.decode, adapter_slots._set
    return [f._cache_size() for f in parts]

  def check(held, names):
    held, ids = pool.use(held, names)
    got = tokens(weights.bind(held.params, ids=ids))
    assert got == [alone[name][row] for row, name in enumerate(names)]
    return held

  held = check(held, ["a", "b"])
  before = compiled()
  for names in (["b", "a"], ["c", "b"], [pool.BASE, "a"], ["c", "c"]):
    held = check(held, names)
  assert held.slots == ("a", "c")
  held = pool.remove(held, "c")
  assert held.slots == ("a", None) and held.names == ("a", "b")
  held = check(held, ["b", "a"])
  assert held.slots == ("a", "b")
  # A new adapter of an old name takes its place.
  held = pool.add(held, "a", places["c"])
  alone["a"] = alone["c"]
  held = check(held, ["a", pool.BASE])
  assert compiled() == before


def test_the_least_recently_used_adapter_is_replaced(places):
  held = empty(slots=2)
  for name, place in places.items():
    held = pool.add(held, name, place)
  for names, want in (
    (["a", "b"], ("a", "b")),
    (["a"], ("a", "b")),
    (["c"], ("a", "c")),
    (["b", "a"], ("a", "b")),
  ):
    held, ids = pool.use(held, names)
    assert held.slots == want
    assert ids.tolist() == [want.index(name) for name in names]


@pytest.mark.slow
def test_host_memory_is_a_least_recently_used_cache(tmp_path, places):
  held = pool.add_tree(empty(slots=1, keep=2), "mine", adapted(7))
  for name in places:
    held = pool.add(held, name, saved(tmp_path / name, adapted(ord(name))))
  assert list(held.host) == ["mine", "b", "c"]
  held, _ = pool.use(held, ["b"])
  assert list(held.host) == ["mine", "c", "b"]
  saved(tmp_path / "a", adapted(99))
  held, ids = pool.use(held, ["a"])
  assert list(held.host) == ["mine", "b", "a"]
  got = tokens(weights.bind(held.params, ids=jnp.array([0, 0])))
  assert got == tokens(adapted(99))
  held, _ = pool.use(held, ["c"])
  (tmp_path / "b" / "adapter_config.json").unlink()
  held, _ = pool.use(held, ["a"])
  with pytest.raises(UserError, match="adapter_config.json"):
    pool.use(held, ["b"])
  # What failed has left the pool as it was.
  assert jnp.isfinite(held.params["run0"]["layer0"]["mlp"]["down"].a).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  "method",
  [
    LoRA(rank=3, rslora=True),
    LoRAFA(rank=4),
    PiSSA(rank=2),
    LoHa(rank=2),
    VeRA(rank=4, widest=64),
    MiSS(rank=4),
  ],
  ids=lambda m: type(m).__name__,
)
@pytest.mark.sample(6)
def test_low_rank_methods_are_plain_lora(method):
  params = adapted(1, method)
  found = row_factors.extract(params, 4)
  got = dict(wrap.leaves(params))
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in wrap.leaves(params[run][layer]):
      if isinstance(leaf, AdaptedTensor):
        want = leaf.delta()
        for k, i in enumerate(layers):
          a, b = found[f"layers/{i}/{path}"]
          atol = 2e-5 * float(jnp.abs(want).max())
          chex.assert_trees_all_close(a.T @ b, want[k], atol=atol)
  assert got
  held = pool.add_tree(empty(slots=2), "x", params)
  held, ids = pool.use(held, ["x", pool.BASE])
  ids_in = support.tokens(2, 5, vocab=base().model.vocab_size)
  model = base().model
  got = logits(model, weights.bind(held.params, ids=ids), ids_in)
  want = logits(model, params, ids_in)[0]
  scale = float(jnp.abs(want).max())
  chex.assert_trees_all_close(got[0], want, atol=1e-4 * scale)


@pytest.mark.parametrize(
  "method",
  [DoRA(rank=2), HiRA(rank=2), IA3(), C3A(block=4), LoHa(rank=4)],
  ids=lambda m: type(m).__name__,
)
@pytest.mark.sample(5)
def test_other_methods_are_refused_by_name(method):
  with pytest.raises(UserError) as error:
    pool.add_tree(empty(), "x", adapted(1, method))
  name = type(method).__name__
  assert f"the update of {name} is no matrix of rank 4" in str(error.value)
  assert str(error.value).startswith("layers/0/")
  assert len(str(error.value).splitlines()) <= 3


@pytest.mark.slow
def test_a_pool_sized_for_its_adapters(places, tmp_path):
  places = places | {
    "d": saved(tmp_path / "d", adapted(3, MiSS(rank=4), ("v",))),
    "e": saved(tmp_path / "e", adapted(4, LoRA(rank=6), ("q",))),
  }
  held = pool.from_directories(
    base().params, base().model, places, adapters.read_factors
  )
  assert (len(held.slots), held.rank, held.names) == (5, 6, (*"abcde",))
  held, ids = pool.use(held, ["d", "e"])
  ids_in, model = support.tokens(2, 5, vocab=60), base().model
  got = logits(model, weights.bind(held.params, ids=ids), ids_in)
  for row, one in enumerate(
    (adapted(3, MiSS(rank=4), ("v",)), adapted(4, LoRA(rank=6), ("q",)))
  ):
    want = logits(model, one, ids_in)[row]
    scale = float(jnp.abs(want).max())
    chex.assert_trees_all_close(got[row], want, atol=1e-4 * scale)


@pytest.mark.slow
def test_factors_have_the_dtype_of_the_computation():
  """bf16 rounds what a single adapter's product rounds, and so bitwise."""
  model = support.model(width=32, head_dim=8)
  model = model.clone(dtype="bfloat16")
  params = support.params(model)
  made = adapt.Adapt(method=LoRA(rank=2))(params, jax.random.key(0))
  made = tree.map_paths(
    lambda p, x: x + 0.1 if p.endswith("trained/b") else x, made
  )
  held = pool.add_tree(pool.create(params, model, slots=4, rank=2), "x", made)
  held, ids = pool.use(held, ["x", "x"])
  assert held.params["run0"]["layer0"]["mlp"]["up"].a.dtype == jnp.bfloat16
  ids_in = support.tokens()
  got = logits(model, weights.bind(held.params, ids=ids), ids_in)
  chex.assert_trees_all_close(got, logits(model, made, ids_in), rtol=0.05)


@pytest.mark.parametrize(
  "act, words",
  [
    (lambda p, d: empty(slots=0), "slots is 0, expected at least 1"),
    (lambda p, d: empty(rank=0), "rank is 0"),
    (lambda p, d: pool.use(p, ["b"]), "no adapter is called 'b'; there are"),
    (lambda p, d: pool.add(p, pool.BASE, d), "cannot be called '__base__'"),
    (lambda p, d: pool.add(p, "b", d / "no"), "no"),
    (
      lambda p, d: pool.use(pool.add(p, "b", d), ["a", "b"]),
      "a batch of 2 adapters, expected at most 1",
    ),
    (
      lambda p, d: pool.add_tree(p, "b", adapted(0, LoRA(rank=5))),
      "layers/0/attention/q: LoRA of rank 5, expected at most 4",
    ),
    (
      lambda p, d: pool.add_tree(p, "b", adapted(0, targets=("o",))),
      "changes layers/0/attention/o, expected only matrices",
    ),
  ],
  ids=range(8),
)
def test_errors(act, words, places):
  held = empty(slots=1, targets=("q", "down"))
  held = pool.add(held, "a", places["a"])
  with pytest.raises(UserError) as error:
    act(held, places["a"])
  assert words in str(error.value)
  assert len(str(error.value).splitlines()) <= 3


def test_an_adapter_with_nan_reaches_no_other_row():
  params = tree.map_paths(
    lambda p, x: x.at[1, 0, 0].set(jnp.nan) if p.endswith("q/trained/b") else x,
    adapted(0),
  )
  with pytest.raises(UserError, match=r"layers/1/.*q: its adapter holds NaN"):
    pool.add_tree(empty(), "x", params)


@pytest.mark.parametrize(
  "name, base",
  [
    ("saved", "qwen2"),
    ("saved_embed", "llama"),
    ("saved_norms", "gemma2"),
    ("bias_all", "llama_biases"),
  ],
)
def test_adapters_with_whole_weights_are_refused(name, base):
  loaded = load.load_model(TINY.parent / base)
  held = pool.create(
    loaded.params, loaded.model, rank=16, read=adapters.read_factors
  )
  with pytest.raises(UserError) as error:
    pool.add(held, "x", TINY.parent / f"peftfull_{name}")
  text = str(error.value)
  assert "full weights" in text or "change the model's configuration" in text


def test_twice_adapted_is_an_error():
  again = adapt.Adapt(method=LoRA(rank=2), targets=("q",))(
    adapted(0), jax.random.key(0)
  )
  with pytest.raises(UserError, match="adapted twice"):
    row_factors.extract(again, 4)


def test_a_pool_of_trees_reads_no_directory(places):
  with pytest.raises(UserError, match="created without `read`"):
    pool.add(empty(read=None), "x", places["a"])


def test_reading_an_adapter_writes_nothing(places):
  """Reading an adapter writes nothing."""
  before = json.loads((places["a"] / "adapter_config.json").read_text())
  pool.add(empty(), "x", places["a"])
  after = json.loads((places["a"] / "adapter_config.json").read_text())
  assert before == after
