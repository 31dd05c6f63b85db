"""Tiny models quantized by other tools, and modified copies."""

import functools
import shutil

import jax
import numpy as np

from research import weights
from research.interop import parts, quantized, sources
from research.interop.quantized import checkpoint_formats
from research.io import safetensors
from tests import support

SIZES = dict(width=64, hidden=96, head_dim=16, depth=3)
SQUARE = dict(width=64, hidden=64, head_dim=16, kv_heads=4, depth=2)

WRITERS = {
  "gptq": checkpoint_formats.Gptq(group=32),
  "gptq3": checkpoint_formats.Gptq(bits=3, group=32),
  "gptq8": checkpoint_formats.Gptq(bits=8, group=0),
  "awq": checkpoint_formats.Awq(group=32),
  "nf4": checkpoint_formats.Bnb(),
  "int8": checkpoint_formats.Bnb("int8"),
  "compressed": checkpoint_formats.Compressed(),
}


def source(model, params):
  return sources.Source(
    model=model,
    parts=parts.from_params(params),
    params=lambda: params,
    origin={},
  )


@functools.cache
def plain(square=False):
  model = support.model(**(SQUARE if square else SIZES))
  return source(model, support.params(model))


def raw(folder):
  return {
    name: (t.shape, str(t.dtype), t.read().tobytes())
    for name, t in safetensors.open_directory(folder).items()
  }


def packed_leaves(params):
  leaves = jax.tree.leaves(params, is_leaf=weights.is_weight)
  return [w for w in leaves if weights.is_weight(w)]


def decoded(params):
  return jax.tree.map(weights.dense, params, is_leaf=weights.is_weight)


def change(folder, to, edit=None, **config):
  """Returns a copy of a directory with other tensors and another config."""
  shutil.copytree(folder, to)
  tensors = {
    name: np.array(t.read())
    for name, t in safetensors.open_directory(folder).items()
  }
  if edit is not None:
    edit(tensors)
  (to / safetensors.SINGLE).unlink()
  safetensors.write_directory(to, tensors)
  said = safetensors.read_json(to / "config.json")
  said[quantized.CONFIG] |= config
  safetensors.write_json(to / "config.json", said)
  return to
