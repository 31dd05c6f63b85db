"""Adapters that PEFT made over small models, and what it says of them."""

import functools
import pathlib

import jax
import numpy as np

from research import weights
from research.interop import load

MODELS = pathlib.Path(__file__).parent / "golden" / "models"


@functools.cache
def base():
  return load.load_model(MODELS / "llama")


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
