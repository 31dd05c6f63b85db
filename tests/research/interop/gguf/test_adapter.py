"""llama.cpp's adapters: what its reader computes, and files that are wrong."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.interop import convert, gguf, load, sources
from research.interop.gguf import adapter as gguf_adapter
from research.interop.gguf import tensor_types
from research.lora import lora_factors, wrap
from research.lora.methods.hira import HiRA
from research.typing import UserError
from tests.support_lora import adapting

MODELS = pathlib.Path(__file__).parents[3] / "golden" / "models"


@functools.cache
def base(name="gguf_f32"):
  folder = MODELS / name
  file = folder / "model.gguf"
  return load.load_model(file if file.is_file() else folder)


@functools.cache
def file_tensors(name="gguf_f32"):
  return gguf.open_gguf(MODELS / name / "model.gguf").tensors


def adapted(it, **options):
  params = adapting(**options)(it.params, jax.random.key(0))
  rng = np.random.default_rng(0)
  return tree.map_paths(
    lambda p, x: (
      jnp.asarray(rng.standard_normal(x.shape), x.dtype)
      if "/trained/" in p
      else x
    ),
    params,
  )


OPTIONS = [
  dict(rank=3, alpha=6.0),
  dict(rank=4, alpha=6.0, rslora=True),
  dict(rank=4, alpha=6.0, rank_pattern={"q": 2}, alpha_pattern={"down": 1.0}),
  dict(rank=2, targets=("q", "k", "head", "embed")),
]


def theirs(file, name):
  """What llama.cpp adds to a tensor `[out, in]`: llama-adapter.h."""
  a, b = (file.tensors[f"{name}.{x}"].decode() for x in ("lora_a", "lora_b"))
  alpha, rank = file.metadata["adapter.lora.alpha"], b.shape[-1]
  scale = alpha / rank if alpha else 1.0
  # An embedding's rows are looked up in A, as the embedding's are.
  return scale * ((a @ b.T) if name == "token_embd.weight" else (b @ a))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.sample(4)
def test_llama_cpp_adds_what_we_add(options, tmp_path):
  """Added to the tensors of the base's own file, in the file's order."""
  it = base()
  assert not it.model.tied
  params = adapted(it, **options)
  gguf_adapter.save(tmp_path / "a.gguf", params, it.model)
  file = gguf.open_gguf(tmp_path / "a.gguf")
  changed, old = {}, file_tensors()
  names = {n.rsplit(".", 1)[0] for n in file.tensors}
  for name, t in old.items():
    x = t.decode()
    if name in names:
      x = x + theirs(file, name).astype(np.float32)
    raw = tensor_types.encode("F32", x)
    changed[name] = gguf.Tensor("F32", t.shape, raw)
  assert len(names) == len(lora_factors.adapters(params))
  whole = gguf.open_gguf(MODELS / "gguf_f32" / "model.gguf")
  gguf.write_gguf(tmp_path / "m.gguf", whole.metadata, changed)
  got = load.load_model(tmp_path / "m.gguf").params
  want = wrap.merge(params)
  for one, other in zip(tree.layers(got), tree.layers(want), strict=True):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(x, y, atol=2e-5)
  for name in ("embed", "head"):
    np.testing.assert_allclose(got[name], want[name], atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("name", ["gguf_f32", "qwen3"])
@pytest.mark.cover(1)
def test_there_and_back(name, options, tmp_path):
  it = base(name)
  if it.model.tied and "targets" in options:
    options = options | dict(targets=("q", "k"))
  params = adapted(it, **options)
  log = gguf_adapter.save(tmp_path / "a.gguf", params, it.model)
  assert not any(c.max_abs_error for c in log.changes)
  again = gguf_adapter.load(tmp_path / "a.gguf", it.params, it.model)
  want, got = lora_factors.factors(params), lora_factors.factors(again)
  assert set(got) == set(want)
  for path, f in want.items():
    np.testing.assert_array_equal(got[path].a, f.a)
    size = np.abs(f.delta()).max()
    np.testing.assert_allclose(got[path].delta(), f.delta(), atol=1e-6 * size)


def test_one_alpha_is_kept_and_no_factor_changes(tmp_path):
  it = base("qwen3")
  params = adapted(it, rank=3, alpha=6.0)
  gguf_adapter.save(tmp_path / "a.gguf", params, it.model)
  file = gguf.open_gguf(tmp_path / "a.gguf")
  assert file.metadata["adapter.lora.alpha"] == 6.0
  b = file.tensors["blk.1.ffn_up.weight.lora_b"].decode()
  f = lora_factors.factors(params)["layers/1/mlp/up"]
  np.testing.assert_array_equal(b, f.b.T)
  assert file.metadata["general.architecture"] == "qwen3"


def test_half_precision_tells_its_errors(tmp_path):
  it = base()
  log = gguf_adapter.save(
    tmp_path / "a.gguf", adapted(it), it.model, kind="F16"
  )
  assert 1e-5 < log.summary()["max_relative_error"] < 5e-4
  gguf_adapter.load(tmp_path / "a.gguf", it.params, it.model)


def test_what_the_format_cannot_say(tmp_path):
  it, path = base(), tmp_path / "a.gguf"
  tied = base("smollm2")
  cases = [
    (adapted(tied, targets=("embed",)), tied.model, {}, "that is the head"),
    (it.params, it.model, {}, "hold no adapter"),
    (adapted(it), it.model, dict(kind="Q8_0"), "expected one of F32"),
  ]
  from research.lora.adapt import Adapt

  hira = Adapt(method=HiRA(rank=2))(it.params, jax.random.key(0))
  cases.append((hira, it.model, {}, "--op=lora"))
  for params, model, options, words in cases:
    with pytest.raises(UserError) as error:
      gguf_adapter.save(path, params, model, **options)
    assert words in str(error.value)
    assert not path.exists()


@pytest.mark.parametrize("name", ["tied_lora", "tied_lora_head"])
def test_a_tied_base_stays_tied_though_peft_unties_it(name, tmp_path):
  source = sources.open_source(MODELS / f"peftfull_{name}")
  assert source.base.model.tied
  assert not source.model.tied
  with pytest.raises(UserError, match="that is the head"):
    convert.to_gguf_adapter(source, tmp_path / "a.gguf")
  assert not list(tmp_path.iterdir())


def _without(*names):
  return lambda meta, tensors: (
    meta,
    {k: v for k, v in tensors.items() if k not in names},
  )


def _meta(**changes):
  changes = {k.replace("__", "."): v for k, v in changes.items()}
  return lambda meta, tensors: (
    {k: v for k, v in (meta | changes).items() if v is not None},
    tensors,
  )


def _renamed(old, new):
  return lambda meta, tensors: (
    meta,
    {new if k == old else k: v for k, v in tensors.items()},
  )


def _replaced(name, f):
  def change(meta, tensors):
    x = f(tensors[name].decode())
    new = gguf.Tensor("F32", x.shape, tensor_types.encode("F32", x))
    return meta, tensors | {name: new}

  return change


A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
WRONG = [
  (_meta(general__type="model"), "general.type is 'model'"),
  (_meta(general__type=None), "expected 'adapter'"),
  (_meta(adapter__type="vector"), "expected 'lora'"),
  (_meta(general__architecture="gemma"), "expected 'llama'"),
  (_meta(adapter__lora__alpha="big"), "expected a number from 0"),
  (_meta(adapter__lora__alpha=-1.0), "expected a number from 0"),
  (_meta(adapter__lora__alpha=float("nan")), "expected a number from 0"),
  (_meta(adapter__alora__invocation_tokens=[1]), "waits for tokens"),
  (_without(B), "alone, expected a pair"),
  (_renamed(A, "blk.9.attn_q.weight.lora_a"), "alone, expected a pair"),
  (_renamed(B, "blk.0.attn_norm.weight"), "alone, expected a pair"),
  (_replaced(A, lambda x: x[:, :-1]), "expected [2, "),
  (_replaced(B, lambda x: x[:, :1]), "expected [1, "),
  (_replaced(B, lambda x: x * np.inf), "not finite"),
  (_replaced(B, lambda x: 0 * x), "changes nothing"),
]


@functools.cache
def written(folder):
  it = base()
  params = adapted(it, rank=2, targets=r"layers/0/attention/q")
  gguf_adapter.save(folder / "good.gguf", params, it.model)
  return gguf.open_gguf(folder / "good.gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize("change, words", WRONG)
def test_wrong_files(change, words, folder, tmp_path):
  it, good = base(), written(folder)
  meta, tensors = change(dict(good.metadata), dict(good.tensors))
  path = tmp_path / "bad.gguf"
  gguf.write_gguf(path, meta, tensors)
  with pytest.raises(UserError) as error:
    gguf_adapter.load(path, it.params, it.model)
  assert words in str(error.value)
  assert str(error.value).startswith(str(path))
  assert len(str(error.value).splitlines()) <= 3


def test_superfluous_tensors_and_no_alpha(folder, tmp_path):
  it, good = base(), written(folder)
  extra = dict(good.tensors) | {"blk.0.attn_norm.weight": good.tensors[A]}
  gguf.write_gguf(tmp_path / "a.gguf", good.metadata, extra)
  with pytest.raises(UserError, match="no place for: blk.0.attn_norm.weight"):
    gguf_adapter.load(tmp_path / "a.gguf", it.params, it.model)
  meta = dict(good.metadata)
  del meta["adapter.lora.alpha"]
  gguf.write_gguf(tmp_path / "b.gguf", meta, good.tensors)
  params = gguf_adapter.load(tmp_path / "b.gguf", it.params, it.model)
  (f,) = lora_factors.factors(params).values()
  assert f.scale == 1.0
  other = dataclasses.replace(f, scale=1.0)
  np.testing.assert_array_equal(f.delta(), other.delta())
