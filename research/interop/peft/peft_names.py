"""What PEFT's files call the tensors of an adapter."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.interop import hf
from research.interop.peft import peft_whole
from research.interop.peft.peft_naming import EMBEDDINGS, USUAL, Naming
from research.lora import wrap
from research.lora.method import MatrixSpec, Method
from research.lora.methods import tokens
from research.lora.methods.lora import KEYS
from research.nn.transformer import Transformer
from research.typing import Params


def named(
  module: str, method: Method, arrays: Any, size: tuple[int, int]
) -> dict[str, Any]:
  """Returns a module's tensors by their names in the file."""
  place = MatrixSpec(*size, embedding=module in EMBEDDINGS)
  return {
    key(module, name, method): x
    for name, x in method.to_peft(arrays, place).items()
  }


def key(module: str, name: str, method: Method) -> str:
  """Returns the name in the file of one tensor of a module."""
  if name in method.PEFT_SHARED:
    return f"base_model.{name}"
  return f"{peft_whole.PREFIX}{module}.{name}"


def shapes_of(
  module: str, method: Method, size: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and type of a module's tensors by their names in the file.

  Of the types only the kind matters: a float, or a whole number.
  """
  arrays = _started(method, MatrixSpec(*size, embedding=module in EMBEDDINGS))
  return jax.eval_shape(lambda x: named(module, method, x, size), dict(arrays))


# Modules of one size are many, and each start would be traced.
@functools.lru_cache(maxsize=256)
def _started(
  method: Method, place: MatrixSpec
) -> Mapping[str, jax.ShapeDtypeStruct]:
  def fresh():
    w = jnp.zeros((place.size_in, place.size_out))
    trained, fixed = method.init_arrays(jax.random.key(0), place, w)
    return trained | fixed

  return jax.eval_shape(fresh)


def modules(
  params: Params, model: Transformer, naming: Naming = USUAL
) -> dict[str, str]:
  """Returns the module name of each address of a matrix that has one."""
  rows, out = hf.table(model), {}
  for path in wrap.matrices(params):
    # An adapted weight that is adapted again is addressed as itself.
    try:
      name, _ = rows.theirs(peft_whole.addressed(path))
    except KeyError:
      continue  # only ours has it: what tells a model the time
    out[path] = naming.theirs(name).removesuffix(".weight")
  return out


def tied_rows(naming: Naming = USUAL) -> list[tuple[str, str]]:
  """Returns pairs of keys: the head's rows of some tokens, the embedding's."""
  return [
    tuple(
      f"{peft_whole.PREFIX}{module}.{within}{tokens.KEY}"
      for module in (naming.head, naming.embedding)
    )
    for within in ("", tokens.NESTED_PREFIX)
  ]


def tied_keys(naming: Naming = USUAL) -> list[tuple[str, str]]:
  """Returns pairs of keys: the head's factors are the embedding's, turned."""
  embed, head = (
    [f"{peft_whole.PREFIX}{module}.{name}" for name in KEYS[embedding]]
    for module, embedding in (
      (naming.embedding, True),
      (naming.head, False),
    )
  )
  return [(head[0], embed[1]), (head[1], embed[0])]
