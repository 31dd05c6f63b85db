"""An adapter knows its base in every format, and no other."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.interop import peft
from research.interop.peft import base_fingerprint
from research.io import safetensors
from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.typing import UserError
from tests.support_peft import base, loaded


@functools.cache
def packed(format):
  return Quantize(format=format)(base().params)


def changed(f, paths="", keep=True):
  """Returns the base with `f` of its layers' matrices, norms as they are."""

  def new(path, x):
    inside = path.startswith("run") and x.ndim == 3 and paths in path
    if not inside:
      return x
    return f(np.array(x)).astype(x.dtype) if keep else f(np.array(x))

  return tree.map_paths(new, base().params)


def drawn(x):
  return x.std() * np.random.default_rng(x.size).standard_normal(x.shape)


def in_one_layer(x):
  x[1] *= 1.05
  return x


def half(params, dtype):
  return jax.tree.map(lambda x: x.astype(dtype), params)


@pytest.fixture
def saved(tmp_path):
  it = loaded("peft_lora")
  peft.save_adapter(tmp_path, it.params, it.model, "../llama")
  return tmp_path


def read(folder, params):
  return peft.load_adapter(folder, params, base().model)


def test_norms_that_differ(saved):
  norms = {p for p, _ in tree.flatten_paths(base().params) if "norm" in p}
  params = tree.map_paths(
    lambda p, x: x * 1.01 if p in norms else x, base().params
  )
  with pytest.raises(UserError) as e:
    read(saved, params)
  own, found = map(base_fingerprint.fingerprint, (base().params, params))
  for said in ("../llama", own[:12], found[:12]):
    assert said in str(e.value)


@pytest.mark.parametrize(
  "f, paths, where",
  [
    (drawn, "", "layers/0/"),
    (in_one_layer, "attention/v", "layers/1/attention/v"),
    # As trained on, for a little while.
    (lambda x: x * 1.001, "", "many matrices"),
  ],
)
def test_matrices_that_differ_under_the_same_norms(saved, f, paths, where):
  params = changed(f, paths)
  assert base_fingerprint.fingerprint(params) == base_fingerprint.fingerprint(
    base().params
  )
  with pytest.raises(UserError, match="another base: '../llama'") as e:
    read(saved, params)
  assert where in str(e.value) and len(str(e.value).splitlines()) == 2


FORMATS = {
  "unrolled": lambda: tree.unroll(base().params),
  "numpy": lambda: jax.device_get(base().params),
  "bfloat16": lambda: half(base().params, jnp.bfloat16),
  "float16": lambda: half(half(base().params, jnp.float16), jnp.float32),
  "float8": lambda: changed(
    lambda x: np.asarray(jnp.asarray(x, jnp.float8_e4m3fn)), keep=False
  ),
  "int4": lambda: packed(Affine(block=4)),
  "int2": lambda: packed(Affine(bits=2, block=4)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.sample(4)
def test_the_same_base_in_another_format(saved, name, tmp_path):
  other = FORMATS[name]()
  read(saved, other)
  # And back: written over that format, read over the plain one.
  it = loaded("peft_lora")
  there = read(saved, other)
  peft.save_adapter(tmp_path / "b", there, it.model, "../llama")
  read(tmp_path / "b", base().params)
  with pytest.raises(UserError, match="other numbers in"):
    read(tmp_path / "b", changed(drawn))


def test_a_packed_base_that_is_another(saved):
  other = Quantize(format=Affine(block=4))(changed(drawn))
  with pytest.raises(UserError, match="other numbers in most matrices"):
    read(saved, other)


def test_a_base_with_one_layer_more(saved):
  """Its other numbers are the same, and so are those of the adapter."""
  plain = base().params
  _, own = safetensors.open_with_metadata(saved / peft.WEIGHTS)
  base_fingerprint.check("f", "x", own, plain)
  longer = tree.unroll(plain)
  longer["run3"] = longer["run2"]
  assert len(list(tree.layers(longer))) == 4
  with pytest.raises(UserError, match="in layers/3, which its base has not"):
    base_fingerprint.check("f", "x", own, longer)


def test_a_layer_of_which_an_adapter_replaces_everything_is_no_other_base():
  plain = base().params
  last = {
    a
    for a in json.loads(base_fingerprint.header(plain)[base_fingerprint.SAMPLE])
    if a.startswith("layers/2/")
  }
  said = base_fingerprint.header(plain, last)
  assert last and not any("layers/2/" in note for note in said.values())
  base_fingerprint.check("f", "x", said, plain)


def test_a_fingerprint_is_of_the_base_however_it_is_held():
  it, plain = loaded("peft_lora"), base().params
  want = base_fingerprint.fingerprint(plain)
  assert base_fingerprint.fingerprint(it.params) == want
  assert base_fingerprint.fingerprint(tree.unroll(plain)) == want
  assert base_fingerprint.fingerprint(half(plain, jnp.bfloat16)) == want
  assert jax.eval_shape(lambda p: (base_fingerprint.header(p), p)[1], plain)
  assert base_fingerprint.header(jax.eval_shape(lambda: plain)) == {}


def renoted(folder, change):
  file = folder / peft.WEIGHTS
  tensors, notes = safetensors.open_with_metadata(file)
  tensors = {k: np.array(x.read()) for k, x in tensors.items()}
  safetensors.write_file(file, tensors, change(dict(notes)))


def test_files_with_fewer_notes_are_read(saved):
  def older(notes):
    del notes[base_fingerprint.SAMPLE]
    return notes

  renoted(saved, older)
  read(saved, changed(drawn))  # which is all that sizes and norms can tell
  norms = tree.map_paths(lambda p, x: x + ("norm" in p), base().params)
  with pytest.raises(UserError, match="its norms, or other sizes"):
    read(saved, norms)
  # Norms that the adapter replaces leave no fingerprint to speak of.
  said = base_fingerprint.header(base().params, {"final_norm/scale"})
  with pytest.raises(UserError) as e:
    base_fingerprint.check("f", "x", said, changed(drawn))
  assert "for another base: 'x'.\n" in str(e.value)
  assert "it is put on has other numbers in layers/0/" in str(e.value)
  assert "None" not in str(e.value)
  renoted(saved, lambda notes: {"format": "pt"})
  read(saved, norms)


@pytest.mark.parametrize(
  "note", ["[]", "{", '{"a": 3}', '{"a": "zz"}', '{"a": "00"}', "[" * 10**5]
)
def test_notes_that_are_damaged(saved, note):
  renoted(saved, lambda notes: notes | {base_fingerprint.SAMPLE: note})
  with pytest.raises(UserError, match="its note base_sample is damaged"):
    read(saved, base().params)


def test_what_an_adapter_replaces_is_not_noted():
  plain = base().params
  own = base_fingerprint.header(plain)
  less = base_fingerprint.header(
    plain, {"layers/1/mlp/up", "layers/0/mlp_norm/scale"}
  )
  assert (
    base_fingerprint.FINGERPRINT in own
    and base_fingerprint.FINGERPRINT not in less
  )
  numbers, fewer = (json.loads(n[base_fingerprint.SAMPLE]) for n in (own, less))
  assert set(numbers) - set(fewer) == {
    "layers/1/mlp/up",
    "layers/0/mlp_norm/scale",
  }
  names = {p for p in numbers if p.startswith("layers/2/")}
  assert len(names) == 9 and not {"embed", "head"} & set(numbers)
