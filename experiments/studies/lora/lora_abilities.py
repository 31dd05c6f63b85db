"""What each method of LoRA's family can be used with, found by trying.

Shapes alone are traced, of one matrix; that what comes out is right is what
`tests/research/lora/methods/test_methods.py` shows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import weights
from research.lora.adapt import init_adapters
from research.lora.adapted import AdaptedTensor
from research.lora.method import Method
from research.lora.methods import qalora
from research.quant import quantize
from research.quant.formats import ggml
from research.typing import UserError

SIDE = 128
"""Of the matrix; methods' default blocks and groups divide it."""

PATH = "layers/0/x"

NAMES = ("PEFT's files", "packed base", "merges")
"""Columns."""


@functools.cache
def columns(method: Method) -> dict[str, str]:
  """Returns whose files it reads and writes, and what it stands on.

  PEFT's files are both read and written; written, as plain LoRA, which is what
  comes back; or neither. A method merges into an array, or also into a base
  that stays packed as it is, by its offsets; or not at all.

  Args:
    method: with all that it needs.
  """
  whole = np.random.default_rng(0).standard_normal((SIDE, SIDE))
  base = jnp.asarray(whole, jnp.float32)
  merges = "yes" if _works(_dense, method, base) else "no"
  if isinstance(method, qalora.QALoRA):
    four = quantize.Quantize(format=ggml.GGML(kind="Q4_1")).pack(base)
    whole_blocks = dataclasses.replace(method, group=four.format.block)
    if _works(_offsets, whole_blocks, four):
      merges = "yes, packed too"
  packed = quantize.Quantize().pack(base)  # NF4
  return dict(
    zip(
      NAMES,
      (
        _files(method),
        "yes" if _works(_product, method, packed) else "no",
        merges,
      ),
      strict=True,
    )
  )


def _files(method: Method) -> str:
  if method.PEFT is not None:
    return "both"
  plain = type(method).exported is not Method.exported
  return "written" if plain else "-"


def _works(use: Callable[[Any], Any], method: Method, base: Any) -> bool:
  """Returns whether `use` of a fresh adapter on `base` is no error."""

  def tried(w):
    lifted = jax.tree.map(lambda x: x[None], w)
    # As many numbers as a look measures; they need not mean anything.
    seen = {PATH: jnp.eye(SIDE)}
    trained, fixed = init_adapters(
      jax.random.key(0), [PATH], method, lifted, seen
    )
    arrays = jax.tree.map(lambda x: x[0], (trained, fixed))
    return use(AdaptedTensor(w, *arrays, method=method))

  try:
    jax.eval_shape(tried, base)
  except UserError:
    return False
  return True


def _dense(leaf: AdaptedTensor) -> Any:
  return leaf.dense()


def _offsets(leaf: AdaptedTensor) -> Any:
  return qalora.merged_offsets(leaf)


def _product(leaf: AdaptedTensor) -> Any:
  """Returns the gradient by what is trained of a sum of products."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  x = jnp.ones((1, 2, SIDE))

  def total(trained):
    moved = AdaptedTensor(leaf.w, trained, leaf.fixed, method=leaf.method)
    bound = weights.with_tokens(moved, tokens)
    return weights.einsum("btd,df->btf", x, bound).sum()

  return jax.grad(total)(leaf.trained)
