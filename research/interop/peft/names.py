"""What PEFT's files call a base's modules, and an adapter's tensors.

Modules have the names of the code that PEFT is to find them in. Most models are
in transformers, under the names of `research.interop.hf.names`. LLaDA's own
code (8B, 1.5) has OLMo's: `model.transformer.blocks.0.q_proj`, `.ff_proj` for
the gate, `.ff_out`, which is the head's name, too, so that a target `ff_out`
means both. LLaDA 2's has queries, keys and values as one module, in which ours
are parts: an adapter on one of them has no name. LLaDA-MoE's and Dream's code
has the usual names. A vision language model's class has its language model
under a name of its own (`Family.language_module`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research.interop import hf
from research.interop.hf import llada, llada2
from research.interop.hf.names import EMBEDDING, HEAD
from research.interop.parts import Address
from research.interop.vision import families
from research.io import safetensors
from research.lora import wrap
from research.lora.method import MatrixSpec, Method
from research.lora.methods import tokens
from research.lora.methods.lora import KEYS
from research.nn.transformer import Transformer
from research.typing import Params, UserError

PREFIX = "base_model.model."
"""Before the name of a module, in every key of a file."""

FUSED = "query_key_value"
"""LLaDA 2's module of three; `<it>[q]` is what a part of it is called here."""


def _same(name: str) -> str:
  return name


def _llada(name: str) -> str:
  return next(iter(llada.to_llada_names({name: None})))


def _llada2(name: str) -> str:
  for theirs, ours in llada2.MODULES.items():
    name = name.replace(f".{ours}.", f".{theirs}.")
  for part in "qkv":
    fused = f".attention.{FUSED}[{part}]."
    name = name.replace(f".self_attn.{part}_proj.", fused)
  return name.replace("model.embed_tokens.", "model.word_embeddings.")


def _in_module(module: str, name: str) -> str:
  inner = name.removeprefix("model.")
  return name if inner == name else f"{module}.{inner}"


def _in_causal_model(name: str) -> str:
  return f"language_model.{name}"


@dataclasses.dataclass(frozen=True)
class Naming:
  """Names of modules.

  Attributes:
    embedding, head: of those two.
    theirs: the usual name of a tensor -> theirs.
    language: in a vision language model, what the names of the language
      model's modules begin with; empty for a language model. Its encoder has
      modules of the same names, so adapters state theirs in full.
  """

  embedding: str = EMBEDDING.removesuffix(".weight")
  head: str = HEAD.removesuffix(".weight")
  theirs: Callable[[str], str] = _same
  language: str = ""


def in_language_module(module: str) -> Naming:
  """Returns the names in a class that has its language model in `module`."""
  return Naming(
    embedding=f"{module}.embed_tokens",
    theirs=functools.partial(_in_module, module),
    language=f"{module}.",
  )


USUAL = Naming()
LLADA = Naming("model.transformer.wte", "model.transformer.ff_out", _llada)
LLADA2 = Naming("model.word_embeddings", theirs=_llada2)

LANGUAGE_MODEL = in_language_module("model.language_model")
TEXT_MODEL = in_language_module("model.text_model")
BEFORE_4_52 = Naming(
  "language_model.model.embed_tokens",
  "language_model.lm_head",
  _in_causal_model,
  "language_model.",
)
"""Of LLaVA, PaliGemma, Gemma 3 and InternVL in transformers before 4.52."""

_EMBEDDINGS = {
  n.embedding.rsplit(".", 1)[-1] for n in (USUAL, LLADA, LLADA2)
} | {
  "embed_tokens_per_layer"  # Gemma 4's, of its layers' inputs
}


def is_embedding(module: str) -> bool:
  """Returns whether adapters of a module are those of embeddings."""
  return module.rsplit(".", 1)[-1] in _EMBEDDINGS


def naming_of_config(config: Mapping[str, Any] | None) -> Naming:
  """Returns the names of the model that a config.json describes."""
  kind = config.get("model_type") if config else None
  if kind == llada2.KIND:
    return LLADA2
  if kind in llada.KINDS and not llada.is_mixture(config or {}):
    return LLADA
  if kind in families.MODULES:
    return _of_family(families.family_of(kind))
  return USUAL


def _of_family(family: families.Family) -> Naming:
  if family.language_module is None:
    raise UserError(
      f"{family.architecture}: fuses matrices that are several here, so PEFT"
      " has no name for adapters on them; merge them into the model instead"
    )
  return in_language_module(family.language_module)


def naming_of_source(source: Mapping[str, Any]) -> Naming:
  """Returns the names of a loaded model, given where it came from."""
  config, path = source.get("config"), source.get("path")
  if config is None and path is not None:
    file = pathlib.Path(path) / "config.json"
    config = safetensors.read_json(file) if file.is_file() else None
  return naming_of_config(config)


def naming_of_keys(keys: Iterable[str]) -> Naming:
  """Returns the names that an adapter's file has, in doubt the usual ones."""
  found = list(keys)
  if any(".model.transformer." in key for key in found):
    return LLADA
  if any(".attention.dense." in key or FUSED in key for key in found):
    return LLADA2
  for naming in (LANGUAGE_MODEL, TEXT_MODEL, BEFORE_4_52):
    if any(key.startswith(PREFIX + naming.language) for key in found):
      return naming
  return USUAL


def check_language_alone(
  keys: Iterable[str], naming: Naming, where: Any
) -> None:
  """Raises UserError for a tensor of an encoder's or connector's adapter.

  Those that all modules share (`Method.PEFT_SHARED`) are of none.
  """
  if not naming.language:
    return
  own = PREFIX + naming.language, f"{PREFIX}{naming.head}."
  others = sorted(
    k for k in keys if k.startswith(PREFIX) and not k.startswith(own)
  )
  if others:
    raise UserError(
      f"{where}: found {len(others)} tensors of other modules than the language"
      f" model's ({others[0]}), expected adapters of that alone: train those of"
      " encoders and connectors here, or merge them into their model with PEFT"
    )


def check_not_fused(modules: Iterable[str], where: Any) -> None:
  """Raises UserError for an adapter on what is a part of a module."""
  parts = sorted(m for m in modules if FUSED in m)
  if parts:
    raise UserError(
      f"{where}: {parts[0]}: LLaDA 2 keeps queries, keys and values in one"
      " module, so an adapter on one of them has no name; expected adapters on"
      " others (attention/o, dense layers), or merge it into the model"
    )


def to_tensors(
  module: str, method: Method, arrays: Any, size: tuple[int, int]
) -> dict[str, Any]:
  """Returns a module's tensors by their names in the file."""
  place = MatrixSpec(*size, embedding=is_embedding(module))
  return {
    key(module, name, method): x
    for name, x in method.to_peft(arrays, place).items()
  }


def key(module: str, name: str, method: Method) -> str:
  """Returns the name in the file of one tensor of a module."""
  if name in method.PEFT_SHARED:
    return f"base_model.{name}"
  return f"{PREFIX}{module}.{name}"


def shapes_of(
  module: str, method: Method, size: tuple[int, int]
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns shape and type of a module's tensors by their names in the file.

  Of the types only the kind matters: a float, or a whole number.
  """
  arrays = _started(method, MatrixSpec(*size, embedding=is_embedding(module)))
  return jax.eval_shape(
    lambda x: to_tensors(module, method, x, size), dict(arrays)
  )


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
      name, _ = rows.theirs(Address.parse(path))
    except KeyError:
      continue  # only ours has it: the time embedding
    out[path] = naming.theirs(name).removesuffix(".weight")
  return out


def tied_rows(naming: Naming = USUAL) -> list[tuple[str, str]]:
  """Returns pairs of keys: the head's rows of some tokens, the embedding's."""
  return [
    tuple(
      f"{PREFIX}{module}.{within}{tokens.KEY}"
      for module in (naming.head, naming.embedding)
    )
    for within in ("", tokens.NESTED_PREFIX)
  ]


def tied_keys(naming: Naming = USUAL) -> list[tuple[str, str]]:
  """Returns pairs of keys: the head's factors are the embedding's, turned."""
  embed, head = (
    [f"{PREFIX}{module}.{name}" for name in KEYS[embedding]]
    for module, embedding in (
      (naming.embedding, True),
      (naming.head, False),
    )
  )
  return [(head[0], embed[1]), (head[1], embed[0])]
