"""Adapters of each of PEFT's methods compute here what they compute there."""

import functools
import json
import re

import chex
import jax
import numpy as np
import optax
import pytest

from research import tree
from research.interop import peft
from research.interop.peft import config as peft_config
from research.io import safetensors
from research.lora import adapt, wrap
from research.lora.methods import all_methods
from research.lora.methods.lora import LoRA
from research.lora.methods.qalora import QALoRA
from tests.research.lora.methods import test_methods as methods
from tests.support_peft import (
  BASES,
  MODELS,
  base,
  base_of,
  golden,
  loaded,
  logits,
  relative,
)

SLOW = pytest.mark.slow
ADAPTERS = sorted(p.name for start in BASES for p in MODELS.glob(f"{start}_*"))


# PEFT repeats them for every module, and reads them without.
SHARED = ("randlora_A", "randlora_B")


ABSENT = (
  *("ADAMSS", "BEFT", "DEFT", "FROD", "GLORA", "LILY", "LN_TUNING", "OSF"),
  *("PEANUT", "PSOFT", "PVERA", "ROAD", "SUPERTUNING", "UNILORA", "VBLORA"),
  "WAVEFT",
)
"""Methods of PEFT's that change weights and are not here."""

NO_WEIGHTS = (
  *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY"),
  *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA"),
)
"""Prompts, caches, second models and mixtures: no changes to one matrix."""


def test_every_method_of_pefts_is_here_or_named():
  golden = json.loads((MODELS.parent / "peft_facts.json").read_text())
  ours = {kind.PEFT for kind in all_methods().values() if kind.PEFT}
  assert ours <= set(golden["types"])
  assert sorted(set(golden["types"]) - ours) == sorted([*ABSENT, *NO_WEIGHTS])


def test_every_method_that_is_here_is_compared():
  theirs = {kind for kind in all_methods().values() if kind.PEFT}
  for start in BASES:
    found = [name for name in ADAPTERS if name.startswith(start)]
    kinds = {peft_config.read_config(MODELS / name)[1] for name in found}
    # Plain LoRA and rows of tokens have tests of their own (`test_read` and
    # `test_full_weights`), QA-LoRA no form on a CPU.
    left = {kind.__name__ for kind in theirs - kinds}
    assert left == {"LoRA", "QALoRA", "Tokens"}


def error(name):
  """Returns how far from PEFT's a result may be, relative to its range."""
  # PEFT decomposes these methods' bases in fp32, and their goldens with that;
  # so do we. Each turns singular vectors by rounding (2^-24, times the root of
  # 44 columns) over their gap, here 1/94 of the largest value or more.
  return 1e-4 if "kasa" in name or "tinylora" in name else 1e-5


# A program is run once: what compiling it takes is the time of a test.
quick = functools.partial(
  jax.jit,
  compiler_options={
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  },
)


@functools.partial(quick, static_argnums=0)
def computed(model, params, tokens):
  """Returns what PEFT's golden holds, in one program."""
  selected, frozen = tree.partition(params, wrap.TRAINABLE)

  def loss(selected):
    y = logits(model, tree.combine(selected, frozen), tokens)
    rows = optax.softmax_cross_entropy_with_integer_labels(
      y[:, :-1], tokens[:, 1:]
    )
    return rows.mean(), y

  (value, y), slopes = jax.value_and_grad(loss, has_aux=True)(selected)
  return value, y, slopes


@pytest.mark.parametrize(
  "name",
  [
    # The base with biases asks for all that the other one does, and more;
    # a second underscore names a variant of a method.
    pytest.param(n, marks=() if re.fullmatch("biased_[^_]+", n) else SLOW)
    for n in ADAPTERS
  ],
)
@pytest.mark.sample(13)
def test_logits_loss_and_gradients_are_pefts(name, tmp_path):
  it, g, bound = loaded(name), golden(name), error(name)
  value, y, slopes = computed(it.model, it.params, g["tokens"])
  assert relative(y, g["logits"]) < bound
  np.testing.assert_allclose(value, g["loss"], rtol=2e-6)
  # Saved as if they were an adapter, the gradients carry the file's names.
  _, frozen = tree.partition(it.params, wrap.TRAINABLE)
  both = tree.combine(slopes, frozen)
  peft.save_adapter(tmp_path, both, it.model, "x")
  got = safetensors.open_file(tmp_path / peft.WEIGHTS)
  wanted = {k[5:]: v for k, v in g.items() if k.startswith("grad/")}
  assert wanted and set(wanted) <= set(got)
  largest = max(abs(want).max() for want in wanted.values())
  for key, want in wanted.items():
    atol = 1.5 * bound * max(abs(want).max(), 1e-2 * largest)
    np.testing.assert_allclose(got[key].read(), want, atol=atol, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ADAPTERS if "alora" not in n])
@pytest.mark.sample(15)
def test_merged_logits_are_pefts(name):
  it, g = loaded(name), golden(name)
  merged = quick(wrap.merge)(it.params)
  got = logits(it.model, merged, g["tokens"])
  assert relative(got, g["merged_logits"]) < error(name)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.sample(5)
def test_read_and_written_again(name, tmp_path):
  it, under = loaded(name), base_of(name)
  peft.save_adapter(tmp_path, it.params, it.model, f"../{under}")
  original = json.loads((MODELS / name / "adapter_config.json").read_text())
  written = json.loads((tmp_path / "adapter_config.json").read_text())
  changed = {k for k in written if original[k] != written[k]}
  # How it began is no longer known, nor is what its training planned.
  assert changed <= {"init_weights", "total_step"}
  theirs, ours = (
    safetensors.open_file(f / peft.WEIGHTS) for f in (MODELS / name, tmp_path)
  )
  copies = {k for k in theirs if k.endswith(SHARED) and "layers" in k}
  assert set(ours) == set(theirs) - copies
  for key in ours:
    x = theirs[key]
    if key.startswith("base_model.randlora_"):
      # No module is so large that it uses all of them.
      x = x.read() * (ours[key].read() != 0)
      np.testing.assert_array_equal(ours[key].read(), x)
      continue
    np.testing.assert_array_equal(ours[key].read(), x.read(), err_msg=key)
  again = peft.load_adapter(tmp_path, base(under).params, it.model)
  chex.assert_trees_all_equal(again, it.params)
  same_bytes(tmp_path, again, under)


def same_bytes(folder, again, under="llama"):
  """Asserts that what was read from a folder is written as it was there."""
  model = base(under).model
  peft.save_adapter(folder / "b", again, model, f"../{under}")
  names = {p.name for p in folder.iterdir() if p.is_file()}
  assert names == {"adapter_config.json", peft.WEIGHTS}
  for name in names:
    assert (folder / "b" / name).read_bytes() == (folder / name).read_bytes()


OTHERS = [
  m
  for m in methods.METHODS
  if type(m).PEFT is None and isinstance(m, LoRA) or isinstance(m, QALoRA)
]


@pytest.mark.parametrize("method", OTHERS, ids=methods.label)
@pytest.mark.sample(3)
def test_what_peft_has_as_something_else_is_written_again(method, tmp_path):
  """With a start of its own, half fixed, or grouped: as PEFT is told of it."""

  def seen(params, paths, key):
    sizes = wrap.matrices(params)
    return methods.look(method, {path: sizes[path] for path in paths})

  how = adapt.Adapt(
    method=method, init_stats=seen, targets=r"layers/1/.*/(q|down)"
  )
  params = tree.map_paths(
    lambda p, x: x + methods.waves(x) if "/trained/" in p else x,
    jax.device_get(how(base().params, jax.random.key(0))),
  )
  peft.save_adapter(tmp_path, params, base().model, "../llama")
  again = peft.load_adapter(tmp_path, base().params, base().model)
  close = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  if isinstance(method, QALoRA):
    close(again, params)
  else:
    found = wrap.adapters(again, lambda w: w)
    for path, w in wrap.adapters(params, lambda w: w).items():
      plain, arrays = w.method.exported(w.arrays)
      assert found[path].method.rank == plain.rank
      np.testing.assert_allclose(found[path].method.scale, plain.scale)
      close(dict(found[path].arrays), dict(arrays))
  same_bytes(tmp_path, again)
