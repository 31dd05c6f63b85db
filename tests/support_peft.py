"""Adapters that PEFT made over small models, and PEFT's results."""

import functools
import pathlib

import jax
import numpy as np

from research import weights
from research.interop import load

MODELS = pathlib.Path(__file__).parent / "golden" / "models"


BASES = {"method": "llama", "biased": "llama_biases"}
"""Folder prefixes of `make_peft_methods` -> the base of their adapters."""


def base_of(name):
  """Returns the name of the base of such a folder."""
  return BASES[name.split("_")[0]]


@functools.cache
def base(name="llama"):
  return load.load_model(MODELS / name)


@functools.cache
def loaded(name):
  return load.load_model(MODELS / name)


@functools.cache
def golden(name):
  with np.load(MODELS / name / "golden.npz") as file:
    return dict(file)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, tokens):
  params = weights.with_tokens(params, tokens)
  hidden, _ = model.apply({"params": params}, tokens)
  return model.apply({"params": params}, hidden, method="logits")


def relative(got, want):
  return np.abs(np.asarray(got) - want).max() / (want.max() - want.min())
